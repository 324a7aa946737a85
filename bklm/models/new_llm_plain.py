"""NewLLM's recurrence in ordinary operations, position by position, which may be differentiated any number of times.

Formulas and names: ``bklm.models.new_llm_loop``, which calls these where a gradient will be differentiated again and where
torch.func looks inside, and which the tests compare with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.models.second_derivatives import differentiable_gradients
from bklm.moe.autocast import autocast_dtype, autocast_off

CONTEXT_LIMIT = 10.0  # the original's clamp of the context


def product_dtype(like: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on, except for double."""
    return autocast_dtype(like) or like.dtype


def plain(
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


def plain_gradients(
    d_hidden: Tensor, d_context: Tensor, a: Tensor, inputs: Sequence[Tensor], scale: float, eps: float
) -> tuple[Tensor | None, ...]:
    """What the backward returns, as functions that may be differentiated again; ``a`` says where gradients pass."""
    silent = a == 0
    grads = differentiable_gradients(
        lambda *nodes: plain(
            *nodes, eps=eps, product=a.dtype,
            activate=lambda t, layer, x: x.masked_fill(silent[layer, t], 0.0) * scale,
        ),
        inputs,
        (d_hidden, d_context),
    )  # fmt: skip
    return (*grads[:6], None, None, *grads[6:])
