"""The baseline study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
from bklm.studies.baseline.models import TITLES
from bklm.studies.baseline.tables import REPORTED_EPOCHS, Runs, by_model
from bklm.studies.baseline.text import BaselineText

if TYPE_CHECKING:
    from bklm.studies.baseline.config import BaselineConfig

MODELS = tuple(TITLES)  # a model's place here gives its colour in every figure
_LINES = ("--", "-.", ":", (0, (6, 1)))


def describe_run(config: BaselineConfig, text: BaselineText, searched: Sequence[dict[str, Any]] = ()) -> str:
    """The small print of a figure: data, sizes, seeds, and the budget of the learning-rate search."""
    seeds = len(config.seeds)
    parts = [
        f"{text.corpus.name}, {text.train_targets:,} training targets an epoch, vocabulary {text.vocab_size:,}",
        f"batch {config.batch_size} x {config.seq_len}",
        f"{seeds} seeds, bars: 95% interval" if seeds > 1 else "1 seed, no interval",
    ]
    if searched:
        steps, tried = searched[0]["steps"], len({r["learning_rate"] for r in searched})
        parts.append(f"each model's learning rate: best of {tried} over {steps} steps")
    else:
        parts.append(f"learning rate {config.learning_rates[0]:g} for all")
    if config.protocol == "original":
        parts.append("the original's windows: an overlap's targets count twice")
    if config.validation == "valid+test":
        parts.append(
            "validation holds the test split too, which early stopping and the choice of rate and epoch saw"
        )
    if text.is_demonstration:
        parts.insert(0, "Demonstration")
    return "; ".join(parts) + "."


def draw_curves(
    path: Path,
    runs: Runs,
    text: BaselineText,
    config: BaselineConfig,
    title: str,
    searched: Sequence[dict[str, Any]] = (),
) -> Path:
    """Validation perplexity per epoch of every model, the original's epochs and the n-gram baselines with them."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown: list[float] = []
        for name, group in by_model(runs).items():
            place = MODELS.index(name)
            epochs = min(len(r["epochs"]) for r in group)  # a run that ended early ends the mean
            curves = [[r["epochs"][i]["val_perplexity"] for r in group] for i in range(epochs)]
            summary = [Perplexity.over_seeds(values) for values in curves]
            style = {"color": colours(len(MODELS))[place], "marker": MARKERS[place]}
            mean_with_error(
                axes,
                range(1, epochs + 1),
                [p.mean for p in summary],
                [(p.low, p.high) for p in summary],
                label=f"{TITLES[name]} ({group[0]['parameters'] / 1e6:.2g} M)",
                **style,
            )
            shown += [p.mean for p in summary]
            train = [
                Perplexity.over_seeds([r["epochs"][i]["train_perplexity"] for r in group]).mean
                for i in range(epochs)
            ]
            axes.plot(range(1, epochs + 1), train, color=style["color"], linewidth=1, alpha=0.5)
            shown += train
        last = max(len(r["epochs"]) for r in runs)
        reported = [r for r in REPORTED_EPOCHS if r["epoch"] <= last]
        axes.plot(
            [r["epoch"] for r in reported],
            [r["val_ppl"] for r in reported],
            color="black", marker="x", linestyle="none", label="original's report (its windows)",
        )  # fmt: skip
        shown += [r["val_ppl"] for r in reported]
        for baseline, line in zip(text.baselines[1:], _LINES, strict=False):
            axes.axhline(
                baseline["val_ppl"], color=GREY, linestyle=line, linewidth=1.2,
                label=f"{baseline['name']} ({baseline['val_ppl']:.0f})",
            )  # fmt: skip
            shown.append(baseline["val_ppl"])
        wide_range_axis(axes.yaxis, shown, "perplexity (thin: training)")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes, ncols=3, fontsize=10)

    return save_figure(path, draw, title=title, note=describe_run(config, text, searched), size=(7.6, 5.6))


def draw_contexts(path: Path, table: list[dict[str, Any]], config: BaselineConfig, note: str) -> Path | None:
    """Validation perplexity against context length; None where the windows have no longer contexts."""
    points = {
        row["model"]: [
            (int(key.rpartition("_")[2]), value)
            for key, value in row.items()
            if key.startswith("val_ppl_context_") and value is not None
        ]
        for row in table
    }
    points = {name: values for name, values in points.items() if values}
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, values in points.items():
            place = MODELS.index(name)
            x, y = zip(*values, strict=True)
            axes.plot(x, y, color=colours(len(MODELS))[place], marker=MARKERS[place], label=TITLES[name])
        axes.axvline(config.seq_len, color=GREY, linestyle="--", linewidth=1, label="length trained with")
        axes.set_xscale("log", base=2)
        lengths = sorted({x for values in points.values() for x, _ in values})
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_xlabel("window length: most context a target can have")
        found = [y for values in points.values() for _, y in values]
        wide_range_axis(axes.yaxis, found, "validation PPL")
        if max(found) < 1.02 * min(found):  # a flat line, not the last digits of its numbers
            axes.set_ylim(0.95 * min(found), 1.05 * max(found))
        legend_below(axes, ncols=4, fontsize=10)

    longest = {name: values[-1][0] for name, values in points.items()}
    ends = [f"{TITLES[n]} ends at {x}" for n, x in longest.items() if x < max(longest.values())]
    gains = ", ".join(
        f"{TITLES[n]} {dict(v)[min(dict(v))]:.1f} to {min(y for _, y in v):.1f}" for n, v in points.items()
    )
    title = f"What longer context brings: {gains}" + (f"; {', '.join(ends)}" if ends else "")
    return save_figure(path, draw, title=title, note=f"{note} The same targets at every length.")
