"""The sweep's tables: one row per alpha beside what the original reported, and the directions of the candidate gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bklm.harness.arms import Holds, any_holds, claim, is_below
from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean, same
from bklm.harness.statistics import Perplexity, interval95
from bklm.training.context_gain import gain_in_words

# Reported by the original: WikiText-2, 2 epochs, one seed, a T4; its model saw the future.
REPORTED = {
    alpha: {"val_ppl": perplexity, "gradient_variance": variance}
    for alpha, perplexity, variance in (
        (0.0, 309.90, 0.0216), (0.3, 341.95, 0.1778), (0.5, 322.15, 0.0742), (0.7, 495.04, 427.32), (1.0, 494.01, 437.88),
    )
}  # fmt: skip
# Where the quick-start page of the original expected the best alpha.
BLENDS = (0.3, 0.7)
# Not before training: the untrained model's branches are small, and the gradient of v is mostly noise.
WHEN_MEASURED = ("after one epoch", "at the end")


def _convergence(group: Sequence[Trial]) -> float | None:
    """Mean epoch of 90% of the improvement; None where a seed's perplexity never fell: that is no fast convergence."""
    improved = all(
        min(e["val_perplexity"] for e in t["epochs"]) < t["epochs"][0]["val_perplexity"] for t in group
    )
    return interval95([t["convergence_speed"] for t in group])[0] if improved else None


def _without_unk(row: dict[str, Any]) -> str:
    return str(Perplexity(row["val_ppl_without_unk"], None, None)) if row["seeds"] else "-"


def _seconds(row: dict[str, Any]) -> str:
    return "-" if row["seconds"] is None else f"{row['seconds']:.{int(row['seconds'] < 10)}f}"


def _reported(row: dict[str, Any]) -> str:
    return "-" if row.get("original_val_ppl") is None else f"{row['original_val_ppl']:.2f}"


ALPHAS = Comparison(
    by="alpha",
    title="alpha {:g}".format,
    short="{:g}".format,
    other="other alpha",
    order=lambda trial: trial["alpha"],
    columns=(
        Column("val_ppl_without_unk", geometric_mean("val_ppl_without_unk"), "without <unk>", _without_unk),
        Column("learning_rate", same("learning_rate"), "rate", "g"),
        Column("accuracy", "val_accuracy", "accuracy", ".1%"),
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        Column("convergence_epoch", _convergence, "converged at epoch", ".1f"),
        Column("gradient_variance", "gradient_variance", "grad-norm variance", ".3g", spread=True),
        Column("seconds", "seconds", "seconds", _seconds),
        Column("", "", "PPL reported by the original", _reported),
    ),
    reported=REPORTED,
    reported_columns=("val_ppl", "gradient_variance"),
)
ALONE = dataclasses.replace(ALPHAS, columns=ALPHAS.columns[:-1], reported={}, reported_columns=())


def beside(is_wikitext2: bool) -> Comparison:
    """The comparison for a text: what the original reported stands only beside the words of WikiText-2."""
    return ALPHAS if is_wikitext2 else ALONE


