"""The embedding-freeze study's numbers: one row per arm and sample, factors judged over paired seeds, side claims measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats

from bklm.harness.statistics import Perplexity, interval95, is_off_the_scale, with_interval
from bklm.studies.embedding_freeze.config import FACTORS, ORIGINAL_ARMS

Trials = Sequence[dict[str, Any]]

# Reported by the original: UltraChat, GPT-2 sizes, an L4, one seed. The second arm did not train the embedding.
REPORTED = {
    ("frozen", 500): {"val_ppl": 334.31, "accuracy": 0.1888, "best_epoch": 2, "train_tokens": 251_208},
    ("frozen", 1000): {"val_ppl": 280.27, "accuracy": 0.1991, "best_epoch": 2, "train_tokens": 502_498},
    ("trained", 500): {"val_ppl": 1189.15, "accuracy": 0.1158},
    ("trained", 1000): {"val_ppl": 840.46, "accuracy": 0.1303},
}
RULE = (
    20  # training tokens per trained parameter; Hoffmann et al. 2022, for models trained once over their data
)

ACTIONS = {
    "initialisation": "a pretrained instead of a random embedding",
    "freezing": "freezing the embedding instead of training it",
    "head": "a tied instead of an untied head",
}
NOUNS = {"initialisation": "pretraining", "freezing": "freezing", "head": "tying"}


def grouped(trials: Trials) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Trials by (arm, samples), seeds ascending; in the order of their first appearance."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault((trial["arm"], trial["samples"]), []).append(trial)
    return {key: sorted(group, key=lambda t: t["seed"]) for key, group in groups.items()}


def arm_table(trials: Trials) -> list[dict[str, Any]]:
    """One row per arm and sample size: means over seeds at each run's best epoch, with 95% intervals (None for one seed).

    ``gap`` is validation loss minus training loss, in nats per token; the training loss is the mean over the epoch while the
    weights were moving.
    """
    rows = []
    for (arm, samples), group in grouped(trials).items():
        perplexity = Perplexity.over_seeds([t["val_ppl"] for t in group])
        row = {
            "arm": arm, "samples": samples, "seeds": len(group), "train_tokens": group[0]["train_tokens"],
            "val_ppl": perplexity.mean, "val_ppl_low": perplexity.low, "val_ppl_high": perplexity.high,
            "val_ppl_without_unk": Perplexity.over_seeds([t["val_ppl_without_unk"] for t in group]).mean,
        }  # fmt: skip
        for name in ("accuracy", "gap", "best_epoch", "seconds"):
            row[name], row[f"{name}_95"] = interval95([t[name] for t in group])
        for name in ("parameters", "trainable_parameters", "tokens_per_parameter", "learning_rate"):
            row[name] = group[0][name]
        reported = reported_for(group[0])
        row |= {f"original_{name}": reported.get(name) for name in ("val_ppl", "accuracy")}
        rows.append(row)
    return rows


def reported_for(trial: dict[str, Any]) -> dict[str, Any]:
    """What the original reported for an arm: for its own comparison's, and for the controlled one that its "frozen" is."""
    theirs = trial["original"]
    if not theirs and (trial["initialisation"], trial["freezing"], trial["head"]) == (
        "pretrained",
        "frozen",
        "tied",
    ):
        theirs = "frozen"
    return REPORTED.get((theirs, trial["samples"]), {})


def describe_diverged(diverged: Trials) -> str:
    """One sentence, "" when there is nothing to say."""
    if not diverged:
        return ""
    listed = "; ".join(f"{t['arm']}, {t['samples']} samples, seed {t['seed']}" for t in diverged)
    rates = ", ".join(f"{rate:g}" for rate in sorted({t["learning_rate"] for t in diverged}))
    return f" Diverged, and in none of these numbers: {listed} (learning rate {rates})."


def readable(rows: Sequence[dict[str, Any]], diverged: Trials = ()) -> list[dict[str, Any]]:
    """The arm table rounded for people; what diverged below it."""
    found = [
        {
            "arm": r["arm"],
            "samples": r["samples"],
            "val PPL (95%)": str(Perplexity(r["val_ppl"], r["val_ppl_low"], r["val_ppl_high"])),
            "without <unk>": str(Perplexity(r["val_ppl_without_unk"], None, None)),
            "accuracy %": with_interval(100 * r["accuracy"], _scaled(r["accuracy_95"], 100)),
            "trained / all parameters": f"{r['trainable_parameters']:,} / {r['parameters']:,}",
            "tokens per trained": f"{r['tokens_per_parameter']:.3g}",
            "val - train, nats": with_interval(r["gap"], r["gap_95"], 2),
            "best epoch": with_interval(r["best_epoch"], r["best_epoch_95"]),
            "seconds": with_interval(r["seconds"], r["seconds_95"], 1 if r["seconds"] < 10 else 0),
            "PPL reported by the original": "-"
            if r["original_val_ppl"] is None
            else f"{r['original_val_ppl']:.1f}",
        }
        for r in rows
    ]
    return found + [
        dict.fromkeys(found[0], "-")
        | {"arm": arm, "samples": samples, "val PPL (95%)": f"diverged: {_seeds(group)}"}
        for (arm, samples), group in grouped(diverged).items()
    ]


