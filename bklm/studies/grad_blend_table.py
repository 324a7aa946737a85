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

MEASURED = (
    "val_ppl", "val_ppl_low", "val_ppl_high", "val_ppl_without_unk", "accuracy", "convergence_epoch",
    "gradient_variance", "gradient_variance_95", "seconds",
)  # fmt: skip

# Not before training: the untrained model's branches are small, and the gradient of v is mostly noise.
WHEN_MEASURED = ("after one epoch", "at the end")


def finished(trials: Trials) -> list[dict[str, Any]]:
    """The trials that did not diverge."""
    return [t for t in trials if t["final_perplexity"] is not None]


def by_alpha(trials: Trials) -> dict[float, list[dict[str, Any]]]:
    """Finished trials grouped by alpha, both in ascending order; an alpha whose seeds all diverged has no group."""
    return _grouped(finished(trials))


def diverged_by_alpha(trials: Trials) -> dict[float, list[dict[str, Any]]]:
    """Diverged trials grouped as in `by_alpha`."""
    return _grouped([t for t in trials if t["final_perplexity"] is None])


def _grouped(trials: Trials) -> dict[float, list[dict[str, Any]]]:
    groups: dict[float, list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda t: (t["alpha"], t["seed"])):
        groups.setdefault(trial["alpha"], []).append(trial)
    return groups


def best_alpha(trials: Trials) -> float:
    """The alpha of the lowest mean final validation perplexity; the smaller alpha on a tie.

    An alpha that diverged with some seed is no candidate, unless all did: then those that finished the most seeds are.
    """
    groups = by_alpha(trials)
    most = max(len(group) for group in groups.values())
    means = {a: final_perplexity(group).mean for a, group in groups.items() if len(group) == most}
    return min(means, key=lambda a: (means[a], a))


def final_perplexity(group: Trials) -> Perplexity:
    """Over the seeds of one alpha."""
    return Perplexity.over_seeds([t["final_perplexity"] for t in group])


def alpha_table(trials: Trials) -> list[dict[str, Any]]:
    """One row per alpha: means over seeds with 95% intervals (None for one seed), the original's numbers beside.

    ``seeds`` counts those that finished, ``diverged`` the others; where none finished, what was to be measured is None.
    """
    rows, groups, lost = [], by_alpha(trials), diverged_by_alpha(trials)
    for alpha in sorted({*groups, *lost}):
        group = groups.get(alpha, [])
        reported = {
            "original_val_ppl": REPORTED.get(alpha, {}).get("final_perplexity"),
            "original_gradient_variance": REPORTED.get(alpha, {}).get("gradient_variance"),
        }
        counts = {"alpha": alpha, "seeds": len(group), "diverged": len(lost.get(alpha, []))}
        if not group:
            rows.append({**counts, **dict.fromkeys(MEASURED), **reported})
            continue
        perplexity = final_perplexity(group)
        variance, variance_half = interval95([t["gradient_variance"] for t in group])
        rows.append(
            {
                **counts,
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
                **reported,
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

    def perplexity(row: dict[str, Any]) -> str:
        # A summary that an earlier version wrote counts none: it could not hold a diverged trial.
        lost = row.get("diverged", 0)
        if not row["seeds"]:
            return "diverged"
        words = str(Perplexity(row["val_ppl"], row["val_ppl_low"], row["val_ppl_high"]))
        return words + (f"; diverged: {lost} of {lost + row['seeds']} seeds" if lost else "")

    def without_unk(row: dict[str, Any]) -> str:
        return str(Perplexity(row["val_ppl_without_unk"], None, None)) if row["seeds"] else "-"

    return [
        {
            "alpha": f"{r['alpha']:g}",
            "val PPL (95%)": perplexity(r),
            "without <unk>": without_unk(r),
            "accuracy": or_dash(r["accuracy"], ".1%"),
            "converged at epoch": or_dash(r["convergence_epoch"], ".1f"),
            "grad-norm variance": or_dash(r["gradient_variance"], ".3g"),
            "seconds": or_dash(r["seconds"], ".1f" if (r["seconds"] or 0) < 10 else ".0f"),
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
    """Per alpha other than the best: its final PPL over the best alpha's on the same seeds, mean and 95% interval.

    Seeds are those of the best alpha; an alpha that lost one of them has no ratio.
    """
    scores = {a: {t["seed"]: t["final_perplexity"] for t in group} for a, group in by_alpha(trials).items()}
    best = scores.pop(best_alpha(trials))
    return {
        alpha: Perplexity.ratio_over_seeds([of_seed[seed] for seed in best], list(best.values()))
        for alpha, of_seed in scores.items()
        if best.keys() <= of_seed.keys()
    }


def state_finding(trials: Trials) -> str:
    """One sentence: the best alpha, and which others differ from it beyond the paired 95% interval over seeds.

    A second one names the trials that diverged, if any.
    """
    seeds = len(by_alpha(trials)[best_alpha(trials)])
    found = verdict.state_finding(_best_in_words(trials), _named_ratios(trials), seeds)
    return found + describe_diverged(trials)


def describe_diverged(trials: Trials) -> str:
    """Which trials diverged, and what that means for the finding; "" when there is nothing to say."""
    groups, lost = by_alpha(trials), diverged_by_alpha(trials)
    if not lost:
        return ""
    words = [f"alpha {t['alpha']:g}, seed {t['seed']}" for group in lost.values() for t in group]
    said = f" Diverged, and in none of these numbers: {'; '.join(words)}."
    if best_alpha(trials) in lost:
        return f"{said} No alpha finished all its seeds; the best is among those that finished the most."
    if partly := [f"{alpha:g}" for alpha in groups if alpha in lost]:
        said += f" An alpha that lost a seed is given no verdict (alpha {', '.join(partly)})."
    return said


def headline(trials: Trials) -> str:
    """The finding in a figure's title: the best alpha, how many others are worse beyond the interval, and what diverged."""
    found = verdict.headline(_best_in_words(trials), _named_ratios(trials), "other alpha")
    return found + diverged_in_short(trials)


def diverged_in_short(trials: Trials) -> str:
    """ "; diverged: alpha 0.7 (1 seed), alpha 1 (3 seeds)", or "" where none did."""
    words = [
        f"alpha {alpha:g} ({len(group)} seed{'s' if len(group) > 1 else ''})"
        for alpha, group in diverged_by_alpha(trials).items()
    ]
    return f"; diverged: {', '.join(words)}" if words else ""


def _best_in_words(trials: Trials) -> str:
    best = best_alpha(trials)
    return f"Lowest validation PPL at alpha {best:g}: {final_perplexity(by_alpha(trials)[best])}"


def _named_ratios(trials: Trials) -> dict[str, Perplexity]:
    return {f"alpha {alpha:g}": ratio for alpha, ratio in paired_ratios(trials).items()}


def pooled_directions(trials: Trials) -> list[dict[str, Any]]:
    """Norm ratio and cosine of each direction over all layers, early and at the end of training, mean over finished trials."""
    rows = []
    for when in WHEN_MEASURED:
        groups: dict[str, list[dict[str, Any]]] = {}
        for trial in finished(trials):
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
