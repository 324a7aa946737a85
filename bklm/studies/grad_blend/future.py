"""Does the model see the future? Measured on the causal core and on the bidirectional one that the original used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bklm.harness.figures import MARKERS, colours, save_figure
from bklm.harness.text import StudyText
from bklm.models import ResNetBK, future_leak


def measure_future(model: ResNetBK, text: StudyText) -> list[dict[str, Any]]:
    """Change the last token of one real validation window and see how far each earlier position's logits move.

    Three models are asked: ``model`` as it was trained, and two untrained twins of it with fresh weights from one seed, causal
    and bidirectional.

    Returns:
        rows with model, causal, leak (largest change of any earlier logit), leak_before (at the position that predicts the
        changed token) and by_distance (list: entry d - 1 is the largest change d positions before the changed token).
    """
    ids = torch.from_numpy(text.tokens.valid[: text.seq_len].astype("int64"))[None]
    candidates = [(f"trained, {_kind(model.config.causal)}", model)]
    for causal in (True, False):
        torch.manual_seed(0)
        twin = dataclasses.replace(model.config, causal=causal, grad_blend=0.0)
        candidates.append((f"untrained, {_kind(causal)}", ResNetBK(twin)))
    rows = []
    for name, candidate in candidates:
        change = future_leak(candidate.cpu(), ids, position=ids.shape[1] - 1)
        rows.append(
            {
                "model": name,
                "causal": candidate.config.causal,
                "leak": float(change.max()),
                "leak_before": float(change[-1]),
                "by_distance": change.flip(0).tolist(),
            }
        )
    return rows


def readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for people."""
    return [
        {
            "model": r["model"],
            "largest change of any earlier logit": f"{r['leak']:.1e}" if r["leak"] else "0",
            "at the position that predicts the changed token": f"{r['leak_before']:.1e}"
            if r["leak_before"]
            else "0",
            "verdict": "never sees the future" if r["leak"] <= 1e-12 else "SEES THE FUTURE",
        }
        for r in rows
    ]


def draw_future(path: Path, rows: list[dict[str, Any]]) -> Path:
    """How far the logits move against the distance to the changed token; what stays exactly the same lies on the floor."""
    floor = 1e-16

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, colour, marker in zip(rows, colours(len(rows)), MARKERS, strict=False):
            shown = row["by_distance"][:24]
            values = [max(v, floor) for v in shown]
            axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, label=row["model"])
        axes.set(yscale="log", ylim=(floor / 3, None), xlabel="positions before the changed token")
        axes.set_ylabel("largest change of a logit (log scale)")
        axes.set_yticks([floor, 1e-12, 1e-8, 1e-4, 1], ["0", "1e-12", "1e-8", "1e-4", "1"])
        axes.legend(loc="center right")

    seeing = [r["model"] for r in rows if r["leak"] > 1e-12]
    title = (
        f"Changing the last token moves earlier predictions: {', '.join(seeing)}"
        if seeing
        else ("Changing the last token moves no earlier prediction")
    )
    return save_figure(
        path, draw, title=title, note="Logits in double precision; changes below 1e-16 are drawn as 0."
    )


def _kind(causal: bool) -> str:
    return "causal" if causal else "bidirectional"
