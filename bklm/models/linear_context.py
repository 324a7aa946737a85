"""LinearContext: diagonal recurrences over positions, either gated by the input or linear throughout, the linear competitor.

``recurrence="lru"`` is that of ``bklm.models.lru``, whose operator is the same at every position. "gated", per block and
channel, with u = LN(x):

    lambda_i = sigmoid(w_lambda . u_i + beta),   h_i = lambda_i h_{i-1} + (1 - lambda_i) v_i,   v = W_v u
    x_i <- x_i + W_o (silu(W_g u_i) h_i),        x_i <- x_i + W_2 gelu(W_1 LN(x_i))

h is a running mean of the values with learned forgetting (minGRU: Feng et al. 2024; HGRN: Qin et al. 2023): bounded by
them at any length. Its decay is a function of the input, so it is linear in h alone, and it has no phase: its weights are
positive. No position embedding, a tied head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_choice, check_dropout, check_int
from bklm.models.dropout import add_dropout, dropout
from bklm.models.linear_scan import linear_scan
from bklm.models.lru import LRUBlock
from bklm.models.mixing import MixingPoint
from bklm.moe.products import Linear

INITIAL_STD = 0.02
_LONGEST_MEMORY = 64.0


@dataclass(frozen=True)
class LinearContextConfig:
    """Size of a LinearContext.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    dropout_p: float = 0.1
    tied: bool = True
    recurrence: str = "gated"

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 2)
        for name in ("d_model", "n_layers"):
            check_int(name, getattr(self, name), 1)
        check_dropout(self.dropout_p)
        check_choice("tied", self.tied, (True, False))
        check_choice("recurrence", self.recurrence, ("gated", "lru"))


@dataclass(frozen=True)
class LinearContextState:
    """All that a LinearContext carries from one token to the next: h of each layer, (B, d_model); of an LRU, which is complex,
    real and imaginary parts, (B, 2 d_model)."""

    contexts: tuple[Tensor, ...]


class LinearContextBlock(nn.Module):
    """One gated residual block, (B, N, D) -> (B, N, D)."""

    parts = 1  # numbers of a channel's state

    def __init__(self, d: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.mixer_norm = nn.LayerNorm(d)
        # Values, gates and decays, one after the other.
        self.inputs = Linear(d, 3 * d)
        self.mixed = MixingPoint()
        self.mixer_output = Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d)
        self.up = Linear(d, 4 * d)
        self.down = Linear(4 * d, d)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int) -> None:
        for linear in (self.inputs, self.mixer_output, self.up, self.down):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        for linear in (self.mixer_output, self.down):
            linear.weight.div_(math.sqrt(2 * n_layers))
        for norm in (self.mixer_norm, self.mlp_norm):
            norm.reset_parameters()
        # Memories 1 / (1 - lambda) of 1 to 64 positions at first, evenly spread in their logarithm.
        d = self.mixer_output.in_features
        memory = torch.logspace(0.1, math.log10(_LONGEST_MEMORY), d)
        self.inputs.bias[2 * d :] = torch.log(memory - 1)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output, and h (B, D) after the last position; ``before``: h before the first one, zeros if None."""
        values, gates, decay = self.inputs(self.mixer_norm(x)).chunk(3, -1)
        # Under autocast the products are half precision; the recurrence is not.
        values, decay = (t.float() if t.dtype.itemsize < 4 else t for t in (values, decay))
        given = torch.sigmoid(-decay) * values
        decay = torch.sigmoid(decay)
        h = linear_scan(decay, given, None if before is None else before.to(given.dtype))
        gated = F.silu(gates) * self.mixed(h)
        p, training = self.dropout_p, self.training
        x = add_dropout(x, self.mixer_output(gated.to(x.dtype)), p, training)
        wide = F.gelu(self.up(self.mlp_norm(x)))
        return add_dropout(x, self.down(wide), p, training), h[:, -1]


class LinearContext(LanguageModel):
    """The model of this module; any length, and the same state and cost at every position."""

    streams = True

    def __init__(self, config: LinearContextConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        block = {"gated": LinearContextBlock, "lru": LRUBlock}[config.recurrence]
        self.blocks = nn.ModuleList(block(config.d_model, config.dropout_p) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator, as GPT-2: N(0, 0.02), biases 0, the last layer of each residual
        branch smaller by the square root of the number of branches; decays spread over memories of 1 to 64 positions. The
        blocks of an LRU as their paper has them."""
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        for block in self.blocks:
            block.reset_parameters(self.config.n_layers)
        self.norm.reset_parameters()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=INITIAL_STD)

    def head(self) -> tuple[Tensor, None]:
        return (self.embedding if self.output is None else self.output).weight, None

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids, None)[0]

    def init_state(self, batch_size: int) -> LinearContextState:
        zeros = self.norm.weight.new_zeros(batch_size, self._state_width)
        return LinearContextState((zeros,) * self.config.n_layers)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, LinearContextState]:
        self.check_prompt(input_ids)
        return self._continue(input_ids, None)

    @torch.no_grad()
    def step(self, token: Tensor, state: LinearContextState) -> tuple[Tensor, LinearContextState]:
        self.check_token(token)
        return self._continue(token.unsqueeze(1), state)

    def state_bytes(self, position: int) -> int:
        return self.config.n_layers * self._state_width * self.norm.weight.element_size()

    @property
    def _state_width(self) -> int:
        return self.blocks[0].parts * self.config.d_model

    def _continue(
        self, input_ids: Tensor, state: LinearContextState | None
    ) -> tuple[Tensor, LinearContextState]:
        hidden, state = self._run(input_ids, state)
        return self.logits(hidden[:, -1]), state

    def _run(self, input_ids: Tensor, state: LinearContextState | None) -> tuple[Tensor, LinearContextState]:
        x = dropout(self.embedding(input_ids), self.config.dropout_p, self.training)
        contexts = []
        for layer, block in enumerate(self.blocks):
            x, h = block(x, None if state is None else state.contexts[layer])
            contexts.append(h)
        return self.norm(x), LinearContextState(tuple(contexts))
