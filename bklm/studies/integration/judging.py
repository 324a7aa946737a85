"""What the removal of a switch does to loss, time, bytes and parameters, and whether it stays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bklm.harness.arms import Arm, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.statistics import times_wider
from bklm.studies.integration.switches import OF_PLAIN, SWITCHES, removed
from bklm.studies.integration.tables import (
    ARMS,
    FULL,
    LESS,
    NONE,
    PLACEBO,
    PLAIN,
    Milliseconds,
    Row,
    Rows,
    time_ratio,
)

# A smaller change is no reason to keep a switch: in nats, and in logarithms of ratios.
LEAST = {"loss": 0.0, "time": math.log(1.02), "bytes": math.log(1.02)}
# What time or bytes may not be bought with, in nats: a loss that may be lower without the switch by more than this.
HARM = math.log(1.02)
ROUNDING = 0.01  # nats, by which losses that differ in rounding alone may come apart over a training
SAME = "the same but for rounding"
NOWHERE = dict.fromkeys(("loss_difference", "low", "high"))


def left_out(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By switch the arm without it, and the arm that differs from that by it alone; a switch that others need goes with them,
    and so is compared with the arm that lacks those, and, in a row of them together, with the full set."""
    found = {}
    for name in names:
        group = removed(name)
        less = [LESS + " and ".join(part) for part in (group, group[1:])]
        found[name] = (less[0], less[1] if group[1:] else FULL)
        found[" and ".join(group)] = (less[0], FULL)
    return found


def steps_that_fit(milliseconds: Milliseconds, arm: str, steps: int) -> int:
    """Steps of an arm in the time of ``steps`` of the plain one."""
    return max(1, round(steps / time_ratio(milliseconds, arm, PLAIN).mean))


def known_as(kept: Collection[str]) -> str | None:
    """The arm that has these switches, of those that are trained first."""
    known = {frozenset(SWITCHES): FULL, OF_PLAIN: PLAIN, frozenset(): NONE}
    for name in SWITCHES:
        known[frozenset(SWITCHES) - set(removed(name))] = next(iter(left_out([name]).values()))[0]
    return known.get(frozenset(kept))


def portions_that_fit(fit: int, scores: int) -> tuple[int, int]:
    """Steps from one score to the next, and scores, of about ``fit`` steps: as many of ``scores`` as leave what they miss
    within the time that counts for nothing, or the nearest."""
    options = [(max(1, round(fit / n)), n) for n in range(scores, 0, -1)]
    missed = {option: abs(math.log(option[0] * option[1] / fit)) for option in options}
    return next(
        (option for option in options if missed[option] <= LEAST["time"]), min(options, key=missed.__getitem__)
    )


def judged(trials: Sequence[Trial], arms: Mapping[str, Arm], unigram: float) -> Rows:
    """Verdicts on pairs of which both were trained; those on left-out switches hold for all of them at once. An arm is no
    better than another where its perplexity is not below unigram's."""
    less = {n: a for n, a in arms.items() if n.startswith(LESS)}
    made = verdicts(ARMS, trials, {n: a for n, a in arms.items() if n not in less})
    made += verdicts(ARMS, trials, less, any_of=sum(len(a.against) for a in less.values()) or 1)
    by, present = ARMS.groups(trials), {t["arm"] for t in trials}
    rows = [row for row in made if {row["arm"], row["against"]} <= present]
    for row in rows:
        both = [by[n] for n in (row["arm"], row["against"]) if n in by]
        if arms[row["arm"]].same_as and len(both) == 2:
            curves = [{t["seed"]: [e["val_loss"] for e in t["epochs"]] for t in group} for group in both]
            # At the first score: later ones come apart in rounding alone, as trainings do.
            shared = curves[0].keys() & curves[1].keys()
            worst = max((abs(curves[0][s][0] - curves[1][s][0]) for s in shared), default=math.inf)
            row["verdict"] = (
                f"{SAME if worst < ROUNDING else 'NOT the same'}: by up to {worst:.1g} nats at the first score"
            )
        elif row["low"] is not None and all(ARMS.perplexity(g).mean >= unigram for g in both):
            row |= {"low": None, "high": None, "verdict": "neither is below unigram: no verdict"}
    return rows


