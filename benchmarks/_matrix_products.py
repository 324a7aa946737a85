"""The matrix products of train_step.py's optimiser step alone: the time that no way to write it can go below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bklm.models import loss as loss_module
from bklm.moe.products import linear, weight_gradient

HEADS = 8  # of the mixer solve


@dataclass(frozen=True)
class Size:
    vocab_size: int = 30_000
    batch: int = 32
    length: int = 128
    d_model: int = 64
    n_layers: int = 4
    num_experts: int = 4

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class GemmFloor:
    """The matrix products that no implementation can leave out: 3 of the head, 6 per layer of the chosen experts, and with
    the mixer solve 6 of its two maps."""

    def __init__(self, size: Size, now: Callable[[], float], mixer: bool) -> None:
        self.now = now
        rows = min(size.tokens, loss_module.CPU_CHUNK_BYTES // (4 * size.vocab_size))
        t, d, v = size.tokens, size.d_model, size.vocab_size
        self.h, self.w, self.logits = torch.randn(t, d), torch.randn(v, d), torch.randn(rows, v)
        self.dw, self.rows = torch.zeros(v, d), rows
        # Up and down are of one size.
        widths = [2 * d, 2 * d, *([2 * d + 2 * HEADS, 2 * d] if mixer else [])] * size.n_layers
        self.maps = [(torch.randn(w, d), torch.randn(t, w)) for w in widths]
        self.flop = 3 * 2 * t * d * (v + sum(widths))

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        start = self.now()
        # The library that serves these shapes best.
        head = loss_module.LinearHead(self.h, self.w, None, self.rows)
        for chunk in head.chunks():
            h = self.h[chunk]
            head.logits(h)
            head.towards_rows(self.logits[: len(h)])
            self.dw.addmm_(self.logits[: len(h)].t(), h)
        for weight, u in self.maps:  # forward, input and weight gradient
            linear(self.h, weight)
            linear(u, weight.t())
            weight_gradient(u, self.h)
        return {"total": self.now() - start}
