"""Whether an energy is conserved: its drift against its spread, beside what its controls come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import NOT_SHOWN
from bklm.harness.comparison import Trial
from bklm.harness.statistics import FEWEST_SEEDS, Perplexity, interval95
from bklm.studies.physics.tables import ARMS, NOTHING, Rows, interval_of, number, words_of
from bklm.training.energy_drift import mean_or_none, over_spread

CONSERVED, COLLAPSED = 0.1, 0.1  # drift over spread; spread over its first value
DETACHED = "detached"
# Nets that learn beside a model which no term touches, and pairs without the structure, come to a low drift, too.
ENERGY_CONTROLS = {
    "published": ("shuffled",), "apart": ("apart-shuffled",), "mended": (DETACHED, "mended-placebo"),
}  # fmt: skip


def energy_rows(trials: Sequence[Trial], first: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row per arm with an energy: does it drift, does it still tell states apart, and what does it take of the clip?

    Args:
        first: per arm the same measures of its untrained model of the first seed.
    """
    groups = {arm: group for arm, group in ARMS.groups(trials).items() if arm in first}
    ratios = {arm: {t["seed"]: t["energy"]["ratio"] for t in group} for arm, group in groups.items()}
    rows = []
    for arm, group in groups.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(group)}
        for key in ("drift", "spread", "gradient_share", "work", "inverse_error"):
            values = [t["energy"].get(key) for t in group]
            row[key] = None if None in values else interval95(values)[0]
        row |= interval_of("ratio", _over_seeds(list(ratios[arm].values())))
        # A published energy begins when the model has learned a while: from there on its spread is its own doing.
        begun = [t["energy"]["trace"][0] for t in group if t["energy"].get("trace")]
        row["first_spread"] = interval95([r["spread"] for r in begun])[0] if begun else first[arm]["spread"]
        row["first_ratio"] = first[arm]["ratio"]
        if begun:
            row["first_ratio"] = mean_or_none([over_spread(r["drift"], r["spread"]) for r in begun])
        shares = [t["energy"]["shares"][0]["gradient_share"] for t in group if t["energy"].get("shares")]
        row["first_share"] = interval95(shares)[0] if shares else None
        row["spread_kept"] = over_spread(row["spread"], row["first_spread"])
        # An energy of untrained nets on small embeddings tells next to nothing apart: it must also stay near what the same
        # nets find in a model that does not hear of them.
        beside = DETACHED in ENERGY_CONTROLS.get(arm, ()) and DETACHED in groups
        row["spread_of_detached"] = over_spread(row["spread"], _spread(groups[DETACHED])) if beside else None
        controls = {c: _paired(ratios[arm], ratios.get(c, {})) for c in ENERGY_CONTROLS.get(arm, ())}
        hardest = max(controls, key=lambda c: _hard(controls[c]), default="")
        row |= {"control": hardest} | interval_of("over_control", controls.get(hardest, NOTHING))
        rows.append(row | {"conserves": _conserves(row)})
    return rows


def _spread(group: Sequence[Trial]) -> float:
    return interval95([t["energy"]["spread"] for t in group])[0]


def _hard(found: Perplexity) -> tuple[bool, float]:
    """How hard a control is to be below, by the arm's drift over its own: most of all one that is shown to drift no more, then
    one without an interval, then by the interval's upper end."""
    low, high = found.interval
    return low is not None and low >= 1, math.inf if high is None else high


def _over_seeds(values: Sequence[float | None]) -> Perplexity:
    """Mean of positive numbers and its interval, as of perplexities; ``NOTHING`` where one is missing."""
    return NOTHING if not values or None in values else Perplexity.over_seeds([max(v, 1e-12) for v in values])


def _paired(own: Mapping[int, float | None], other: Mapping[int, float | None]) -> Perplexity:
    pairs = [(own[seed], other.get(seed)) for seed in own]
    return (
        NOTHING
        if any(None in pair for pair in pairs)
        else _over_seeds([max(a, 1e-12) / max(b, 1e-12) for a, b in pairs])
    )


def _conserves(row: Mapping[str, Any]) -> str:
    if any(row["arm"] in controls for controls in ENERGY_CONTROLS.values()):
        return "a control"
    if row["seeds"] < FEWEST_SEEDS:
        return "no verdict"
    kept = [row["spread_kept"], row["spread_of_detached"]]
    if (
        row["ratio"] is None
        or kept[0] is None
        or any(share is not None and share < COLLAPSED for share in kept)
    ):
        return "no: collapsed"
    if row["ratio_low"] >= CONSERVED:
        return "no: it drifts"
    if row["ratio_high"] >= CONSERVED:
        return f"{NOT_SHOWN} to drift by less than {CONSERVED:.0%} of its spread"
    if not row["control"]:
        return "yes"
    if row["over_control_high"] is None:
        return "no verdict"
    if row["over_control_low"] >= 1:
        return f"no: {row['control']} drifts no more"
    return "yes" if row["over_control_high"] < 1 else f"{NOT_SHOWN} to drift less than {row['control']}"


def kept_in_words(share: float | None) -> str:
    """ "42% of the first", "57 times the first" or "-": a spread at the end."""
    if share is None:
        return "-"
    return f"{share:.0%} of the first" if share < 2 else f"{share:.{int(share < 10)}f} times the first"


def spread_in_words(row: Mapping[str, Any]) -> str:
    """ "319 times the first, 113% of detached's"."""
    beside = row.get("spread_of_detached")
    return kept_in_words(row["spread_kept"]) + ("" if beside is None else f", {beside:.0%} of {DETACHED}'s")


def readable_energies(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"],
            "drift / spread, at first": number(r["first_ratio"]),
            "at the end (95%)": words_of(r, "ratio"),
            "over its control's (95%)": f"{words_of(r, 'over_control')}, {r['control']}" if r["control"] else "-",
            "spread at the end": spread_in_words(r),
            "conserves": r["conserves"],
            "share of the gradient, first / last": f"{number(r['first_share'])} / {number(r['gradient_share'])}",
            "drift / spread with the drive": number(r["work"]),
            "inverse's error": number(r["inverse_error"], ".0e"),
        }
        for r in rows
    ]  # fmt: skip


def trace_rows(trials: Sequence[Trial]) -> Rows:
    """What was logged of every energy over its training: a row per arm, seed and step; shares have rows of their own."""
    return [
        {"arm": t["arm"], "seed": t["seed"], **row}
        for t in ARMS.finished(trials)
        for key in ("trace", "shares")
        for row in t["energy"].get(key, ())
    ]
