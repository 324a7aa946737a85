"""What the GRAD_BLEND sweep leaves behind: table, finding, the original's files under their names, figures, manifest, zip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bklm.checkpoints import write_json, write_text
from bklm.figures import (
    GREY,
    MARKERS,
    colours,
    legend_below,
    mean_with_error,
    save_figure,
    wide_range_axis,
)
from bklm.moe import usage_entropy
from bklm.reporting import Bundle, interval95, with_interval, write_csv, write_manifest, zip_study
from bklm.studies.text import StudyText

if TYPE_CHECKING:
    from bklm.studies.grad_blend import GradBlendConfig

# Reported by the original: WikiText-2, 2 epochs, one seed, a T4; its model saw the future.
REPORTED = {
    0.0: {"final_perplexity": 309.90, "convergence_speed": 2.0, "gradient_variance": 0.0216, "training_time": 153.2},
    0.3: {"final_perplexity": 341.95, "convergence_speed": 2.0, "gradient_variance": 0.1778, "training_time": 149.7},
    0.5: {"final_perplexity": 322.15, "convergence_speed": 2.0, "gradient_variance": 0.0742, "training_time": 149.7},
    0.7: {"final_perplexity": 495.04, "convergence_speed": 2.0, "gradient_variance": 427.32, "training_time": 149.8},
    1.0: {"final_perplexity": 494.01, "convergence_speed": 2.0, "gradient_variance": 437.88, "training_time": 151.4},
}  # fmt: skip

# The untrained model's residual branches end in zeros: there is no gradient of v yet whose direction could be compared.
WHEN_MEASURED = ("after one epoch", "at the end")

Trials = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class GradBlendResult:
    """What `run_grad_blend` found and wrote. ``table`` holds one row per alpha, ``paths`` the files by name."""

    config: GradBlendConfig
    table: list[dict[str, Any]]
    best_alpha: float
    best_perplexity: float
    finding: str
    baselines: list[dict[str, Any]]
    directions: list[dict[str, Any]]
    final: dict[str, Any]
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle


def by_alpha(trials: Trials) -> dict[float, list[dict[str, Any]]]:
    """Trials grouped by alpha, both in ascending order of alpha and seed."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda t: (t["alpha"], t["seed"])):
        groups.setdefault(trial["alpha"], []).append(trial)
    return groups


def best_alpha(trials: Trials) -> float:
    """The alpha of the lowest mean final validation perplexity; the smaller alpha on a tie."""
    means = {a: interval95([t["final_perplexity"] for t in group])[0] for a, group in by_alpha(trials).items()}
    return min(means, key=lambda a: (means[a], a))


def alpha_table(trials: Trials) -> list[dict[str, Any]]:
    """One row per alpha: means over seeds with 95% half-widths (None for one seed), the original's numbers beside."""
    rows = []
    for alpha, group in by_alpha(trials).items():
        perplexity, half = interval95([t["final_perplexity"] for t in group])
        variance, variance_half = interval95([t["gradient_variance"] for t in group])
        rows.append(
            {
                "alpha": alpha,
                "seeds": len(group),
                "val_ppl": perplexity,
                "val_ppl_95": half,
                "val_ppl_without_unk": interval95([t["final_perplexity_without_unk"] for t in group])[0],
                "accuracy": interval95([t["final_accuracy"] for t in group])[0],
                "convergence_epoch": interval95([t["convergence_speed"] for t in group])[0],
                "gradient_variance": variance,
                "gradient_variance_95": variance_half,
                "seconds": interval95([t["training_time"] for t in group])[0],
                "original_val_ppl": REPORTED.get(alpha, {}).get("final_perplexity"),
                "original_gradient_variance": REPORTED.get(alpha, {}).get("gradient_variance"),
            }
        )
    return rows


