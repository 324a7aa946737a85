"""Draw docs/picture.png: how a sentence becomes the next word, and where alpha bends the way back.

python scripts/picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bklm.bk_core import resolvent_diagonal
from bklm.harness.figures import PALETTE, save_figure

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "picture.png"
WORDS = ["the", "cat", "sees", "the"]
POTENTIAL = [0.5, -0.3, 0.9, 0.2]  # as a layer might give them
ROWS = {"text": 4.4, "potential v": 3.3, "chain H": 2.2, "G": 1.1, "next word": 0.0}
BLUE, ORANGE, GREEN = PALETTE[:3]


def draw(figure: Figure) -> None:
    """Five rows from the text to the next word; the arrow back on the right."""
    axes = figure.subplots()
    axes.set(xlim=(-1.6, 5.1), ylim=(-0.5, 4.9))
    axes.axis("off")
    g = resolvent_diagonal(torch.tensor(POTENTIAL, dtype=torch.float64) - 2, 1.0, 1.0, 1j, causal=True)
    for name, y in ROWS.items():
        axes.text(-1.5, y, name, va="center", fontweight="bold")
    for i, (word, v) in enumerate(zip(WORDS, POTENTIAL, strict=True)):
        _box(axes, i, ROWS["text"], word, "#eeeeee")
        _box(axes, i, ROWS["potential v"], f"{v:+.1f}", "#d6e8f5")
        axes.plot(i, ROWS["chain H"], marker="o", markersize=20, color=BLUE)
        if i:
            axes.plot([i - 0.82, i - 0.18], [ROWS["chain H"]] * 2, color=BLUE, linewidth=3)
        value = complex(g[i])
        _box(axes, i, ROWS["G"], f"{value.real:+.2f}\n{value.imag:+.2f}i", "#d5efe6")
        for above, below in (("text", "potential v"), ("potential v", "chain H"), ("chain H", "G")):
            _arrow(axes, (i, ROWS[above] - 0.3), (i, ROWS[below] + 0.3), "black")
    _box(axes, 3, ROWS["next word"], "dog", "#fbe3d2")
    _arrow(axes, (3, ROWS["G"] - 0.34), (3, ROWS["next word"] + 0.3), "black")
    _arrow(axes, (3.5, ROWS["next word"]), (3.5, ROWS["potential v"]), ORANGE, bend=0.45)
    axes.text(
        4.25, 1.7, "the gradient:\n(1 - α) exact\n+ α hypothesis-7", color=ORANGE, va="center", fontsize=11
    )


def _box(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"}
    axes.text(x, y, words, ha="center", va="center", bbox=style, fontsize=11, linespacing=1.1)


def _arrow(axes: Axes, start: tuple, end: tuple, colour: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "->", "color": colour, "linewidth": 1.6, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    save_figure(
        PICTURE, draw,
        title="The published model: each word sets a potential, the chain hands on one number, G is the feature",
        note="G is computed with bklm.resolvent_diagonal, causal, z = i: no word knows a later one.", size=(7.2, 5.2),
    )  # fmt: skip
    print(f"wrote {PICTURE.name}")
