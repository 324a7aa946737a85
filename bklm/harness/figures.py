"""One look for every figure: colour-blind safe, readable at phone width, drawn without pyplot's global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from bklm.files.atomic import replacing

# Okabe and Ito's palette, black last; distinct under the common colour-vision deficiencies and in print.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6e6e6e"

STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "errorbar.capsize": 4,
    "figure.dpi": 110,
    "savefig.dpi": 160,
}


def colours(n: int) -> list[tuple[float, float, float, float]] | list[str]:
    """``n`` distinguishable colours: the palette, or for more than it holds steps of a perceptual map."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [mpl.colormaps["viridis"](0.95 * i / (n - 1)) for i in range(n)]


def save_figure(
    path: Path,
    draw: Callable[[Figure], None],
    *,
    title: str,
    note: str = "",
    size: tuple[float, float] = (7.2, 4.6),
) -> Path:
    """Draw a figure and write it as PNG, atomically.

    Args:
        draw: fills the figure with axes.
        title: the finding, as a sentence.
        note: what a reader must know to judge it (data, seeds, "sees the future"); small print below.
        size: inches; 7.2 is readable on a phone.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        draw(figure)
        lines = "\n".join(textwrap.wrap(title, int(size[0] * 8.6)))
        figure.suptitle(lines, x=0.02, ha="left", fontsize=13, fontweight="bold")
        if note:
            figure.supxlabel(
                "\n".join(textwrap.wrap(note, int(size[0] * 11.2))), x=0.02, ha="left", fontsize=10, color=GREY
            )
        # Ticks are chosen for the room that axes have, which is left for what the ticks were: the second time both agree.
        figure.draw_without_rendering()
        with replacing(path) as temporary:
            # Whoever shows the picture can say what it shows (page.py).
            figure.savefig(temporary, metadata={"Title": title, "Description": note})
    return path


def mean_with_error(
    axes: Axes,
    x: Sequence[float],
    means: Sequence[float],
    intervals: Sequence[tuple[float | None, float | None]],
    sideways: bool = False,
    **style: object,
) -> None:
    """Points with bars from the lower to the upper end of an interval; no bar where one seed gives none (None).

    ``sideways``: the means go to the right, and ``x`` goes up.
    """
    errors = None
    if any(low is not None for low, _ in intervals):
        known = [(math.nan, math.nan) if low is None else (low, high) for low, high in intervals]
        errors = [
            [m - low for m, (low, _) in zip(means, known, strict=True)],
            [high - m for m, (_, high) in zip(means, known, strict=True)],
        ]
    if sideways:
        axes.errorbar(means, x, xerr=errors, **style)
    else:
        axes.errorbar(x, means, yerr=errors, **style)


def wide_range_axis(axis: Axis, values: Sequence[float], label: str) -> None:
    """A logarithmic axis where ``values`` span more than a factor of 10, a linear one otherwise; plain numbers as ticks."""
    name = axis.axis_name
    wide = min(values) > 0 and max(values) / min(values) > 10
    if wide:
        axis.axes.set(**{f"{name}scale": "log"})
        decades = math.log10(max(values) / min(values))
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axis.set_label_text(label + (" (log scale)" if wide else ""))


def legend_below(axes: Axes, **options: object) -> None:
    """A legend under the x label: for more entries than the title's line holds."""
    # Inches below the axes, whatever height the layout gives them in the end: ticks and label need about half of one.
    below = axes.transAxes + ScaledTranslation(0, -0.55, axes.figure.dpi_scale_trans)
    # Five entries of at most four a line stand 3 + 2, not 4 + 1.
    entries = len(axes.get_legend_handles_labels()[0])
    rows = math.ceil(entries / options.get("ncols", 1)) or 1
    options["ncols"] = math.ceil(entries / rows) or 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, **options)
