"""The sweep's numbers: one row per alpha, judged over paired seeds, beside what the original reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bklm.reporting import Perplexity, interval95
from bklm.studies import verdict

# Reported by the original: WikiText-2, 2 epochs, one seed, a T4; its model saw the future.
REPORTED = {
    0.0: {"final_perplexity": 309.90, "convergence_speed": 2.0, "gradient_variance": 0.0216, "training_time": 153.2},
    0.3: {"final_perplexity": 341.95, "convergence_speed": 2.0, "gradient_variance": 0.1778, "training_time": 149.7},
    0.5: {"final_perplexity": 322.15, "convergence_speed": 2.0, "gradient_variance": 0.0742, "training_time": 149.7},
    0.7: {"final_perplexity": 495.04, "convergence_speed": 2.0, "gradient_variance": 427.32, "training_time": 149.8},
    1.0: {"final_perplexity": 494.01, "convergence_speed": 2.0, "gradient_variance": 437.88, "training_time": 151.4},
}  # fmt: skip

Trials = Sequence[dict[str, Any]]

# Not before training: the untrained model's branches are small, and the gradient of v is mostly noise.
WHEN_MEASURED = ("after one epoch", "at the end")


def by_alpha(trials: Trials) -> dict[float, list[dict[str, Any]]]:
    """Trials grouped by alpha, both in ascending order of alpha and seed."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda t: (t["alpha"], t["seed"])):
        groups.setdefault(trial["alpha"], []).append(trial)
    return groups


def best_alpha(trials: Trials) -> float:
    """The alpha of the lowest mean final validation perplexity; the smaller alpha on a tie."""
    means = {a: final_perplexity(group).mean for a, group in by_alpha(trials).items()}
    return min(means, key=lambda a: (means[a], a))


def final_perplexity(group: Trials) -> Perplexity:
    """Over the seeds of one alpha."""
    return Perplexity.over_seeds([t["final_perplexity"] for t in group])


def alpha_table(trials: Trials) -> list[dict[str, Any]]:
    """One row per alpha: means over seeds with 95% intervals (None for one seed), the original's numbers beside."""
    rows = []
    for alpha, group in by_alpha(trials).items():
        perplexity = final_perplexity(group)
        variance, variance_half = interval95([t["gradient_variance"] for t in group])
        rows.append(
            {
                "alpha": alpha,
                "seeds": len(group),
                "val_ppl": perplexity.mean,
                "val_ppl_low": perplexity.low,
                "val_ppl_high": perplexity.high,
                "val_ppl_without_unk": Perplexity.over_seeds(
                    [t["final_perplexity_without_unk"] for t in group]
                ).mean,
                "accuracy": interval95([t["final_accuracy"] for t in group])[0],
                "convergence_epoch": _convergence(group),
                "gradient_variance": variance,
                "gradient_variance_95": variance_half,
                "seconds": interval95([t["training_time"] for t in group])[0],
                "original_val_ppl": REPORTED.get(alpha, {}).get("final_perplexity"),
                "original_gradient_variance": REPORTED.get(alpha, {}).get("gradient_variance"),
            }
        )
    return rows


def _convergence(group: Trials) -> float | None:
    """Mean epoch of 90% of the improvement; None where a seed's perplexity never fell: that is no fast convergence."""
    improved = all(
        min(e["val_perplexity"] for e in t["epochs"]) < t["epochs"][0]["val_perplexity"] for t in group
    )
    return interval95([t["convergence_speed"] for t in group])[0] if improved else None


def readable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alpha table rounded for people."""

    def or_dash(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    return [
        {
            "alpha": f"{r['alpha']:g}",
            "val PPL (95%)": str(Perplexity(r["val_ppl"], r["val_ppl_low"], r["val_ppl_high"])),
            "without <unk>": str(Perplexity(r["val_ppl_without_unk"], None, None)),
            "accuracy": f"{r['accuracy']:.1%}",
            "converged at epoch": or_dash(r["convergence_epoch"], ".1f"),
            "grad-norm variance": f"{r['gradient_variance']:.3g}",
            "seconds": f"{r['seconds']:.{1 if r['seconds'] < 10 else 0}f}",
            "PPL reported by the original": or_dash(r["original_val_ppl"], ".2f"),
        }
        for r in rows
    ]


def readable_baselines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The baselines rounded for people."""
    return [
        {
            "baseline": r["name"],
            "val PPL": f"{r['val_ppl']:.1f}",
            "without <unk>": f"{r['val_ppl_without_unk']:.1f}",
        }
        for r in rows
    ]


def paired_ratios(trials: Trials) -> dict[float, Perplexity]:
    """Per alpha other than the best: its final PPL over the best alpha's on the same seeds, mean and 95% interval."""
    groups = by_alpha(trials)
    best = groups.pop(best_alpha(trials))
    return {
        alpha: Perplexity.over_seeds(
            [t["final_perplexity"] / b["final_perplexity"] for t, b in zip(group, best, strict=True)]
        )
        for alpha, group in groups.items()
    }


def state_finding(trials: Trials) -> str:
    """One sentence: the best alpha, and which others differ from it beyond the paired 95% interval over seeds."""
    seeds = len(by_alpha(trials)[best_alpha(trials)])
    return verdict.state_finding(_best_in_words(trials), _named_ratios(trials), seeds)


def headline(trials: Trials) -> str:
    """The finding in a figure's title: the best alpha and how many others are worse beyond the interval."""
    return verdict.headline(_best_in_words(trials), _named_ratios(trials), "other alpha")


def _best_in_words(trials: Trials) -> str:
    best = best_alpha(trials)
    return f"Lowest validation PPL at alpha {best:g}: {final_perplexity(by_alpha(trials)[best])}"


def _named_ratios(trials: Trials) -> dict[str, Perplexity]:
    return {f"alpha {alpha:g}": ratio for alpha, ratio in paired_ratios(trials).items()}


def pooled_directions(trials: Trials) -> list[dict[str, Any]]:
    """Norm ratio and cosine of each direction over all layers, early and at the end of training, mean over trials."""
    rows = []
    for when in WHEN_MEASURED:
        groups: dict[str, list[dict[str, Any]]] = {}
        for trial in trials:
            for row in trial["directions"][when]:
                if row["layer"] == "all":
                    groups.setdefault(row["direction"], []).append(row)
        for name, group in groups.items():
            cosine, cosine_half = interval95([r["cosine"] for r in group])
            rows.append(
                {
                    "weights": when,
                    "direction": name,
                    "norm": interval95([r["norm"] for r in group])[0],
                    "norm_ratio": math.exp(
                        interval95([math.log(max(r["norm_ratio"], 1e-30)) for r in group])[0]
                    ),
                    "cosine": cosine,
                    "cosine_low": None if cosine_half is None else cosine - cosine_half,
                    "cosine_high": None if cosine_half is None else cosine + cosine_half,
                    "measured_on": len(group),
                }
            )
    return rows
