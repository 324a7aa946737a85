"""The sequential part of NewLLM for whole sequences, with a backward written by hand.

With a_0 .. a_L the layers' outputs after ReLU and dropout, c the context and m masks that are 0 or 1 / (1 - p),

    a_0 = m relu(first_t + W_c c_{t-1}),   a_l = m relu(W_l a_{l-1} + b_l),   h_t = a_L
    f, i, u = sigmoid(z_f), sigmoid(z_i), z_u,   z = W_g h_t + b_g
    s_t = f c_{t-1} + i u,    c_t = clamp(LN(s_t))

A unit's output is zero exactly where no gradient passes, so a is all that the backward needs of a layer. Autograd would
compute each weight's gradient N times, as N thin products added up; here the loop only carries the gradient back,
and one product over all positions follows per weight. What depends on the forward alone (the gates' slopes, the
clamp) is computed for all positions before that loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bklm.models.products import PreparedLinear, weight_gradient

__all__ = ["CONTEXT_LIMIT", "recurrence"]

CONTEXT_LIMIT = 10.0  # the original's clamp of the context
_STEPS = 2**16  # of the dropout probability


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
        dropout_p: of each unit of each layer, to the nearest 1/65536; masks come from torch's global generator. 0
            outside training.

    Returns:
        Hidden states (N, B, H), in the dtype of the products (autocast's, where it is on), and the context (B, C) after
        the last position. Both are differentiable once, in all tensors given.
    """
    if len(first) == 0:
        return first, context
    if torch.is_grad_enabled() or dropout_p > 0:
        flat = [tensor for pair in layers for tensor in pair]
        return _Recurrence.apply(
            first, context, context_weight, gate_weight, gate_bias, norm.weight, norm.bias, norm.eps, dropout_p, *flat
        )  # fmt: skip
    return _infer(first, context, context_weight, layers, gate_weight, gate_bias, norm)


