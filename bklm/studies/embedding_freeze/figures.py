"""The embedding-freeze study's figures; each title says what was found."""

from __future__ import annotations

import math
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
from bklm.harness.statistics import Perplexity, interval95
from bklm.studies.embedding_freeze.config import FACTORS
from bklm.studies.embedding_freeze.tables import ARMS

LINES = {"frozen": "-", "trained": "--"}


def draw_arms(
    path: Path, table: list[dict[str, Any]], baselines: list[dict[str, Any]], title: str, note: str
) -> Path:
    """Validation PPL of every arm with its interval, one colour per sample size, the best count model of each beside."""
    names = list(dict.fromkeys(row["arm"] for row in table))
    sizes = sorted({row["samples"] for row in table})
    found = [row for row in table if row["seeds"]]
    values = [row["val_ppl"] for row in found]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (size, colour) in enumerate(zip(sizes, colours(len(sizes)), strict=True)):
            shift = 0.14 * (place - (len(sizes) - 1) / 2)
            rows = [row for row in found if row["samples"] == size]
            mean_with_error(
                axes, [names.index(row["arm"]) + shift for row in rows], [row["val_ppl"] for row in rows],
                [(row["val_ppl_low"], row["val_ppl_high"]) for row in rows], sideways=True,
                fmt=MARKERS[place % len(MARKERS)], color=colour, capsize=3, label=f"{size} samples",
            )  # fmt: skip
            for row in (row for row in table if row["samples"] == size and not row["seeds"]):
                where = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center", "fontsize": 9}
                axes.text(0.5, names.index(row["arm"]) + shift, "diverged", color=colour, **where)
            own = [b for b in baselines if b["samples"] == size]
            if own:
                counted = min(own, key=lambda b: b["val_ppl"])
                label = f"{counted['name'].partition(',')[0]}, {size} samples ({counted['val_ppl']:.0f})"
                axes.axvline(counted["val_ppl"], color=colour, linestyle=":", linewidth=1.5, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        wide_range_axis(axes.xaxis, values, "validation PPL")
        axes.set_xlim(min(axes.get_xlim()[0], 0.95 * min(values)), min(axes.get_xlim()[1], 2 * max(values)))
        # One column: beside long names the axes are too narrow for two.
        legend_below(axes, ncols=1, fontsize=10)

    farthest = max(row["val_ppl_high"] or 0 for row in found)
    if farthest > 2 * max(values):
        note = f"Bars that reach the edge go on beyond it, to {farthest:,.0f} at most. {note}"
    return save_figure(path, draw, title=title, note=note, size=(8.0, 2.6 + 0.36 * len(names)))


def draw_curves(path: Path, trials: Sequence[Trial], note: str) -> Path:
    """PPL per epoch of finished controlled arms: validation thick, training thin; one panel per sample size and head."""
    controlled = [t for t in trials if not t["original"]] or list(trials)
    sizes = sorted({t["samples"] for t in controlled})
    heads = [head for head in FACTORS["head"] if any(t["head"] == head for t in controlled)]
    palette = dict(zip(FACTORS["initialisation"], colours(2), strict=True))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(heads), len(sizes), sharex=True, sharey=True, squeeze=False)
        for panels, head in zip(grid, heads, strict=True):
            for axes, size in zip(panels, sizes, strict=True):
                shown = [t for t in controlled if t["samples"] == size and t["head"] == head]
                for name, group in ARMS.groups(shown).items():
                    colour, line = palette[group[0]["initialisation"]], LINES[group[0]["freezing"]]
                    style = {"color": colour, "linestyle": line}
                    _curve(axes, group, "val_perplexity", label=name.rsplit(",", 1)[0], **style)
                    _curve(axes, group, "train_perplexity", linewidth=1, alpha=0.7, **style)
                axes.set_title(f"{head} head, {size} samples")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        keys = ("val_perplexity", "train_perplexity")
        values = [e[key] for t in controlled for e in t["epochs"] for key in keys]
        for axes in grid.flat:
            wide_range_axis(axes.yaxis, [max(v, 1.0) for v in values], "perplexity")
        for axes in grid[:, 1:].flat:
            axes.set_ylabel("")
        for axes in grid[-1]:
            axes.set_xlabel("epoch of phase 2")
        # Long enough to show a dashed line.
        legend_below(grid[-1, 0], ncols=2, fontsize=9, handlelength=4)

    best = min(controlled, key=lambda t: t["val_ppl"])
    where = f"{best['arm']}, {best['samples']} samples, epoch {best['best_epoch']}"
    title = f"Lowest validation PPL {best['val_ppl']:.1f}: {where}"
    note = f"Thick: validation, thin: training; geometric mean over the seeds still running. {note}"
    return save_figure(path, draw, title=title, note=note, size=(8.4, 2.4 + 2.7 * len(heads)))


def _curve(axes: Axes, group: Sequence[Trial], key: str, **style: object) -> None:
    longest = max(len(t["epochs"]) for t in group)
    means = []
    for epoch in range(longest):
        values = [t["epochs"][epoch][key] for t in group if len(t["epochs"]) > epoch]
        means.append(Perplexity.over_seeds(values).mean)
    marker = {} if "linewidth" in style else {"marker": "o", "markersize": 4}
    axes.plot(range(1, longest + 1), means, **marker, **style)


