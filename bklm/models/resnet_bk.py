"""ResNet-BK: residual blocks that mix positions through the diagonal of a resolvent, in O(N) time.

Each block reads a potential v from its mixture of experts, puts it on the diagonal of a tridiagonal Hamiltonian
and gives
back the resolvent's diagonal as two features per head:

    f = MoE(LN(x)),   v = W_v f,   G = diag((H - z)^-1),  H = tridiag(1, v - 2, 1),  z = i eta
    x <- x + f + s W [Re G, Im G]

With ``causal=True`` G_i is the last entry of the resolvent of the leading block H[0..i, 0..i], which depends on
nothing after i; it is then also the whole state that position i + 1 needs.

That is the published model, mixer "diagonal": one number a head passes between positions. With ``mixer="solve"`` a block
reads what stood at the positions before: the resolvent is applied to values (``bklm.models.resnet_bk_mixers``).
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
from bklm.models.dropout import dropout
from bklm.models.mixing import MixingPoint
from bklm.models.resnet_bk_config import ResNetBKConfig
from bklm.models.resnet_bk_mixers import MixerState, SolveBlock
from bklm.moe.layer import AnalyticMoE, total_balance_loss
from bklm.moe.ops import counted_once, in_backward

POTENTIAL_LIMIT = 3.0  # the original's clamps, used with ``clamps=True``
FEATURE_LIMIT = 10.0


@dataclass(frozen=True)
class ResNetBKState:
    """All that a causal ResNet-BK carries from one token to the next."""

    position: int  # of the next token
    # Per layer, None before the first token: G at the last position, (B, n_heads) complex; of the mixer "solve" a MixerState.
    resolvents: tuple[Tensor, ...] | tuple[MixerState, ...] | None


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
        self.mixed = MixingPoint()
        self.mix = nn.Linear(2 * config.n_heads, config.d_model)
        self.scale = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See ``ResNetBK.reset_parameters``."""
        self.norm.reset_parameters()
        self.moe.reset_parameters()
        self.moe.down_weight.mul_(0.1)
        self.moe.down_bias.zero_()
        # f starts at about 0.02 a coordinate; v then at about 0.1 in all, enough for G to differ between tokens.
        nn.init.normal_(self.potential.weight, std=6.0 / math.sqrt(self.potential.in_features))
        nn.init.zeros_(self.potential.bias)
        nn.init.normal_(self.mix.weight, std=0.02)
        nn.init.zeros_(self.mix.bias)
        self.scale.fill_(1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, N, D), and the state after the last position: G there, (B, n_heads).

        The core's features (B, N, 2 n_heads) are the real parts before the imaginary ones. In the causal core G_i is the
        left resolvent L_i itself: the last position's features are the state.
        """
        f, v = self._experts(x)
        features = self.core(v)
        return self._add(x, f, features), torch.complex(*features[:, -1].chunk(2, dim=-1))

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
        return x + f + self.scale * self.mix(self.mixed(features).to(x.dtype))


class ResNetBK(LanguageModel):
    """Token (and position) embedding, ``n_layers`` blocks, a final LayerNorm, a linear head: with bias, or ``tied``.

    Streams when ``causal``: ``step`` costs the same at every position. A bidirectional one cannot, because its
    features at every position change with each new token; ``generate`` then runs over the whole text for each of
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
        block = SolveBlock if config.mixer == "solve" else ResNetBKBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = None if config.tied else nn.Linear(config.d_model, config.vocab_size)
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

        With the mixer "solve" as GPT-2: N(0, 0.02), the last layer of each residual branch smaller.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.zeros_(self.positions.weight)
        for block in self.blocks:
            block.reset_parameters()
        self.norm.reset_parameters()
        if self.config.mixer == "diagonal":
            nn.init.constant_(self.norm.weight, 3.0)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.01)
            nn.init.zeros_(self.output.bias)

    def head(self) -> tuple[Tensor, Tensor | None]:
        return (self.embedding.weight, None) if self.output is None else (self.output.weight, self.output.bias)

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
        hidden, states = self._run(input_ids)
        return self.logits(hidden[:, -1]), ResNetBKState(input_ids.shape[1], tuple(states))

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
        # One complex resolvent per layer and head: two numbers of the model's dtype. The solve's y is complex, too.
        config, numbers = self.config, 2 * self.config.n_heads
        if config.mixer == "solve":
            numbers += (2 + max(0, config.convolution - 1)) * config.d_model
        return config.n_layers * numbers * self.norm.weight.element_size()

    @property
    def loss_is_likelihood(self) -> bool:
        return self.config.balance == 0

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
        if self.config.mixer == "solve":
            x = dropout(x, self.config.dropout_p, self.training)
        return x

    def _run(self, input_ids: Tensor) -> tuple[Tensor, list[Any]]:
        """Hidden states, and each layer's state after the last position."""
        x, states = self._embed(input_ids), []
        for block in self.blocks:
            x, state = block(x)
            states.append(state)
        if self.training:
            self._count_experts()
        return self.norm(x), states

    def _count_experts(self) -> None:
        counts = [block.moe.expert_counts for block in self.blocks if block.moe is not None]
        if not counts or any(c is None for c in counts):
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
