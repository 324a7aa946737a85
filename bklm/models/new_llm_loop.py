"""The sequential part of NewLLM for whole sequences, with a backward written by hand.

With a_0 .. a_L the layers' outputs after ReLU and dropout, c the context, k = 1 / (1 - p) dropout's scale and m a
mask of -infinity where a unit is dropped and 0 elsewhere,

    a_0 = relu(k (first_t + W_c c_{t-1}) + m),   a_l = relu(k (W_l a_{l-1} + b_l) + m),   h_t = a_L
    f, i, u = sigmoid(z_f), sigmoid(z_i), z_u,   z = W_g h_t + b_g
    s_t = f c_{t-1} + i u,    c_t = clamp(LN(s_t))

Dropout inside the ReLU makes a unit's output zero exactly where no gradient passes, so a is all the backward needs of
a layer. Autograd would compute each weight's gradient N times, as N thin products added up; here the loop only
carries the gradient back, and one product over all positions follows per weight. What depends on the forward
alone (the gates' slopes, the clamp) is computed for all positions before that loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["CONTEXT_LIMIT", "recurrence"]

CONTEXT_LIMIT = 10.0  # the original's clamp of the context


def recurrence(
    first: Tensor,
    context: Tensor,
    context_weight: Tensor,
    layers: list[tuple[Tensor, Tensor]],
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm: nn.LayerNorm,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Run all positions in turn.

    Args:
        first: (N, B, H) the tokens' share of the first layer, its bias included, before the ReLU; time comes first.
        context: (B, C), before the first position.
        context_weight: (H, C), the context's share of the first layer.
        layers: weight (H, H) and bias (H,) of the layers after the first.
        gate_weight: (3C, H), gate_bias: (3C,): forget gate, input gate, update, in this order.
        dropout_p: of each unit of each layer; masks are drawn from torch's global generator. 0 outside training.

    Returns:
        Hidden states (N, B, H), in the dtype of the products (autocast's, where it is on), and the context (B, C) after
        the last position. Both are differentiable once, in all tensors given.
    """
    if len(first) == 0:
        return first, context
    dropped = None
    if dropout_p > 0:
        shape = (1 + len(layers), *first.shape)
        dropped = torch.empty(shape, dtype=torch.bool, device=first.device).bernoulli_(dropout_p)
    flat = [tensor for pair in layers for tensor in pair]
    scale = 1.0 / (1.0 - dropout_p)
    if torch.is_grad_enabled() or dropped is not None:
        return _Recurrence.apply(
            first, context, context_weight, gate_weight, gate_bias, norm.weight, norm.bias, norm.eps, dropped, scale, *flat
        )  # fmt: skip
    return _infer(first, context, context_weight, layers, gate_weight, gate_bias, norm)


def _infer(first, context, context_weight, layers, gate_weight, gate_bias, norm):
    """The same without dropout, keeping nothing but the hidden states."""
    hidden = []
    for x in first:
        h = (x + nn.functional.linear(context, context_weight)).relu_()
        for weight, bias in layers:
            h = nn.functional.linear(h, weight, bias).relu_()
        hidden.append(h)
        forget, write, update = nn.functional.linear(h, gate_weight, gate_bias).chunk(3, 1)
        mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * update
        context = norm(mixed).clamp_(-CONTEXT_LIMIT, CONTEXT_LIMIT)
    return torch.stack(hidden), context