def readable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alpha table rounded for people."""

    def or_dash(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    return [
        {
            "alpha": f"{r['alpha']:g}",
            "val PPL": with_interval(r["val_ppl"], r["val_ppl_95"]),
            "without <unk>": f"{r['val_ppl_without_unk']:.1f}",
            "accuracy": f"{r['accuracy']:.1%}",
            "converged at epoch": f"{r['convergence_epoch']:.1f}",
            "grad-norm variance": f"{r['gradient_variance']:.3g}",
            "seconds": f"{r['seconds']:.0f}",
            "PPL reported by the original": or_dash(r["original_val_ppl"], ".1f"),
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


def state_finding(trials: Trials) -> str:
    """One sentence: the best alpha, and which others differ from it beyond the paired 95% interval over seeds."""
    best = best_alpha(trials)
    group = by_alpha(trials)[best]
    mean, half = interval95([t["final_perplexity"] for t in group])
    sentence = f"Lowest validation PPL at alpha {best:g}: {with_interval(mean, half)}"
    gaps = {alpha: gap for alpha, gap in paired_gaps(trials).items() if alpha != best}
    if not gaps:
        return sentence + "."
    if half is None:
        return sentence + "; one seed, so no interval and no verdict on the differences."
    words = {alpha: f"{alpha:g} ({gap:+.1f} ± {gap_half:.1f})" for alpha, (gap, gap_half) in gaps.items()}
    worse = [words[alpha] for alpha, (gap, gap_half) in gaps.items() if gap - gap_half > 0]
    same = [word for word in words.values() if word not in worse]
    if worse:
        sentence += f"; worse over {len(group)} paired seeds: alpha {', '.join(worse)}"
    if same:
        sentence += f"; no difference beyond the 95% interval: alpha {', '.join(same)}"
    return sentence + "."


def headline(trials: Trials) -> str:
    """The finding in a figure's title: the best alpha and how many others are worse beyond the interval."""
    rest = [gap for alpha, gap in paired_gaps(trials).items() if alpha != best_alpha(trials)]
    mean, half = interval95([t["final_perplexity"] for t in by_alpha(trials)[best_alpha(trials)]])
    title = f"Lowest validation PPL at alpha {best_alpha(trials):g}: {with_interval(mean, half)}"
    if not rest:
        return title
    if rest[0][1] is None:
        return title + "; one seed, no interval"
    worse = sum(gap - half > 0 for gap, half in rest)
    count = f"{worse} of {len(rest)} other alphas" if worse else "no other alpha"
    return title + f"; {count} {'are' if worse > 1 else 'is'} worse beyond the 95% interval"


def paired_gaps(trials: Trials) -> dict[float, tuple[float, float | None]]:
    """Per alpha: mean difference of the final PPL to the best alpha's over the same seeds, and its 95% half-width."""
    groups = by_alpha(trials)
    best = groups[best_alpha(trials)]
    return {
        alpha: interval95(
            [t["final_perplexity"] - b["final_perplexity"] for t, b in zip(group, best, strict=True)]
        )
        for alpha, group in groups.items()
    }


def describe_run(config: GradBlendConfig, text: StudyText, seeds: int) -> str:
    """The small print of a figure: data, sizes, the number of seeds shown, and whether the model sees the future."""
    parts = [
        f"{text.corpus.name}, {text.train_tokens:,} training tokens, vocabulary {text.vocab_size:,}",
        f"batch {config.batch_size} x {config.seq_len}",
        f"{seeds} seeds, bars: 95% interval" if seeds > 1 else "1 seed, no interval",
        f"{config.protocol} protocol, theory gradient: {config.gradient}",
    ]
    if text.is_demonstration:
        parts.insert(0, "Demonstration")
    if not config.causal:
        parts.insert(0, "THIS MODEL SEES THE FUTURE")
    return "; ".join(parts) + "."


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
                    "cosine_95": cosine_half,
                    "measured_on": len(group),
                }
            )
    return rows


def write_report(
    config: GradBlendConfig, text: StudyText, trials: Trials, final: dict[str, Any], folder: Path
) -> GradBlendResult:
    """Write every file of the study and its zip; the same trials always give the same numbers."""
    table, finding, directions = alpha_table(trials), state_finding(trials), pooled_directions(trials)
    best = best_alpha(trials)
    best_perplexity = next(r["val_ppl"] for r in table if r["alpha"] == best)
    note = describe_run(config, text, len(config.seeds))
    note_of_one = describe_run(config, text, 1)
    names = (
        "grad_blend_results.json", "summary.json", "table.csv", "epochs.csv", "gradient_directions.csv",
        "grad_blend_analysis.png", "training_curves.png", "gradient_directions.png", "experts.png", "vocabulary.json",
        "manifest.json",
    )  # fmt: skip
    paths = {name: folder / name for name in names}
    paths["best_model.safetensors"] = folder / "final" / "best_model.safetensors"

    write_json(paths["grad_blend_results.json"], _original_format(config, trials, table, best, best_perplexity))
    write_json(
        paths["summary.json"],
        {
            "finding": finding,
            "sees_the_future": not config.causal,
            "demonstration": text.is_demonstration,
            "best_alpha": best,
            "best_perplexity": best_perplexity,
            "final_training": {k: v for k, v in final.items() if k not in ("epochs", "directions")},
            "baselines": text.baselines,
            "table": table,
        },
    )
    write_csv(paths["table.csv"], table)
    write_csv(paths["epochs.csv"], _epoch_rows(trials, final))
    write_csv(paths["gradient_directions.csv"], directions)
    write_text(paths["vocabulary.json"], text.vocabulary_json())
    draw_analysis(paths["grad_blend_analysis.png"], trials, table, headline(trials), note)
    draw_training(paths["training_curves.png"], final, text.baselines, note_of_one)
    draw_directions(paths["gradient_directions.png"], directions, note)
    draw_experts(paths["experts.png"], final, note_of_one)
    write_manifest(
        paths["manifest.json"],
        config=config,
        corpus=text.corpus,
        module="bklm.studies.grad_blend",
        seconds=sum(t["training_time"] for t in (*trials, final)),
        sees_the_future=not config.causal,
    )
    return GradBlendResult(
        config=config,
        table=table,
        best_alpha=best,
        best_perplexity=best_perplexity,
        finding=finding,
        baselines=text.baselines,
        directions=directions,
        final=final,
        folder=folder,
        paths=paths,
        bundle=zip_study(folder),
    )


