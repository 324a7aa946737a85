"""The integration study's tables: arms, switches with what their removal costs, seconds to a loss, and what stays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import bdtr

from bklm.harness.arms import nats_in_words
from bklm.harness.comparison import Column, Comparison, Trial
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.training.context_gain import gain_in_words
from bklm.training.stability import steps_to_loss

# The published operator, made causal: without a switch; and with ``OF_PLAIN``, which is what this package begins from.
NONE, PLAIN = "none", "plain"
FULL, LESS, KEPT, RIVAL = "full", "less ", "integrated", "GPT"
Rows = list[dict[str, Any]]
Row = Mapping[str, Any]
Milliseconds = Mapping[str, Sequence[float]]
"""Of an arm's steps, round by round."""

ARMS = Comparison(
    by="arm", title=str, other="other arm",
    columns=(
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        Column("learning_rate", "learning_rate", "rate"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("seconds", "seconds", "seconds", ".1f"),
    ),
)  # fmt: skip


def time_ratio(milliseconds: Milliseconds, arm: str, to: str) -> Perplexity:
    """How many times as long as ``to``'s an arm's step takes: the median over rounds in which both took a turn.

    Its interval is the sign test's, between two of the ordered ratios: one round that was disturbed moves neither end. Below
    six rounds there is none.
    """
    ratios = sorted(a / b for a, b in zip(milliseconds[arm], milliseconds[to], strict=False))
    outside = sum(bdtr(k, len(ratios), 0.5) <= 0.025 for k in range(len(ratios)))
    ends = (ratios[outside - 1], ratios[-outside]) if outside else (None, None)
    return Perplexity(statistics.median(ratios), *ends)


def steps_that_fit(milliseconds: Milliseconds, arm: str, steps: int) -> int:
    """Steps of an arm in the time of ``steps`` of the plain one."""
    return max(1, round(steps / time_ratio(milliseconds, arm, PLAIN).mean))


def switch_rows(
    switches: Mapping[str, Any],
    steps: Rows,
    time: Rows,
    milliseconds: Milliseconds,
    table: Rows,
) -> Rows:
    """One row a switch: what its removal from the full set does to loss, time and parameters, and whether it stays.

    It stays where its removal costs loss or time beyond the interval. Where it costs the one and gains the other, the loss
    at equal time decides.

    Args:
        steps, time: verdicts at equal steps and at equal time (none: []); table: rows of ``ARMS``.
    """
    counts = {row["arm"]: row["parameters"] for row in table}
    rows = []
    for name, switch in switches.items():
        arm = LESS + name
        row = {"switch": name, "study": switch.study, "on": switch.on, "off": switch.off}
        for words, verdicts in (("", steps), ("time_", time)):
            found = next((r for r in verdicts if (r["arm"], r["against"]) == (arm, FULL)), {})
            keys = {"loss_difference": "loss_difference", "low": "loss_low", "high": "loss_high"}
            row |= {words + new: found.get(old) for old, new in keys.items()}
        ratio = time_ratio(milliseconds, arm, FULL)
        row |= {"milliseconds": statistics.median(milliseconds[arm]), "ms_ratio": ratio.mean}
        row |= {"ms_ratio_low": ratio.low, "ms_ratio_high": ratio.high}
        known = None not in (counts.get(FULL), counts.get(arm))
        row["more_parameters"] = counts[FULL] - counts[arm] if known else None
        rows.append(row | dict(zip(("stays", "verdict"), _judge(row), strict=True)))
    return rows


def _judge(row: Row) -> tuple[bool | None, str]:
    """Whether a switch stays, and why."""
    if row["loss_low"] is None or row["ms_ratio_low"] is None:
        return None, "no verdict"
    worse = {"loss": row["loss_low"] > 0, "time": row["ms_ratio_low"] > 1}
    better = {"loss": row["loss_high"] < 0, "time": row["ms_ratio_high"] < 1}
    costs, gains = (" and ".join(k for k, v in found.items() if v) for found in (worse, better))
    if not costs:
        return False, f"goes: without it less {gains}" if gains else "goes: no difference"
    if not gains:
        return True, f"stays: without it more {costs}"
    if row["time_loss_low"] is None:
        return None, f"no verdict: without it more {costs}, less {gains}"
    stays = row["time_loss_low"] > 0
    return stays, f"{'stays' if stays else 'goes'}: without it more {costs}, less {gains}; at equal time " + (
        "more loss" if stays else "less loss" if row["time_loss_high"] < 0 else "no difference"
    )


def readable_switches(rows: Sequence[Row]) -> Rows:
    def time_in_words(r: Row) -> str:
        return f"x{Perplexity(r['ms_ratio'], r['ms_ratio_low'], r['ms_ratio_high'])}"

    def nats(r: Row, words: str) -> str:
        found = {
            k: r[f"{words}{k if k == 'loss_difference' else f'loss_{k}'}"]
            for k in ("loss_difference", "low", "high")
        }
        return nats_in_words(found, digits=3)

    return [
        {
            "switch": f"{r['switch']} ({r['study']})", "on": r["on"], "off": r["off"],
            "removed: loss, nats (95%)": nats(r, ""), "at equal time": nats(r, "time_"),
            "removed: time of a step (95%)": time_in_words(r), "ms": f"{r['milliseconds']:.1f}",
            "its parameters": "-" if r["more_parameters"] is None else f"{r['more_parameters']:+,.0f}",
            "verdict": r["verdict"],
        }
        for r in rows
    ]  # fmt: skip


def interaction(trials: Sequence[Trial], switches: Sequence[str]) -> dict[str, Any] | None:
    """Full set against none, in nats, less the sum of what each switch brings to the full set; over paired seeds.

    0: what they bring adds up. None where a seed of an arm diverged.
    """
    losses = {
        arm: {t["seed"]: math.log(t["val_ppl"]) for t in group} for arm, group in ARMS.groups(trials).items()
    }
    arms = [NONE, FULL, *(LESS + name for name in switches)]
    seeds = sorted({t["seed"] for t in trials})
    if any(losses.get(arm, {}).keys() != set(seeds) for arm in arms):
        return None
    whole = [losses[NONE][s] - losses[FULL][s] for s in seeds]
    single = [sum(losses[LESS + n][s] - losses[FULL][s] for n in switches) for s in seeds]
    found = {}
    for key, values in (
        ("together", whole), ("sum", single), ("interaction", [w - s for w, s in zip(whole, single, strict=True)])
    ):  # fmt: skip
        found[key], found[f"{key}_95"] = interval95(values)
    return found


def interaction_in_words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "A trial diverged: nothing is said of interactions."
    words = {k: with_interval(found[k], found[f"{k}_95"], 3) for k in ("together", "sum", "interaction")}
    return (
        f"Without any switch the loss is {words['together']} nats higher than with all; what the removal of each adds to "
        f"it sums to {words['sum']}: the interaction is {words['interaction']} nats."
    )


def cost_rows(trials: Sequence[Trial], milliseconds: Milliseconds, steps: int, first_loss: float) -> Rows:
    """Seconds to the plain arm's last loss of the same seed, one row an arm; ``steps`` lie between two scores."""
    groups = ARMS.groups(trials)
    goals = {t["seed"]: t["epochs"][-1]["val_loss"] for t in groups.get(PLAIN, [])}
    taken = {
        arm: {t["seed"]: steps_to_loss(t["epochs"], goals[t["seed"]], first_loss) for t in group if t["seed"] in goals}
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
                "arm": arm, "milliseconds": each, "reached": len(reached), "seeds": len(goals),
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


def kept_in_words(rows: Sequence[Row]) -> str:
    by = {v: [r["switch"] for r in rows if r["stays"] is v] for v in (True, False, None)}
    words = {True: "Stays", False: "Goes", None: "No verdict on"}
    return " ".join(f"{words[v]}: {', '.join(names)}." for v, names in by.items() if names)
