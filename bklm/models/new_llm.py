"""NewLLM: a recurrent language model without attention; all that it remembers is one context vector.

At each position a stack of layers reads the token's embedding e_t and the context c_{t-1}, and three gates write
the context that the next position will read:

    h_t = 6 x [Linear, ReLU, dropout] ([e_t; c_{t-1}]),    logits_t = W_o h_t + b_o
    c_t = clamp(LN(sigmoid(W_f h_t + b_f) * c_{t-1} + sigmoid(W_i h_t + b_i) * (W_u h_t + b_u)), -10, 10),   c_0 = 0

The recurrence is sequential, and only it is: the token's share of the first layer, W_1 e_t, is computed for all
positions before the loop, output head and loss after it, and the weights' gradients are one matrix product each
over all positions (``bklm.models.new_llm_loop``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_dropout, check_int
from bklm.models.mixing import MixingPoint
from bklm.models.new_llm_loop import recurrence
from bklm.models.new_llm_plain import CONTEXT_LIMIT

INITIAL_STD = 0.02


@dataclass(frozen=True)
class NewLLMConfig:
    """Size of a NewLLM; the defaults are the published baseline (2,739,432 parameters with 1,000 words).

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    embed_dim: int = 256
    hidden_dim: int = 512
    context_dim: int = 256
    n_layers: int = 6
    dropout_p: float = 0.1

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 2)
        for name in ("embed_dim", "hidden_dim", "context_dim", "n_layers"):
            check_int(name, getattr(self, name), 1)
        check_dropout(self.dropout_p)

    @classmethod
    def advanced(cls, vocab_size: int, **changes: Any) -> NewLLMConfig:
        """The published larger model (4,840,936 parameters with 1,000 words)."""
        return cls(vocab_size, **{"context_dim": 512, "n_layers": 12, **changes})


@dataclass(frozen=True)
class NewLLMState:
    """All that a NewLLM carries from one token to the next."""

    context: Tensor  # (B, context_dim)


class NewLLM(LanguageModel):
    """The model of this module; any length, and the same state and cost at every position.

    Each sequence given to ``forward`` or ``loss`` starts from the zero context; ``step`` carries one on.
    """

    streams = True

    def __init__(self, config: NewLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        widths = [config.embed_dim + config.context_dim] + [config.hidden_dim] * config.n_layers
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.forget_gate = nn.Linear(config.hidden_dim, config.context_dim)
        self.input_gate = nn.Linear(config.hidden_dim, config.context_dim)
        self.update = nn.Linear(config.hidden_dim, config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size)
        self.mixed = MixingPoint()  # the context that a position reads
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator: N(0, 0.02), biases 0, as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.norm.reset_parameters()

    def head(self) -> tuple[Tensor, Tensor]:
        return self.output.weight, self.output.bias

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids)[0]

    def init_state(self, batch_size: int) -> NewLLMState:
        return NewLLMState(self.norm.weight.new_zeros(batch_size, self.config.context_dim))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, NewLLMState]:
        self.check_prompt(input_ids)
        hidden, context = self._run(input_ids)
        return self.logits(hidden[:, -1]), NewLLMState(context)

    @torch.no_grad()
    def step(self, token: Tensor, state: NewLLMState) -> tuple[Tensor, NewLLMState]:
        self.check_token(token)
        first = self.layers[0](torch.cat((self.embedding(token), state.context), -1))
        hidden, context = self._cell(first, state.context)
        return self.logits(hidden), NewLLMState(context)

    def state_bytes(self, position: int) -> int:
        return self.config.context_dim * self.norm.weight.element_size()

    def _run(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, N, hidden_dim) and the context (B, context_dim) after the last position."""
        # Time goes first inside, so that what one position reads and writes is contiguous.
        embedded = self.embedding(input_ids.t())
        context = self.init_state(input_ids.shape[0]).context
        if not self.mixed.idle or any(type(layer) is not nn.Linear for layer in (*self.layers, *self._gates())):
            return self._run_modules(embedded, context)
        hidden, context = recurrence(
            embedded,
            context,
            [(layer.weight, layer.bias) for layer in self.layers],
            torch.cat([gate.weight for gate in self._gates()]),
            torch.cat([gate.bias for gate in self._gates()]),
            self.norm,
            self.config.dropout_p if self.training else 0.0,
        )
        return hidden.transpose(0, 1), context

    def _run_modules(self, embedded: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Position by position through the modules, whatever they are (quantised ones, for instance)."""
        hidden = []
        for e in embedded:
            context = self.mixed(context.unsqueeze(1)).squeeze(1)
            h, context = self._cell(self.layers[0](torch.cat((e, context), -1)), context)
            hidden.append(h)
        return torch.stack(hidden, 1), context

    def _cell(self, first: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One position: first layer before its ReLU (B, hidden_dim) and context -> hidden state and next context."""
        p = self.config.dropout_p
        h = F.dropout(F.relu(first), p, self.training)
        for layer in self.layers[1:]:
            h = F.dropout(F.relu(layer(h)), p, self.training)
        forget, write, update = (gate(h) for gate in self._gates())
        mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * update
        return h, self.norm(mixed).clamp(-CONTEXT_LIMIT, CONTEXT_LIMIT)

    def _gates(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.forget_gate, self.input_gate, self.update
