"""ResNet-BK: residual blocks that mix positions through the diagonal of a resolvent, in O(N) time.

Each block reads a potential v from its mixture of experts, puts it on the diagonal of a tridiagonal Hamiltonian
and gives
back the resolvent's diagonal as two features per head:

    f = MoE(LN(x)),   v = W_v f,   G = diag((H - z)^-1),  H = tridiag(1, v - 2, 1),  z = i eta
    x <- x + f + s W [Re G, Im G]

With ``causal=True`` G_i is the last entry of the resolvent of the leading block H[0..i, 0..i], which depends on
nothing after i; it is then also the whole state that position i + 1 needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bklm.bk_core import BKCore
from bklm.models.base import LanguageModel
from bklm.models.checks import check_choice, check_dropout, check_int
from bklm.moe.layer import AnalyticMoE, total_balance_loss
from bklm.moe.ops import counted_once, in_backward

POTENTIAL_LIMIT = 3.0  # the original's clamps, used with ``clamps=True``
FEATURE_LIMIT = 10.0


@dataclass(frozen=True)
class ResNetBKConfig:
    """Size and kind of a ResNet-BK; the defaults are the original's size with the corrections.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int = 64
    n_layers: int = 4
    n_seq: int | None = 128  # positions with a learned embedding; None: no position embedding, any length
    num_experts: int = 4
    top_k: int = 1
    dropout_p: float = 0.1
    causal: bool = True
    gradient: str = "exact"  # of the potential: "exact", "local" or "original", see bklm.bk_core
    grad_blend: float = 0.0  # share of hypothesis-7 in that gradient, 0 to 1
    router_gradient: str = "exact"  # "exact", "selected" or "none", see bklm.moe
    clamps: bool = False  # the original's +-3 on the potential and +-10 on the features
    eta: float = (
        1.0  # imaginary part of z; memory reaches at most about 1 / eta positions back, see docs/theory.md
    )
    n_heads: int = 1  # potentials per position, each with a Hamiltonian of its own
    balance: float = 0.0  # weight of the experts' load-balancing loss, see bklm.moe

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 3)
        for name in ("d_model", "n_layers", "num_experts", "n_heads"):
            check_int(name, getattr(self, name), 1)
        if self.n_seq is not None:
            check_int("n_seq", self.n_seq, 1, " or None for any length")
        check_int("top_k", self.top_k, 1)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}; it can be at most num_experts = {self.num_experts}.")
        check_dropout(self.dropout_p)
        if not 0.0 <= self.grad_blend <= 1.0:
            raise ValueError(f"grad_blend: got {self.grad_blend}; it must lie between 0 and 1.")
        if not 0.0 < self.eta < float("inf"):
            raise ValueError(f"eta: got {self.eta}; the resolvent needs a positive, finite imaginary shift.")
        if not 0.0 <= self.balance < float("inf"):
            raise ValueError(f"balance: got {self.balance}; it must be 0 or a positive, finite number.")
        if self.balance > 0 and self.router_gradient == "none":
            raise ValueError(
                f"balance: got {self.balance}, but router_gradient='none' leaves no router to balance."
            )
        check_choice("gradient", self.gradient, ("exact", "local", "original"))
        check_choice("router_gradient", self.router_gradient, ("exact", "selected", "none"))
        check_choice("causal", self.causal, (True, False))
        check_choice("clamps", self.clamps, (True, False))

    @classmethod
    def original(cls, vocab_size: int, **changes: Any) -> ResNetBKConfig:
        """The published model: it sees the future, its gradient lacks the conjugate, its router never learns."""
        settings = {
            "causal": False,
            "gradient": "original",
            "router_gradient": "none",
            "clamps": True,
            **changes,
        }
        return cls(vocab_size, **settings)


@dataclass(frozen=True)
class ResNetBKState:
    """All that a causal ResNet-BK carries from one token to the next."""

    position: int  # of the next token
    # Per layer G at the last position, (B, n_heads) complex; None before the first token.
    resolvents: tuple[Tensor, ...] | None


class ResNetBKBlock(nn.Module):
    """One residual block, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.clamps = config.clamps
        self.norm = nn.LayerNorm(config.d_model)
        self.moe = AnalyticMoE(
            config.d_model,
            config.num_experts,
            config.top_k,
            config.dropout_p,
            router_gradient=config.router_gradient,
            balance=config.balance,
        )
        self.potential = nn.Linear(config.d_model, config.n_heads)
        self.core = BKCore(config.n_heads, config.causal, config.gradient, config.grad_blend, config.eta)
        self.mix = nn.Linear(2 * config.n_heads, config.d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, N, D) and the core's features (B, N, 2 n_heads), the real parts before the imaginary ones."""
        f, v = self._experts(x)
        features = self.core(v)
        return self._add(x, f, features), features

    def step(self, x: Tensor, resolvent: Tensor | None) -> tuple[Tensor, Tensor]:
        """One position x (B, 1, D) after the one whose resolvent (B, n_heads) is given, or the first."""
        f, v = self._experts(x)
        features, resolvent = self.core.step(v.squeeze(1), resolvent)
        return self._add(x, f, features.unsqueeze(1)), resolvent

    def _experts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.moe(self.norm(x))
        v = self.potential(f)
        if self.clamps:
            v = v.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
        # Under autocast the products are half precision; the recurrence is not.
        return f, v.float() if v.dtype.itemsize < 4 else v

    def _add(self, x: Tensor, f: Tensor, features: Tensor) -> Tensor:
        if self.clamps:
            features = features.clamp(-FEATURE_LIMIT, FEATURE_LIMIT)
        return x + f + self.scale * self.mix(features.to(x.dtype))


