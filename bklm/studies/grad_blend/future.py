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
from bklm.studies.grad_blend.run import GradBlendResult


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


def future_table(result: GradBlendResult, text: StudyText) -> list[dict[str, Any]]:
    """Rows for people on the model with the best alpha and its untrained twins; draws the study's future_leak.png."""
    rows = measure_future(result.load(), text)
    draw_future(result.folder / "future_leak.png", rows)
    return readable_probes(rows)


def readable_probes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model: how far its logits moved, as words, and whether it sees the future."""

    def size(change: float) -> str:
        return f"{change:.1e}" if change else "0"

    return [
        {
            "model": r["model"],
            "largest change of any earlier logit": size(r["leak"]),
            "at the position that predicts the changed token": size(r["leak_before"]),
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
    moved = f"earlier predictions: {', '.join(seeing)}" if seeing else "no earlier prediction"
    title, note = (
        f"Changing the last token moves {moved}",
        "Logits in double precision; changes below 1e-16 are drawn as 0.",
    )
    return save_figure(path, draw, title=title, note=note)


def _kind(causal: bool) -> str:
    return "causal" if causal else "bidirectional"
