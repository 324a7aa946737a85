"""The sweep's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bklm.harness.comparison import Trial
from bklm.harness.figures import (
    GREY,
    MARKERS,
    colours,
    legend_below,
    mean_with_error,
    save_figure,
    wide_range_axis,
)
from bklm.harness.statistics import Perplexity
from bklm.harness.text import drawn_baselines
from bklm.moe.layer import usage_entropy
from bklm.studies.grad_blend.tables import ALPHAS, WHEN_MEASURED


def draw_analysis(
    path: Path, trials: Sequence[Trial], table: list[dict[str, Any]], title: str, note: str
) -> Path:
    """The original's four panels: PPL per epoch by alpha; final PPL, convergence and gradient variance against alpha."""
    groups = ALPHAS.groups(trials)
    every_alpha = [row["alpha"] for row in table]
    lost = [row["alpha"] for row in table if not row["seeds"]]
    table = [row for row in table if row["seeds"]]
    alphas = [row["alpha"] for row in table]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 2)
        by_epoch, final, convergence, variance = axes.flat
        for (alpha, group), colour, marker in zip(
            groups.items(), colours(len(groups)), MARKERS * 9, strict=False
        ):
            curves = list(zip(*[[e["val_perplexity"] for e in t["epochs"]] for t in group], strict=True))
            summary = [Perplexity.over_seeds(epoch) for epoch in curves]
            shift = 0.04 * (alphas.index(alpha) - (len(alphas) - 1) / 2)  # keeps error bars apart
            mean_with_error(
                by_epoch,
                [i + shift for i in range(1, len(curves) + 1)],
                [p.mean for p in summary],
                [(p.low, p.high) for p in summary],
                label=f"{alpha:g}",
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
            )
        by_epoch.set(title="PPL per epoch", xlabel="epoch")
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        _perplexity_axis(by_epoch, [e["val_perplexity"] for t in ALPHAS.finished(trials) for e in t["epochs"]])
        legend_below(by_epoch, title="alpha", ncols=4, fontsize=9, title_fontsize=9)
        style = {"color": colours(1)[0], "marker": "o"}
        means = [r["val_ppl"] for r in table]
        mean_with_error(final, alphas, means, [(r["val_ppl_low"], r["val_ppl_high"]) for r in table], **style)
        final.set(title="Final PPL", xlabel="alpha")
        _perplexity_axis(final, means)
        convergence.plot(alphas, [r["convergence_epoch"] for r in table], **style)
        convergence.set(title="Convergence", xlabel="alpha", ylabel="epoch of 90% improvement")
        # Room above, or the highest point is cut in half.
        convergence.set_ylim(0, 1.05 * convergence.get_ylim()[1])
        never = [r["alpha"] for r in table if r["convergence_epoch"] is None]
        variances = [r["gradient_variance"] for r in table]
        variance.plot(alphas, variances, **style)
        variance.set(title="Gradient-norm variance", xlabel="alpha")
        wide_range_axis(variance.yaxis, variances, "variance over steps")
        for axes in (final, convergence, variance):
            axes.set_xticks(every_alpha if len(every_alpha) <= 6 else every_alpha[::2])
            # Also where the outer alphas have no point: their words need room.
            axes.set_xlim(min(every_alpha) - 0.06, max(every_alpha) + 0.06)
            said = dict.fromkeys(never if axes is convergence else (), "never") | dict.fromkeys(
                lost, "diverged"
            )
            for alpha, word in said.items():
                place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "center"}
                axes.text(alpha, 0.5, word, rotation=90, color=GREY, fontsize=10, **place)

    return save_figure(path, draw, title=title, note=note, size=(8.4, 7.8))


def _perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    """A perplexity axis ruled by the points: the interval of a diverged alpha may leave it, the others stay readable."""
    drawn = axes.dataLim
    lowest, highest = min(values) / 2, max(values) * 3
    if drawn.y1 > highest or drawn.y0 < lowest:
        axes.set_title(f"{axes.get_title(loc='left')} (intervals cut)")
    wide_range_axis(axes.yaxis, values, "validation PPL")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, lowest), min(high, highest))


