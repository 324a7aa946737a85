"""What the original announced of Koopman learning, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import claim, helps, nats_in_words
from bklm.harness.comparison import Trial
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.studies.koopman.tables import LONG, RECALL, long_range, ppl_ratio

CONTROLS = ("original", "mixer off", "skip", "MLP")
TERMS = ("mended", "published")
TWICE = 2.0


def claims_table(
    verdicts: Sequence[Mapping[str, Any]],
    trials: Sequence[Trial],
    linearised: Sequence[Mapping[str, Any]],
    recalled: Sequence[Trial],
    steps: Mapping[str, Sequence[float]],
    unigram: float,
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict, of the parts that were run."""
    rows = []
    terms = [name for name in dict.fromkeys(r["arm"] for r in verdicts) if name.startswith(TERMS)]
    if terms:
        found = {name: helps(verdicts, name) for name in terms}
        told = "; ".join(f"{r['arm']} - {r['against']}: {_nats(r)}" for r in verdicts if r["arm"] in terms)
        holds = True if True in found.values() else None if None in found.values() else False
        rows.append(claim("the Koopman loss makes training converge better", told, holds))
    forward = [
        t["lifting"]["koopman_ppl"]
        for t in trials
        if "koopman_ppl" in t.get("lifting", {}) and t["arm"].startswith("published")
    ]
    if forward:
        mean = Perplexity.over_seeds(forward)
        moved = max(
            t["lifting"]["koopman_moves"]
            for t in trials
            if t["arm"].startswith("published") and t["val_ppl"] is not None
        )
        words = f"PPL {mean}, unigram {unigram:.0f}; a changed token moves {moved:.0f} other positions"
        rows.append(
            claim("the Koopman forward can stand in for the blocks", words, mean.mean < unigram and moved > 0)
        )
    operators = [r for r in linearised if r["block"] == "all" and r["replacement"] not in CONTROLS]
    if operators:
        rows.append(_faster(operators))
    if recalled:
        rows += [_recurrence(recalled, steps), _far(recalled)]
    return rows


def term_in_words(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What the strongest arm with a term does beside its controls, and whether that is a help."""
    terms = [r for r in verdicts if r["arm"].startswith(TERMS)]
    if not terms or any(r["loss_difference"] is None for r in terms):
        return ""
    best = min((r for r in terms if r["against"] == "none"), key=lambda r: r["loss_difference"])["arm"]
    told = ", ".join(f"{_nats(r)} against {r['against']}" for r in terms if r["arm"] == best)
    verdict = {True: "it helps", False: "no help", None: "no verdict"}[helps(verdicts, best)]
    return f"The Koopman loss ({best}): {told}: {verdict}"


def operators_in_words(linearised: Sequence[Mapping[str, Any]]) -> str:
    """What the operator of the lowest perplexity makes of the model when it stands in for all blocks."""
    whole = {r["replacement"]: r for r in linearised if r["block"] == "all"}
    best = min((r for name, r in whole.items() if name not in CONTROLS), key=lambda r: r["val_ppl"])
    gain = best["context_gain_kept"]
    kept = (
        "and mixing brought nothing to keep" if gain is None else f"keeping {gain:.2f} of the gain from context"
    )
    return (
        f"All blocks replaced by {best['replacement']}, the best operator: PPL {whole['original']['val_ppl']:.1f} becomes "
        f"{best['val_ppl']:.1f}, {kept}"
    )


def _nats(row: Mapping[str, Any]) -> str:
    return row["verdict"] if row["loss_difference"] is None else f"{nats_in_words(row, 3)} nats"


def _faster(operators: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Faster and no worse: of one operator, not of two. Told is the one of the lowest perplexity among the fast ones."""
    announced = "blocks become linear operators, and that is 2 times faster"
    fast = [r for r in operators if r["times_faster_low"] >= TWICE]
    shown = min(fast or operators, key=lambda r: r["ppl_ratio"])
    faster = Perplexity(shown["times_faster"], shown["times_faster_low"], shown["times_faster_high"])
    told = (
        f"{shown['replacement']} in place of all blocks: a block {faster} times faster, PPL x{ppl_ratio(shown)}"
    )
    if shown["context_gain_kept"] is None:
        return claim(announced, f"{told}; nothing to linearise: the mixers bring nothing here", None)
    told += f", {shown['context_gain_kept']:.2f} of the context gain kept"
    if fast and shown["ppl_ratio_low"] is None:
        return claim(announced, told, None)
    return claim(announced, told, bool(fast) and shown["ppl_ratio_low"] <= 1)


def _recurrence(trials: Sequence[Trial], steps: Mapping[str, Sequence[float]]) -> dict[str, str]:
    announced = "a linear recurrence over positions trains 2 times faster"
    groups, to = RECALL.groups(trials), "ResNetBK"
    if not {"LinearContext", to} <= groups.keys():
        return claim(announced, "a model diverged", None)
    speed = Perplexity.over_seeds([b / a for a, b in zip(steps["LinearContext"], steps[to], strict=False)])
    ratio = RECALL.ratio(trials, "LinearContext", to)
    told = f"LinearContext's step is {speed} times as fast as {to}'s, its PPL at recall x{ratio or '-'}"
    if speed.low < TWICE:
        return claim(announced, told, False)
    return claim(announced, told, None if ratio is None or not ratio.is_judged else ratio.low <= 1)


def _far(trials: Sequence[Trial]) -> dict[str, str]:
    announced, found = "better long-range dependence", long_range(trials)
    if found is None:
        return claim(announced, f"no distance of {LONG} or more was tested on both models", None)
    mean, half = found
    groups = RECALL.groups(trials)
    told = f"recall at {LONG} and more, LinearContext - NewLLM: {with_interval(100 * mean, half and 100 * half, 1)} points; "
    told += ", ".join(
        f"{name} {_at(group)}" for name, group in groups.items() if name in ("LinearContext", "NewLLM")
    )
    return claim(announced, told, None if half is None else mean - half > 0)


def _at(group: Sequence[Trial]) -> str:
    far = [d for d in group[0]["recall"] if int(d) >= LONG]
    return ", ".join(f"{interval95([t['recall'][d] for t in group])[0]:.0%} at {d}" for d in far)
