"""The embedding-freeze study's numbers: one row per arm and sample, each factor's effect over paired seeds, phase 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bklm.harness import text
from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean, same
from bklm.harness.statistics import Perplexity, is_off_the_scale, with_interval
from bklm.studies.embedding_freeze.config import FACTORS, ORIGINAL_ARMS, PHASE1_ARMS, Arm
from bklm.training.context_gain import gain_in_words

# Reported by the original: UltraChat, GPT-2 sizes, an L4, one seed. The second arm did not train the embedding.
REPORTED = {
    ("frozen", 500): {"val_ppl": 334.31, "accuracy": 0.1888, "best_epoch": 2, "train_tokens": 251_208},
    ("frozen", 1000): {"val_ppl": 280.27, "accuracy": 0.1991, "best_epoch": 2, "train_tokens": 502_498},
    ("trained", 500): {"val_ppl": 1189.15, "accuracy": 0.1158},
    ("trained", 1000): {"val_ppl": 840.46, "accuracy": 0.1303},
}
# The arms that they are about: its own comparison's, and the controlled one that its "frozen" is.
ABOUT = {
    "frozen": (ORIGINAL_ARMS[0].name, Arm("pretrained", "frozen", "tied").name),
    "trained": (ORIGINAL_ARMS[1].name,),
}

ACTIONS = {
    "initialisation": "a pretrained instead of a random embedding",
    "freezing": "freezing the embedding instead of training it",
    "head": "a tied instead of an untied head",
}


def _mean(key: str, digits: int | None = 1, factor: float = 1) -> Callable[[dict[str, Any]], str]:
    """ "20.1 ± 0.3": a mean with its interval; "-" where every seed diverged. Without digits, one below 10 and none above."""

    def words(row: dict[str, Any]) -> str:
        if not row["seeds"]:
            return "-"
        mean, half = factor * row[key], row[f"{key}_95"]
        shown = int(mean < 10) if digits is None else digits
        return with_interval(mean, None if half is None else factor * half, shown)

    return words


# Each value of the factor is (arm, samples); ``in_cells`` makes trials fit.
ARMS = Comparison(
    by="arm",
    title=lambda cell: f"{cell[0]}, {cell[1]} samples",
    short=lambda cell: cell[0],
    other="other arm",
    columns=(
        Column("train_tokens", same("train_tokens")),
        Column(
            "val_ppl_without_unk", geometric_mean("val_ppl_without_unk"), "without <unk>",
            lambda row: str(Perplexity(row["val_ppl_without_unk"], None, None)) if row["seeds"] else "-",
        ),
        Column("accuracy", "val_accuracy", "accuracy %", _mean("accuracy", factor=100), spread=True),
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        Column("parameters", same("parameters")),
        Column(
            "trainable_parameters", same("trainable_parameters"), "trained / all parameters",
            lambda row: f"{row['trainable_parameters']:,} / {row['parameters']:,}" if row["seeds"] else "-",
        ),
        Column("tokens_per_parameter", same("tokens_per_parameter"), "tokens per trained", ".3g"),
        Column("gap", "gap", "val - train, nats", _mean("gap", 2), spread=True),
        Column("best_epoch", "best_epoch", "best epoch", _mean("best_epoch"), spread=True),
        Column("seconds", "seconds", "seconds", _mean("seconds", None), spread=True),
        Column("learning_rate", same("learning_rate")),
        Column(
            "", "", "PPL reported by the original",
            lambda row: "-" if row["original_val_ppl"] is None else f"{row['original_val_ppl']:.1f}",
        ),
    ),
    reported={(arm, samples): row for (about, samples), row in REPORTED.items() for arm in ABOUT[about]},
    reported_columns=("val_ppl", "accuracy"),
)  # fmt: skip


def in_cells(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials as ``ARMS`` compares them: an arm with two samples counts as two."""
    return [{**trial, "arm": (trial["arm"], trial["samples"])} for trial in trials]


def arm_table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per arm and sample size: means over seeds at each run's best epoch, with 95% intervals (None for one seed).

    ``gap`` is validation loss minus training loss, in nats per token; the training loss is the mean over the epoch while the
    weights were moving. Where every seed diverged, what was to be measured is None.
    """
    rows = []
    for row in ARMS.rows(in_cells(trials)):
        arm, samples = row.pop("arm")
        rows.append({"arm": arm, "samples": samples, **row})
    return rows


def readable_arms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm and sample size, its means with intervals as words."""
    told = ARMS.readable(in_cells(rows))
    return [
        {"arm": words["arm"], "samples": row["samples"], **words} for row, words in zip(rows, told, strict=True)
    ]


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The first finished seed of the best controlled arm and sample; of the original's arms where no other finished."""
    candidates = in_cells([t for t in trials if not t["original"]])
    if not ARMS.finished(candidates):
        candidates = in_cells(trials)
    cell = ARMS.best(candidates)
    seed = ARMS.groups(candidates)[cell][0]["seed"]
    return next(t for t in trials if (t["arm"], t["samples"], t["seed"]) == (*cell, seed))


def paired(
    trials: Sequence[Trial], factor: str, where: Mapping[str, Any] | None = None
) -> list[dict[int, tuple[float, float]]]:
    """By seed, PPL with a factor's first value and with its second, for each cell: all else equal.

    Judged are the seeds of the fullest cell; one that lacks any of them, because a trial diverged, is left out.

    Args:
        where: keeps to the cells with these values, such as {"head": "tied"}.
    """
    others = [name for name in (*FACTORS, "samples") if name != factor]
    found: dict[tuple, dict[str, dict[int, float]]] = {}
    for trial in ARMS.finished(trials):
        if not trial["original"] and all(trial[name] == value for name, value in (where or {}).items()):
            values = found.setdefault(tuple(trial[name] for name in others), {})
            values.setdefault(trial[factor], {})[trial["seed"]] = trial["val_ppl"]
    first, second = FACTORS[factor]
    cells = []
    for values in found.values():
        one, other = values.get(first, {}), values.get(second, {})
        cells.append({seed: (one[seed], other[seed]) for seed in one if seed in other})
    fullest = max(cells, key=len, default={})
    return [cell for cell in cells if fullest and fullest.keys() <= cell.keys()]