def draw_training(path: Path, final: Trial, baselines: list[dict[str, Any]], note: str) -> Path:
    """Train and validation perplexity of the final training, with the n-gram baselines of the same tokens."""
    epochs = final["epochs"]
    last = epochs[-1]["val_perplexity"]
    shown = drawn_baselines(baselines)
    beaten = [b["name"] for b in shown if last < b["val_ppl"]]
    missed = [b["name"] for b in shown if last >= b["val_ppl"]]
    verdict = f"below {', '.join(beaten)}" if beaten else "below none of the baselines"
    if beaten and missed:
        verdict += f"; above {', '.join(missed)}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # Of a loss with a further term there is no perplexity, and no curve.
        x, train, valid = ([e[k] for e in epochs] for k in ("epoch", "train_perplexity", "val_perplexity"))
        axes.plot(x, train, marker="o", color=colours(2)[0], label="training" if all(train) else None)
        axes.plot(x, valid, marker="s", color=colours(2)[1], label="validation")
        for baseline, line in zip(shown, ("--", "-.", ":", (0, (6, 1))), strict=False):
            label = f"{baseline['name']} ({baseline['val_ppl']:.0f})"
            axes.axhline(baseline["val_ppl"], color=GREY, linestyle=line, linewidth=1.5, label=label)
        told = [*filter(None, train), *valid, *(b["val_ppl"] for b in shown)]
        wide_range_axis(axes.yaxis, told, "perplexity")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes, ncols=3, fontsize=10)

    title = f"Trained with alpha {final['alpha']:g}: ends at validation PPL {last:.1f}, {verdict}"
    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.2))


def draw_directions(path: Path, directions: list[dict[str, Any]], note: str) -> Path:
    """Cosine with the exact gradient and length against alpha, at the weights after one epoch and at the end."""
    blends = [r for r in directions if r["direction"].startswith("alpha ")]
    # Without the sign of a rounded zero.
    early = {
        r["direction"]: round(r["cosine"], 2) + 0.0 for r in directions if r["weights"] == WHEN_MEASURED[0]
    }

    def draw(figure: Figure) -> None:
        cosine, ratio = figure.subplots(1, 2)
        for when, colour, marker in zip(WHEN_MEASURED, colours(2), MARKERS, strict=False):
            rows = [r for r in blends if r["weights"] == when]
            x = [float(r["direction"].split()[1]) for r in rows]
            style = {"color": colour, "marker": marker, "label": when}
            means = [r["cosine"] for r in rows]
            mean_with_error(cosine, x, means, [(r["cosine_low"], r["cosine_high"]) for r in rows], **style)
            lengths = [(r["norm_ratio_low"], r["norm_ratio_high"]) for r in rows]
            mean_with_error(ratio, x, [r["norm_ratio"] for r in rows], lengths, **style)
        cosine.axhline(1, color=GREY, linewidth=1, linestyle="--")
        cosine.set(title="Direction", xlabel="alpha", ylabel="cosine with the exact gradient")
        ratio.axhline(1, color=GREY, linewidth=1, linestyle="--")
        ratio.set(title="Length", xlabel="alpha")
        wide_range_axis(ratio.yaxis, [r["norm_ratio"] for r in blends], "norm / exact norm")
        legend_below(cosine, fontsize=10, ncols=2)

    title = f"Cosine with the exact gradient after one epoch: hypothesis-7 {early['hypothesis-7']:+.2f}"
    if "local" in early:
        title += (
            f", diagonal term {early['local']:+.2f}; unconjugated, as published: {early['original']:+.2f} and "
            f"{early['original hypothesis-7']:+.2f}"
        )
    return save_figure(path, draw, title=title, note=note, size=(8.4, 5.0))


def draw_experts(path: Path, final: Trial, note: str) -> Path:
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
            axes.axhline(100 / experts, color=GREY, linewidth=1, linestyle="--", label="even")
            axes.set(title=f"layer {layer + 1}", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        first = figure.axes[0]
        first.set(ylabel="% of training tokens", ylim=(0, 105 if experts < 3 else None))
        legend_below(first, title="expert", ncols=2, fontsize=10)

    title = (
        f"Expert use in the last epoch: entropy {min(entropies):.2f} to {max(entropies):.2f} of an even one's"
    )
    if experts == 1:
        title = "One expert: every token visits it"
    return save_figure(path, draw, title=title, note=note, size=(8.4, 4.2))
