"""The physics study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from bklm.studies.physics.energies import CONSERVED
from bklm.training.energy_drift import TIME, DriftBySteps, over_spread


def draw_arms(path: Path, rows: Sequence[Mapping[str, Any]], title: str, note: str) -> Path | None:
    """Perplexity of every arm with its interval."""
    shown = [r for r in rows if r["val_ppl"] is not None]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [(r["val_ppl_low"], r["val_ppl_high"]) for r in shown]
        style = {"color": colours(1)[0], "marker": "o", "linestyle": ""}
        mean_with_error(axes, range(len(shown)), [r["val_ppl"] for r in shown], ends, sideways=True, **style)
        axes.set_yticks(range(len(shown)), [r["arm"] for r in shown])
        axes.axvline(shown[0]["val_ppl"], color=GREY, linewidth=1, linestyle="--")
        axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel=f"validation PPL (dashed: {shown[0]['arm']})")

    return save_figure(path, draw, title=title, note=note, size=(7.2, 2.2 + 0.4 * len(shown)))


PANELS = (("spread", "spread of E"), ("ratio", "drift / spread"), ("gradient_share", "gradient share"))


def draw_energies(
    path: Path, logged: Mapping[str, Any], energies: Sequence[Mapping[str, Any]], note: str
) -> Path | None:
    """An energy's own spread, its drift and its share of the gradient over a training of one seed, one line an arm.

    Args:
        logged: by arm "trace" and "shares", rows by step.
        energies: what is left of each arm's energy, over all seeds.
    """
    shown = {
        arm: [*found["trace"], *found["shares"]] for arm, found in logged.items() if len(found["trace"]) > 1
    }
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(3, sharex=True)
        for axes, (key, words) in zip(panels, PANELS, strict=True):
            values = []
            for (arm, rows), colour, marker in zip(
                shown.items(), colours(len(shown)), MARKERS * 9, strict=False
            ):
                own = [r for r in rows if ("gradient_share" in r) == (key == "gradient_share")]
                y = [over_spread(r["drift"], r["spread"]) if key == "ratio" else r[key] for r in own]
                # A logarithm has no place for a spread of 0, and a ratio to it is none.
                is_drawn = [value is not None and (value > 0 or key == "gradient_share") for value in y]
                points = [(r["step"], value) for r, value, drawn in zip(own, y, is_drawn, strict=True) if drawn]
                x, y = ([p[i] for p in points] for i in (0, 1))
                axes.plot(x, y, color=colour, marker=marker, markersize=3, label=arm)
                values += y
            if key == "gradient_share":
                axes.set(ylabel=words, ylim=(-0.02, 1), xlabel="step")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            elif values:
                wide_range_axis(axes.yaxis, values, words)
            if key == "ratio":
                axes.axhline(CONSERVED, color=GREY, linewidth=1, linestyle="--")
        legend_below(panels[-1], ncols=4, fontsize=9)

    judged = [row for row in energies if row["arm"] in shown and row["conserves"] != "a control"]
    # "no: it drifts" without its reason, which the table has.
    title = "Is the energy conserved? " + ", ".join(
        f"{r['arm']}: {r['conserves'].split(':')[0]}" for r in judged
    )
    return save_figure(path, draw, title=title, note=note, size=(7.2, 8.4))


def draw_curves(path: Path, trials: Sequence[Mapping[str, Any]], steps: int, note: str) -> Path | None:
    """Validation loss by step, one line an arm (mean over its finished seeds)."""
    groups: dict[str, list] = {}
    for t in trials:
        if t["val_ppl"] is not None:
            groups.setdefault(t["arm"], []).append([e["val_loss"] for e in t["epochs"]])
    if not groups:
        return None
    lines = {arm: [sum(at) / len(at) for at in zip(*curves, strict=True)] for arm, curves in groups.items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (arm, means), colour, marker in zip(lines.items(), colours(len(lines)), MARKERS * 9, strict=False):
            x = [steps * (i + 1) for i in range(len(means))]
            axes.plot(x, means, color=colour, marker=marker, label=arm)
        axes.set(xlabel="step", ylabel="validation loss, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(axes, ncols=4, fontsize=10)

    first, *_ = lines
    last = min(lines, key=lambda arm: lines[arm][-1])
    title = f"After the last step {last} has the lowest loss, {lines[last][-1]:.3f} nats"
    title += f"; {first} has {lines[first][-1]:.3f}" * (last != first)
    return save_figure(path, draw, title=title, note=note)


def draw_drift(path: Path, forces: Sequence[DriftBySteps]) -> Path:
    """Drift against step of four forces: what has an energy, and what has none."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        styles = zip(forces, colours(len(forces)), MARKERS, ("-", "--", "-", "-"), strict=False)
        for found, colour, marker, line in styles:
            label = f"{found.name}{', SEES THE FUTURE' * found.sees_future}: slope {found.slope:.1f}"
            style = {"color": colour, "marker": marker, "linestyle": line, "label": label}
            axes.plot(found.steps, found.drifts, **style)
        axes.set(xscale="log", yscale="log", xlabel="step h", ylabel="largest drift of H / spread")
        axes.set_xticks(forces[0].steps, [f"{h:g}" for h in forces[0].steps])
        axes.xaxis.minorticks_off()
        legend_below(axes, fontsize=9)

    kept = [f for f in forces if f.slope > 1.5]
    seeing = sum(f.sees_future for f in kept)
    title = f"{len(kept)} of {len(forces)} forces conserve an energy; {seeing} of them, coupling positions, sees the future"
    note = (
        f"Slope of the logs: 2, an energy is conserved to second order; 0: no step is short enough. Random weights, no drive, "
        f"double precision; over {TIME:g} units of time, {round(TIME / forces[0].steps[0])} of the longest steps."
    )
    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.4))


def draw_memory(path: Path, rows: Sequence[Mapping[str, Any]], note: str) -> Path | None:
    """Peak memory of a training step against depth."""
    shown = [r for r in rows if r["growth"] is not None]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for r, colour, marker in zip(shown, colours(len(shown)), MARKERS, strict=False):
            points = {int(k[6:]): v / 1e6 for k, v in r.items() if k.startswith("bytes_") and v}
            axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=r["way"])
        axes.set(xscale="log", xlabel="blocks")
        wide_range_axis(axes.yaxis, [v / 1e6 for r in shown for k, v in r.items() if k.startswith("bytes_") and v],
                        "peak of a step, MB")  # fmt: skip
        axes.set_xticks(list(points), list(points))
        axes.xaxis.minorticks_off()
        legend_below(axes, ncols=2, fontsize=10)

    depths = [int(k[6:]) for k in shown[0] if k.startswith("bytes_")]
    grown = {r["way"]: r["growth"] for r in shown}
    named = {
        "residual": "residual",
        "leapfrog, checkpoint": "checkpointed",
        "leapfrog, reversible": "reversible",
    }
    times = ", ".join(f"{grown[way]:.1f} times if {word}" for way, word in named.items() if way in grown)
    title = f"{max(depths)} blocks take, of the memory of {min(depths)}: {times}"
    return save_figure(path, draw, title=title, note=note)