def _seeds(group: Trials) -> str:
    return f"seed{'s' if len(group) > 1 else ''} {', '.join(str(t['seed']) for t in group)}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def effect(trials: Trials, factor: str, where: dict[str, Any] | None = None) -> Perplexity | None:
    """PPL with a factor's first value over PPL with its second, all else equal; geometric mean over what else varies.

    Paired: one value per seed, over the cells (other factors, sample sizes) that hold both values for that seed; the
    interval is over seeds, and there is none where a perplexity is off the scale. None where no cell holds both.

    Args:
        where: keeps to the cells with these values, such as {"head": "tied"}.
    """
    first, second = FACTORS[factor]
    others = [name for name in (*FACTORS, "samples") if name != factor]
    cells: dict[tuple, dict[str, float]] = {}
    for trial in trials:
        if trial["original"] or any(trial[name] != value for name, value in (where or {}).items()):
            continue
        key = (trial["seed"], *(trial[name] for name in others))
        cells.setdefault(key, {})[trial[factor]] = trial["val_ppl"]
    ratios: dict[int, list[float]] = {}
    paired = [ppl for values in cells.values() if len(values) == 2 for ppl in values.values()]
    for (seed, *_), values in cells.items():
        if len(values) == 2:
            ratios.setdefault(seed, []).append(math.log(values[first] / values[second]))
    if not ratios:
        return None
    ratio = Perplexity.over_seeds([math.exp(sum(logs) / len(logs)) for logs in ratios.values()])
    return Perplexity(ratio.mean, None, None) if any(map(is_off_the_scale, paired)) else ratio


def effect_table(trials: Trials) -> list[dict[str, Any]]:
    """Every factor's effect: over all cells, and at each value of the other factors and each sample size."""
    rows = []
    sizes = sorted({t["samples"] for t in trials})
    for factor in FACTORS:
        scopes: list[dict[str, Any]] = [{}]
        scopes += [{other: value} for other in FACTORS if other != factor for value in FACTORS[other]]
        scopes += [{"samples": size} for size in sizes if len(sizes) > 1]
        for scope in scopes:
            ratio = effect(trials, factor, scope)
            if ratio is not None:
                rows.append(
                    {
                        "factor": factor, "change": ACTIONS[factor], "where": _in_words(scope), "ratio": ratio.mean,
                        "ratio_low": ratio.low, "ratio_high": ratio.high, "verdict": verdict(ratio),
                    }
                )  # fmt: skip
    return rows


def _in_words(scope: dict[str, Any]) -> str:
    if not scope:
        return "all"
    ((name, value),) = scope.items()
    return (
        f"{value} samples"
        if name == "samples"
        else {
            "initialisation": f"{value} embedding",
            "freezing": f"{value} embedding",
            "head": f"{value} head",
        }[name]
    )


def verdict(ratio: Perplexity) -> str:
    """ "lower", "higher" or "no difference" by the 95% interval; "no verdict" without one."""
    if ratio.low is None:
        return "no verdict"
    return "lower" if ratio.high < 1 else "higher" if ratio.low > 1 else "no difference"