class ResNetBK(LanguageModel):
    """Token (and position) embedding, ``n_layers`` blocks, a final LayerNorm, an untied linear head with bias.

    Streams when ``causal``: `step` costs the same at every position. A bidirectional one cannot, because its
    features at every position change with each new token; `generate` then runs over the whole text for each of
    them.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_seq = config.n_seq
        self.streams, self.sees_future = config.causal, not config.causal
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = None if config.n_seq is None else nn.Embedding(config.n_seq, config.d_model)
        self.blocks = nn.ModuleList(ResNetBKBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size)
        self._expert_counts: list[Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator.

        Chosen by validation perplexity after three epochs at a fixed learning rate of 1e-3, where what counts is how
        fast AdamW's equal steps change the function. Small embeddings and no position signal at first let tokens
        move far relative to where they start; blocks that begin near the identity leave them in charge of the
        stream; a gain of 3 in the last LayerNorm multiplies what a step of the head does. Nothing is exactly zero
        but biases and positions: every path carries signal, and the bidirectional core shows its leak, from the
        start.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.zeros_(self.positions.weight)
        for block in self.blocks:
            block.norm.reset_parameters()
            block.moe.reset_parameters()
            block.moe.down_weight.mul_(0.1)
            block.moe.down_bias.zero_()
            # f starts at about 0.02 a coordinate; v then at about 0.1 in all, enough for G to differ between tokens.
            nn.init.normal_(block.potential.weight, std=6.0 / math.sqrt(self.config.d_model))
            nn.init.zeros_(block.potential.bias)
            nn.init.normal_(block.mix.weight, std=0.02)
            nn.init.zeros_(block.mix.bias)
            block.scale.fill_(1.0)
        nn.init.constant_(self.norm.weight, 3.0)
        nn.init.zeros_(self.norm.bias)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    def head(self) -> tuple[Tensor, Tensor]:
        return self.output.weight, self.output.bias

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids)[0]

    def init_state(self, batch_size: int) -> ResNetBKState:
        if not self.streams:
            raise TypeError(self._cannot_stream())
        return ResNetBKState(0, None)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, ResNetBKState]:
        if not self.streams:
            raise TypeError(self._cannot_stream())
        self.check_prompt(input_ids)
        hidden, features = self._run(input_ids)
        # In the causal core G_i is the left resolvent L_i itself: the last position's features are the state.
        resolvents = tuple(torch.complex(*g[:, -1].chunk(2, dim=-1)) for g in features)
        return self.logits(hidden[:, -1]), ResNetBKState(input_ids.shape[1], resolvents)

    @torch.no_grad()
    def step(self, token: Tensor, state: ResNetBKState) -> tuple[Tensor, ResNetBKState]:
        if not self.streams:
            raise TypeError(self._cannot_stream())
        self.check_token(token)
        self.check_positions(state.position + 1)
        x = self._embed(token.unsqueeze(1), state.position)
        resolvents = []
        for layer, block in enumerate(self.blocks):
            x, resolvent = block.step(x, None if state.resolvents is None else state.resolvents[layer])
            resolvents.append(resolvent)
        return self.logits(self.norm(x)[:, 0]), ResNetBKState(state.position + 1, tuple(resolvents))

    def state_bytes(self, position: int) -> int:
        if not self.streams:
            raise TypeError(self._cannot_stream())
        # One complex resolvent per layer and head: two numbers of the model's dtype.
        return self.config.n_layers * self.config.n_heads * 2 * self.norm.weight.element_size()

    def auxiliary_loss(self) -> Tensor | None:
        return total_balance_loss(self) if self.config.balance > 0 else None

    def reset_expert_counts(self, counts: Sequence[Sequence[int]] = ()) -> None:
        self._expert_counts = [torch.tensor(layer, device="cpu") for layer in counts] or None

    def expert_counts(self) -> list[list[int]]:
        return [] if self._expert_counts is None else [c.tolist() for c in self._expert_counts]

    def _embed(self, input_ids: Tensor, first_position: int = 0) -> Tensor:
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions.weight[first_position : first_position + input_ids.shape[1]]
        return x

    def _run(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self._embed(input_ids), []
        for block in self.blocks:
            x, g = block(x)
            features.append(g)
        if self.training:
            self._count_experts()
        return self.norm(x), features

    def _count_experts(self) -> None:
        counts = [block.moe.expert_counts for block in self.blocks]
        if any(c is None for c in counts):
            return
        if torch.compiler.is_compiling():
            counts = [counted_once(c) for c in counts]
        elif in_backward():  # activation checkpointing computes again what was counted already
            return
        if self._expert_counts is None:
            self._expert_counts = [c.clone() for c in counts]
        else:
            for total, count in zip(self._expert_counts, counts, strict=True):
                total += count
