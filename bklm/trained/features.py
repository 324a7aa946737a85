"""What a ResNetBK makes of a sentence: the potential of every word in every layer, and the resolvent that follows from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bklm.bk_core import BKCore, resolvent_diagonal
from bklm.harness.figures import save_figure
from bklm.models import LanguageModel
from bklm.models.resnet_bk_mixers import SolveCore

SHOWN_SHARE = 0.95  # of the values, that the colours span
LONGEST_LABEL = 14  # characters of a word below the figure
PANELS = (("potential", "potential"), ("real", "Re G"), ("imaginary", "Im G"))


@dataclass(frozen=True, eq=False)
class Features:
    """``words``; ``potential``, ``real`` and ``imaginary`` (layers, heads, words), float64: v, Re G and Im G.

    G is the diagonal of the resolvent that the layer reads: in a causal model at each word that of the words up to there.
    """

    words: list[str]
    potential: np.ndarray
    real: np.ndarray
    imaginary: np.ndarray
    name: str
    causal: bool

    def rows(self) -> list[dict[str, Any]]:
        """One row per word, layer and head."""
        layers, heads, _ = self.potential.shape
        return [
            {"word": word, "position": i, "layer": layer + 1}
            | ({"head": head + 1} if heads > 1 else {})
            | {title: round(float(getattr(self, part)[layer, head, i]), 6) for part, title in PANELS}
            for i, word in enumerate(self.words)
            for layer in range(layers)
            for head in range(heads)
        ]

    def figure(self, path: str | os.PathLike[str] = "features.png") -> Path:
        """Draw potential, Re G and Im G, one line a layer and head, one column a word; return the picture's path."""
        layers, heads, count = self.potential.shape
        labels = [f"{i + 1}.{h + 1}" if heads > 1 else str(i + 1) for i in range(layers) for h in range(heads)]

        def draw(figure: Figure) -> None:
            axes = figure.subplots(len(PANELS), 1, sharex=True)
            for place, (part, title) in zip(axes, PANELS, strict=True):
                values = getattr(self, part).reshape(layers * heads, count)
                # A few values near a pole would leave all others pale.
                most = float(np.quantile(np.abs(values), SHOWN_SHARE)) or 1.0
                if values.min() >= 0:
                    scale = {"cmap": "Blues", "vmin": float(values.min()), "vmax": most}
                elif values.max() <= 0:
                    scale = {"cmap": "Blues_r", "vmin": -most, "vmax": float(values.max())}
                else:
                    scale = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
                image = place.imshow(values, aspect="auto", **scale)
                place.set_title(title)
                place.grid(False)
                step = max(1, len(labels) // 8)
                place.set_yticks(range(0, len(labels), step), labels[::step])
                place.set_ylabel("layer.head" if heads > 1 else "layer")
                ends = (values.min() < -most, values.max() > most)
                beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(ends, "neither")
                figure.colorbar(image, ax=place, pad=0.02, extend=beyond)
            step = max(1, count // 24)
            shown = [_short(word) for word in self.words[::step]]
            axes[-1].set_xticks(range(0, count, step), shown, rotation=60, ha="right", rotation_mode="anchor")

        reads = "of the words up to there" if self.causal else "of all words: THIS MODEL SEES THE FUTURE"
        title = f"{self.name}: the potential of every word, and the resolvent {reads}"
        note = f"{count} words, {layers} layers" + (f" of {heads} heads" if heads > 1 else "")
        note += f"; colours end at the {SHOWN_SHARE:.0%} quantile"
        height = 6.2 + 0.12 * layers * heads
        return save_figure(
            Path(path), draw, title=title, note=f"{note}; G = diag (H - z)^-1.", size=(7.2, height)
        )


def _short(word: str) -> str:
    word = word.replace("\n", "\\n").replace("$", r"\$")
    return word if len(word) <= LONGEST_LABEL else word[: LONGEST_LABEL - 1] + "…"


@torch.no_grad()
def read_features(model: LanguageModel, ids: Sequence[int], words: list[str], name: str) -> Features:
    """Run a model once over ids and record what passes through its cores.

    Raises:
        ValueError: a model without a BK-core, no id, or more ids than positions.
    """
    if not any(isinstance(part, BKCore | SolveCore) for part in model.modules()):
        raise ValueError(
            f"features: {name} is a {type(model).__name__}, which has no potential and no resolvent; load a ResNetBK, in 03 "
            "model='resnet_bk' or 'resnet_bk_diagonal'."
        )
    if not len(ids):
        raise ValueError("features: the text holds no token; write at least one word.")
    if model.n_seq is not None and len(ids) > model.n_seq:
        raise ValueError(
            f"features: the text has {len(ids)} tokens, and {name} has {model.n_seq} positions; give a shorter one."
        )
    with _listening(model) as heard:
        model(torch.tensor([list(ids)], dtype=torch.int64))
    potential = np.stack([v.numpy() for v, _ in heard])
    resolvent = np.stack([g.numpy() for _, g in heard])
    return Features(words, potential, resolvent.real, resolvent.imag, name, not model.sees_future)


@contextlib.contextmanager
def _listening(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block, (v, G) of every core that runs, each (heads, N)."""
    heard: list[tuple[Tensor, Tensor]] = []

    def diagonal(core: BKCore, inputs: tuple[Tensor], features: Tensor) -> None:
        real, imaginary = features[0].double().chunk(2, dim=-1)
        heard.append((inputs[0][0].double().T, torch.complex(real, imaginary).T))

    def solve(core: SolveCore, inputs: tuple[Tensor, Tensor, Tensor, Tensor], _: Any) -> None:
        _, potential, bonds, z = inputs
        potential, bonds = potential.double(), bonds.double()
        z = z.to(torch.complex128).expand(potential.shape[:-1])
        heard.append((potential[0], resolvent_diagonal(potential, bonds, bonds, z, causal=core.causal)[0]))

    hooks = [
        part.register_forward_hook(diagonal if isinstance(part, BKCore) else solve)
        for part in model.modules()
        if isinstance(part, BKCore | SolveCore)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
