"""Figures of the precision study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bklm.harness.figures import GREY, MARKERS, colours, legend_below, save_figure
from bklm.studies.precision import parts
from bklm.studies.precision.claims import UNDECIDED
from bklm.studies.precision.grid import LEFT_RIGHT, PRECISIONS, THETA_PHI, THETA_PHI_LOOP
from bklm.studies.precision.tables import RESOLVED_MB, Rows, first_overflow, of_arm, times_as_long, worst

COLOUR = dict(zip(PRECISIONS, colours(len(PRECISIONS)), strict=True))
MARKER = dict(zip(PRECISIONS, MARKERS, strict=False))
# So that lines which coincide all show.
WIDTH = dict(zip(PRECISIONS, (3.6, 1.4, 2.6, 1.4), strict=True))
LINE = {LEFT_RIGHT: "-", THETA_PHI: "--", THETA_PHI_LOOP: ":"}

# Of the error axes; what is not finite is drawn in a band at the top.
FLOOR, BAND, CEILING = 1e-17, 1e0, 1e5


def _log(axis: Any, decades: int = 1) -> None:
    axis.set_major_locator(LogLocator(base=10.0**decades, numticks=20))
    axis.set_minor_locator(NullLocator())
    low, high = axis.get_view_interval()
    # Powers of ten alone would leave such an axis with one tick or none.
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")


def _style(recursion: str, precision: str) -> dict[str, Any]:
    style = {"color": COLOUR[precision], "marker": MARKER[precision], "linestyle": LINE[recursion]}
    style |= {"markersize": 3 + 1.5 * WIDTH[precision], "linewidth": WIDTH[precision]}
    return style if recursion == LEFT_RIGHT else style | {"markerfacecolor": "white"}


def draw_errors(path: Path, table: Rows, note: str) -> Path:
    """Error of value and gradient against N, one row of panels per Im z; what is not finite in a band at the top."""
    shifts = list(dict.fromkeys(r["im_z"] for r in table))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shifts), 2, sharex=True, sharey=True, squeeze=False)
        for im_z, (value, gradient) in zip(shifts, grid, strict=True):
            rows = [r for r in table if r["im_z"] == im_z]
            _error_panel(value, rows, "value_error", ("complex64", "complex128"))
            _error_panel(gradient, rows, "gradient_error", PRECISIONS)
            value.set_ylabel(f"Im z = {im_z:g}\nrelative error")
        grid[0][0].set_title("value G (mixed, adaptive: as complex128)", fontsize=10)
        grid[0][1].set_title("gradient dL/da", fontsize=10)
        handles, labels = grid[0][1].get_legend_handles_labels()
        half = len(handles) // 2
        for axes, some in zip(grid[-1], (slice(half), slice(half, None)), strict=True):
            axes.set_xlabel("N, positions (log scale)")
            legend_below(axes, handles=handles[some], labels=labels[some], fontsize=10)

    size = (8.4, 2.4 + 2.3 * len(shifts))
    return save_figure(path, draw, title=errors_title(table), note=note, size=size)


def _error_panel(axes: Axes, rows: Rows, key: str, precisions: Sequence[str]) -> None:
    axes.set(xscale="log", yscale="log", ylim=(FLOOR, CEILING))
    axes.axhspan(BAND, CEILING, color="#eeeeee", zorder=0)
    axes.text(0.02, 0.97, "not finite", transform=axes.transAxes, va="top", fontsize=10, color=GREY)
    for recursion in (THETA_PHI, LEFT_RIGHT):
        for i, precision in enumerate(precisions):
            mine = of_arm(rows, recursion, precision)
            finite = [r for r in mine if r["status"] == "finite"]
            errors, label = [max(r[key], 2 * FLOOR) for r in finite], f"{recursion}, {precision}"
            axes.plot([r["n"] for r in finite], errors, label=label, **_style(recursion, precision))
            lost = [r["n"] for r in mine if r["status"] != "finite"]
            # One line of crosses per precision.
            height, style = BAND * 10 ** (0.6 + 1.0 * i), {"color": COLOUR[precision], "marker": "x"}
            axes.plot(lost, [height] * len(lost), linestyle="", markersize=6, **style)
    axes.set_yticks([10.0**e for e in (-16, -12, -8, -4, 0)])
    axes.yaxis.set_minor_locator(NullLocator())
    _log(axes.xaxis)


def errors_title(table: Rows) -> str:
    """Where theta/phi is lost, and that left/right is not, as far as was measured."""
    lost = {p: first_overflow(table, THETA_PHI, p) for p in ("complex64", "complex128")}
    words = [f"N = {n:,} ({p})" for p, n in lost.items() if n is not None]
    title = f"theta/phi overflows by {' and '.join(words)}; " if words else "theta/phi has not overflowed yet; "
    never = [p for p in PRECISIONS if first_overflow(table, LEFT_RIGHT, p) is None]
    errors = [worst(table, LEFT_RIGHT, p, "gradient_error")["gradient_error"] for p in never]
    if len(never) == len(PRECISIONS):
        n = table[-1]["n"]
        return f"{title}left/right is finite to N = {n:,}, gradient error at most {max(errors):.0e}"
    return title + f"left/right stayed finite in {', '.join(never) or 'no precision'} only"


def _plot_times(axes: Axes, key: str, rows: Rows, **style: Any) -> None:
    """Medians against ``key``, and a band of the quartiles."""
    x = [r[key] for r in rows]
    axes.plot(x, [r["ms"] for r in rows], **style)
    low, high = ([r[name] for r in rows] for name in ("ms_low", "ms_high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def draw_costs(path: Path, table: Rows, note: str) -> Path:
    """Time and peak memory of value and gradient against N, at the first Im z."""
    rows = [r for r in table if r["im_z"] == table[0]["im_z"]]

    def draw(figure: Figure) -> None:
        time, memory = figure.subplots(1, 2)
        for recursion in (LEFT_RIGHT, THETA_PHI, THETA_PHI_LOOP):
            precisions = PRECISIONS if recursion == LEFT_RIGHT else ("complex128",)
            for precision in precisions:
                mine = of_arm(rows, recursion, precision)
                style = _style(recursion, precision) | {"linewidth": 1.8, "markersize": 5}
                _plot_times(time, "n", [r for r in mine if r["ms"] is not None], **style)
                weighed = [r for r in mine if (r["peak_mb"] or 0) >= RESOLVED_MB]
                x, label = [r["n"] for r in weighed], f"{recursion}, {precision}"
                if weighed:
                    memory.plot(x, [r["peak_mb"] for r in weighed], label=label, **style)
        for axes in (time, memory):
            axes.set(xscale="log", yscale="log", xlabel="N, positions (log scale)")
        memory.set_xlim(time.get_xlim())
        if not memory.get_lines():
            # At short lengths every arm's memory is below what the system's counter tells apart.
            memory.set(xscale="linear", yscale="linear", xticks=[], yticks=[])
            memory.text(0.5, 0.5, "too little to be told apart", transform=memory.transAxes, ha="center")
        told = [axes for axes in (time, memory) if axes.get_lines()]
        for axis in (axis for axes in told for axis in (axes.xaxis, axes.yaxis)):
            _log(axis)
        time.set(title="Value and gradient", ylabel="ms, median and quartiles (log scale)")
        memory.set(title="Peak memory", ylabel="MB above the inputs (log scale)")
        handles, labels = (memory if memory.get_lines() else time).get_legend_handles_labels()
        for axes, some in ((time, slice(4)), (memory, slice(4, None))):
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": 10}
            axes.legend(handles[some], labels[some], **place)

    return save_figure(path, draw, title=costs_title(rows), note=note, size=(8.4, 5.6))


def costs_title(rows: Rows) -> str:
    """How complex64 and complex128 compare at the longest N that both were timed at."""
    n = max(r["n"] for r in rows if r["ms"] is not None and r["recursion"] == LEFT_RIGHT)
    at = {r["precision"]: r for r in rows if r["n"] == n and r["recursion"] == LEFT_RIGHT}
    single, double = at["complex64"], at["complex128"]
    title = f"At N = {n:,} left/right in complex128 takes {times_as_long(double, single)} times as long as in complex64"
    if single["peak_mb"] and double["peak_mb"]:
        title += f" and {double['peak_mb'] / single['peak_mb']:.1f} times the memory"
    return title


def draw_batched(path: Path, batched: Rows, backward: Rows, note: str) -> Path:
    """Time of a batch's gradients against its size: the original's three ways, autograd, and the fused operator."""

    def draw(figure: Figure) -> None:
        titles = ("Diagonal-term gradient", "Exact gradient")
        both = zip(figure.subplots(1, 2, sharey=True), (batched, backward), titles, strict=True)
        for axes, rows, title in both:
            names = list(dict.fromkeys(r["arm"] for r in rows))
            for name, colour, marker in zip(names, colours(len(names)), MARKERS, strict=False):
                style = {"color": colour, "marker": marker, "markersize": 5, "label": name}
                _plot_times(axes, "batch", [r for r in rows if r["arm"] == name], **style)
            axes.set(title=title, xscale="log", yscale="log", xlabel="batch size (log scale)")
            batches = list(dict.fromkeys(r["batch"] for r in rows))
            axes.set_xticks(batches, [str(b) for b in batches])
            axes.xaxis.set_minor_locator(NullLocator())
            _log(axes.yaxis)
            legend_below(axes, fontsize=10)
        figure.axes[0].set_ylabel("ms per batch (log scale)")

    return save_figure(path, draw, title=batched_title(batched, backward), note=note, size=(8.4, 5.8))


def batched_title(batched: Rows, backward: Rows) -> str:
    """How much faster than autograd and vmap the fused operator is at the largest batch."""
    largest = max(r["batch"] for r in batched)

    def at(rows: Rows, arm: str) -> dict[str, Any]:
        return next(r for r in rows if (r["batch"], r["arm"]) == (largest, arm))

    vmap = times_as_long(at(batched, parts.VMAP), at(batched, parts.FUSED), ".3g")
    autograd = times_as_long(at(backward, parts.LOOP_AUTOGRAD), at(backward, parts.ANALYTIC), ".3g")
    return (
        f"At batch {largest} vmap over the loop takes {vmap} times as long as the fused operator; autograd through the loop "
        f"{autograd} times as long as the analytic backward"
    )


def draw_claims(path: Path, claims: Rows, note: str) -> Path:
    """The claimed speed-ups as bars, the measured ones as points with quartiles."""
    shown = [r for r in claims if r["low"] is not None][::-1]
    reached = [r["claim"] for r in shown if r["verdict"] in ("reached", "exceeded")]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(shown):
            middle = math.sqrt(row["claimed_low"] * row["claimed_high"])
            spread = max(row["claimed_high"] / middle, 1.06)
            claimed, measured = ("claimed", "measured, quartiles") if y == 0 else (None, None)
            style = {"color": "#bbbbbb", "linewidth": 9, "solid_capstyle": "butt", "label": claimed}
            axes.plot([middle / spread, middle * spread], [y, y], **style)
            bars = [[row["measured"] - row["low"]], [row["high"] - row["measured"]]]
            style = {"color": colours(1)[0], "marker": "o", "linestyle": "", "label": measured}
            axes.errorbar([row["measured"]], [y], xerr=bars, **style)
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        labels = [f"{r['claim']}\n{r['short']}" for r in shown]
        axes.set_yticks(range(len(shown)), labels, fontsize=9)
        axes.set(xscale="log", xlabel="times faster (log scale)")
        axes.xaxis.set_major_formatter("{x:g}")
        legend_below(axes, ncols=2, fontsize=10)

    noisy = sum(r["verdict"] == UNDECIDED for r in shown)
    title = f"{len(reached)} of {len(shown) - noisy} comparisons reach the speed-up that the original announced"
    if noisy == len(shown):
        title = f"The machine was busy: {UNDECIDED} of any of {noisy} comparisons whether it reaches what was announced"
    elif noisy:
        title += f"; of {noisy} more it is {UNDECIDED}"
    title += f":\n{', '.join(sorted(set(reached)))}" if reached else ""
    return save_figure(path, draw, title=title, note=note, size=(8.4, 1.6 + 0.52 * len(shown)))
