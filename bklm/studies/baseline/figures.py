"""The baseline study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from bklm.studies.baseline.models import CONTEXT_LENGTHS, TITLES
from bklm.studies.baseline.tables import MODELS, REPORTED_EPOCHS, Rows
from bklm.studies.baseline.text import BaselineText

ORDER = tuple(TITLES)  # a model's place here gives its colour in every figure
_LINES = ("--", "-.", ":", (0, (6, 1)))


def draw_curves(path: Path, runs: Sequence[Trial], text: BaselineText, title: str, note: str) -> Path:
    """Validation perplexity per epoch of every model, the n-gram baselines with them; on WikiText-2 the original's epochs."""
    baselines = text.baselines

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown: list[float] = []
        for name, group in MODELS.groups(runs).items():
            place = ORDER.index(name)
            epochs = min(len(r["epochs"]) for r in group)  # a run that ended early ends the mean
            curves = [[r["epochs"][i]["val_perplexity"] for r in group] for i in range(epochs)]
            summary = [Perplexity.over_seeds(values) for values in curves]
            style = {"color": colours(len(ORDER))[place], "marker": MARKERS[place]}
            style["label"] = f"{TITLES[name]} ({group[0]['parameters'] / 1e6:.2g} M)"
            x, means, intervals = (
                range(1, epochs + 1),
                [p.mean for p in summary],
                [(p.low, p.high) for p in summary],
            )
            mean_with_error(axes, x, means, intervals, **style)
            train = [[r["epochs"][i]["train_perplexity"] for r in group] for i in range(epochs)]
            train = [Perplexity.over_seeds(values).mean for values in train]
            axes.plot(x, train, color=style["color"], linewidth=1, alpha=0.5)
            shown += means + train
        last = max(len(r["epochs"]) for r in MODELS.finished(runs))
        reported = [r for r in REPORTED_EPOCHS if r["epoch"] <= last and text.is_the_originals]
        if reported:
            axes.plot(
                [r["epoch"] for r in reported],
                [r["val_ppl"] for r in reported],
                color="black", marker="x", linestyle="none", label="original's report (its windows)",
            )  # fmt: skip
        shown += [r["val_ppl"] for r in reported]
        for baseline, line in zip(drawn_baselines(baselines)[1:], _LINES, strict=False):
            axes.axhline(
                baseline["val_ppl"], color=GREY, linestyle=line, linewidth=1.2,
                label=f"{baseline['name']} ({baseline['val_ppl']:.0f})",
            )  # fmt: skip
            shown.append(baseline["val_ppl"])
        wide_range_axis(axes.yaxis, shown, "perplexity (thin: training)")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes, ncols=3, fontsize=10)

    return save_figure(path, draw, title=title, note=note, size=(7.6, 5.6))


def draw_contexts(path: Path, table: Rows, seq_len: int, note: str) -> Path | None:
    """Validation perplexity against context length; None where the windows have no longer contexts."""
    points = {}
    for row in table:
        values = [(n, row.get(f"val_ppl_context_{n}")) for n in CONTEXT_LENGTHS]
        if found := [(n, value) for n, value in values if value is not None]:
            points[row["model"]] = found
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, values in points.items():
            place = ORDER.index(name)
            x, y = zip(*values, strict=True)
            axes.plot(x, y, color=colours(len(ORDER))[place], marker=MARKERS[place], label=TITLES[name])
        axes.axvline(seq_len, color=GREY, linestyle="--", linewidth=1, label="length trained with")
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
