"""The integration study's tables: arms, switches with what their removal costs, seconds to a loss, and what stays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.special import bdtr

from bklm.harness.arms import nats_in_words
from bklm.harness.comparison import Column, Comparison, Trial, same
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.studies.integration.switches import NEEDS, OF_PLAIN, removed, with_needed
from bklm.training.context_gain import gain_in_words
from bklm.training.stability import steps_to_loss

# The published operator with 4 heads and dense layers, causal, without clamps: no switch; and with ``OF_PLAIN``.
NONE, PLAIN = "none", "plain"
FULL, LESS, KEPT, PLACEBO = "full", "less ", "integrated", "placebo "
Rows = list[dict[str, Any]]
Row = Mapping[str, Any]
Milliseconds = Mapping[str, Sequence[float]]
"""Of an arm's steps, round by round."""

ARMS = Comparison(
    by="arm", title=str, other="other arm",
    columns=(
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        Column("learning_rate", same("learning_rate"), "rate"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("logit_parameters", "logit_parameters", "of the logits", ",.0f"),
        Column("bytes", "bytes", "bytes of its file", ",.0f"),
        Column("seconds", "seconds", "seconds", ".1f"),
    ),
)  # fmt: skip


def time_ratio(milliseconds: Milliseconds, arm: str, to: str, any_of: int = 1) -> Perplexity:
    """How many times as long as ``to``'s an arm's step takes: the median over rounds in which both took a turn.

    Its interval is the sign test's, between two of the ordered ratios: one round that was disturbed moves neither end. Below
    six rounds there is none. ``any_of``: as for ``verdicts``.
    """
    ratios = sorted(a / b for a, b in zip(milliseconds[arm], milliseconds[to], strict=False))
    outside = sum(bdtr(k, len(ratios), 0.5) <= 0.025 / any_of for k in range(len(ratios)))
    ends = (ratios[outside - 1], ratios[-outside]) if outside else (None, None)
    return Perplexity(statistics.median(ratios), *ends)


def at_once(verdicts: Sequence[Row]) -> int:
    """How many intervals of losses hold at once, of those with a switch left out."""
    return max((r["any_of"] for r in verdicts if r["arm"].startswith(LESS)), default=1)


def readable_switches(rows: Sequence[Row], verdicts: Sequence[Row]) -> Rows:
    """Rows of ``switch_rows`` in words; ``verdicts``: of ``judged`` at equal steps."""

    def time_in_words(r: Row) -> str:
        ratio = f"x{Perplexity(r['ms_ratio'], r['ms_ratio_low'], r['ms_ratio_high'])}"
        return (
            "the same step" if r["same_step"] else f"{ratio}, the kernel's as well" if r["untimed"] else ratio
        )

    def nats(r: Row, words: str) -> str:
        found = {
            k: r[f"{words}{k if k == 'loss_difference' else f'loss_{k}'}"]
            for k in ("loss_difference", "low", "high")
        }
        return nats_in_words(found, digits=3)

    all_at_once = f"(95% for {at_once(verdicts)} at once)"
    return [
        {
            "switch": f"{r['switch']} ({r['study']})", "on": r["on"], "off": r["off"],
            f"removed: loss, nats {all_at_once}": "the same" if r["same_loss"] else nats(r, ""),
            "at equal time": nats(r, "time_"),
            "removed: time of a step": time_in_words(r), "ms without it": f"{r['milliseconds']:.1f}",
            "removed: bytes": f"x{r['bytes_ratio']:.2f}" if r["bytes_ratio"] else "-",
            "its parameters": "-" if r["more_parameters"] is None else f"{r['more_parameters']:+,.0f}",
            "verdict": r["verdict"],
        }
        for r in rows
    ]  # fmt: skip


def interaction(trials: Sequence[Trial], switches: Iterable[str]) -> dict[str, Any] | None:
    """Plain less full set, in nats, less the sum of what the removal of each switch that plain lacks does to the full set;
    over paired seeds. A switch that needs another counts with that one, once.

    0: what they bring adds up. None where a seed of an arm diverged.
    """
    less = [LESS + " and ".join(removed(n)) for n in switches if n not in OF_PLAIN and n not in NEEDS]
    groups = ARMS.groups([t for t in trials if t["arm"] in (PLAIN, FULL, *less)])
    losses = {arm: {t["seed"]: math.log(t["val_ppl"]) for t in group} for arm, group in groups.items()}
    seeds = sorted({t["seed"] for t in trials})
    if any(losses.get(arm, {}).keys() != set(seeds) for arm in (PLAIN, FULL, *less)):
        return None
    whole = [losses[PLAIN][s] - losses[FULL][s] for s in seeds]
    single = [sum(losses[arm][s] - losses[FULL][s] for arm in less) for s in seeds]
    both = [w - s for w, s in zip(whole, single, strict=True)]
    found = {}
    for key, values in (("together", whole), ("sum", single), ("interaction", both)):
        found[key], found[f"{key}_95"] = interval95(values)
    return found


def interaction_in_words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "A trial diverged: nothing is said of interactions."
    words = {k: with_interval(found[k], found[f"{k}_95"], 3) for k in ("together", "sum", "interaction")}
    return (
        f"Loss of plain less that of full: {words['together']} nats; what each removal adds to full's sums to {words['sum']}; "
        f"the interaction is {words['interaction']} nats."
    )


def rates_in_words(rows: Sequence[Row], tried: Sequence[float]) -> str:
    """Which arms found their best rate at an edge of those tried, so that a better one may lie beyond; "" where none did."""
    edge = [r["arm"] for r in rows if r["learning_rate"] in (min(tried), max(tried))] if len(tried) > 1 else []
    ends = f"{min(tried):g} or {max(tried):g}"
    return f"Best rate at an edge of those tried ({ends}): {', '.join(edge)}." if edge else ""


def realised_in_words(timed: Sequence[Trial]) -> str:
    """What the trainings at equal time took over what the plain arm's took, means over seeds; "" without any."""
    spent = {arm: statistics.mean(t["seconds"] for t in group) for arm, group in ARMS.groups(timed).items()}
    words = ", ".join(f"{a} {s / spent[PLAIN]:.2f}" for a, s in spent.items() if a != PLAIN and PLAIN in spent)
    return f"Seconds of training at equal time, over the plain arm's: {words}." if words else ""


def cost_rows(
    trials: Sequence[Trial], milliseconds: Milliseconds, steps: int, first: Mapping[str, Mapping[str, float]]
) -> Rows:
    """Seconds to the plain arm's last loss of the same seed, one row a timed arm; ``steps`` lie between two scores, and
    ``first`` are losses before the first step by arm and seed (as a word)."""
    groups = {arm: group for arm, group in ARMS.groups(trials).items() if arm in milliseconds}
    goals = {t["seed"]: t["epochs"][-1]["val_loss"] for t in groups.get(PLAIN, [])}
    taken = {
        arm: {
            t["seed"]: steps_to_loss(t["epochs"], goals[t["seed"]], first[arm][str(t["seed"])])
            for t in group if t["seed"] in goals
        }
        for arm, group in groups.items()
    }  # fmt: skip
    rows = []
    for arm, found in taken.items():
        reached = [n for n in found.values() if n is not None]
        whole = bool(goals) and len(reached) == len(goals)
        time = time_ratio(milliseconds, arm, PLAIN)
        ratio = Perplexity(None, None, None)
        if whole and len(taken[PLAIN]) == len(goals):
            # Steps differ from seed to seed and milliseconds from round to round: the ends of both together are no narrower
            # than the interval of the product.
            ratio = Perplexity.over_seeds([max(found[s], 1e-9) / taken[PLAIN][s] for s in goals])
            ends = [
                None if e is None or t is None else e * t
                for e, t in zip(ratio.interval, (time.low, time.high), strict=True)
            ]
            ratio = Perplexity(ratio.mean * time.mean, *ends)
        each = statistics.median(milliseconds[arm])
        rows.append(
            {
                "arm": arm, "milliseconds": each, "reached": len(reached), "seeds": len(found),
                "steps": steps * interval95(reached)[0] if whole else None,
                "seconds": steps * interval95(reached)[0] * each / 1e3 if whole else None,
                "ratio": ratio.mean, "low": ratio.low, "high": ratio.high,
            }
        )  # fmt: skip
    return rows


def readable_costs(rows: Sequence[Row]) -> Rows:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        {
            "arm": r["arm"], "ms a step": f"{r['milliseconds']:.1f}", "seeds there": f"{r['reached']} of {r['seeds']}",
            "steps to the plain loss": number(r["steps"], ",.0f"), "seconds": number(r["seconds"], ".2f"),
            "seconds over the plain arm's (95%)": str(Perplexity(r["ratio"], r["low"], r["high"])) if r["ratio"] else "-",
        }
        for r in rows
    ]  # fmt: skip


