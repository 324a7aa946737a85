"""Compute per token: each residual block runs over the positions that a causal gate keeps, and passes the others on.

    p_i = sigmoid(w LN(x_i) + b),   kept where p_i > 1/2,   x_i <- x_i + kept_i (block(x)_i - x_i)

A threshold and no choice of the best k of a sequence, which would look at later positions (Mixture-of-Depths, Raposo et al.
2024, names that problem). The load (mean of kept - share)^2 keeps the share near its target; kept passes the gradient of p
straight through. Skipped positions are not in the block's chain: of each row those that are kept stand in front, and what
fills up the row behind them no causal block can see. The control skips as many positions by chance: others in every batch of a
training, so that nothing adapts to them, and in evaluation a fixed set of positions whose rate is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.compression.coded_model import model_of
from bklm.models import ResNetBK
from bklm.models.wrapped import Wrapped

LOAD = 1.0  # weight of the load in the loss, nats
PATTERN = 4096  # positions after which those that are kept by chance repeat
EVEN = 32  # positions of which they are kept at exactly their rate


class GatedBlock(nn.Module):
    """A block of a causal ResNetBK over part of the positions of each row, (B, N, D) -> (B, N, D)."""

    def __init__(self, block: nn.Module, width: int, share: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.block, self.share = block, share
        self.gate = self.load = None
        if generator is None:
            self.gate = nn.Linear(width, 1)
            nn.init.normal_(self.gate.weight, std=0.1)
            nn.init.zeros_(self.gate.bias)
        else:
            ranks = torch.rand(PATTERN // EVEN, EVEN, generator=generator, device="cpu").argsort(1).argsort(1)
            ends = (torch.arange(len(ranks) + 1) * EVEN * share).round()
            self.register_buffer("pattern", (ranks < ends.diff().unsqueeze(1)).flatten())

    @property
    def moe(self) -> Any:
        return self.block.moe

    def chosen(self, x: Tensor) -> Tensor:
        """Which positions are kept, (B, N): 1 or 0 of x's dtype, with the gradient of p."""
        if self.gate is None and self.training:
            return (torch.rand(x.shape[:2], device=x.device) < self.share).to(x.dtype)
        if self.gate is None:
            places = torch.arange(x.shape[1], device=x.device) % PATTERN
            return self.pattern[places].to(x.dtype).expand(x.shape[:2])
        p = self.gate(F.layer_norm(x, x.shape[-1:])).squeeze(-1).sigmoid()
        return (p > 0.5).to(x.dtype) + p - p.detach()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        chosen = self.chosen(x)
        kept = chosen.detach() > 0.5
        self.load = (chosen.mean() - self.share).square() if self.gate is not None else None
        counts = kept.sum(1)
        most = int(counts.max())
        if most == 0:
            return x, None
        # Stable: what is kept stays in its order.
        order = (~kept).to(torch.int8).sort(stable=True, dim=1).indices[:, :most]
        places = order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        front = x.gather(1, places)
        change = self.block(front)[0] - front
        is_kept = torch.arange(most, device=x.device) < counts.unsqueeze(1)
        change = change * (chosen.gather(1, order) * is_kept).unsqueeze(-1)
        return x + torch.zeros_like(x).scatter(1, places, change), None


class GatedBlocks(Wrapped):
    """A causal ResNetBK, changed in place, whose blocks skip positions; it does not stream: it runs over all it has written
    again for each token.

    Args:
        model: its blocks are replaced by gated ones; it learns in place, and is this model's own from now on.
        share: of the positions that a block keeps, as a target; of those kept by chance, as a rate.
        seed: of positions kept by chance in evaluation, the same in every row; in training torch's generator draws them. None:
            by a gate that learns.

    Raises:
        TypeError: no plain ResNetBK, or one that sees the future. ValueError: a share outside (0, 1].
    """

    loss_is_likelihood = False

    def __init__(self, model: ResNetBK, share: float = 0.5, *, seed: int | None = None) -> None:
        plain = model_of(model, "GatedBlocks")
        if not isinstance(plain, ResNetBK) or plain.sees_future:
            raise TypeError(
                f"GatedBlocks: got a {type(plain).__name__}{' that sees the future' * plain.sees_future}; give a causal "
                "ResNetBK."
            )
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: got {share}; a block keeps a share of the positions above 0 and up to 1.")
        super().__init__(plain)
        self.streams = False
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        device = next(plain.parameters()).device
        plain.blocks = nn.ModuleList(
            GatedBlock(block, plain.config.d_model, share, generator) for block in plain.blocks
        ).to(device)

    def auxiliary_loss(self) -> Tensor | None:
        loads = [b.load for b in self.model.blocks if b.load is not None]
        own = self.model.auxiliary_loss()
        load = LOAD * torch.stack(loads).mean() if loads else None
        return own if load is None else load if own is None else own + load

    @torch.no_grad()
    def kept_share(self, input_ids: Tensor) -> float:
        """The share of positions that blocks keep of some ids (B, N), all blocks together."""
        counts: list[Tensor] = []
        hooks = [
            b.register_forward_pre_hook(lambda block, given: counts.append(block.chosen(given[0]).mean()))
            for b in self.model.blocks
        ]
        self.hidden(input_ids)
        for hook in hooks:
            hook.remove()
        return float(torch.stack(counts).mean())
