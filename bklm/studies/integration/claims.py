"""What the originals announced of everything together, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import claim, is_below, nats_in_words
from bklm.harness.statistics import Perplexity
from bklm.studies.integration.tables import FULL, KEPT, NONE, PLAIN

# Announced as products of targets: of steps 5 and 6, and of step 7.
TIMES = {"10 times faster (steps 5 and 6)": 10.0, "17.5 times faster (step 7)": 17.5}
FIRST_PPL = 428.84  # of the first proof of concept, on rows that were no text in order
Rows = Sequence[Mapping[str, Any]]


def claims_table(steps: Rows, time: Rows, costs: Rows, table: Rows, unigram: float) -> list[dict[str, str]]:
    """Announced, measured, verdict.

    Args:
        steps, time: verdicts at equal steps and at equal time ([]: not asked for); costs, table: rows of each arm.
        unigram: perplexity of the same validation tokens.
    """
    rows, by = [], {row["arm"]: row for row in table}
    for words, judged in (("equal steps", steps), ("equal time", time)):
        for row in (r for r in judged if r["arm"] in (FULL, KEPT) and r["against"] in (PLAIN, NONE)):
            beside = "" if row["against"] == PLAIN else ", beside none of them"
            which, helped = "all optimisations", is_below(row["low"], row["high"])
            told = f"{row['arm']} - {row['against']}: {nats_in_words(row, 3)} nats"
            told += _sizes(by, row["arm"], row["against"])
            if row["arm"] == KEPT:
                # Chosen by these seeds on this text, it is flattered by them: it can fail here, and not be shown.
                which, helped = "those that stay", None if helped is True else helped
                told += "; chosen and measured on the same seeds and text"
            rows.append(claim(f"{which} together help, at {words}{beside}", told, helped))
    cost = next((r for r in costs if r["arm"] == FULL), None)
    for announced, times in TIMES.items():
        rows.append(_times_faster(announced, times, cost))
    if (reached := by.get(FULL, {}).get("val_ppl")) is not None:
        told = (
            "it was of the loss on training rows that were no text in order; here, of other words, unigram "
            f"{unigram:.1f}, full set {reached:.1f}"
        )
        rows.append(claim(f"PPL {FIRST_PPL} (first proof of concept)", told, None))
    told = "not asked here: study 03 compares both on test text, of equal size and with equal search"
    rows.append(claim("better than a Transformer (590 against 1288)", told, None))
    return rows


def _sizes(by: Mapping[str, Mapping[str, Any]], arm: str, against: str) -> str:
    """ "; parameters that reach the logits 2,196,608 and 3,870,000", or "" where one is not known."""
    found = [by.get(name, {}).get("logit_parameters") for name in (arm, against)]
    return "" if None in found else "; parameters that reach the logits {:,.0f} and {:,.0f}".format(*found)


def _times_faster(announced: str, times: float, cost: Mapping[str, Any] | None) -> dict[str, str]:
    if cost is None:
        return claim(announced, "the full set diverged", None)
    if cost["ratio"] is None:
        return claim(announced, "the full set does not get to the plain loss in every seed", False)
    ratio = Perplexity(1 / cost["ratio"], *(None if e is None else 1 / e for e in (cost["high"], cost["low"])))
    told = f"the full set is at the plain loss {ratio} times as fast"
    return claim(announced, told, is_below(cost["low"], cost["high"], 1 / times))
