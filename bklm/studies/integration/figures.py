"""The integration study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bklm.harness.figures import GREY, MARKERS, colours, legend_below, mean_with_error, save_figure
from bklm.studies.integration.tables import ARMS, FULL, KEPT, NONE, PLAIN

LABELS = {NONE: " (the published operator, causal)", PLAIN: " (exact gradient, fused kernel)"}
SHIFT = 0.16  # between the two budgets of a switch
LINEAR = 0.1  # nats on either side of 0
CURVES = (NONE, PLAIN, FULL, KEPT)


def draw_switches(path: Path, rows: Sequence[Mapping[str, Any]], title: str, note: str) -> Path:
    """What the removal of each switch does to the loss, at both budgets, and to the time of a step."""

    def draw(figure: Figure) -> None:
        loss, time = figure.subplots(1, 2, sharey=True)
        # One switch may be worth a hundred times another: near 0 the axis is linear.
        loss.set_xscale("symlog", linthresh=LINEAR)
        loss.xaxis.set_major_formatter("{x:g}")
        # -1 and -0.1 stand close to each other.
        loss.tick_params(axis="x", labelsize=9)
        budgets = [("", "equal steps", -SHIFT)]
        if any(r["time_loss_difference"] is not None for r in rows):
            budgets.append(("time_", "equal time", SHIFT))
        for (words, label, shift), colour, marker in zip(budgets, colours(2), MARKERS, strict=False):
            here = {i + shift: r for i, r in enumerate(rows) if r[f"{words}loss_difference"] is not None}
            means = [r[f"{words}loss_difference"] for r in here.values()]
            ends = [(r[f"{words}loss_low"], r[f"{words}loss_high"]) for r in here.values()]
            style = {"color": colour, "marker": marker, "linestyle": "", "label": label}
            mean_with_error(loss, list(here), means, ends, sideways=True, **style)
        timed = {i: r for i, r in enumerate(rows) if not r["same_step"]}
        ends = [(r["ms_ratio_low"], r["ms_ratio_high"]) for r in timed.values()]
        style = {"color": "#000000", "marker": "D", "linestyle": ""}
        mean_with_error(
            time, list(timed), [r["ms_ratio"] for r in timed.values()], ends, sideways=True, **style
        )
        _compare(loss, 0.0, "loss without it, nats more")
        _compare(time, 1.0, "step time, ratio")
        loss.set_yticks(range(len(rows)), [f"{r['switch']} ({r['study']})" for r in rows])
        loss.set_ylim(len(rows) - 0.5, -0.5)
        legend_below(loss, ncols=2, fontsize=10)

    cost = "A bar that lies wholly right of a dashed line is a cost of the removal (of time: of more than 2%)"
    note = f"{cost}; the bars of a panel hold all at once. {note}"
    return save_figure(path, draw, title=title, note=note, size=(7.2, 2.4 + 0.42 * len(rows)))


def _compare(axes: Axes, value: float, label: str) -> None:
    axes.axvline(value, color=GREY, linewidth=1, linestyle="--")
    axes.set_xlabel(label)


def draw_curves(
    path: Path, trials: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], title: str, note: str
) -> Path | None:
    """Validation loss against time, means over the seeds; ``seconds`` from one score of an arm to its next."""
    groups = {arm: g for arm, g in ARMS.groups(trials).items() if arm in CURVES}
    if not groups:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (arm, group), colour, marker in zip(groups.items(), colours(len(CURVES)), MARKERS, strict=False):
            curves = [[e["val_loss"] for e in t["epochs"]] for t in group]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            times = [seconds[arm] * (i + 1) for i in range(len(means))]
            label = arm + LABELS.get(arm, "")
            axes.plot(times, means, color=colour, marker=marker, label=label)
        axes.set(xlabel="seconds of training steps", ylabel="validation loss, nats")
        legend_below(axes, ncols=2, fontsize=10)

    return save_figure(path, draw, title=title, note=note)
