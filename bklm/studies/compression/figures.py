"""The compression study's figures; each title says what was found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from bklm.harness.figures import (
    GREY,
    MARKERS,
    colours,
    legend_below,
    mean_with_error,
    save_figure,
    wide_range_axis,
)
from bklm.studies.compression.tables import BITS, KINDS, MEGA, SMALLER, kind_of

COUNTED = "Kneser-Ney, by order"
RINGED = "recommended"
WIDTH = re.compile(r".*, width [\d.]+")
NARROWER = {"": ("narrower, float32", ":"), ": int8": ("narrower, int8", "-")}
"""By the ending of an arm: the label and the style of the line through narrower models."""
WORST = 3.0  # times the float model's perplexity: what is above says no more than that


def draw_files(
    path: Path, rows: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]],
    recommended: Sequence[Mapping[str, Any]], unigram: float, title: str, note: str,
) -> Path | None:  # fmt: skip
    """Perplexity against the size of the packed file, a panel per model; the line to beat are smaller models and counting;
    what is recommended is ringed; above the unigram model's line nothing was read."""
    families = list(dict.fromkeys(r["family"] for r in rows if r["seeds"] and r["arm"] == r["family"]))
    if not families:
        return None
    kinds = [BITS, *dict.fromkeys(kind for _, kind in KINDS)]
    styles = dict(zip(kinds, zip(colours(len(kinds)), MARKERS, strict=False), strict=True))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(families), 1, squeeze=False)[:, 0]
        for axes, family in zip(panels, families, strict=True):
            own = [r for r in rows if r["family"] == family and r["seeds"] and r["packed_file_bytes"]]
            whole = next(r for r in own if r["arm"] == family)
            limit = max(WORST * whole["val_ppl"], 1.1 * unigram)
            shown = [r for r in own if r["val_ppl"] <= limit]
            for kind in kinds:
                points = sorted(
                    (r for r in shown if kind_of(r["arm"]) == kind), key=lambda r: r["packed_file_bytes"]
                )
                if points:
                    colour, marker = styles[kind]
                    style = {"color": colour, "marker": marker, "linestyle": "", "label": kind, "markersize": 5}
                    _points(axes, points, **style)
            for ending, (label, line) in NARROWER.items():
                ended = [r for r in shown if r["arm"].endswith(ending)]
                names = {family, *(a for r in ended if WIDTH.fullmatch(a := r["arm"].removesuffix(ending)))}
                dense = sorted(
                    (r for r in ended if r["arm"].removesuffix(ending) in names),
                    key=lambda r: r["packed_file_bytes"],
                )
                if len(dense) > 1:
                    axes.plot(
                        [r["packed_file_bytes"] / MEGA for r in dense], [r["val_ppl"] for r in dense], linestyle=line,
                        color=styles[SMALLER][0], linewidth=1, label=label,
                    )  # fmt: skip
            ringed = [r for r in recommended if r["family"] == family and r["val_ppl"] <= limit]
            axes.plot(
                [r["packed_file_bytes"] / MEGA for r in ringed], [r["val_ppl"] for r in ringed], color="#000000", marker="o",
                markersize=11, fillstyle="none", linestyle="", label=RINGED,
            )  # fmt: skip
            near = [r for r in counted if r["val_ppl"] <= limit]
            axes.plot(
                [r["packed_file_bytes"] / MEGA for r in near], [r["val_ppl"] for r in near], color="#000000", marker="*",
                markersize=9, linestyle="", label=COUNTED, zorder=5,
            )  # fmt: skip
            for row in near:
                order = row["arm"].removeprefix("Kneser-Ney ").partition("-")[0]
                place = row["packed_file_bytes"] / MEGA, row["val_ppl"]
                halo = [withStroke(linewidth=2, foreground="white")]
                style = {"fontsize": 9, "zorder": 6, "path_effects": halo}
                axes.annotate(order, place, (5, 4), textcoords="offset points", **style)
            axes.axhline(
                whole["val_ppl"], color=GREY, linewidth=1, linestyle="--", label="float32, as first trained"
            )
            axes.axhline(unigram, color="#000000", linewidth=1, linestyle="-.", label="unigram")
            sizes = [r["packed_file_bytes"] / MEGA for r in (*shown, *near)]
            wide_range_axis(axes.xaxis, sizes, "file packed by zlib, MB")
            # From 1, so that it is logarithmic whatever is shown.
            wide_range_axis(axes.yaxis, [1.0, limit], "validation PPL")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
            axes.set_title(family, fontsize=11)
        # One legend for all panels: what others show and the last does not is added to it.
        told = {label for axes in panels for label in axes.get_legend_handles_labels()[1]}
        told -= set(panels[-1].get_legend_handles_labels()[1])
        for label, line in NARROWER.values():
            if label in told:
                panels[-1].plot([], [], color=styles[SMALLER][0], linestyle=line, linewidth=1, label=label)
        for kind in (k for k in kinds if k in told):
            panels[-1].plot([], [], color=styles[kind][0], marker=styles[kind][1], linestyle="", label=kind)
        legend_below(panels[-1], ncols=3, fontsize=10)

    return save_figure(path, draw, title=title, note=note, size=(7.2, 1.8 + 3.1 * len(families)))


def _points(axes: Any, points: Sequence[Mapping[str, Any]], **style: Any) -> None:
    mean_with_error(
        axes,
        [r["packed_file_bytes"] / MEGA for r in points],
        [r["val_ppl"] for r in points],
        [(r["val_ppl_low"], r["val_ppl_high"]) for r in points],
        **style,
        elinewidth=0.8,
        capsize=2,
    )


def draw_speed(path: Path, rows: Sequence[Mapping[str, Any]], title: str, note: str) -> Path | None:
    """Scoring and writing, times as fast as in float32."""
    families = list(dict.fromkeys(r["family"] for r in rows))
    if not families:
        return None
    uses = {"times_faster": "scoring", "written_times_faster": "writing"}
    # Of all panels, so that they have one kind of scale.
    shown = [r[f"{key}_{end}"] for r in rows for key in uses for end in ("low", "high")]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(families), 1, squeeze=False)[:, 0]
        for axes, family in zip(panels, families, strict=True):
            own = [r for r in rows if r["family"] == family]
            for k, (key, label) in enumerate(uses.items()):
                ends = [(r[f"{key}_low"], r[f"{key}_high"]) for r in own]
                style = {"color": colours(2)[k], "marker": MARKERS[k], "linestyle": "", "label": label}
                heights = [i + 0.2 * k for i in range(len(own))]
                mean_with_error(axes, heights, [r[key] for r in own], ends, sideways=True, **style)
            axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
            axes.set_yticks(range(len(own)), [r["arm"] for r in own])
            axes.set(ylim=(len(own) - 0.4, -0.6))
            wide_range_axis(axes.xaxis, shown, "times as fast as float32")
            axes.set_title(family, fontsize=11)
        legend_below(panels[-1], ncols=2)

    height = 1.6 + sum(1.2 + 0.3 * sum(r["family"] == f for r in rows) for f in families)
    return save_figure(path, draw, title=title, note=note, size=(7.2, height))
