"""The example study's figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bklm.harness.figures import colours, mean_with_error, save_figure


def draw_dropouts(path: Path, table: list[dict[str, Any]], title: str, note: str) -> Path:
    """Validation perplexity against dropout; arms that diverged are left out."""
    rows = [row for row in table if row["val_ppl"] is not None]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [(row["val_ppl_low"], row["val_ppl_high"]) for row in rows]
        means = [row["val_ppl"] for row in rows]
        mean_with_error(axes, [row["dropout"] for row in rows], means, ends, color=colours(1)[0], marker="o")
        axes.set(xlabel="dropout", ylabel="validation perplexity")

    return save_figure(path, draw, title=title, note=note)