def switch_rows(
    switches: Mapping[str, Any], steps: Rows, time: Rows, milliseconds: Milliseconds, table: Rows
) -> Rows:
    """One row a switch, and one of those that go together.

    A switch stays where its removal costs loss, time or bytes beyond the interval, which is one for all switches at once in
    each of the three, and time and bytes by more than 2%; or where without it a seed diverges. Where time or bytes are all
    that its removal costs, the loss must be shown not to be lower without it by 2% of perplexity or more, by the switch's own
    95% interval: a wide one is no proof that it does no harm. Where its removal costs the one and gains the other, the loss at
    equal time decides, and where that shows no difference the bytes. A term must also beat its placebo, if trained.

    Args:
        steps, time: of ``judged`` at equal steps and at equal time (none: []); table: rows of ``ARMS``.
    """
    by = {row["arm"]: row for row in table}
    verdict, at_equal_time = ({(r["arm"], r["against"]): r for r in found} for found in (steps, time))
    pairs, rows = left_out(switches), []
    any_of = sum(not (s := switches.get(label)) or not (s.same_step or s.untimed) for label in pairs)
    for label, pair in pairs.items():
        switch = switches.get(label) or switches[label.split(" and ")[0]]._replace(on="both", off="neither")
        without, base = (by[name] for name in pair)
        row = {"switch": label, "arm": pair[0], "against": pair[1], "any_of": any_of, **switch._asdict()}
        for words, found in (("", verdict), ("time_", at_equal_time)):
            own = found.get(pair, NOWHERE)
            row |= {words + (k if k == "loss_difference" else f"loss_{k}"): own[k] for k in NOWHERE}
        row["loss_low_alone"] = _alone(verdict.get(pair), without.get("seeds"))
        ratio = time_ratio(milliseconds, *pair, any_of or 1)
        row |= {"milliseconds": statistics.median(milliseconds[pair[0]]), "ms_ratio": ratio.mean}
        row |= {"ms_ratio_low": ratio.low, "ms_ratio_high": ratio.high}
        row["same_loss"] = switch.same_loss and verdict.get(pair, {}).get("verdict", "").startswith(SAME)
        known = all(r.get("parameters") for r in (without, base))
        row["more_parameters"] = base["parameters"] - without["parameters"] if known else None
        row["bytes_ratio"] = without["bytes"] / base["bytes"] if known else None
        row["diverged"] = bool(without["diverged"]) and not base["diverged"]
        row |= dict(zip(("stays", "trade", "verdict"), _judge(row), strict=True))
        placebo = verdict.get((PLACEBO + label, FULL))
        if row["stays"] and placebo and placebo["low"] is None:
            row |= {"stays": None, "verdict": "no verdict: its placebo has none"}
        elif row["stays"] and placebo and placebo["low"] <= 0:
            row |= {"stays": False, "verdict": "goes: not shown to be better than its placebo"}
        rows.append(row)
    return rows


def _alone(found: Mapping[str, Any] | None, seeds: int | None) -> float | None:
    """The lower end of a difference's own 95% interval, where ``found`` has that for several at once."""
    if not found or found["low"] is None:
        return None
    wider = times_wider(seeds, found["any_of"]) if seeds and found.get("any_of") else 1.0
    return found["loss_difference"] - (found["loss_difference"] - found["low"]) / wider


def _judge(row: Row) -> tuple[bool | None, bool, str]:
    """Whether a switch stays, whether its removal costs the one and gains the other, and why."""
    if row["diverged"]:
        return True, False, "stays: without it a seed diverged"
    ratios = {"time": (row["ms_ratio_low"], row["ms_ratio_high"]), "bytes": (row["bytes_ratio"],) * 2}
    changes = {k: tuple(e and math.log(e) for e in ends) for k, ends in ratios.items()}
    changes["loss"] = (row["loss_low"], row["loss_high"])
    untimed = row["same_step"] or row["untimed"]
    changes |= {k: (0.0, 0.0) for k, same in (("loss", row["same_loss"]), ("time", untimed)) if same}
    if any(low is None for low, _ in changes.values()):
        return None, False, "no verdict"
    costs = " and ".join(k for k, least in LEAST.items() if changes[k][0] > least)
    gains = " and ".join(k for k, least in LEAST.items() if changes[k][1] < -least)
    if not costs:
        return (
            False,
            False,
            f"goes: without it less {gains}" if gains else "goes: no cost of its removal is shown",
        )
    if not gains:
        if "loss" not in costs and not row["same_loss"] and row["loss_low_alone"] <= -HARM:
            return None, False, f"no verdict: without it more {costs}, and not shown that the loss is not lower"
        return True, False, f"stays: without it more {costs}"
    if row["time_loss_low"] is None:
        return None, True, f"no verdict: without it more {costs}, less {gains}"
    worse, better = row["time_loss_low"] > 0, row["time_loss_high"] < 0
    stays = worse or (not better and "bytes" in costs)
    words = f"{'stays' if stays else 'goes'}: without it more {costs}, less {gains}; at equal time "
    return stays, True, words + ("more loss" if worse else "less loss" if better else "no difference is shown")
