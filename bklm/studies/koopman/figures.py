"""The Koopman study's figures; each title says what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Circle

from bklm.harness.figures import (
    GREY,
    MARKERS,
    colours,
    legend_below,
    mean_with_error,
    save_figure,
)
from bklm.studies.koopman.tables import OWN


def draw_arms(path: Path, verdicts: Sequence[Mapping[str, Any]], title: str, note: str) -> Path | None:
    """Every arm's loss minus that of its controls, with the interval over seeds."""
    rows = [r for r in verdicts if r["loss_difference"] is not None]
    if not rows:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        controls = list(dict.fromkeys(r["against"] for r in rows))
        names = list(dict.fromkeys(r["arm"] for r in rows))
        for k, (control, colour) in enumerate(zip(controls, colours(len(controls)), strict=True)):
            own = [r for r in rows if r["against"] == control]
            heights = [names.index(r["arm"]) + 0.12 * k for r in own]
            ends = [(r["low"], r["high"]) for r in own]
            style = {
                "color": colour,
                "marker": MARKERS[k % len(MARKERS)],
                "linestyle": "",
                "label": f"against {control}",
            }
            mean_with_error(axes, heights, [r["loss_difference"] for r in own], ends, sideways=True, **style)
        axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.set(
            xlabel="validation loss minus the control's, nats (left of 0: better)",
            ylim=(len(names) - 0.4, -0.6),
        )
        legend_below(axes, ncols=2, fontsize=10)

    return save_figure(
        path, draw, title=title, note=note, size=(7.2, 2.6 + 0.4 * len({r["arm"] for r in rows}))
    )


def draw_linearised(path: Path, rows: Sequence[Mapping[str, Any]], title: str, note: str) -> Path:
    """Perplexity with all blocks replaced, beside the model as it is and without its mixers; and R^2 of each block."""
    whole = [r for r in rows if r["block"] == "all"]
    level = {r["replacement"]: r["val_ppl"] for r in whole}
    shown = [r for r in whole if r["replacement"] not in ("original", "mixer off")]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(shown))
        # What is left out whole may be ten times as bad: it would squeeze everything else into one line.
        edge = 1.3 * max(v for name, v in level.items() if name != "skip")
        for place, row in zip(places, shown, strict=True):
            mean = row["val_ppl"]
            if mean > edge:
                left.annotate(
                    f"{mean:,.0f} →", (0.98, place), xycoords=("axes fraction", "data"), ha="right", va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )  # fmt: skip
                continue
            # Of the ratio to the original: seeds differ by more than replacements do.
            ends = [e and e * mean / row["ppl_ratio"] for e in (row["ppl_ratio_low"], row["ppl_ratio_high"])]
            mean_with_error(
                left, [place], [mean], [ends], sideways=True, color=colours(1)[0], marker="o", linestyle=""
            )
        for (name, style), colour in zip(
            (("original", "-"), ("mixer off", "--")), ("black", GREY), strict=True
        ):
            left.axvline(level[name], color=colour, linestyle=style, label=f"{name} ({level[name]:.1f})")
        left.set(xlabel="val PPL, all blocks replaced")
        left.set_yticks(places, [r["replacement"] for r in shown])
        left.invert_yaxis()
        legend_below(left, fontsize=10)
        blocks = [b for b in dict.fromkeys(r["block"] for r in rows) if b != "all"]
        for block, colour, marker in zip(blocks, colours(len(blocks)), MARKERS * len(blocks), strict=False):
            found = {r["replacement"]: r["r2"] for r in rows if r["block"] == block}
            values = [found[r["replacement"]] for r in shown]
            right.plot(values, places, color=colour, marker=marker, linestyle="", label=f"block {block}")
        right.axvline(0, color=GREY, linewidth=1, linestyle="--")
        right.set(xlabel="R² of the increment (0: no change)", xlim=(min(-0.1, right.get_xlim()[0]), 1.05))
        legend_below(right, ncols=2, fontsize=10)

    return save_figure(path, draw, title=title, note=note, size=(8.4, 5.2))


def draw_spectrum(path: Path, rows: Sequence[Mapping[str, Any]], note: str) -> Path:
    """Eigenvalues of the repeated block in the complex plane, coloured by residual; a conjugate pair counts as one."""
    counted = [r for r in rows if r["imaginary"] >= 0]
    sure = sum(r["residual"] < OWN for r in counted)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linestyle="--"))
        points = axes.scatter(
            [r["real"] for r in rows], [r["imaginary"] for r in rows], c=[r["residual"] for r in rows], vmin=0,
            vmax=max(1.0, min(2.0, max(r["residual"] for r in rows))), cmap="viridis", s=26, zorder=3,
        )  # fmt: skip
        figure.colorbar(points, ax=axes, label="residual (0: an eigenvalue)")
        axes.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
        axes.autoscale_view()

    title = f"One block at every depth: {sure} of {len(counted)} eigenvalues have a residual below {OWN:g}"
    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.4))


def draw_recall(
    path: Path, rows: Sequence[Mapping[str, Any]], title: str, trained: int, chance: float, note: str
) -> Path:
    """Accuracy against distance, a line a model."""
    shown = [r for r in rows if r["seeds"]]
    places = [k for k in rows[0] if k.startswith("accuracy_") and not k.endswith("_95")]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (row, colour, marker) in enumerate(zip(shown, colours(len(shown)), MARKERS, strict=False)):
            known = [k for k in places if row[k] is not None]
            ends = [
                (None, None)
                if row[f"{k}_95"] is None
                else (max(0.0, row[k] - row[f"{k}_95"]), min(1.0, row[k] + row[f"{k}_95"]))
                for k in known
            ]
            # Beside one another: bars of one distance would hide each other.
            aside = 1.06 ** (number - (len(shown) - 1) / 2)
            x, y = [aside * int(k[9:]) for k in known], [row[k] for k in known]
            mean_with_error(axes, x, y, ends, color=colour, marker=marker, label=row["arm"])
        axes.axhline(chance, color=GREY, linestyle=":", label="chance")
        axes.axvline(trained, color=GREY, linewidth=1, linestyle="--", label="longest in training")
        axes.set(
            xscale="log",
            xlabel="distance, positions (log scale)",
            ylabel="share of right answers",
            ylim=(0, 1.03),
        )
        axes.set_xticks([int(k[9:]) for k in places], [k[9:] for k in places])
        axes.minorticks_off()
        legend_below(axes, ncols=3, fontsize=10)

    return save_figure(path, draw, title=title, note=note, size=(7.2, 5.0))
