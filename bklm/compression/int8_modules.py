"""Models that read weights past their modules, rewritten with a linear module for each product, so that it can be int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bklm.models import LSTM, ContextTokenLM, LanguageModel
from bklm.models.context_token import ContextBlock


def with_modules(model: LanguageModel) -> None:
    """Give an LSTM or a ContextTokenLM, in place, modules for the products that it takes of weights; its function stays.

    Other models multiply by modules as they are. For evaluation only: no dropout, and not the parameters' names.
    """
    if isinstance(model, LSTM):
        model.lstm = ModularLSTM(model.lstm)
    if isinstance(model, ContextTokenLM):
        model.context_block = ModularContextBlock(model.context_block)


class ModularLSTM(nn.Module):
    """``torch.nn.LSTM`` without dropout, batch first: x (B, N, K) and (h, c), each (L, B, D) or zeros, give the outputs
    (B, N, D) and the last (h, c). Each layer reads all positions in one product, and then goes on position by position.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.inputs, self.recurrent = nn.ModuleList(), nn.ModuleList()
        # Parameters: a model without any has no device that a caller could ask for.
        self.biases = nn.ParameterList()
        for layer in range(lstm.num_layers):
            w_x, w_h, b_x, b_h = (getattr(lstm, f"{name}_l{layer}") for name in _LSTM_WEIGHTS)
            self.inputs.append(_linear(w_x, None))
            self.biases.append(nn.Parameter((b_x + b_h).detach(), False))
            self.recurrent.append(_linear(w_h, None))

    def forward(
        self, x: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        zeros = x.new_zeros(len(x), self.recurrent[0].in_features)
        ends = []
        layers = zip(self.inputs, self.recurrent, self.biases, strict=True)
        for layer, (inputs, recurrent, bias) in enumerate(layers):
            h, c = (zeros, zeros) if start is None else (t[layer] for t in start)
            outputs = []
            for read in (inputs(x) + bias).unbind(1):
                # torch's order of gates: input, forget, cell, output.
                i, f, g, o = (read + recurrent(h)).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            x = torch.stack(outputs, 1)
            ends.append((h, c))
        return x, tuple(torch.stack(t) for t in zip(*ends, strict=True))


class ModularContextBlock(ContextBlock):
    """A ContextTokenLM's context block with a module for what tokens add in all layers, and one a layer for the context."""

    def __init__(self, block: ContextBlock) -> None:
        nn.Module.__init__(self)
        self.context_dim, self.norms, self.mixing = block.context_dim, block.norms, block.mixing
        self.register_buffer("fixed_point_iterations", block.fixed_point_iterations)
        self.inputs = _linear(*block.input_weights())
        own = (linear.weight[:, : block.context_dim] for linear in block.linears)
        self.recurrent = nn.ModuleList(_linear(weight, None) for weight in own)

    def given(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def own(self, layer: int, context: Tensor) -> Tensor:
        return self.recurrent[layer](context)


_LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().contiguous(), False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), False)
    return made
