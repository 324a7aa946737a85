"""The dialogue study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bklm.harness.figures import (
    GREY,
    MARKERS,
    colours,
    legend_below,
    mean_with_error,
    save_figure,
    wide_range_axis,
)
from bklm.studies.dialogue.tables import WAYS, distances

Rows = Sequence[Mapping[str, Any]]
CONTEXT_NAMES = (
    "none",
    "last turn",
    "last three",
    "all",
    "all of another\ndialogue",
    "its last turn,\nanother's before",
)


def draw_arms(path: Path, rows: Rows, baselines: Rows, title: str, note: str) -> Path | None:
    """Perplexity of the replies per model and way of training, beside the best count model and the true law.

    Without those that were pretrained alone: they are off the scale of the others.
    """
    shown = [r for r in rows if r["val_ppl"] is not None and not r["arm"].endswith(" pretrained")]
    if not shown:
        return None
    names = list(dict.fromkeys(r["arm"].split()[0] for r in shown))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ways = [way for way in WAYS if way != "pretrained"]
        for k, (way, colour) in enumerate(zip(ways, colours(len(ways)), strict=True)):
            own = [r for r in shown if r["arm"].endswith(f" {way}")]
            ends = [(r["val_ppl_low"], r["val_ppl_high"]) for r in own]
            style = {"color": colour, "marker": MARKERS[k], "linestyle": "", "label": way}
            places = [names.index(r["arm"].split()[0]) + 0.14 * (k - 1.5) for r in own]
            mean_with_error(axes, places, [r["val_ppl"] for r in own], ends, sideways=True, **style)
        for line, style in zip(baselines, ("--", ":"), strict=False):
            axes.axvline(
                line["val_ppl"],
                color=GREY,
                linewidth=1.5,
                linestyle=style,
                label=line["name"].partition(" of ")[0],
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        values = [r["val_ppl"] for r in shown] + [line["val_ppl"] for line in baselines]
        wide_range_axis(axes.xaxis, values, "PPL of the replies")
        legend_below(axes, ncols=3)

    return save_figure(path, draw, title=title, note=note, size=(7.2, 3.4 + 0.7 * len(names)))


def draw_contexts(path: Path, rows: Rows, title: str, note: str) -> Path | None:
    """Perplexity of the same replies behind six contexts, one line a tuned model."""
    shown = [r for r in rows if r["arm"].endswith(" tuned")]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for aside, row, colour, marker in _side_by_side(shown):
            keys = [k[6:] for k in row if k.startswith("turns_")]
            values = [row[f"turns_{k}"] for k in keys]
            # No perplexity lies below 1, whatever the interval of few seeds says.
            ends = [
                (low and max(1.0, low), row[f"ppl_{k}_high"]) for k in keys for low in [row[f"ppl_{k}_low"]]
            ]
            style = {"color": colour, "marker": marker}
            places = [i + aside for i in range(len(values))]
            mean_with_error(axes, places[:4], values[:4], ends[:4], label=row["arm"].split()[0], **style)
            mean_with_error(axes, places[4:], values[4:], ends[4:], linestyle="", **style)
        axes.set_xticks(range(len(CONTEXT_NAMES)), CONTEXT_NAMES, fontsize=10)
        values = [v for row in shown for k, v in row.items() if k.startswith("turns_")]
        wide_range_axis(axes.yaxis, values, "PPL of the replies")
        axes.set_xlabel("turns before the reply that the model reads")
        # Between the short contexts and another dialogue's no model is that bad.
        axes.legend(loc="upper center")

    return save_figure(path, draw, title=title, note=note, size=(8.0, 4.8))


def draw_facts(path: Path, rows: Rows, chance: float, title: str, note: str) -> Path | None:
    """Share of right facts by turns back, one line a tuned model."""
    shown = [r for r in rows if r["arm"].endswith(" tuned")]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for aside, row, colour, marker in _side_by_side(shown):
            keys = distances(row)
            halves = [row[f"{k}_95"] for k in keys]
            ends = [
                (None, None) if h is None else (max(0.0, row[k] - h), min(1.0, row[k] + h))
                for k, h in zip(keys, halves, strict=True)
            ]
            style = {"color": colour, "marker": marker, "label": row["arm"].split()[0]}
            mean_with_error(axes, [int(k[9:]) + aside for k in keys], [row[k] for k in keys], ends, **style)
        axes.axhline(chance, color=GREY, linewidth=1.5, linestyle="--", label=f"chance, {chance:.0%}")
        axes.set(ylim=(0, 1.02), xlabel="turns back", ylabel="share of right facts")
        legend_below(axes, ncols=len(shown) + 1)

    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.0))


def _side_by_side(rows: Rows) -> Iterator[tuple[float, Mapping[str, Any], str, str]]:
    """How far aside of its place a row is drawn, so that no bar hides another; the row, its colour and its marker."""
    for i, (row, colour, marker) in enumerate(zip(rows, colours(len(rows)), MARKERS, strict=False)):
        yield 0.12 * (i - (len(rows) - 1) / 2), row, colour, marker
