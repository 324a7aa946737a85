"""What the original announced of Koopman learning, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import NOT_SHOWN, Holds, all_hold, any_holds, claim, helps, is_below, nats_in_words
from bklm.harness.comparison import Trial
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.studies.koopman.tables import (
    ARMS,
    CONTROLS,
    LINEAR,
    LONG,
    RECALL,
    has_learned,
    kept_in_words,
    long_range,
    ratio_of,
)

TERMS = ("mended", "published")
TWICE = 2.0
NO_WORSE = 1.01  # a ratio of perplexities, by its interval's upper end
GATED = "LinearContext"  # a recurrence whose gate reads the input

Rows = Sequence[Mapping[str, Any]]


def claims_table(
    verdicts: Rows,
    equal_seconds: Rows,
    trials: Sequence[Trial],
    linearised: Rows,
    recalled: Sequence[Trial],
    steps: Mapping[str, Sequence[float]],
    unigram: float,
    chance: float,
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict, of the parts that were run.

    Args:
        equal_seconds: rows of ``at_equal_seconds``; steps: seconds of a training step at recall, by model.
        unigram: its perplexity; chance: of a right answer at recall.
    """
    rows = []
    if terms := _terms(verdicts):
        announced, many = "the Koopman loss makes training converge better", _at_once(verdicts)
        told = "; ".join(f"{r['arm']} - {r['against']}: {_nats(r)}" for r in verdicts if r["arm"] in terms)
        rows.append(claim(announced, told + many, any_holds(helps(verdicts, name) for name in terms)))
        if equal_seconds:
            step = ratio_of(equal_seconds[0], "step_ratio")
            told = "; ".join(f"{r['arm']} - none: {_nats(r)}" for r in equal_seconds)
            better = any_holds(
                all_hold((helps(verdicts, r["arm"]), helps([r], r["arm"]))) for r in equal_seconds
            )
            rows.append(
                claim(
                    f"{announced} in the same time", f"a step takes {step} times as long; {told}{many}", better
                )
            )
    if forward := [
        t for t in ARMS.finished(trials) if "koopman_ppl" in t["lifting"] and t["arm"].startswith("published")
    ]:
        mean = Perplexity.over_seeds([t["lifting"]["koopman_ppl"] for t in forward])
        moved = max(t["lifting"]["koopman_moves"] for t in forward)
        told = f"PPL {mean}, unigram {unigram:.0f}; a changed token moves {moved:.0f} other positions"
        rows.append(
            claim(
                "the Koopman forward can stand in for the blocks",
                told,
                all_hold((is_below(*mean.interval, unigram), moved > 0)),
            )
        )
    if operators := [r for r in linearised if r["block"] == "all" and r["replacement"] not in CONTROLS]:
        rows.append(_faster(operators))
    if recalled:
        rows += [_recurrence(recalled, steps)] + [_far(recalled, chance, name) for name in (LINEAR, GATED)]
    return rows


def _terms(verdicts: Rows) -> list[str]:
    return [name for name in dict.fromkeys(r["arm"] for r in verdicts) if name.startswith(TERMS)]


def _at_once(verdicts: Rows) -> str:
    many = max(int(r.get("any_of") or 1) for r in verdicts)
    return f"; intervals for {many} weights at once, of which any may help" if many > 1 else ""


def _nats(row: Mapping[str, Any]) -> str:
    return row["verdict"] if row["loss_difference"] is None else f"{nats_in_words(row, 3)} nats"


def term_in_words(verdicts: Rows) -> str:
    """What the strongest arm with a term does beside its controls, and whether that is a help."""
    terms = [r for r in verdicts if r["arm"] in _terms(verdicts)]
    if not terms or any(r["loss_difference"] is None for r in terms):
        return ""
    best = min((r for r in terms if r["against"] == "none"), key=lambda r: r["loss_difference"])["arm"]
    told = ", ".join(f"{_nats(r)} against {r['against']}" for r in terms if r["arm"] == best)
    words = {True: "it helps", False: "no help", NOT_SHOWN: "no help is shown", None: "no verdict"}
    verdict = words[helps(verdicts, best)]
    return f"The Koopman loss ({best}): {told}: {verdict}"


def operators_in_words(linearised: Rows, tokens: int) -> str:
    """What the operator of the lowest perplexity makes of the model when it stands in for all blocks, on so many tokens
    (0: all)."""
    whole = {r["replacement"]: r for r in linearised if r["block"] == "all"}
    best = min((r for name, r in whole.items() if name not in CONTROLS), key=lambda r: r["val_ppl"])
    scored = f"the first {tokens:,}" if tokens else "all"
    return (
        f"All blocks replaced by {best['replacement']}, the best operator: PPL {whole['original']['val_ppl']:.1f} becomes "
        f"{best['val_ppl']:.1f} ({scored} validation tokens); gain from context kept: {kept_in_words(best)}"
    )


