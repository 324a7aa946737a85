"""The sequential part of NewLLM for whole sequences, with a backward written by hand.

With e the tokens' embeddings, c the context, a_1 .. a_L the layers' outputs and m masks that are 0 or 1 / (1 - p),

    a_1 = m relu(W_e e_t + W_c c_{t-1} + b_1),   a_l = m relu(W_l a_{l-1} + b_l),   h_t = a_L
    f, i, u = sigmoid(z_f), sigmoid(z_i), z_u,   z = W_g h_t + b_g
    s_t = f c_{t-1} + i u,    c_t = clamp(LN(s_t))

Two engines run it: ``new_llm_windows`` on a CPU, ``new_llm_steps`` everywhere. For all positions at once come W_e e before
the forward, and after the backward one product per weight for its gradient, which autograd would compute as N thin
products added up. A unit's output is zero exactly where no gradient passes, so a is all that the backward needs of a layer.

A gradient that will be differentiated again, and all that torch.func asks for, is left to autograd (``new_llm_plain``).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import new_llm_steps, new_llm_windows
from bklm.models.checks import is_plain_wanted, values_at_hand
from bklm.models.dropout import keep_scale
from bklm.models.new_llm_plain import plain, plain_gradients, product_dtype
from bklm.models.new_llm_steps import Gradients, Trace, Weights
from bklm.moe.products import linear, weight_gradient

INFERRED_AT_ONCE = 1024
"""Positions: what a forward leaves for its backward is kept of no more of them where there will be none."""


def recurrence(
    embedded: Tensor,
    context: Tensor,
    layers: list[tuple[Tensor, Tensor]],
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm: nn.LayerNorm,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Run all positions in turn.

    Args:
        embedded: (N, B, E), the tokens; time comes first.
        context: (B, C), before the first position.
        layers: weight and bias (H,) of each layer; the first weight is (H, E + C), the others (H, H).
        gate_weight: (3C, H), gate_bias: (3C,): forget gate, input gate, update, in this order.
        dropout_p: of each unit of each layer, to the nearest 1/65536; masks come from torch's global generator. 0
            outside training.

    Returns:
        Hidden states (N, B, H), in the dtype of the products (autocast's, where it is on), and the context (B, C) after
        the last position. Both are differentiable any number of times, in all tensors given.
    """
    if len(embedded) == 0:
        return embedded.new_empty(0, len(context), len(gate_weight[0])), context
    flat = [tensor for pair in layers for tensor in pair]
    # torch.compile cannot draw masks inside a Function.
    compiled_draw = dropout_p > 0 and torch.compiler.is_compiling()
    if compiled_draw or is_plain_wanted(embedded, context, gate_weight, gate_bias, *flat):
        return plain(
            embedded, context, gate_weight, gate_bias, norm.weight, norm.bias, *flat,
            eps=norm.eps, product=product_dtype(context),
            activate=lambda t, layer, x: F.dropout(F.relu(x), dropout_p) if dropout_p > 0 else F.relu(x),
        )  # fmt: skip
    inputs = embedded, context, gate_weight, gate_bias, norm.weight, norm.bias
    if torch.is_grad_enabled():
        return _Recurrence.apply(*inputs, norm.eps, dropout_p, *flat)
    weights, hidden = _weights(product_dtype(context), *inputs[2:], *flat), []
    for piece in embedded.split(INFERRED_AT_ONCE):
        trace = _engine(context, weights).forward(piece, context, weights, norm.eps, dropout_p)
        hidden.append(trace.outputs[-1].view(len(piece), len(context), -1))
        context = trace.contexts[-len(context) :]
    return torch.cat(hidden), context.clone()


def _weights(product: torch.dtype, gate_weight, gate_bias, gain, shift, *layers) -> Weights:
    """The weights, those of products in their dtype: autocast does not reach into a Function."""
    maps = (tuple(t.detach().to(product) for t in x) for x in (layers[::2], layers[1::2]))
    return Weights(gate_weight.to(product), gate_bias.to(product), gain, shift, *maps)


def _engine(context: Tensor, weights: Weights) -> ModuleType:
    """The module whose forward and backward run the recurrence."""
    takes = context.dtype in (torch.float32, torch.float64) and values_at_hand(context)
    # The kernels read plain numbers of one dtype.
    takes = takes and all(t.dtype == context.dtype for t in (weights.gate, weights.gain, *weights.layers))
    return new_llm_windows if takes else new_llm_steps


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embedded, context, gate_weight, gate_bias, gain, shift, eps, dropout_p, *layers):
        weights = _weights(product_dtype(context), gate_weight, gate_bias, gain, shift, *layers)
        ctx.engine = _engine(context, weights)
        trace = ctx.engine.forward(embedded, context, weights, eps, dropout_p)
        ctx.save_for_backward(*trace, embedded, context, gate_weight, gate_bias, gain, shift, *layers)
        ctx.scale, ctx.eps = keep_scale(dropout_p), eps
        # Copies: what is saved must not be what the caller may change.
        hidden = trace.outputs[-1].clone().view(*embedded.shape[:2], -1)
        return hidden, trace.contexts[-len(context) :].clone()

    @staticmethod
    def backward(ctx, d_hidden, d_context):
        # Asked for once: activation checkpointing allows no more.
        count, saved = len(Trace._fields), ctx.saved_tensors
        trace, inputs = Trace(*saved[:count]), saved[count:]
        embedded, _, *parameters = inputs
        if torch.is_grad_enabled() or is_plain_wanted(d_hidden, d_context):
            outputs = trace.outputs.view(-1, *d_hidden.shape)
            return plain_gradients(d_hidden, d_context, outputs, inputs, ctx.scale, ctx.eps)
        weights = _weights(embedded.dtype, *parameters)
        found = ctx.engine.backward(
            trace, weights, d_hidden.contiguous().flatten(0, 1), d_context.contiguous(), ctx.scale
        )
        return _all_gradients(trace, found, weights, embedded, ctx.needs_input_grad)


def _all_gradients(
    trace: Trace, found: Gradients, weights: Weights, embedded: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """What the backward returns, from the gradients at every position: one product a weight."""
    width, d = embedded.shape[-1], found.layers
    normed = (trace.mixed - trace.mean) * trace.rstd
    grads = [
        linear(d[0], weights.layers[0][:, :width].t().to(d.dtype)).view_as(embedded) if needed[0] else None,
        found.context,
        weight_gradient(found.gates.to(d.dtype), trace.outputs[-1]) if needed[2] else None,
        found.gates.sum(0),
        normed.mul_(found.normed).sum(0),
        found.normed.sum(0),
        None,
        None,
    ]
    for i, layer_needed in enumerate(needed[8::2]):
        inputs = [trace.outputs[i - 1]] if i else [embedded, trace.contexts[: len(normed)]]
        grads.append(torch.cat([weight_gradient(d[i], x) for x in inputs], 1) if layer_needed else None)
        grads.append(d[i].sum(0))
    return tuple(grads)