def _original_format(
    config: GradBlendConfig, trials: Trials, table: list[dict[str, Any]], best: float, best_perplexity: float
) -> dict[str, Any]:
    """grad_blend_results.json with the original's keys (means over seeds) and, beside them, ours."""
    results = []
    for row, group in zip(table, by_alpha(trials).values(), strict=True):
        curves = [[e["val_perplexity"] for e in t["epochs"]] for t in group]
        losses = [[e["train_loss"] for e in t["epochs"]] for t in group]
        results.append(
            {
                "alpha": row["alpha"],
                "final_perplexity": row["val_ppl"],
                "convergence_speed": row["convergence_epoch"],
                "gradient_variance": row["gradient_variance"],
                "training_time": row["seconds"],
                "loss_curve": [interval95(epoch)[0] for epoch in zip(*losses, strict=True)],
                "perplexity_curve": [interval95(epoch)[0] for epoch in zip(*curves, strict=True)],
                "final_perplexity_95": row["val_ppl_95"],
                "final_perplexity_by_seed": {str(t["seed"]): t["final_perplexity"] for t in group},
            }
        )
    return {
        "alpha_values": [row["alpha"] for row in table],
        "epochs_per_trial": config.epochs_per_trial,
        "best_alpha": best,
        "best_perplexity": best_perplexity,
        "results": results,
    }


def _epoch_rows(trials: Trials, final: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "alpha": trial["alpha"],
            "seed": trial["seed"],
            **{k: v for k, v in epoch.items() if k != "expert_counts"},
        }
        for run, group in (("sweep", trials), ("final", [final]))
        for trial in group
        for epoch in trial["epochs"]
    ]


def draw_analysis(path: Path, trials: Trials, table: list[dict[str, Any]], title: str, note: str) -> Path:
    """The original's four panels: PPL per epoch by alpha; final PPL, convergence and gradient variance against alpha."""
    groups = by_alpha(trials)
    alphas = [row["alpha"] for row in table]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 2)
        by_epoch, final, convergence, variance = axes.flat
        for (alpha, group), colour, marker in zip(
            groups.items(), colours(len(groups)), MARKERS * 9, strict=False
        ):
            curves = list(zip(*[[e["val_perplexity"] for e in t["epochs"]] for t in group], strict=True))
            summary = [interval95(epoch) for epoch in curves]
            shift = 0.04 * (alphas.index(alpha) - (len(alphas) - 1) / 2)  # keeps error bars apart
            mean_with_error(
                by_epoch,
                [i + shift for i in range(1, len(curves) + 1)],
                [m for m, _ in summary],
                [h for _, h in summary],
                label=f"{alpha:g}",
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
            )
        by_epoch.set(title="PPL per epoch, by alpha", xlabel="epoch", ylabel="validation perplexity")
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_epoch.legend(title="alpha", ncols=2, fontsize=9, title_fontsize=9, loc="upper right")
        style = {"color": colours(1)[0], "marker": "o"}
        mean_with_error(final, alphas, [r["val_ppl"] for r in table], [r["val_ppl_95"] for r in table], **style)
        final.set(title="Final PPL", xlabel="alpha", ylabel="validation perplexity")
        convergence.plot(alphas, [r["convergence_epoch"] for r in table], **style)
        convergence.set(title="Convergence", xlabel="alpha", ylabel="epoch of 90% improvement")
        convergence.set_ylim(bottom=0)
        variances = [r["gradient_variance"] for r in table]
        variance.plot(alphas, variances, **style)
        variance.set(title="Gradient-norm variance", xlabel="alpha")
        wide_range_axis(variance.yaxis, variances, "variance over steps")
        for axes in (final, convergence, variance):
            axes.set_xticks(alphas if len(alphas) <= 6 else alphas[::2])

    return save_figure(path, draw, title=title, note=note, size=(8.4, 7.8))