def draw_effects(path: Path, effects: list[dict[str, Any]], note: str) -> Path | None:
    """Ratio of perplexities of each factor's two values, over all cells and within each value of the others."""
    if not effects:
        return None
    verdicts = {"lower": "#009E73", "no difference": GREY, "higher": "#D55E00", "no verdict": GREY}
    beyond = [e for e in effects if e["where"] == "all" and e["verdict"] in ("lower", "higher")]
    overall = [e for e in effects if e["where"] == "all"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(effects):
            style = {"fmt": "D" if row["where"] == "all" else "o", "color": verdicts[row["verdict"]]}
            ends = [(row["ratio_low"], row["ratio_high"])]
            mean_with_error(axes, [place], [row["ratio"]], ends, sideways=True, capsize=3, **style)
        axes.axvline(1, color="black", linewidth=1)
        labels = [row["change"] if row["where"] == "all" else row["where"] for row in effects]
        axes.set_yticks(range(len(effects)), labels, fontsize=10)
        for label, row in zip(axes.get_yticklabels(), effects, strict=True):
            label.set_fontweight("bold" if row["where"] == "all" else "normal")
        axes.set_ylim(len(effects) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        # Ruled by the points: an interval from two seeds may leave the picture.
        reach = 1.6 * max(abs(math.log(row["ratio"])) for row in effects) + 0.05
        wide_range_axis(axes.xaxis, [math.exp(-reach), math.exp(reach)], "ratio of PPL")
        axes.set_xlim(math.exp(-reach), math.exp(reach))

    title = f"{len(beyond)} of {len(overall)} changes move validation PPL beyond the 95% interval"
    if any(e["verdict"] == "no verdict" for e in overall):
        title = "Effects on validation PPL; not every one has an interval"
    words = "Ratio over paired seeds; below 1 the change lowers PPL. Bold: over all cells; below it, within one value."
    words += " Bars that reach the edge go on beyond it."
    size = (8.0, 2.4 + 0.3 * max(3, len(effects)))
    return save_figure(path, draw, title=title, note=f"{words} {note}", size=size)


def draw_phase1(path: Path, phase1: Sequence[dict[str, Any]], note: str) -> Path:
    """Converged tokens and effective rank (plain and centred) per iteration, mean over seeds with 95% intervals."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in phase1:
        groups.setdefault((run["initialisation"], run["samples"]), []).append(run)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3)
        kinds = (("converged", "Tokens converged, %"), ("effective_rank", "Effective rank, %"))
        kinds += (("effective_rank_centred", "The same, centred, %"),)
        for axes, (key, title) in zip(panels, kinds, strict=True):
            for ((name, size), runs), colour, marker in zip(
                groups.items(), colours(len(groups)), MARKERS * 9, strict=False
            ):
                longest = max(len(run["rows"]) for run in runs)
                going = [[run["rows"][i] for run in runs if len(run["rows"]) > i] for i in range(longest)]
                summary = [interval95([100 * row[key] for row in rows]) for rows in going]
                ends = [(None, None) if half is None else (mean - half, mean + half) for mean, half in summary]
                mean_with_error(
                    axes, range(1, longest + 1), [mean for mean, _ in summary], ends,
                    color=colour, marker=marker, markersize=4, linewidth=1.5, capsize=2,
                    label=f"{name}, {size}",
                )  # fmt: skip
            axes.set(title=title, xlabel="iteration")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.set_ylim(0, 105)
        legend_below(panels[1], ncols=2, fontsize=10)

    last = [run["rows"][-1] for run in phase1]
    converged, ranks = [r["converged"] for r in last], [r["effective_rank"] for r in last]
    title = f"Phase 1 ends with {_range(converged)} of tokens converged and an effective rank of {_range(ranks)} of the width"
    words = "Lines: embedding, training documents; means over the seeds still running. Iteration 1 gives the first contexts."
    return save_figure(path, draw, title=title, note=f"{words} {note}", size=(8.8, 4.6))


def _range(shares: Sequence[float]) -> str:
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return f"{low}%" if low == high else f"{low} to {high}%"


def draw_budget(path: Path, table: list[dict[str, Any]], rule: int, note: str) -> Path:
    """Validation PPL and train-validation gap against training tokens per trained parameter; the rule's as a line."""
    found = [row for row in table if row["seeds"]]
    rows = [row for row in found if "original" not in row["arm"]] or found
    sizes = sorted({row["samples"] for row in rows})

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for size, colour, marker in zip(sizes, colours(len(sizes)), MARKERS * 9, strict=False):
            own = [row for row in rows if row["samples"] == size]
            x = [row["tokens_per_parameter"] for row in own]
            style = {"color": colour, "marker": marker, "linestyle": "none", "label": f"{size} samples"}
            left.plot(x, [row["val_ppl"] for row in own], **style)
            right.plot(x, [row["gap"] for row in own], **style)
        ratios = [row["tokens_per_parameter"] for row in rows]
        for axes in (left, right):
            wide_range_axis(axes.xaxis, [*ratios, rule], "tokens / parameter")
            axes.axvline(rule, color=GREY, linestyle="--", linewidth=1)
        wide_range_axis(left.yaxis, [row["val_ppl"] for row in rows], "validation PPL")
        right.set_ylabel("val - train loss, nats")
        legend_below(left, ncols=2, fontsize=10)

    met = sum(row["tokens_per_parameter"] >= rule for row in rows)
    title = f"{met or 'None'} of {len(rows)} arms {'has' if met < 2 else 'have'} {rule} tokens per trained parameter"
    note = f"Dashed: the rule's {rule} tokens per trained parameter. {note}"
    return save_figure(path, draw, title=title, note=note, size=(8.4, 5.0))
