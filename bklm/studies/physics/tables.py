"""The physics study's tables: arms, energies, steps and seconds to a loss, stability, memory."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial, same
from bklm.harness.statistics import FEWEST_SEEDS, Perplexity, interval95
from bklm.training.context_gain import gain_in_words
from bklm.training.energy_drift import mean_or_none, over_spread
from bklm.training.stability import largest_rate, steps_to_loss

PLAIN = "plain"
CONSERVED, COLLAPSED = 0.1, 0.1  # drift over spread; spread over its first value
ROUNDS = 9  # of timing steps
WIDEST = 1000.0  # an interval's higher end over its lower: beyond, seeds differ so much that their mean tells nothing
# Nets that learn beside a model which no term touches, and pairs without the structure, come to a low drift, too.
ENERGY_CONTROLS = {
    "published": ("shuffled",), "apart": ("apart-shuffled",), "mended": ("detached", "mended-placebo"),
}  # fmt: skip
Rows = list[dict[str, Any]]


def _highest_norm(group: Sequence[Trial]) -> float:
    return interval95([max(e["gradient_norm_99"] for e in t["epochs"]) for t in group])[0]


def _rate_in_words(row: Mapping[str, Any]) -> str:
    rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
    return f"{rate}, at the edge" if row.get("at_edge") else rate


ARMS = Comparison(
    by="arm", title=str, other="other arm",
    columns=(
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        Column("learning_rate", "learning_rate", "rate", _rate_in_words),
        Column("at_edge", same("at_edge")),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("gradient_norm_99", _highest_norm, "99% gradient norm", ".3g"),
        Column("embedding_norm", "embedding_norm", "embedding size", ".3f"),
        Column("seconds", "seconds"),
    ),
)  # fmt: skip
LOSSES, BLOCKS = (dataclasses.replace(ARMS, other=words) for words in ("other term", "other block"))


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
        row |= _interval("ratio", _over_seeds(list(ratios[arm].values())))
        # A published energy begins when the model has learned a while: from there on its spread is its own doing.
        begun = [t["energy"]["trace"][0] for t in group if t["energy"].get("trace")]
        row["first_spread"] = interval95([r["spread"] for r in begun])[0] if begun else first[arm]["spread"]
        row["first_ratio"] = first[arm]["ratio"]
        if begun:
            row["first_ratio"] = mean_or_none([over_spread(r["drift"], r["spread"]) for r in begun])
        shares = [t["energy"]["shares"][0]["gradient_share"] for t in group if t["energy"].get("shares")]
        row["first_share"] = interval95(shares)[0] if shares else None
        row["spread_kept"] = over_spread(row["spread"], row["first_spread"])
        controls = {c: _paired(ratios[arm], ratios.get(c, {})) for c in ENERGY_CONTROLS.get(arm, ())}
        # The hardest one to be below: of those without an interval none can be.
        hardest = max(
            controls,
            key=lambda c: math.inf if controls[c].interval[1] is None else controls[c].high,
            default="",
        )
        row |= {"control": hardest} | _interval("over_control", controls.get(hardest, NOTHING))
        rows.append(row | {"conserves": _conserves(row)})
    return rows


NOTHING = Perplexity(None, None, None)


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


def _interval(name: str, found: Perplexity) -> dict[str, float | None]:
    low, high = found.interval
    return {name: found.mean, f"{name}_low": low, f"{name}_high": high}


def _conserves(row: Mapping[str, Any]) -> str:
    if any(row["arm"] in controls for controls in ENERGY_CONTROLS.values()):
        return "a control"
    if row["seeds"] < FEWEST_SEEDS:
        return "no verdict"
    if row["ratio"] is None or row["spread_kept"] is None or row["spread_kept"] < COLLAPSED:
        return "no: collapsed"
    if row["ratio_high"] >= CONSERVED:
        return "no: it drifts"
    if row["control"] and row["over_control_high"] is None:
        return "no verdict"
    if row["control"] and row["over_control_high"] >= 1:
        return f"no: {row['control']} drifts as little"
    return "yes"


def kept_in_words(share: float | None) -> str:
    """ "42% of the first", "57 times the first" or "-": a spread at the end."""
    if share is None:
        return "-"
    return f"{share:.0%} of the first" if share < 2 else f"{share:.{int(share < 10)}f} times the first"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def words_of(row: Mapping[str, Any], name: str) -> str:
    """A ratio with its interval; "-" where there is none, "no ratio" where its interval is wider than any ratio means."""
    mean, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if mean is None:
        return "-"
    return "no ratio" if low is not None and high > WIDEST * low else str(Perplexity(mean, low, high))


def readable_energies(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"],
            "drift / spread, at first": _number(r["first_ratio"]),
            "at the end (95%)": words_of(r, "ratio"),
            "over its control's (95%)": f"{words_of(r, 'over_control')}, {r['control']}" if r["control"] else "-",
            "spread at the end": kept_in_words(r["spread_kept"]),
            "conserves": r["conserves"],
            "share of the gradient, first / last": f"{_number(r['first_share'])} / {_number(r['gradient_share'])}",
            "drift / spread with the drive": _number(r["work"]),
            "inverse's error": _number(r["inverse_error"], ".0e"),
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


def step_rows(
    trials: Sequence[Trial],
    arms: Mapping[str, Any],
    steps: int,
    first_loss: float,
    times: Mapping[str, Sequence[float]],
) -> Rows:
    """Steps and seconds to the plain model's last loss of the same seed, and paired ratios against every control.

    Args:
        arms: with ``against``; the first is the plain one.
        steps: of one recorded epoch.
        times: milliseconds of a step by arm, in rounds that all arms took turns in.
    """
    groups, target = ARMS.groups(trials), next(iter(arms))
    goals = {t["seed"]: t["epochs"][-1]["val_loss"] for t in groups.get(target, [])}
    taken = {
        arm: {t["seed"]: steps_to_loss(t["epochs"], goals[t["seed"]], first_loss) for t in groups[arm] if t["seed"] in goals}
        for arm in arms if arm in groups
    }  # fmt: skip
    rows = []
    for arm, found in taken.items():
        reached = [n for n in found.values() if n is not None]
        row = {"arm": arm, "reached": len(reached), "seeds": len(goals), "ms": statistics.median(times[arm])}
        row["steps"] = steps * interval95(reached)[0] if reached and len(reached) == len(goals) else None
        row["seconds_to_loss"] = row["steps"] and 1e-3 * row["steps"] * row["ms"]
        for control in arms[arm].against or ((target,) if arm != target else ("-",)):
            other = taken.get(control, {})
            pairs = [(found.get(s), other.get(s)) for s in goals]
            known = bool(pairs) and all(n is not None and m for n, m in pairs)
            ratio = Perplexity.over_seeds([max(n, 1e-9) / m for n, m in pairs]) if known else NOTHING
            (low, high), slower = ratio.interval, _times_slower(times, arm, control) if known else NOTHING
            seconds = NOTHING
            if known:
                ends = (None, None) if low is None else (low * slower.low, high * slower.high)
                seconds = Perplexity(ratio.mean * slower.mean, *ends)
            row |= {"against": control, "ratio": ratio.mean, "low": low, "high": high, "ms_ratio": slower.mean}
            rows.append(row | _interval("seconds_ratio", seconds))
    return rows


def _times_slower(times: Mapping[str, Sequence[float]], arm: str, control: str) -> Perplexity:
    """Median ratio of the steps' times over the rounds; its ends are the second from below and from above of nine rounds or
    more, which hold the median with 96%, whatever disturbs a round, and the outermost of fewer."""
    ratios = sorted(own / other for own, other in zip(times[arm], times[control], strict=False))
    out = int(len(ratios) >= ROUNDS)
    return Perplexity(statistics.median(ratios), ratios[out], ratios[-1 - out])


def readable_steps(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"], "seeds that get there": f"{r['reached']} of {r['seeds']}",
            "steps to the plain model's loss": _number(r["steps"], ",.0f"), "ms a step": _number(r["ms"], ".1f"),
            "seconds": _number(r["seconds_to_loss"], ",.1f"), "against": r["against"],
            "steps over its (95%)": words_of({**r, "ratio_low": r["low"], "ratio_high": r["high"]}, "ratio"),
            "seconds over its (95%)": words_of(r, "seconds_ratio"),
        }
        for r in rows
    ]  # fmt: skip


def stability_rows(trials: Sequence[Trial], untrained: Mapping[str, Mapping[str, float]]) -> Rows:
    """Per arm the largest stable rate. ``untrained``: by arm and seed (as a word) the loss before the first step."""
    found: dict[str, dict[float, list[tuple[float | None, float]]]] = {}
    for t in trials:
        last = None if t["val_ppl"] is None else t["epochs"][-1]["val_loss"]
        seeds = found.setdefault(t["arm"], {}).setdefault(t["learning_rate"], [])
        seeds.append((last, untrained[t["arm"]][str(t["seed"])]))
    rows = []
    for arm, losses in found.items():
        most, stayed = largest_rate(losses)
        row = {
            "arm": arm,
            "largest_rate": most,
            "at_edge": most == max(losses),
            "seeds": len(next(iter(losses.values()))),
        }
        rows.append(row | {f"stayed_{rate:g}": count for rate, count in stayed.items()})
    return rows


def readable_stability(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {"arm": r["arm"]}
        | {f"rate {k[7:]}": f"{v} of {r['seeds']}" for k, v in r.items() if k.startswith("stayed_")}
        | {"largest stable rate": largest_in_words(r)}
        for r in rows
    ]


def largest_in_words(row: Mapping[str, Any]) -> str:
    return (
        "none"
        if row["largest_rate"] is None
        else f"{row['largest_rate']:g}{', the largest tried' * row['at_edge']}"
    )


def readable_memory(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {"blocks": r["way"]}
        | {f"{k[6:]} layers, MB": "-" if v is None else f"{v / 1e6:.1f}" for k, v in r.items() if k.startswith("bytes_")}
        | {"deepest / shallowest": "-" if r["growth"] is None else f"{r['growth']:.2f}"}
        for r in rows
    ]  # fmt: skip


def growth(by_layers: Mapping[int, int | None]) -> float | None:
    """Memory at the largest depth over that at the smallest; None for one depth, or where one could not be measured."""
    low, high = by_layers[min(by_layers)], by_layers[max(by_layers)]
    return high / low if low and high and len(by_layers) > 1 else None


def nearest_decay(trials: Sequence[Trial], size: float) -> float | None:
    """The weight decay whose plain models' embeddings came nearest to a size, by ratio; None where all diverged."""
    groups = Comparison(by="decay", title=str).groups(trials)
    means = {d: interval95([math.log(t["embedding_norm"]) for t in group])[0] for d, group in groups.items()}
    return min(means, key=lambda d: abs(means[d] - math.log(size)), default=None)