def _faster(operators: Rows) -> dict[str, str]:
    """Faster and no worse: of one operator, not of two. Told is the one of the lowest perplexity among the fast ones."""
    announced = "blocks become linear operators, and that is 2 times faster"
    fast = [r for r in operators if r["times_faster_low"] >= TWICE]
    shown = min(fast or operators, key=lambda r: r["ppl_ratio"])
    told = "of the operators 2 times faster, that of the lowest perplexity: " if fast else ""
    told += f"{shown['replacement']} in place of all blocks: a block {ratio_of(shown, 'times_faster')} times faster, a "
    told += f"forward to logits {ratio_of(shown, 'forward_times_faster')}, PPL x{ratio_of(shown, 'ppl_ratio')}"
    if shown["context_gain_kept"] is None:
        return claim(announced, f"{told}; nothing to linearise: the mixers bring nothing here", None)
    told += f", context gain kept: {kept_in_words(shown)}"
    if not fast:
        # One whose interval holds 2 may be.
        return claim(announced, told, any_holds(_is_twice(ratio_of(r, "times_faster")) for r in operators))
    # What keeps none of the gain from context stands in for no block that reads.
    kept, half = shown["context_gain_kept"], shown["context_gain_kept_95"] or 0.0
    # A wide interval is no proof of "no worse".
    no_worse = is_below(shown["ppl_ratio_low"], shown["ppl_ratio_high"], NO_WORSE)
    return claim(announced, told, all_hold((no_worse, is_below(-kept - half, half - kept))))


def _recurrence(trials: Sequence[Trial], steps: Mapping[str, Sequence[float]]) -> dict[str, str]:
    announced = "a linear recurrence over positions trains 2 times faster"
    groups, to = RECALL.groups(trials), "ResNetBK"
    if not {LINEAR, to} <= groups.keys():
        return claim(announced, "a model diverged", None)
    speed = Perplexity.over_seeds([b / a for a, b in zip(steps[LINEAR], steps[to], strict=False)])
    ratio = RECALL.ratio(trials, LINEAR, to)
    told = f"a step of the {LINEAR} is {speed} times as fast as {to}'s (95% over rounds), its PPL at recall x{ratio or '-'}"
    no_worse = None if ratio is None else is_below(*ratio.interval, NO_WORSE)
    return claim(announced, told, all_hold((_is_twice(speed), no_worse)))


def _is_twice(speed: Perplexity) -> Holds:
    """Whether times as fast are 2 or more, beyond the interval."""
    low, high = speed.interval
    return None if low is None else is_below(-high, -low, -TWICE)


def _far(trials: Sequence[Trial], chance: float, model: str) -> dict[str, str]:
    """Beside a model that never learned the task nothing is said of distance, nor of one that did not."""
    rival, found = "NewLLM", long_range(trials, model)
    announced = f"better long-range dependence: {'linear' if model == LINEAR else 'gated'} recurrence ({model})"
    groups = RECALL.groups(trials)
    if lost := [name for name in (model, rival) if name not in groups]:
        return claim(announced, f"diverged with every seed: {', '.join(lost)}", None)
    if found is None:
        return claim(announced, f"no distance of {LONG} or more was tested on both models", None)
    mean, half = found
    told = f"recall at {LONG} and more, {model} - {rival}: {with_interval(100 * mean, half and 100 * half, 1)} points; "
    told += ", ".join(f"{name} {_at(group)}" for name, group in groups.items() if name in (model, rival))
    idle = [name for name in (model, rival) if not has_learned(groups[name], chance)]
    if half is not None and idle:
        shortest = min(groups[rival][0]["recall"], key=int)
        told += f"; not above chance ({chance:.0%}) at {shortest}, so that it never learned the task: {', '.join(idle)}"
        return claim(announced, told, None)
    return claim(announced, told, None if half is None else is_below(-mean - half, half - mean))


def _at(group: Sequence[Trial]) -> str:
    # The shortest one first: what is not remembered there is no matter of range.
    far = [d for d in group[0]["recall"] if int(d) >= LONG or d == min(group[0]["recall"], key=int)]
    return ", ".join(f"{interval95([t['recall'][d] for t in group])[0]:.0%} at {d}" for d in far)
