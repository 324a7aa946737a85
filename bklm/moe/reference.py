"""The mixture of experts of ``bklm.moe`` in plain autograd: short, slow, and what the analytic backward must equal.

Both functions take the arguments of ``bklm.moe.ops.mixture`` and return y (T, D). They exist for tests and benchmarks:
``dense_moe`` states the definition, every expert on every token; ``looped_moe`` is what one usually writes for a sparse
mixture, a loop over the selected experts under autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.moe.analytic import Settings, choose


def gates(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    noise: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (T, E) with their straight-through gradient, the selection (T, E) of 0 and 1, and p (T, E)."""
    if router_weight is None:
        ones = x.new_ones(len(x), 1)
        return ones, ones, ones
    scores = F.linear(x, router_weight, router_bias)
    if noise is not None:
        scores = scores + noise.t()
    p = torch.softmax(scores / settings.tau, -1)
    selected = torch.zeros_like(p).scatter(1, choose(scores.t(), settings.top_k).t(), 1.0)
    hard = selected / settings.top_k
    if settings.router_gradient == "none":
        return hard, selected, p
    if settings.top_k == len(router_weight):
        return p, selected, p
    straight_through = p - p.detach()
    if settings.router_gradient == "selected":
        straight_through = straight_through * selected
    return hard + straight_through, selected, p


def balance_loss(selected: Tensor, p: Tensor) -> Tensor:
    """Switch's load-balancing loss E <F, P> of (T, E) selections and probabilities; 1 when usage is uniform."""
    share = selected.sum(0) / selected.sum()
    return p.shape[1] * (share.detach() * p.mean(0)).sum()


def dense_moe(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Every expert on every token, weighted by its gate: y_t = sum over e of g_te f_e(x_t)."""
    weights, _, _ = gates(x, router_weight, router_bias, noise, settings)
    mask = 1.0 if keep is None else keep.to(x.dtype) / settings.keep_p
    y = torch.zeros_like(x)
    # On a CPU this loop is faster than one einsum or batched product over all experts: its blocks are smaller.
    for e in range(len(up_weight)):
        hidden = torch.relu(F.linear(x, up_weight[e], up_bias[e])) * mask
        y = y + weights[:, e].unsqueeze(1) * F.linear(hidden, down_weight[e], down_bias[e])
    return y


def looped_moe(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Each expert on its own tokens only; the router's gradient is that of "selected" (unless "none" is asked for)."""
    if settings.router_gradient == "exact" and settings.top_k < len(up_weight):
        raise ValueError(
            "a loop over selected experts cannot give the exact router gradient; use 'selected' or 'none'"
        )
    weights, selected, _ = gates(x, router_weight, router_bias, noise, settings)
    y = torch.zeros_like(x)
    for e in range(len(up_weight)):
        rows = selected[:, e].nonzero().squeeze(1)
        hidden = torch.relu(F.linear(x[rows], up_weight[e], up_bias[e]))
        if keep is not None:
            hidden = hidden * keep[rows] / settings.keep_p
        y = y.index_add(0, rows, weights[rows, e].unsqueeze(1) * F.linear(hidden, down_weight[e], down_bias[e]))
    return y
