"""What the original announced of physics-informed learning, beside what was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bklm.harness.arms import NOT_SHOWN, all_hold, any_holds, claim, helps, is_below, nats_in_words
from bklm.harness.statistics import FEWEST_SEEDS
from bklm.studies.physics.energies import spread_in_words
from bklm.studies.physics.tables import Rows, largest_in_words, words_of
from bklm.training.context_gain import gain_in_words

CLAIMED = ("published", "apart", "mended")  # terms any of which makes the first claim hold
MEMORY = 1.3  # of the deepest over that of the shallowest


def claims_table(
    found: Mapping[str, Rows], gains: Mapping[str, float | None], at_edge: Collection[str] = ()
) -> Rows:
    """Announced, measured, verdict.

    Args:
        found: rows of "verdicts", "block_verdicts", "equal_seconds", "energies", "steps", "stability" and "memory".
        gains: share by which context lowers the perplexity, by arm.
        at_edge: arms whose best learning rate is the smallest or largest that was tried.
    """
    rows, terms = [], found["verdicts"]
    better = {arm: helps(terms, arm) for arm in CLAIMED if any(r["arm"] == arm for r in terms)}
    if better:
        several = f" (intervals for {len(better)} terms at once, as any of them would do)" * (len(better) > 1)
        told = (
            _differences(terms, *better) + several + _edges([r for r in terms if r["arm"] in better], at_edge)
        )
        rows.append(claim("the energy term improves generalisation", told, any_holds(better.values())))
    blocks = found["block_verdicts"]
    if blocks:
        holds, own = helps(blocks, "conservative"), [r for r in blocks if r["arm"] == "conservative"]
        beaten = [r["against"] for r in own if holds is not True and (r["high"] or 0) < 0]
        told = f"lower than {', '.join(beaten)}, but not than all: " * bool(beaten) + _differences(
            own, "conservative"
        )
        told += f"; gain from context {gain_in_words(gains['conservative'])}, "
        told += ", ".join(
            f"{r['against']}'s {gain_in_words(gains[r['against']])}" for r in own if r["against"] in gains
        )
        announced = "conservative blocks reach a lower perplexity"
        rows.append(claim(announced, told + _edges(own, at_edge), holds))
        if timed := [r for r in found["equal_seconds"] if r["arm"] == "conservative"]:
            step = "; ".join(f"{words_of(r, 'step_ratio')} times as long as {r['against']}'s" for r in timed)
            told = f"a step takes {step}; {_differences(timed, 'conservative')}"
            rows.append(
                claim(f"{announced} in the same time", told, all_hold((holds, helps(timed, "conservative"))))
            )
    rows += [_conserved(r) for r in found["energies"] if r["arm"] in (*CLAIMED, "conservative")]
    for arm in ("published", "mended", "conservative"):
        if own := [r for r in found["steps"] if r["arm"] == arm]:
            rows.append(_faster(arm, own, found["steps"]))
    rows += _steadier(found["stability"])
    growths = {r["way"]: r["growth"] for r in found["memory"] if r["growth"] is not None}
    if growths:
        told = f"deepest over shallowest (no growth: {MEMORY:g} at most): "
        told += ", ".join(f"{way} {times:.2f}" for way, times in growths.items())
        own = growths.get("leapfrog, reversible")
        rows.append(claim("memory does not grow with depth", told, None if own is None else own <= MEMORY))
    return rows


def _differences(rows: Rows, *arms: str) -> str:
    return "; ".join(f"{r['arm']} - {r['against']}: {nats_in_words(r)} nats" for r in rows if r["arm"] in arms)


def _edges(rows: Rows, at_edge: Collection[str]) -> str:
    """A search that ended at its edge might have gone on, of an arm or of its control."""
    there = [
        name for name in dict.fromkeys(n for r in rows for n in (r["arm"], r["against"])) if name in at_edge
    ]
    return f"; best rate at the edge of those tried: {', '.join(there)}" if there else ""


def _conserved(row: Mapping[str, Any]) -> dict[str, str]:
    """Of one energy: little drift, no collapse, and less drift than where nothing was asked of the model."""
    told = f"drift / spread {words_of(row, 'ratio')}, spread {spread_in_words(row)}"
    told += f"; over {row['control']}'s {words_of(row, 'over_control')}" if row["control"] else ""
    told += f"; with the causal drive {row['work']:.2f}" if row["work"] is not None else ""
    which = row["arm"] if row["work"] is None else f"{row['arm']}, drive off"
    words = row["conserves"]
    holds = (
        True if words == "yes" else None if words == "no verdict" else words.startswith(NOT_SHOWN) and NOT_SHOWN
    )
    return claim(f"energy is conserved: {which}", told, holds)


def _faster(arm: str, own: Rows, steps: Rows) -> dict[str, str]:
    """Of one arm: fewer steps and fewer seconds than each control takes."""
    there = {r["arm"]: f"{r['reached']} of {r['seeds']}" for r in steps}
    told = "; ".join(
        f"over {r['against']}'s no ratio, it gets there in {there[arm]} seeds, that in {there.get(r['against'], 'none')}"
        if r["ratio"] is None else
        f"over {r['against']}'s steps {words_of({**r, 'ratio_low': r['low'], 'ratio_high': r['high']}, 'ratio')}, "
        f"seconds {words_of(r, 'seconds_ratio')}"
        for r in own
    )  # fmt: skip
    announced = f"faster convergence, steps and seconds: {arm}"
    if own[0]["seeds"] < FEWEST_SEEDS:
        return claim(announced, told, None)
    # One that always gets there where a control does not is beyond what a ratio can say.
    ends = (("low", "high"), ("seconds_ratio_low", "seconds_ratio_high"))
    faster = [is_below(r[low], r[high], 1.0) for r in own for low, high in ends]
    return claim(announced, told, all_hold([*faster, *(False for r in own if r["reached"] < r["seeds"])]))


def _steadier(rows: Rows) -> Rows:
    """Whether conservative blocks stay stable at a larger rate than every kind of plain model; of three seeds or more."""
    if not rows:
        return []
    rates = {r["arm"]: r["largest_rate"] or 0.0 for r in rows}
    told = "largest rate: " + ", ".join(f"{r['arm']} {largest_in_words(r)}" for r in rows)
    best = max((r for r in rows if r["arm"] != "conservative"), key=lambda r: rates[r["arm"]])
    is_higher = rates["conservative"] > rates[best["arm"]]
    # Of two that are stable at the largest rate tried nobody knows which breaks first.
    both_at_edge = best["at_edge"] and rates["conservative"] == rates[best["arm"]]
    enough = min(r["seeds"] for r in rows) >= FEWEST_SEEDS and not both_at_edge
    return [claim("more stable than the plain model, all clipped", told, is_higher if enough else None)]


def claims_in_words(claims: Sequence[Mapping[str, str]]) -> str:
    """Which of the announced things were found here."""
    by = {
        v: [c["announced"] for c in claims if c["verdict"] == v]
        for v in ("holds", "does not hold", NOT_SHOWN, "no verdict")
    }
    words = {
        "holds": "Found here",
        "does not hold": "Not so",
        NOT_SHOWN: "Not shown",
        "no verdict": "Undecided",
    }
    return "".join(f" {words[v]}: {'; '.join(names)}." for v, names in by.items() if names)
