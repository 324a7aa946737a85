"""The sequential part of NewLLM for whole sequences, with a backward written by hand.

With e the tokens' embeddings, c the context, a_1 .. a_L the layers' outputs and m masks that are 0 or 1 / (1 - p),

    a_1 = m relu(W_e e_t + W_c c_{t-1} + b_1),   a_l = m relu(W_l a_{l-1} + b_l),   h_t = a_L
    f, i, u = sigmoid(z_f), sigmoid(z_i), z_u,   z = W_g h_t + b_g
    s_t = f c_{t-1} + i u,    c_t = clamp(LN(s_t))

Outside the loops, for all positions at once: W_e e before the forward's; the gates' slopes and the clamp before the
backward's; after it one product per weight for its gradient, which autograd would compute as N thin products added
up. A unit's output is zero exactly where no gradient passes, so a is all that the backward needs of a layer.

A gradient that will be differentiated again, and all that torch.func asks for, is left to autograd (``_plain``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.checks import is_plain_wanted
from bklm.models.dropout import keep_masks, keep_scale
from bklm.models.products import PreparedLinear, linear, weight_gradient
from bklm.moe.autocast import autocast_dtype, autocast_off

CONTEXT_LIMIT = 10.0  # the original's clamp of the context


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
        return _plain(
            embedded, context, gate_weight, gate_bias, norm.weight, norm.bias, *flat,
            eps=norm.eps, product=_product_dtype(context),
            activate=lambda t, layer, x: F.dropout(F.relu(x), dropout_p) if dropout_p > 0 else F.relu(x),
        )  # fmt: skip
    if torch.is_grad_enabled() or dropout_p > 0:
        return _Recurrence.apply(
            embedded, context, gate_weight, gate_bias, norm.weight, norm.bias, norm.eps, dropout_p, *flat
        )
    return _infer(embedded, context, layers, gate_weight, gate_bias, norm)


class _Maps:
    """The loop's linear maps, in the dtype of the products, and the tokens' share of the first layer."""

    def __init__(self, embedded: Tensor, context: Tensor, weights, biases, gate_weight, gate_bias) -> None:
        self.dtype = product = _product_dtype(context)
        rows, width = len(context), embedded.shape[-1]
        first, *others = (w.to(product) for w in weights)
        first_bias, *other_biases = (b.to(product) for b in biases)
        self.tokens = linear(embedded.to(product), first[:, :width], first_bias)
        self.context = PreparedLinear(first[:, width:], rows=rows)
        self.layers = [
            PreparedLinear(w, b, rows=rows, relu=True) for w, b in zip(others, other_biases, strict=True)
        ]
        self.gates = PreparedLinear(gate_weight.to(product), gate_bias.to(product), rows=rows)


def _infer(embedded, context, layers, gate_weight, gate_bias, norm):
    """The same without dropout, keeping nothing but the hidden states."""
    maps = _Maps(embedded, context, *zip(*layers, strict=True), gate_weight, gate_bias)
    hidden = []
    for x in maps.tokens.unbind():
        h = maps.context(context.to(maps.dtype)).add_(x).relu_()
        for layer in maps.layers:
            h = layer(h)
        hidden.append(h)
        forget, write, update = maps.gates(h).to(context.dtype).chunk(3, 1)
        mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * update
        context = norm(mixed).clamp_(-CONTEXT_LIMIT, CONTEXT_LIMIT)
    return torch.stack(hidden), context


class _Recurrence(torch.autograd.Function):
    """Autocast does not reach into a Function: products are cast here, gates, LayerNorm and context are exact."""

    @staticmethod
    def forward(ctx, embedded, context, gate_weight, gate_bias, gain, shift, eps, dropout_p, *layers):
        weights, biases = layers[::2], layers[1::2]
        maps = _Maps(embedded, context, weights, biases, gate_weight, gate_bias)
        (length, batch, width), size, depth = maps.tokens.shape, context.shape[1], len(weights)
        a = maps.tokens.new_empty((depth, length, batch, width))
        gates = context.new_empty(length, batch, 2 * size)
        updates, mixed = context.new_empty(2, length, batch, size)
        contexts = context.new_empty(length + 1, batch, size)
        contexts[0] = context
        statistics = []
        outputs = list(zip(*(layer.unbind() for layer in a), strict=True))
        for t, x in enumerate(maps.tokens.unbind()):
            before, gate = contexts[t], gates[t]
            keep = keep_masks((depth, batch, width), dropout_p, a) if dropout_p > 0 else [None] * depth
            h = _keep(maps.context(before.to(maps.dtype)).add_(x).relu_(), keep[0], outputs[t][0])
            for i, layer in enumerate(maps.layers, start=1):
                h = _keep(layer(h), keep[i], outputs[t][i])
            z = maps.gates(h).to(context.dtype)
            torch.sigmoid(z[:, : 2 * size], out=gate)
            update = updates[t].copy_(z[:, 2 * size :])
            torch.mul(gate[:, :size], before, out=mixed[t]).addcmul_(gate[:, size:], update)
            normed, mean, rstd = torch.native_layer_norm(mixed[t], (size,), gain, shift, eps)
            torch.clamp(normed, -CONTEXT_LIMIT, CONTEXT_LIMIT, out=contexts[t + 1])
            statistics.append((mean, rstd))
        means, rstds = (torch.stack(x) for x in zip(*statistics, strict=True))
        inputs = (embedded, context, gate_weight, gate_bias, gain, shift, *layers)
        ctx.save_for_backward(a, gates, updates, mixed, contexts, means, rstds, *inputs)
        ctx.scale, ctx.eps = keep_scale(dropout_p), eps
        # Copies: what is saved must not be what the caller may change.
        return a[-1].clone(), contexts[-1].clone()

    @staticmethod
    def backward(ctx, d_hidden, d_context):
        a, gates, updates, mixed, contexts, means, rstds, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or is_plain_wanted(d_hidden, d_context):
            return _plain_gradients(d_hidden, d_context, a, inputs, ctx.scale, ctx.eps)
        embedded, _, gate_weight, _, gain, shift, first_weight, *layers = inputs
        layer_weights = layers[1::2]
        (length, batch, size), width = mixed.shape, embedded.shape[-1]

        def backwards(weight: Tensor, scale: float) -> PreparedLinear:
            return PreparedLinear((weight * scale).to(a.dtype).t(), rows=batch)

        # d holds gradients before dropout's scale, which the weights that they go through next bring in.
        from_gates = backwards(gate_weight, 1.0)
        from_layers = [backwards(w, ctx.scale) for w in layer_weights]
        to_context = backwards(first_weight[:, width:], ctx.scale)
        forget, write = gates.chunk(2, 2)
        # d z = slope * d s, for the three gates side by side.
        slope = torch.stack((contexts[:-1] * forget * (1 - forget), updates * write * (1 - write), write), 2)
        inside = (contexts[1:].abs() < CONTEXT_LIMIT).to(mixed.dtype)
        d_normed, d = torch.empty_like(mixed), torch.empty_like(a)
        through_relu = torch.ops.aten.threshold_backward.grad_input
        through_norm = torch.ops.aten.native_layer_norm_backward
        outputs, d_outputs = ([layer.unbind() for layer in x.unbind()] for x in (a, d))
        for t in range(length - 1, -1, -1):
            d_normed_t = torch.mul(d_context, inside[t], out=d_normed[t])
            d_mixed, _, _ = through_norm(
                d_normed_t, mixed[t], (size,), means[t], rstds[t], gain, shift, (True, False, False)
            )
            d_gates = slope[t].mul_(d_mixed.unsqueeze(1)).view(batch, 3 * size)
            g = from_gates(d_gates.to(a.dtype)).add_(d_hidden[t])
            for i in range(len(layer_weights), 0, -1):
                g = from_layers[i - 1](through_relu(g, outputs[i][t], 0, grad_input=d_outputs[i][t]))
            g = to_context(through_relu(g, outputs[0][t], 0, grad_input=d_outputs[0][t]))
            d_context = d_mixed.mul_(forget[t]).add_(g)

        d.mul_(ctx.scale)
        needs_embedded, needs_gates, needs_weights = (
            ctx.needs_input_grad[i] for i in (0, 2, slice(8, None, 2))
        )
        d_gates = slope.flatten(2)
        grads = [
            linear(d[0], first_weight[:, :width].t().to(d.dtype)) if needs_embedded else None,
            d_context,
            weight_gradient(d_gates.to(a.dtype), a[-1]) if needs_gates else None,
            d_gates.sum((0, 1)),
            (d_normed * ((mixed - means) * rstds)).sum((0, 1)),
            d_normed.sum((0, 1)),
            None,
            None,
        ]
        for i, needed in enumerate(needs_weights):
            inputs = [a[i - 1]] if i else [embedded, contexts[:-1]]
            grads.append(torch.cat([weight_gradient(d[i], x) for x in inputs], 1) if needed else None)
            grads.append(d[i].sum((0, 1)))
        return tuple(grads)


def _keep(h: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """A layer's output after dropout, written where the backward finds it."""
    return out.copy_(h) if mask is None else torch.mul(h, mask, out=out)