def effect(trials: Sequence[Trial], factor: str, where: Mapping[str, Any] | None = None) -> Perplexity | None:
    """PPL with a factor's first value over PPL with its second; geometric mean over what else varies.

    Paired: one value per seed, over the cells of ``paired``; the interval is over seeds, and there is none where a
    perplexity is off the scale. None where no cell holds both.
    """
    cells = paired(trials, factor, where)
    if not cells:
        return None
    logs = [[math.log(cell[seed][0] / cell[seed][1]) for cell in cells] for seed in cells[0]]
    ratio = Perplexity.over_seeds([math.exp(sum(own) / len(own)) for own in logs])
    pairs = [ppl for cell in cells for pair in cell.values() for ppl in pair]
    return Perplexity(ratio.mean, None, None) if any(map(is_off_the_scale, pairs)) else ratio


def effect_table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every factor's effect: over all cells, and at each value of the other factors and each sample size."""
    rows = []
    sizes = sorted({t["samples"] for t in trials})
    for factor in FACTORS:
        scopes: list[dict[str, Any]] = [{}]
        scopes += [{other: value} for other in FACTORS if other != factor for value in FACTORS[other]]
        scopes += [{"samples": size} for size in sizes if len(sizes) > 1]
        for scope in scopes:
            ratio, where = effect(trials, factor, scope), "all"
            for name, value in scope.items():
                where = f"{value} {name if name in ('samples', 'head') else 'embedding'}"
            if ratio is not None:
                row = {"factor": factor, "change": ACTIONS[factor], "where": where, "ratio": ratio.mean}
                ends = {"ratio_low": ratio.low, "ratio_high": ratio.high}
                rows.append(row | ends | {"verdict": verdict(ratio)})
    return rows + phase1_effects(trials)


def phase1_effects(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each stand-in for phase 1 does to each arm that it is otherwise equal to, by sample size; [] without such arms."""
    cells, rows = in_cells(trials), []
    own = [t for t in trials if t["original"] in PHASE1_ARMS]
    arms = dict.fromkeys((t["arm"], t["original"], t["samples"]) for t in own)
    several = len({t["samples"] for t in own}) > 1
    for arm, other, samples in arms:
        base = arm.removesuffix(f", {(words := PHASE1_ARMS[other])}")
        if ratio := ARMS.ratio(cells, (arm, samples), (base, samples)):
            change = f"{words} ({base}{f', {samples} samples' * several})"
            row = {"factor": "phase 1", "change": change, "where": "all", "ratio": ratio.mean}
            rows.append(row | {"ratio_low": ratio.low, "ratio_high": ratio.high, "verdict": verdict(ratio)})
    return rows


def whole_phase1(phase1: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of phase 1 as it is, without those that something stands in for."""
    return [run for run in phase1 if run["initialisation"] in FACTORS["initialisation"]]


def verdict(ratio: Perplexity) -> str:
    """ "lower", "higher" or "no difference" by the 95% interval; "no verdict" without one, as of two seeds."""
    if not ratio.is_judged:
        return "no verdict"
    return "lower" if ratio.high < 1 else "higher" if ratio.low > 1 else "no difference"


def readable_effects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per effect: what was changed, where, the ratio with its interval as words, and the verdict."""
    ratios = [f"x{Perplexity(r['ratio'], r['ratio_low'], r['ratio_high'])}" for r in rows]
    return [
        {"change": r["change"], "where": r["where"], "PPL ratio (95%)": ratio, "verdict": r["verdict"]}
        for r, ratio in zip(rows, ratios, strict=True)
    ]


def phase1_table(phase1: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run of phase 1, from its last iteration."""
    rows = []
    for run in phase1:
        last = run["rows"][-1]
        row = {name: run[name] for name in ("initialisation", "samples", "seed")}
        row |= {"iterations": last["iteration"], "stopped_early": run["converged"], "seconds": run["seconds"]}
        row |= {name: last[name] for name in ("converged", "effective_rank", "effective_rank_centred")}
        rows.append(row | {"first_contexts": run["sweep"]})
    return rows


def readable_phase1(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run of phase 1, its shares in percent."""
    return [
        {
            "embedding": r["initialisation"], "samples": r["samples"], "seed": r["seed"], "iterations": r["iterations"],
            "converged": f"{r['converged']:.1%}", "effective rank": f"{r['effective_rank']:.1%}",
            "centred": f"{r['effective_rank_centred']:.1%}", "seconds": f"{r['seconds']:.1f}",
        }
        for r in rows
    ]  # fmt: skip


def readable_baselines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sample size and n-gram model: its perplexities as words."""
    told = text.readable_baselines(rows)
    return [{"samples": row["samples"], **words} for row, words in zip(rows, told, strict=True)]


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per finished trial: its numbers without its curve, as trials.csv has always named them."""
    return [
        {"accuracy" if k == "val_accuracy" else k: v for k, v in t.items() if not isinstance(v, list | dict)}
        for t in ARMS.finished(trials)
    ]


def epoch_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The training curves of finished trials, one row per epoch."""
    return [
        {name: trial[name] for name in ("arm", "samples", "seed")}
        | {k: v for k, v in epoch.items() if k != "expert_counts"}
        for trial in ARMS.finished(trials)
        for epoch in trial["epochs"]
    ]