def keep_masks(shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor:
    """Masks of ``like``'s dtype: 0 with probability p, else 1 / (1 - p), for p rounded to a multiple of 1/65536.

    Four 16-bit draws come from each of the generator's 64-bit numbers: on a CPU a sixth of the time of bernoulli_.
    """
    dropped = _dropped_steps(dropout_p)
    count = torch.Size(shape).numel()
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = noise.view(torch.int16)[:count].view(shape) >= dropped - _STEPS // 2
    return kept.to(like.dtype).mul_(_scale(dropout_p))


def _dropped_steps(dropout_p: float) -> int:
    return min(round(dropout_p * _STEPS), _STEPS - 1)


def _scale(dropout_p: float) -> float:
    return _STEPS / (_STEPS - _dropped_steps(dropout_p))


def _infer(first, context, context_weight, layers, gate_weight, gate_bias, norm):
    """The same without dropout, keeping nothing but the hidden states."""
    product, batch = _product_dtype(context), len(context)
    of_context = PreparedLinear(context_weight.to(product), rows=batch)
    of_layers = [PreparedLinear(w.to(product), b.to(product), rows=batch, relu=True) for w, b in layers]
    of_gates = PreparedLinear(gate_weight.to(product), gate_bias.to(product), rows=batch)
    hidden = []
    for x in first:
        h = of_context(context.to(product)).add_(x).relu_()
        for layer in of_layers:
            h = layer(h)
        hidden.append(h)
        forget, write, update = of_gates(h).to(context.dtype).chunk(3, 1)
        mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * update
        context = norm(mixed).clamp_(-CONTEXT_LIMIT, CONTEXT_LIMIT)
    return torch.stack(hidden), context


class _Recurrence(torch.autograd.Function):
    """Autocast does not reach into a Function: products are cast here, gates, LayerNorm and context are exact."""

    @staticmethod
    def forward(
        ctx, first, context, context_weight, gate_weight, gate_bias, gain, shift, eps, dropout_p, *layers
    ):
        product = _product_dtype(context)
        length, batch, width = first.shape
        size = context.shape[1]
        of_context = PreparedLinear(context_weight.to(product), rows=batch)
        of_layers = [
            PreparedLinear(w.to(product), b.to(product), rows=batch, relu=True)
            for w, b in zip(layers[::2], layers[1::2], strict=True)
        ]
        of_gates = PreparedLinear(gate_weight.to(product), gate_bias.to(product), rows=batch)
        depth = 1 + len(of_layers)
        a = first.new_empty((depth, length, batch, width), dtype=product)
        gates = context.new_empty(length, batch, 2 * size)
        updates, mixed = context.new_empty(2, length, batch, size)
        contexts = context.new_empty(length + 1, batch, size)
        contexts[0] = context
        means, rstds = [], []
        for t in range(length):
            before = contexts[t]
            keep = keep_masks((depth, batch, width), dropout_p, a) if dropout_p > 0 else None
            h = of_context(before.to(product)).add_(first[t]).relu_()
            h = _store(h, keep, a, 0, t)
            for i, layer in enumerate(of_layers, start=1):
                h = _store(layer(h), keep, a, i, t)
            z = of_gates(h).to(context.dtype)
            torch.sigmoid(z[:, : 2 * size], out=gates[t])
            forget, write = gates[t].chunk(2, 1)
            torch.mul(forget, before, out=mixed[t]).addcmul_(write, updates[t].copy_(z[:, 2 * size :]))
            normed, mean, rstd = torch.native_layer_norm(mixed[t], (size,), gain, shift, eps)
            torch.clamp(normed, -CONTEXT_LIMIT, CONTEXT_LIMIT, out=contexts[t + 1])
            means.append(mean)
            rstds.append(rstd)
        statistics = torch.stack(means), torch.stack(rstds)
        ctx.save_for_backward(
            a, gates, updates, mixed, contexts, *statistics, context_weight, gate_weight, gain, shift, *layers[::2]
        )  # fmt: skip
        ctx.scale = _scale(dropout_p)
        # Copies: what is saved must not be what the caller may change.
        return a[-1].clone(), contexts[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden, d_context):
        a, gates, updates, mixed, contexts, means, rstds, *weights = ctx.saved_tensors
        context_weight, gate_weight, gain, shift, *layer_weights = weights
        length, batch, size = mixed.shape

        def backwards(weight: Tensor, scale: float) -> PreparedLinear:
            return PreparedLinear((weight * scale).to(a.dtype).t().contiguous(), rows=batch)

        # d holds gradients before dropout's scale, which the weights that they go through next bring in.
        from_gates = backwards(gate_weight, 1.0)
        from_layers = [backwards(w, ctx.scale) for w in layer_weights]
        to_context = backwards(context_weight, ctx.scale)
        forget, write = gates.chunk(2, 2)
        # d z = slope * d s, for the three gates side by side.
        slope = torch.stack((contexts[:-1] * forget * (1 - forget), updates * write * (1 - write), write), 2)
        inside = (contexts[1:].abs() < CONTEXT_LIMIT).to(mixed.dtype)
        d_normed, d = torch.empty_like(mixed), torch.empty_like(a)
        through_relu = torch.ops.aten.threshold_backward.grad_input
        through_norm = torch.ops.aten.native_layer_norm_backward
        for t in range(length - 1, -1, -1):
            torch.mul(d_context, inside[t], out=d_normed[t])
            d_mixed, _, _ = through_norm(
                d_normed[t], mixed[t], (size,), means[t], rstds[t], gain, shift, (True, False, False)
            )
            d_gates = slope[t].mul_(d_mixed.unsqueeze(1)).view(batch, 3 * size)
            g = from_gates(d_gates.to(a.dtype)).add_(d_hidden[t])
            for i in range(len(layer_weights), 0, -1):
                g = from_layers[i - 1](through_relu(g, a[i, t], 0, grad_input=d[i, t]))
            g = to_context(through_relu(g, a[0, t], 0, grad_input=d[0, t]))
            d_context = (d_mixed * forget[t]).add_(g)

        needed = ctx.needs_input_grad
        d_gates = slope.flatten(2)
        grads = [
            d[0] * ctx.scale,
            d_context,
            weight_gradient(d[0], contexts[:-1]).mul_(ctx.scale) if needed[2] else None,
            weight_gradient(d_gates.to(a.dtype), a[-1]) if needed[3] else None,
            d_gates.sum((0, 1)),
            (d_normed * ((mixed - means) * rstds)).sum((0, 1)),
            d_normed.sum((0, 1)),
            None,
            None,
        ]
        for i in range(1, len(a)):
            grads.append(weight_gradient(d[i], a[i - 1]).mul_(ctx.scale) if needed[7 + 2 * i] else None)
            grads.append(d[i].sum((0, 1)).mul_(ctx.scale))
        return tuple(grads)


def _store(h: Tensor, keep: Tensor | None, a: Tensor, layer: int, t: int) -> Tensor:
    """A layer's output after dropout, written where the backward finds it."""
    out = a[layer, t]
    return out.copy_(h) if keep is None else torch.mul(h, keep[layer], out=out)


def _product_dtype(like: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on, except for double."""
    device = like.device.type
    if torch.is_autocast_enabled(device) and like.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return like.dtype