def _product_dtype(like: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on, except for double."""
    return autocast_dtype(like) or like.dtype


def _plain(
    embedded: Tensor, context: Tensor, gate_weight: Tensor, gate_bias: Tensor, gain: Tensor, shift: Tensor,
    *layers: Tensor, eps: float, product: torch.dtype, activate: Callable[[int, int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formulas in ordinary operations; ``activate(t, layer, x)`` is ReLU and dropout of one layer at one position."""
    size = context.shape[1]
    maps = [(w.to(product), b.to(product)) for w, b in zip(layers[::2], layers[1::2], strict=True)]
    gates, hidden = (gate_weight.to(product), gate_bias.to(product)), []
    with autocast_off(context):
        for t, e in enumerate(embedded):
            h = torch.cat((e.to(product), context.to(product)), 1)
            for layer, (weight, bias) in enumerate(maps):
                h = activate(t, layer, F.linear(h, weight, bias))
            hidden.append(h)
            forget, write, update = F.linear(h, *gates).to(context.dtype).chunk(3, 1)
            mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * update
            context = F.layer_norm(mixed, (size,), gain, shift, eps).clamp(-CONTEXT_LIMIT, CONTEXT_LIMIT)
    return torch.stack(hidden), context


def _plain_gradients(
    d_hidden: Tensor, d_context: Tensor, a: Tensor, inputs: Sequence[Tensor], scale: float, eps: float
) -> tuple[Tensor | None, ...]:
    """What the backward returns, as functions that may be differentiated again; ``a`` says where gradients pass."""
    again, silent = torch.is_grad_enabled(), a == 0
    with torch.enable_grad():
        # Each input as a node of its own: where one was made from another, that way must not be gone twice.
        inputs = [t.view_as(t) for t in inputs]
        outputs = _plain(
            *inputs, eps=eps, product=a.dtype,
            activate=lambda t, layer, x: x.masked_fill(silent[layer, t], 0.0) * scale,
        )  # fmt: skip
        wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
        found = torch.autograd.grad(
            outputs,
            [inputs[i] for i in wanted],
            (d_hidden, d_context),
            create_graph=again,
            allow_unused=True,
        )
    grads = dict(zip(wanted, found, strict=True))
    first, last = (tuple(grads.get(i) for i in range(*span)) for span in ((0, 6), (6, len(inputs))))
    return (*first, None, None, *last)