def readable_alphas(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The main table for people; one of an earlier run is shown as it was."""
    return beside("original_val_ppl" in rows[0]).readable(rows)


def rates_in_words(tried: Sequence[float], epochs: int) -> str:
    """Where the alphas' learning rates come from."""
    if len(tried) == 1:
        return f"learning rate {tried[0]:g} for all"
    listed = ", ".join(f"{r:g}" for r in tried)
    return f"each alpha's learning rate: best of {listed} after {epochs} epochs with the first seed"


def claims_table(trials: Sequence[Trial], tried: Sequence[float]) -> list[dict[str, str]]:
    """What was expected of the blend, in pairs of seeds with no blend at all, for all the alphas of which any would do at
    once; none where the sweep lacks these alphas."""
    groups = ALPHAS.groups(trials)
    blends = [a for a in dict.fromkeys(t["alpha"] for t in trials) if BLENDS[0] <= a <= BLENDS[1]]
    if not blends or not groups.get(0.0):
        return []
    told, found = [], []
    for alpha in blends:
        ratio = ALPHAS.ratio(trials, alpha, 0.0, len(blends))
        held: Holds = None if ratio is None else is_below(*ratio.interval, 1.0)
        words = "a seed diverged" if ratio is None else f"x{ratio}"
        if alpha not in groups:
            held, words = False, "diverged"
        found.append(held)
        told.append(f"alpha {alpha:g}: {words}{_edge(groups.get(alpha, []), tried)}")
    several = f" (intervals for {len(blends)} alphas at once)" * (len(blends) > 1)
    measured = f"PPL over that of alpha 0{_edge(groups[0.0], tried)}: {'; '.join(told)}{several}"
    return [claim(f"an alpha of {BLENDS[0]:g} to {BLENDS[1]:g} is better than 0", measured, any_holds(found))]


def _edge(group: Sequence[Trial], tried: Sequence[float]) -> str:
    """A search that ended at its edge might have gone on."""
    at = group and len(tried) > 1 and group[0]["learning_rate"] in (min(tried), max(tried))
    return f" [best rate {group[0]['learning_rate']:g}, at the edge]" if at else ""


def trained_for_directions(trials: Sequence[Trial]) -> tuple[float, list[Trial]]:
    """Whose weights the directions are compared at: those of alpha 0, trained by the theory alone, or of the best alpha."""
    groups = ALPHAS.groups(trials)
    alpha = 0.0 if 0.0 in groups else ALPHAS.best(trials)
    return alpha, groups[alpha]


def pooled_directions(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Norm ratio and cosine of each direction over all layers, early and at the end of training, mean over finished trials."""
    rows = []
    for when in WHEN_MEASURED:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in (r for t in ALPHAS.finished(trials) for r in t["directions"][when] if r["layer"] == "all"):
            groups.setdefault(row["direction"], []).append(row)
        for name, group in groups.items():
            cosine, half = interval95([r["cosine"] for r in group])
            # Ratios are averaged as perplexities are.
            ratio = Perplexity.over_seeds([max(r["norm_ratio"], 1e-30) for r in group])
            rows.append(
                {
                    "weights": when,
                    "direction": name,
                    "norm": interval95([r["norm"] for r in group])[0],
                    "norm_ratio": ratio.mean,
                    "norm_ratio_low": ratio.low,
                    "norm_ratio_high": ratio.high,
                    "cosine": cosine,
                    "cosine_low": None if half is None else cosine - half,
                    "cosine_high": None if half is None else cosine + half,
                    "measured_on": len(group),
                }
            )
    return rows


def original_format(epochs: int, trials: Sequence[Trial], table: list[dict[str, Any]]) -> dict[str, Any]:
    """grad_blend_results.json with the original's keys (means over seeds) and, beside them, ours; null where all diverged."""
    results, groups = [], ALPHAS.groups(trials)
    for row in table:
        group = groups.get(row["alpha"], [])
        losses, perplexities = (
            list(zip(*[[e[key] for e in t["epochs"]] for t in group], strict=True))
            for key in ("train_loss", "val_perplexity")
        )
        results.append(
            {
                "alpha": row["alpha"],
                "final_perplexity": row["val_ppl"],
                "convergence_speed": interval95([t["convergence_speed"] for t in group])[0] if group else None,
                "gradient_variance": row["gradient_variance"],
                "training_time": row["seconds"],
                "loss_curve": [interval95(epoch)[0] for epoch in losses],
                "perplexity_curve": [Perplexity.over_seeds(epoch).mean for epoch in perplexities],
                "final_perplexity_95": [row["val_ppl_low"], row["val_ppl_high"]],
                "final_perplexity_by_seed": {
                    str(t["seed"]): t["val_ppl"] for t in trials if t["alpha"] == row["alpha"]
                },
            }
        )
    best = ALPHAS.best(trials)
    return {
        "alpha_values": [row["alpha"] for row in table],
        "epochs_per_trial": epochs,
        "best_alpha": best,
        "best_perplexity": next(r["val_ppl"] for r in table if r["alpha"] == best),
        "results": results,
    }
