"""The physics study's tables: arms, energies, steps and seconds to a loss, stability, memory."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial, same
from bklm.harness.statistics import Perplexity, interval95
from bklm.harness.step_times import at_equal_seconds
from bklm.training.context_gain import gain_in_words
from bklm.training.stability import largest_rate, steps_to_loss

PLAIN = "plain"
ROUNDS = 9  # of timing steps
WIDEST = 1000.0  # an interval's higher end over its lower: beyond, seeds differ so much that their mean tells nothing
Rows = list[dict[str, Any]]
NOTHING = Perplexity(None, None, None)


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


def interval_of(name: str, found: Perplexity) -> dict[str, float | None]:
    low, high = found.interval
    return {name: found.mean, f"{name}_low": low, f"{name}_high": high}


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def words_of(row: Mapping[str, Any], name: str) -> str:
    """A ratio with its interval; "-" where there is none, "no ratio" where its interval is wider than any ratio means."""
    mean, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if mean is None:
        return "-"
    return "no ratio" if low is not None and high > WIDEST * low else str(Perplexity(mean, low, high))


def step_rows(
    trials: Sequence[Trial],
    arms: Mapping[str, Any],
    steps: int,
    first_loss: float,
    times: Mapping[str, Sequence[float]],
    late: Mapping[str, int] | None = None,
) -> Rows:
    """Steps and seconds to the plain model's last loss of the same seed, and paired ratios against every control.

    Args:
        arms: with ``against``; the first is the plain one.
        steps: of one recorded epoch.
        times: milliseconds of a step by arm, in rounds that all arms took turns in.
        late: of arms whose term sets in later, the steps before, which are the plain model's.
    """
    late = late or {}
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
        row["seconds_to_loss"] = row["steps"] and 1e-3 * row["steps"] * _step_until(
            row["steps"], arm, target, times, late
        )
        # A control whose step was not timed is one of losses alone.
        controls = [control for control in arms[arm].against if control in times]
        for control in controls or ((target,) if arm != target else ("-",)):
            other = taken.get(control, {})
            pairs = [(found.get(s), other.get(s)) for s in goals]
            known = bool(pairs) and all(n is not None and m for n, m in pairs)
            ratio = Perplexity.over_seeds([max(n, 1e-9) / m for n, m in pairs]) if known else NOTHING
            (low, high), slower = ratio.interval, _times_slower(times, arm, control) if known else NOTHING
            if known:
                means = [interval95(values)[0] for values in zip(*pairs, strict=True)]
                own, its = (
                    _step_until(steps * n, name, target, times, late) / statistics.median(times[name])
                    for name, n in zip((arm, control), means, strict=True)
                )
                slower = Perplexity(*(getattr(slower, end) * own / its for end in ("mean", "low", "high")))
            seconds = NOTHING
            if known:
                ends = (None, None) if low is None else (low * slower.low, high * slower.high)
                seconds = Perplexity(ratio.mean * slower.mean, *ends)
            row |= {"against": control, "ratio": ratio.mean, "low": low, "high": high, "ms_ratio": slower.mean}
            rows.append(row | interval_of("seconds_ratio", seconds))
    return rows


def _step_until(
    steps: float, arm: str, plain: str, times: Mapping[str, Sequence[float]], late: Mapping[str, int]
) -> float:
    """Milliseconds of an arm's mean step over its first ``steps``, of which those before its term sets in are ``plain``'s."""
    own, before = statistics.median(times[arm]), min(1.0, late.get(arm, 0) / max(steps, 1e-9))
    return before * statistics.median(times[plain]) + (1 - before) * own


def _times_slower(times: Mapping[str, Sequence[float]], arm: str, control: str) -> Perplexity:
    """Median ratio of the steps' times over the rounds; its ends are the second from below and from above of nine rounds or
    more, which hold the median with 96%, whatever disturbs a round, and the outermost of fewer."""
    ratios = sorted(own / other for own, other in zip(times[arm], times[control], strict=False))
    out = int(len(ratios) >= ROUNDS)
    return Perplexity(statistics.median(ratios), ratios[out], ratios[-1 - out])


def with_detached(
    part: str, own: list[Trial], arms: Mapping[str, dict[str, Any]], trials: list[Trial]
) -> tuple[list[Trial], dict[str, Any]]:
    """A part's trials and arms; of the blocks with *detached* as a control where it is the plain model at another rate."""
    detached = arms.get("losses", {}).get("detached")
    if part != "blocks" or detached is None or detached.same_as:
        return own, arms[part]
    beside = [t for t in trials if t["arm"] == "detached"]
    added = {
        name: dataclasses.replace(arm, against=(*arm.against, "detached")) if PLAIN in arm.against else arm
        for name, arm in arms[part].items()
    }
    return own + beside, added


def equal_seconds_rows(
    trials: Sequence[Trial], arms: Mapping[str, Any], times: Mapping[str, Sequence[float]], schedule: str
) -> Rows:
    """Validation losses of arms whose step takes longer, and of their controls, when both have trained as long; none where the
    learning rate falls, of which no earlier moment is a shorter training."""
    groups = ARMS.groups(trials)
    return [
        {"arm": arm, "against": control}
        | at_equal_seconds(
            groups[arm], groups[control], [a / b for a, b in zip(times[arm], times[control], strict=False)]
        )
        for arm, own in arms.items()
        for control in own.against
        if schedule == "constant" and {arm, control} <= groups.keys() & times.keys()
    ]


def readable_steps(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"], "seeds that get there": f"{r['reached']} of {r['seeds']}",
            "steps to the plain model's loss": number(r["steps"], ",.0f"), "ms a step": number(r["ms"], ".1f"),
            "seconds": number(r["seconds_to_loss"], ",.1f"), "against": r["against"],
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


def size_in_words(trials: Sequence[Trial], tried: Sequence[float]) -> str:
    """The published arm's embedding beside that of the plain model whose weight decay came nearest."""
    sizes = {
        arm: interval95([t["embedding_norm"] for t in group])[0] for arm, group in ARMS.groups(trials).items()
    }
    whole = [arm for arm, group in ARMS.groups(trials).items() if arm.startswith("decay-") and len(group) > 1]
    if not whole or "published" not in sizes:
        return ""
    edge = f", the largest tried, and {PLAIN} has" if whole[0] == f"decay-{max(tried):g}" else f"; {PLAIN} has"
    return (
        f"The published term leaves an embedding of size {sizes['published']:.3f}, a weight decay of {whole[0][6:]} one of "
        f"{sizes[whole[0]]:.3f}{edge} {sizes[PLAIN]:.3f}."
    )


def nearest_decay(trials: Sequence[Trial], size: float) -> float | None:
    """The weight decay whose plain models' embeddings came nearest to a size, by ratio; None where all diverged."""
    groups = Comparison(by="decay", title=str).groups(trials)
    means = {d: interval95([math.log(t["embedding_norm"]) for t in group])[0] for d, group in groups.items()}
    return min(means, key=lambda d: abs(means[d] - math.log(size)), default=None)
