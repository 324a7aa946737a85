"""What the originals announced of everything together, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import claim, helps, nats_in_words
from bklm.harness.statistics import Perplexity
from bklm.studies.integration.tables import FULL, KEPT, PLAIN, RIVAL

# Announced as products of targets: of steps 5 and 6, of step 7, and of all parts of the plan.
TIMES = {"10 times faster (steps 5 and 6)": 10.0, "17.5 times faster (step 7)": 17.5}
ALL_PARTS = 1e9
# Step 7's "complete success", and the words that it was trained on.
LAST_LOSS, WORDS = 22.52, 30_000
FIRST_PPL = 428.84  # of the first proof of concept, on rows that were no text in order
Rows = Sequence[Mapping[str, Any]]


def claims_table(
    steps: Rows, time: Rows, costs: Rows, shares: Mapping[str, float], table: Rows, unigram: float
) -> list[dict[str, str]]:
    """Announced, measured, verdict.

    Args:
        steps, time: verdicts at equal steps and at equal time ([]: not asked for); costs: of ``cost_rows``.
        table: rows of ``ARMS``; unigram: perplexity of the same validation tokens.
    """
    rows = []
    for words, judged in (("equal steps", steps), ("equal time", time)):
        for row in (r for r in judged if r["arm"] in (FULL, KEPT) and r["against"] == PLAIN):
            which = "all optimisations" if row["arm"] == FULL else "those that stay"
            told = f"{row['arm']} - plain: {nats_in_words(row, 3)} nats"
            rows.append(claim(f"{which} together help, at {words}", told, helps([row], row["arm"])))
    cost = next((r for r in costs if r["arm"] == FULL), None)
    for announced, times in TIMES.items():
        rows.append(_times_faster(announced, times, cost))
    bound = 1 / shares["head_time_share"]
    told = f"with everything but the head free a step would be {bound:.2f} times faster"
    rows.append(claim("a thousand million times by all parts together", told, bound >= ALL_PARTS))
    scores = {r["arm"]: r["val_ppl"] for r in table}
    if (reached := scores.get(FULL)) is not None:
        guess = math.log(WORDS)
        told = f"a uniform guess among {WORDS:,} words has {guess:.2f}; here all switches end at {math.log(reached):.2f}"
        rows.append(claim(f"a loss of {LAST_LOSS} is a complete success (step 7)", told, guess > LAST_LOSS))
        told = (
            "it was of the loss on training rows that were no text in order; here, of other words, unigram "
            f"{unigram:.1f}, full set {reached:.1f}"
        )
        rows.append(claim(f"PPL {FIRST_PPL} (first proof of concept)", told, None))
    own = [r for r in steps if r["arm"] == RIVAL]
    if own:
        better = None if own[0]["low"] is None else own[0]["low"] > 0
        told = f"GPT of equal size - full: {nats_in_words(own[0], 3)} nats"
        rows.append(claim("better than a Transformer (590 against 1288)", told, better))
    return rows


def _times_faster(announced: str, times: float, cost: Mapping[str, Any] | None) -> dict[str, str]:
    if cost is None:
        return claim(announced, "the full set diverged", None)
    if cost["ratio"] is None:
        return claim(announced, "the full set does not get to the plain loss in every seed", False)
    ratio = Perplexity(1 / cost["ratio"], *(None if e is None else 1 / e for e in (cost["high"], cost["low"])))
    told = f"the full set is at the plain loss {ratio} times as fast"
    return claim(announced, told, ratio.low >= times if ratio.is_judged else None)
