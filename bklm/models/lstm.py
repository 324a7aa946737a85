"""LSTM: torch's own, the recurrent competitor at equal size.

Token embedding, ``n_layers`` of ``torch.nn.LSTM`` of the same width, and a head that is the embedding (``tied``) or a linear
map without bias; dropout on the embedding, between the layers and before the head (Zaremba et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_choice, check_dropout, check_int
from bklm.models.dropout import dropout

EMBEDDING_STD = (
    0.3  # N(0, 0.02), as a GPT begins, leaves the gates without a signal: see ``benchmarks/reading_search.py``
)
HEAD_STD = 0.02


@dataclass(frozen=True)
class LSTMConfig:
    """Size of an LSTM.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int = 256
    n_layers: int = 2
    dropout_p: float = 0.1
    tied: bool = True

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 2)
        for name in ("d_model", "n_layers"):
            check_int(name, getattr(self, name), 1)
        check_dropout(self.dropout_p)
        check_choice("tied", self.tied, (True, False))


@dataclass(frozen=True)
class LSTMState:
    """All that an LSTM carries from one token to the next: outputs and cells (n_layers, B, d_model)."""

    output: Tensor
    cell: Tensor


class LSTM(LanguageModel):
    """The model of this module; any length, and the same state and cost at every position.

    It has no features that could be replaced by a mean: gates and cell read the state inside. Its context gain is measured
    with windows of one token, which start from the zero state.
    """

    streams = True

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        between = config.dropout_p if config.n_layers > 1 else 0.0
        self.lstm = nn.LSTM(d, d, config.n_layers, batch_first=True, dropout=between)
        self.output = None if config.tied else nn.Linear(d, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator: torch's for the LSTM, with forget gates that start open (bias
        1; Jozefowicz et al. 2015); N(0, 0.3) for the embedding, N(0, 0.02) for a head of its own."""
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.lstm.reset_parameters()
        d = self.config.d_model
        for layer in range(self.config.n_layers):
            # Two biases are added; torch's order of gates is input, forget, cell, output.
            getattr(self.lstm, f"bias_ih_l{layer}")[d : 2 * d] = 1.0
            getattr(self.lstm, f"bias_hh_l{layer}")[d : 2 * d] = 0.0
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=HEAD_STD)

    def head(self) -> tuple[Tensor, None]:
        return (self.embedding if self.output is None else self.output).weight, None

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids, None)[0]

    def init_state(self, batch_size: int) -> LSTMState:
        zeros = self.embedding.weight.new_zeros(self.config.n_layers, batch_size, self.config.d_model)
        return LSTMState(zeros, zeros)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, LSTMState]:
        self.check_prompt(input_ids)
        return self._continue(input_ids, None)

    @torch.no_grad()
    def step(self, token: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        self.check_token(token)
        return self._continue(token.unsqueeze(1), state)

    def state_bytes(self, position: int) -> int:
        return 2 * self.config.n_layers * self.config.d_model * self.embedding.weight.element_size()

    def _continue(self, input_ids: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        hidden, state = self._run(input_ids, state)
        return self.logits(hidden[:, -1]), state

    def _run(self, input_ids: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        p, training = self.config.dropout_p, self.training
        x = dropout(self.embedding(input_ids), p, training)
        start = None if state is None else (state.output, state.cell)
        if torch._C._are_functorch_transforms_active():
            hidden, (output, cell) = self._plain(x, start)
        elif x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Processors without bfloat16 instructions have no such LSTM; torch would refuse in its own words.
            with torch.autocast("cpu", enabled=False):
                hidden, (output, cell) = self.lstm(x.float(), start)
        else:
            hidden, (output, cell) = self.lstm(x, start)
        return dropout(hidden, p, training), LSTMState(output, cell)

    def _plain(self, x: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``self.lstm(x, start)`` in torch operations, position by position: torch's LSTM has no rule for vmap."""
        zeros = x.new_zeros(len(x), self.config.d_model)
        ends = []
        for layer in range(self.config.n_layers):
            if layer:
                x = dropout(x, self.config.dropout_p, self.training)
            names = ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")
            w_x, w_h, b_x, b_h = (getattr(self.lstm, f"{name}{layer}") for name in names)
            h, c = (zeros, zeros) if start is None else (t[layer] for t in start)
            rows = []
            for read in F.linear(x, w_x, b_x + b_h).unbind(1):
                i, f, g, o = (read + F.linear(h, w_h)).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                rows.append(h)
            x = torch.stack(rows, 1)
            ends.append((h, c))
        return x, tuple(torch.stack(t) for t in zip(*ends, strict=True))
