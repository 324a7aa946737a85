"""NewLLM's recurrence position by position in torch operations, on any device and in any dtype.

Formulas and names: ``bklm.models.new_llm_loop``. Row t B + b is position t of sequence b. For all positions at once come
the gates' slopes and the clamp before the backward's loop. Products are in their own dtype; gates, LayerNorm and context
are in the context's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bklm.models.dropout import keep_masks
from bklm.models.new_llm_plain import CONTEXT_LIMIT
from bklm.moe.products import PreparedLinear, linear


class Weights(NamedTuple):
    """What the recurrence multiplies by."""

    gate: Tensor  # (3C, H)
    gate_bias: Tensor  # (3C,)
    gain: Tensor  # (C,)
    shift: Tensor  # (C,)
    layers: tuple[Tensor, ...]  # (H, E + C), then (H, H)
    biases: tuple[Tensor, ...]  # (H,)


class Trace(NamedTuple):
    """What a forward leaves for its backward."""

    outputs: Tensor  # (L, N B, H): a_1 ... a_L
    gates: Tensor  # (N B, 3C): f, i, u
    contexts: Tensor  # (N B + B, C): c_0 ... c_N
    mixed: Tensor  # (N B, C): s
    mean: Tensor  # (N B, 1): of s
    rstd: Tensor  # (N B, 1): 1 / deviation of s


class Gradients(NamedTuple):
    """Of the loss, at every position and for the first context."""

    layers: Tensor  # (L, N B, H): of each layer before its ReLU
    gates: Tensor  # (N B, 3C): of z
    normed: Tensor  # (N B, C): of LN(s)
    context: Tensor  # (B, C)


def forward(embedded: Tensor, context: Tensor, weights: Weights, eps: float, dropout_p: float) -> Trace:
    """The trace from embedded (N, B, E) and context (B, C); N at least 1, dropout as in ``new_llm_loop.recurrence``."""
    (length, batch, width), size = embedded.shape, context.shape[1]
    product, depth, hidden = weights.gate.dtype, len(weights.layers), weights.gate.shape[1]
    first, *others = weights.layers
    tokens = linear(embedded.to(product), first[:, :width], weights.biases[0])
    to_first = PreparedLinear(first[:, width:], rows=batch)
    maps = [
        PreparedLinear(w, b, rows=batch, relu=True) for w, b in zip(others, weights.biases[1:], strict=True)
    ]
    to_gates = PreparedLinear(weights.gate, weights.gate_bias, rows=batch)
    a = tokens.new_empty((length, depth, batch, hidden))
    gates, mixed = (context.new_empty(length, batch, k * size) for k in (3, 1))
    contexts = context.new_empty(length + 1, batch, size)
    contexts[0] = context
    statistics = []
    for t, x in enumerate(tokens.unbind()):
        before, gate, out = contexts[t], gates[t], a[t]
        keep = keep_masks((depth, batch, hidden), dropout_p, a) if dropout_p > 0 else [None] * depth
        h = _keep(to_first(before.to(product)).add_(x).relu_(), keep[0], out[0])
        for i, layer in enumerate(maps, start=1):
            h = _keep(layer(h), keep[i], out[i])
        gate.copy_(to_gates(h))
        gate[:, : 2 * size].sigmoid_()
        forget, write, update = gate.chunk(3, 1)
        torch.mul(forget, before, out=mixed[t]).addcmul_(write, update)
        normed, mean, rstd = torch.native_layer_norm(mixed[t], (size,), weights.gain, weights.shift, eps)
        torch.clamp(normed, -CONTEXT_LIMIT, CONTEXT_LIMIT, out=contexts[t + 1])
        statistics.append((mean, rstd))
    mean, rstd = (torch.cat(x) for x in zip(*statistics, strict=True))
    outputs = a.transpose(0, 1).flatten(1, 2)
    return Trace(outputs, gates.flatten(0, 1), contexts.flatten(0, 1), mixed.flatten(0, 1), mean, rstd)


def backward(trace: Trace, weights: Weights, d_hidden: Tensor, d_context: Tensor, scale: float) -> Gradients:
    """Gradients from those of the hidden states (N B, H) and of the last context (B, C).

    Args:
        scale: what dropout multiplied the units by that it kept.
    """
    batch, size = d_context.shape
    # Not unflatten: torch.compile cannot follow it where a default device is set (torch 2.13).
    a, gates, contexts, mixed, mean, rstd = (t.view(*t.shape[:-2], -1, batch, t.shape[-1]) for t in trace)
    product, (first, *others) = a.dtype, weights.layers

    def backwards(weight: Tensor, scale: float) -> PreparedLinear:
        return PreparedLinear((weight * scale).to(product).t(), rows=batch)

    # d holds gradients before dropout's scale, which the weights that they go through next bring in.
    from_gates = backwards(weights.gate, 1.0)
    from_layers = [backwards(w, scale) for w in (first[:, -size:], *others)]
    forget, write, update = gates.chunk(3, 2)
    # d z = slope * d s, for the three gates side by side.
    slope = torch.stack((contexts[:-1] * forget * (1 - forget), update * write * (1 - write), write), 2)
    inside = (contexts[1:].abs() < CONTEXT_LIMIT).to(mixed.dtype)
    d_normed, d = torch.empty_like(mixed), torch.empty_like(a)
    through_relu = torch.ops.aten.threshold_backward.grad_input
    through_norm = torch.ops.aten.native_layer_norm_backward
    outputs, d_outputs = ([layer.unbind() for layer in x.unbind()] for x in (a, d))
    d_hidden = d_hidden.view(-1, batch, d_hidden.shape[-1])
    for t in range(len(mixed) - 1, -1, -1):
        d_normed_t = torch.mul(d_context, inside[t], out=d_normed[t])
        d_mixed, _, _ = through_norm(
            d_normed_t, mixed[t], (size,), mean[t], rstd[t], weights.gain, weights.shift, (True, False, False)
        )
        d_gates = slope[t].mul_(d_mixed.unsqueeze(1)).view(batch, 3 * size)
        g = from_gates(d_gates.to(product)).add_(d_hidden[t])
        for i in range(len(from_layers) - 1, -1, -1):
            g = from_layers[i](through_relu(g, outputs[i][t], 0, grad_input=d_outputs[i][t]))
        d_context = d_mixed.mul_(forget[t]).add_(g)
    d.mul_(scale)
    return Gradients(d.flatten(1, 2), slope.view(-1, 3 * size), d_normed.flatten(0, 1), d_context)


def _keep(h: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """A layer's output after dropout, written where the backward finds it."""
    return out.copy_(h) if mask is None else torch.mul(h, mask, out=out)