def costs_in_words(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """ "Seconds to the plain loss: plain 0.43, full 0.67, GPT not in every seed"."""
    shown = [r for r in rows if r["arm"] in arms]
    words = (
        f"{r['arm']} {'not in every seed' if r['seconds'] is None else format(r['seconds'], '.3g')}"
        for r in shown
    )
    return f"Seconds to the plain loss: {', '.join(words)}"


def shares_in_words(shares: Mapping[str, float]) -> str:
    """Amdahl's two shares of the plain arm, and what they bound."""
    outer, head = shares["outer_parameter_share"], shares["head_time_share"]
    return (
        f"Embedding and head hold {outer:.1%} of the plain arm's parameters, the head takes {head:.1%} of a training step: "
        f"were everything else free, it would be {1 / outer:.2f} times smaller, and {1 / head:.2f} times faster."
    )


def kept_names(rows: Sequence[Row]) -> frozenset[str]:
    """The switches that stay: each for itself, those of a pair of which only the two together show that they are needed, and
    what these need."""
    names = {r["switch"] for r in rows if r["stays"] and " and " not in r["switch"]}
    for row in (r for r in rows if r["stays"] and " and " in r["switch"]):
        pair = set(row["switch"].split(" and "))
        names |= set() if pair & names else pair
    return with_needed(names)


def kept_in_words(rows: Sequence[Row]) -> str:
    kept, rows = kept_names(rows), [r for r in rows if " and " not in r["switch"]]
    needed = [r["switch"] for r in rows if r["switch"] in kept and not r["stays"]]
    by = {
        v: [r["switch"] for r in rows if r["stays"] is v and r["switch"] not in needed]
        for v in (True, False, None)
    }
    by[True] += [f"{name} (as one of a pair)" for name in needed]
    by[False] = [f"{r['switch']} ({_short(r['verdict'])})" for r in rows if r["switch"] in by[False]]
    words = {True: "Stays", False: "Goes", None: "No verdict on"}
    return " ".join(f"{words[v]}: {', '.join(names)}." for v, names in by.items() if names)


def _short(verdict: str) -> str:
    """Why a switch goes: "goes: without it more loss, less time; at equal time less loss" is "less loss at equal time"."""
    cause, _, decided = verdict.partition("; at equal time ")
    return f"{decided} at equal time" if decided else cause.removeprefix("goes: ").removeprefix("without it ")