class _Recurrence(torch.autograd.Function):
    """Autocast does not reach into a Function: products are cast here, gates, LayerNorm and context are exact."""

    @staticmethod
    def forward(
        ctx, first, context, context_weight, gate_weight, gate_bias, gain, shift, eps, dropped, scale, *layers
    ):
        exact, product = context.dtype, _product_dtype(context)
        length, batch, width = first.shape
        size = context.shape[1]
        weights = [(w * scale).to(product) for w in (context_weight, *layers[::2])]
        # A layer's outputs start as what is added to its product, so that each step is one product and one ReLU.
        a = first.new_empty((len(weights), length, batch, width), dtype=product)
        a[0] = first * scale
        for i, bias in enumerate(layers[1::2], start=1):
            a[i] = bias * scale
        if dropped is not None:
            a.masked_fill_(dropped, -torch.inf)
        gates = context.new_empty(length, batch, 3 * size)
        mixed = context.new_empty(length, batch, size)
        contexts = context.new_empty(length + 1, batch, size)
        contexts[0] = context
        to_layers = [w.t() for w in weights]
        to_gates, gate_offset = gate_weight.to(product).t(), gate_bias.to(product)
        positions = [row.unbind() for row in a.unbind()]
        means, rstds = [], []
        for t in range(length):
            before = contexts[t]
            h = before.to(product)
            for outputs, weight in zip(positions, to_layers, strict=True):
                h = outputs[t].addmm_(h, weight).relu_()
            z = gates[t]
            if product == exact:
                torch.addmm(gate_offset, h, to_gates, out=z)
            else:
                z.copy_(torch.addmm(gate_offset, h, to_gates))
            z[:, : 2 * size].sigmoid_()
            forget, write, update = z.split(size, 1)
            torch.mul(forget, before, out=mixed[t]).addcmul_(write, update)
            normed, mean, rstd = torch.native_layer_norm(mixed[t], (size,), gain, shift, eps)
            torch.clamp(normed, -CONTEXT_LIMIT, CONTEXT_LIMIT, out=contexts[t + 1])
            means.append(mean)
            rstds.append(rstd)
        statistics = torch.stack(means), torch.stack(rstds)
        ctx.save_for_backward(a, gates, mixed, contexts, gate_weight, gain, shift, *statistics, *weights)
        ctx.scale, ctx.product = scale, product
        # Copies: what is saved must not be what the caller may change.
        return a[-1].clone(), contexts[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden, d_context):
        a, gates, mixed, contexts, gate_weight, gain, shift, means, rstds, *weights = ctx.saved_tensors
        length, batch, size = mixed.shape
        forget, write, update = gates.split(size, 2)
        # d z = slope * d s, for the three gates side by side.
        slope = torch.stack((contexts[:-1] * forget * (1 - forget), update * write * (1 - write), write), 2)
        inside = (contexts[1:].abs() < CONTEXT_LIMIT).to(mixed.dtype)
        d_normed = torch.empty_like(mixed)
        d = torch.empty_like(a)
        d[-1] = d_hidden
        from_gates = gate_weight.to(ctx.product)
        context_weight, *layer_weights = weights
        positions = [row.unbind() for row in d.unbind()]
        outputs = [row.unbind() for row in a.unbind()]
        for t in range(length - 1, -1, -1):
            torch.mul(d_context, inside[t], out=d_normed[t])
            d_mixed, _, _ = torch.ops.aten.native_layer_norm_backward(
                d_normed[t], mixed[t], (size,), means[t], rstds[t], gain, shift, (True, False, False)
            )
            d_gates = slope[t].mul_(d_mixed.unsqueeze(1)).view(batch, 3 * size)
            g = positions[-1][t].addmm_(d_gates.to(ctx.product), from_gates)
            for i in range(len(layer_weights), 0, -1):
                torch.ops.aten.threshold_backward.grad_input(g, outputs[i][t], 0, grad_input=g)
                g = torch.mm(g, layer_weights[i - 1], out=positions[i - 1][t])
            torch.ops.aten.threshold_backward.grad_input(g, outputs[0][t], 0, grad_input=g)
            d_context = (d_mixed * forget[t]).add_(torch.mm(g, context_weight))
        d_gates = slope.view(-1, 3 * size)
        needed = ctx.needs_input_grad
        d_gates, d = slope.view(length, batch, 3 * size), d.mul_(ctx.scale)
        grads = [
            d[0],
            d_context,
            _weight_gradient(d[0], contexts[:-1]) if needed[2] else None,
            _weight_gradient(d_gates.to(ctx.product), a[-1]) if needed[3] else None,
            d_gates.sum((0, 1)),
            (d_normed * ((mixed - means) * rstds)).sum((0, 1)),
            d_normed.sum((0, 1)),
            *[None] * 3,
        ]
        for i in range(1, len(a)):
            grads.append(_weight_gradient(d[i], a[i - 1]) if needed[8 + 2 * i] else None)
            grads.append(d[i].sum((0, 1)))
        return tuple(grads)


def _weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Sum over all positions and rows of d^T x."""
    return d.flatten(0, 1).t() @ x.flatten(0, 1).to(d.dtype)


def _product_dtype(like: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on, except for double."""
    device = like.device.type
    if torch.is_autocast_enabled(device) and like.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return like.dtype