def readable_effects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The effects rounded for people."""
    return [
        {
            "change": r["change"],
            "where": r["where"],
            "PPL ratio (95%)": f"x{Perplexity(r['ratio'], r['ratio_low'], r['ratio_high'])}",
            "verdict": r["verdict"],
        }
        for r in rows
    ]


def state_finding(trials: Trials) -> str:
    """Whether freezing, pretraining or tying made the difference, from the paired effects and nothing else."""
    ratios = {factor: ratio for factor in FACTORS if (ratio := effect(trials, factor)) is not None}
    seeds = len({t["seed"] for t in trials})
    if not ratios:
        return "No factor was varied, so nothing can be said of freezing, pretraining or tying."
    if seeds < 2:
        listed = ", ".join(f"{ACTIONS[f]} x{r}" for f, r in ratios.items())
        return f"Validation PPL changes by: {listed}; one seed, so no interval and no verdict."
    made = [f for f in ratios if verdict(ratios[f]) in ("lower", "higher")]
    made.sort(key=lambda f: -abs(math.log(ratios[f].mean)))
    none = [f for f in ratios if verdict(ratios[f]) == "no difference"]
    unjudged = [f for f in ratios if f not in (*made, *none)]
    parts = []
    if made:
        listed = "; ".join(f"{ACTIONS[f]} gives a {verdict(ratios[f])} PPL, x{ratios[f]}" for f in made)
        parts.append(
            f"{_and(NOUNS[f] for f in made).capitalize()} made a difference over {seeds} paired seeds: {listed}"
        )
    if none:
        parts.append(
            "no difference beyond the 95% interval: " + "; ".join(f"{ACTIONS[f]}, x{ratios[f]}" for f in none)
        )
    if unjudged:
        listed = ", ".join(ACTIONS[f] for f in unjudged)
        parts.append(f"no verdict, because a perplexity is too large to be recorded: {listed}")
    sentence = "; ".join(parts)
    own = effect(trials, "freezing", {"initialisation": "pretrained", "head": "tied"})
    if own is not None:
        sentence += (
            f". A pretrained tied embedding, the original's, frozen instead of trained: x{own}, {_judged(own)}"
        )
    sentence += state_interactions(trials)
    return sentence[0].upper() + sentence[1:] + "."


def state_interactions(trials: Trials) -> str:
    """Effects that differ, beyond their intervals, with the value of another factor: where they do, a mean says little."""
    parts = []
    for factor, by in (("freezing", "head"), ("freezing", "initialisation"), ("head", "initialisation")):
        ratios = {value: effect(trials, factor, {by: value}) for value in FACTORS[by]}
        if any(ratio is None or ratio.low is None for ratio in ratios.values()):
            continue
        low, high = sorted(ratios.values(), key=lambda ratio: ratio.mean)
        if low.high < high.low and high.mean > 1.01 * low.mean:
            listed = " and ".join(
                f"x{ratio} with {_a(_in_words({by: value}))}" for value, ratio in ratios.items()
            )
            why = " (frozen and tied, the output matrix is frozen too)" if by == "head" else ""
            parts.append(f"{ACTIONS[factor]} gives {listed}{why}")
    return f". These means hide that it depends: {'; '.join(parts)}" if parts else ""


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _judged(ratio: Perplexity) -> str:
    return {"lower": "freezing is better", "higher": "freezing is worse"}.get(verdict(ratio), verdict(ratio))


def _and(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def headline(trials: Trials) -> str:
    """The finding in a figure's title."""
    words = []
    for factor in FACTORS:
        ratio = effect(trials, factor)
        if ratio is not None:
            words.append(f"{NOUNS[factor]} x{Perplexity(ratio.mean, None, None)} ({verdict(ratio)})")
    return "Effect on validation PPL: " + ", ".join(words) if words else "Validation PPL by arm"


def state_original(trials: Trials) -> str:
    """What the original's unequal comparison gives here, beside what it reported; "" where it was not run."""
    by_name = {arm.original: [t for t in trials if t["original"] == arm.original] for arm in ORIGINAL_ARMS}
    if not all(by_name.values()):
        return ""
    parts = []
    sizes = [{t["samples"] for t in by_name[name]} for name in ("frozen", "trained")]
    for samples in sorted(set.intersection(*sizes)):  # a trial that diverged is in none
        means = [
            Perplexity.over_seeds([t["val_ppl"] for t in by_name[name] if t["samples"] == samples]).mean
            for name in ("frozen", "trained")
        ]
        change = means[0] / means[1] - 1
        parts.append(f"{abs(change):.0%} {'lower' if change < 0 else 'higher'} with {samples} samples")
    if not parts:
        return ""
    return (
        f"The original's unequal comparison, repeated here: PPL of its frozen arm {_and(parts)} than of the other; "
        "reported by the original: 72% lower with 500, 67% lower with 1000."
    )


def state_rule(trials: Trials) -> str:
    """What the rule of 20 tokens per trained parameter says of these arms, and what they show."""
    controlled = arm_table([t for t in trials if not t["original"]])
    if not controlled:
        return ""
    ratios = [row["tokens_per_parameter"] for row in controlled]
    meeting = (
        f"{sum(r >= RULE for r in ratios)} of {len(ratios)} arms meet it"
        if max(ratios) >= RULE
        else "no arm meets it"
    )
    text = f"Tokens per trained parameter: {min(ratios):.2g} to {max(ratios):.2g}; the rule asks for {RULE}, so {meeting}"
    largest = [row for row in controlled if row["samples"] == max(r["samples"] for r in controlled)]
    if len({row["tokens_per_parameter"] for row in largest}) > 2:
        with_ppl, with_gap = (
            _rank_correlation(largest, "tokens_per_parameter", key) for key in ("val_ppl", "gap")
        )
        text += (
            f". With {largest[0]['samples']} samples the rank correlation over {len(largest)} arms of tokens per trained "
            f"parameter is {with_ppl:+.2f} with validation PPL and {with_gap:+.2f} with the train-validation gap "
            "(the rule would have both negative)"
        )
    return text + "."


def _rank_correlation(rows: Sequence[dict[str, Any]], one: str, other: str) -> float:
    return float(stats.spearmanr([row[one] for row in rows], [row[other] for row in rows]).statistic)
