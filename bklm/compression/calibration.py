"""What a model's linear maps read on a few batches of text: for scales, for outlier columns, and for Wanda's scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bklm.models import LanguageModel
from bklm.models.modes import evaluating
from bklm.training.evaluation import without_padding


@dataclass
class Inputs:
    """Of each input of one map, over all positions that were read: the largest magnitude and the sum of squares, (K,) each."""

    largest: Tensor
    squares: Tensor
    positions: int

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
            self.squares += rows.double().square().sum(0)
            self.positions += len(rows)


@torch.no_grad()
def read_inputs(
    model: LanguageModel, batches: Iterable[tuple[Tensor, Tensor]], caller: str
) -> dict[str, Inputs]:
    """What the weights of ``nn.Linear`` maps and of the head read, by the weight's name; others are not seen.

    Args:
        batches: (x, y) of training text; the targets are not read.

    Raises:
        ValueError: no batches.
    """
    found: dict[str, Inputs] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    device = next(model.parameters()).device

    def slot(weight: Tensor) -> Inputs:
        width = weight.shape[-1]
        empty = Inputs(torch.zeros(width), torch.zeros(width, dtype=torch.float64), 0)
        return found.setdefault(names[id(weight)], empty)

    def listen(module: nn.Linear, given: tuple[Tensor, ...]) -> None:
        slot(module.weight).add(given[0])

    head = model.head()[0]
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head]
    hooks = [m.register_forward_pre_hook(listen) for m in maps]
    # NewLLM calls its maps as modules only while its mixer is looked at.
    watched = model.recording_mixing() if model.mixing_points() else contextlib.nullcontext()
    try:
        with evaluating(model), watched:
            for x in (rows for batch in batches for rows, _ in without_padding(*_pair(batch, caller))):
                slot(head).add(model.hidden(x.to(device)))
    finally:
        for hook in hooks:
            hook.remove()
    if not found or not any(inputs.positions for inputs in found.values()):
        raise ValueError(f"{caller}: calibration holds no text; give some batches (x, y) of the training text.")
    return found


def _pair(batch: Any, caller: str) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return tuple(batch)
    raise ValueError(
        f"{caller}: calibration holds a {type(batch).__name__}; give batches (x, y) of token ids, of which y is not read."
    )


def first_batches(batches: Iterable[tuple[Tensor, Tensor]], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches (x, y) of some, with so many tokens or the least more."""
    found = []
    for x, y in batches:
        found.append((x, y))
        tokens -= x.numel()
        if tokens <= 0:
            break
    return found