def draw_training(path: Path, final: dict[str, Any], baselines: list[dict[str, Any]], note: str) -> Path:
    """Train and validation perplexity of the final training, with the n-gram baselines of the same tokens."""
    epochs = final["epochs"]
    last = epochs[-1]["val_perplexity"]
    shown = [b for b in baselines if b["val_ppl"] is not None]
    beaten = [b["name"] for b in shown if last < b["val_ppl"]]
    missed = [b["name"] for b in shown if last >= b["val_ppl"]]
    verdict = f"below {', '.join(beaten)}" if beaten else "below none of the baselines"
    if beaten and missed:
        verdict += f"; above {', '.join(missed)}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x = [e["epoch"] for e in epochs]
        axes.plot(x, [e["train_perplexity"] for e in epochs], marker="o", color=colours(2)[0], label="training")
        axes.plot(x, [e["val_perplexity"] for e in epochs], marker="s", color=colours(2)[1], label="validation")
        for baseline, line in zip(shown, ("--", "-.", ":", (0, (6, 1))), strict=False):
            label = f"{baseline['name']} ({baseline['val_ppl']:.0f})"
            axes.axhline(baseline["val_ppl"], color=GREY, linestyle=line, linewidth=1.5, label=label)
        curves = [e[key] for e in epochs for key in ("train_perplexity", "val_perplexity")]
        wide_range_axis(axes.yaxis, curves + [b["val_ppl"] for b in shown], "perplexity")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes, ncols=3, fontsize=10)

    title = f"Trained with alpha {final['alpha']:g}: ends at validation PPL {last:.1f}, {verdict}"
    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.2))


def draw_directions(path: Path, directions: list[dict[str, Any]], note: str) -> Path:
    """Cosine with the exact gradient and length against alpha, at the weights after one epoch and at the end."""
    blends = [r for r in directions if r["direction"].startswith("alpha ")]
    early = {r["direction"]: r["cosine"] for r in directions if r["weights"] == WHEN_MEASURED[0]}

    def draw(figure: Figure) -> None:
        cosine, ratio = figure.subplots(1, 2)
        for when, colour, marker in zip(WHEN_MEASURED, colours(2), MARKERS, strict=False):
            rows = [r for r in blends if r["weights"] == when]
            x = [float(r["direction"].split()[1]) for r in rows]
            style = {"color": colour, "marker": marker, "label": when}
            mean_with_error(cosine, x, [r["cosine"] for r in rows], [r["cosine_95"] for r in rows], **style)
            ratio.plot(x, [r["norm_ratio"] for r in rows], **style)
        cosine.axhline(1, color=GREY, linewidth=1, linestyle="--")
        cosine.set(title="Direction", xlabel="alpha", ylabel="cosine with the exact gradient")
        ratio.axhline(1, color=GREY, linewidth=1, linestyle="--")
        ratio.set(title="Length", xlabel="alpha")
        wide_range_axis(ratio.yaxis, [r["norm_ratio"] for r in blends], "norm / exact norm")
        legend_below(cosine, fontsize=10, ncols=2)

    title = (
        f"Cosine with the exact gradient after one epoch: diagonal term {early['local']:+.2f}, hypothesis-7 "
        f"{early['hypothesis-7']:+.2f}; as the original wrote them (unconjugated) {early['original']:+.2f} and "
        f"{early['original hypothesis-7']:+.2f}"
    )
    return save_figure(path, draw, title=title, note=note, size=(8.4, 5.0))


def draw_experts(path: Path, final: dict[str, Any], note: str) -> Path:
    """Share of the training tokens that each expert received, per epoch and layer, in the final training."""
    counts = [e["expert_counts"] for e in final["epochs"]]  # epoch, layer, expert
    layers, experts = len(counts[0]), len(counts[0][0])
    entropies = [usage_entropy(layer, normalised=True) for layer in counts[-1]]

    def draw(figure: Figure) -> None:
        for layer, axes in enumerate(figure.subplots(1, layers, sharey=True, squeeze=False)[0]):
            shares = [[c / max(1, sum(epoch[layer])) for c in epoch[layer]] for epoch in counts]
            x = range(1, len(shares) + 1)
            for expert, (colour, marker) in enumerate(zip(colours(experts), MARKERS * 40, strict=False)):
                axes.plot(
                    x, [100 * s[expert] for s in shares], color=colour, marker=marker, label=f"{expert + 1}"
                )
            axes.axhline(100 / experts, color=GREY, linewidth=1, linestyle="--")
            axes.set(title=f"layer {layer + 1}", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        first = figure.axes[0]
        first.set(ylabel="% of training tokens", ylim=(0, 100 if experts < 3 else None))
        legend_below(first, title="expert", ncols=min(experts, 8), fontsize=10)

    title = (
        f"Expert use in the last epoch: entropy {min(entropies):.2f} to {max(entropies):.2f} of an even one's"
    )
    if experts == 1:
        title = "One expert: every token visits it"
    return save_figure(path, draw, title=title, note=note, size=(8.4, 4.2))
