"""The mixture of experts in ordinary differentiable operations, every expert on every token: what transforms are given.

``bklm.moe.analytic`` is the fast way to y and to its first gradient. Higher derivatives, torch.func (vmap, grad, jacrev),
gradients in batches and forward mode take this one: E / k times the work, the same numbers to rounding, and nothing in it asks
for a value. So a router's infinite logits are not refused here; they show as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.moe.analytic import Settings, choose, routing_dtype
from bklm.moe.autocast import autocast_off


def plain_mixture(
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
) -> tuple[Tensor, Tensor]:
    """y (T, D) and the balance, as ``bklm.moe.ops.mixture`` gives them for these arguments."""
    parameters = (up_weight, up_bias, down_weight, down_bias)
    if router_weight is None:
        return _experts(x, *parameters, x.new_ones((1, len(x)), dtype=routing_dtype(x)), keep, settings)
    with autocast_off(x):
        scores = _logits(x, router_weight, router_bias)
        scores = scores if noise is None else scores + noise
        p = torch.softmax((scores - scores.detach().amax(0)) / settings.tau, 0)
        selected = torch.zeros_like(p).scatter(0, choose(scores.detach(), settings.top_k), 1.0)
    return _gated(x, *parameters, p, selected, keep, settings)


def plain_gradients(
    grad_y: Tensor, grad_balance: Tensor, saved: Sequence[Tensor | None], settings: Settings
) -> list[Tensor | None]:
    """``bklm.moe.analytic.backward`` of the same arguments (``saved``: all between the gradients and the settings), as
    functions of the two gradients, of x and of the parameters that may be differentiated again."""
    again = torch.is_grad_enabled()
    # Each input as a node of its own: where x was made from one of the parameters, that way must not be gone twice.
    with torch.enable_grad():
        x, router_weight, router_bias, *parameters = inputs = [
            t if t is None else t.view_as(t) for t in saved[:7]
        ]
        keep, p, tokens, bounds = saved[7:]
        if router_weight is None:
            y, balance = _experts(x, *parameters, p, keep, settings)
        else:
            with autocast_off(x):
                # p has the noise in it; only what moves the logits is added to its logarithm.
                logits = _logits(x, router_weight, router_bias)
                p = torch.softmax((logits - logits.detach()) / settings.tau + p.log(), 0)
                selected = _selected(p, tokens, bounds)
            y, balance = _gated(x, *parameters, p, selected, keep, settings)
        wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
        outputs = [(o, g) for o, g in ((y, grad_y), (balance, grad_balance)) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in outputs],
            [inputs[i] for i in wanted],
            [g for _, g in outputs],
            create_graph=again,
            allow_unused=True,
        )
    grads = dict(zip(wanted, found, strict=True))
    return [grads.get(i) for i in range(7)]


def plain_draw(x: Tensor, num_experts: int, hidden: int, dropped: int) -> tuple[Tensor, Tensor]:
    """``bklm.moe.ops.draw``'s noise and mask in operations that vmap knows, each sample's own with randomness="different"."""
    dtype = routing_dtype(x)
    uniform = torch.rand((num_experts, len(x)), device=x.device, dtype=dtype).clamp_min(2.0**-26)
    keep = torch.rand((len(x) if dropped else 0, hidden), device=x.device) >= dropped / 2**16
    return -(-uniform.log()).log(), keep.to(torch.uint8)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(E, T), in the routing dtype."""
    dtype = routing_dtype(x)
    return weight.to(dtype) @ x.to(dtype).t() + bias.to(dtype).unsqueeze(1)


def _selected(p: Tensor, tokens: Tensor, bounds: Tensor) -> Tensor:
    """1 where an expert (E, T) was selected, else 0, from the groups that ``bklm.moe.analytic`` made."""
    if not len(tokens):
        return torch.ones_like(p)
    counts = (bounds[:, -1] - bounds[:, 0]).to(tokens.device)
    experts = torch.arange(len(counts), device=tokens.device).repeat_interleave(counts)
    return torch.zeros_like(p).index_put((experts, tokens), p.new_ones(()))


def _gated(
    x: Tensor, up_w: Tensor, up_b: Tensor, down_w: Tensor, down_b: Tensor, p: Tensor, selected: Tensor,
    keep: Tensor | None, settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``_experts`` under the gates that p (E, T) and the selection stand for, straight-through where k < E."""
    hard = selected / settings.top_k
    if settings.router_gradient == "none":
        gates = hard
    elif settings.top_k == len(p):
        gates = p
    else:
        moving = p - p.detach()
        gates = hard + (moving if settings.router_gradient == "exact" else moving * selected)
    y, _ = _experts(x, up_w, up_b, down_w, down_b, gates, keep, settings)
    probabilities = hard if settings.router_gradient == "none" and settings.top_k == len(p) else p
    share = selected.sum(1) / selected.sum()
    return y, len(p) * (share * probabilities.mean(1)).sum()


def _experts(
    x: Tensor, up_w: Tensor, up_b: Tensor, down_w: Tensor, down_b: Tensor, gates: Tensor, keep: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every expert's output times its gate (E, T), added up; and the balance of one expert alone, which is 1."""
    dtype = settings.compute_dtype
    with autocast_off(x):
        xs, mask = x.to(dtype), None if keep is None else keep.to(dtype) / settings.keep_p
        y = torch.zeros_like(xs)
        for e, gate in enumerate(gates):
            h = F.relu(F.linear(xs, up_w[e].to(dtype), up_b[e].to(dtype)))
            h = h if mask is None else h * mask
            y = y + gate.to(dtype).unsqueeze(1) * F.linear(h, down_w[e].to(dtype), down_b[e].to(dtype))
    return y, gates.detach().mean()
