"""Forward and hand-written backward of the mixture of experts; ``bklm.moe`` derives the formulas.

T tokens of width D, E experts of hidden width H, k of them per token. Routing tensors are (E, T), one row an expert:
reductions over the few experts then run vectorised over the many tokens (on a CPU a softmax over a last dimension of
four is ten times slower). No tensor of T k H or T E H hidden activations is ever held: they live in blocks, and the
backward computes them again. Products run in a loop over the experts: torch's grouped_mm needs the same grouping and took
0.96 to 1.08 of the loop's time on a CPU; it has not been tried on a GPU. ``bklm.moe.ops`` ties forward and backward
together for autograd and the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.moe.autocast import autocast_off
from bklm.moe.products import add_linear, add_weight_gradient, scaled_linear

# A block of hidden activations should stay in a CPU's cache and fill a GPU. Blocks of 512 to 2048 tokens were equally
# fast on a CPU for D = 64 to 768; whole batches of 4096 took up to twice as long.
_BLOCK_TOKENS = {"cpu": 1024, "cuda": 16384}


class Settings(NamedTuple):
    """What stays the same from call to call. ``keep_p``: the probability that a hidden unit survives dropout."""

    top_k: int
    tau: float
    router_gradient: str
    keep_p: float
    compute_dtype: torch.dtype


def routing_dtype(x: Tensor) -> torch.dtype:
    """Routing is never done in less than 32 bits: a rounded logit would send the token to another expert."""
    return torch.promote_types(x.dtype, torch.float32)


def mixture_of_few(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    settings: Settings,
) -> Tensor:
    """``mixture`` without noise, dropout or gradient for the few tokens of a generation step, where grouping costs most."""
    dtype, routing, k = settings.compute_dtype, routing_dtype(x), settings.top_k
    with autocast_off(x):
        logits = F.linear(x.to(routing), router_weight.to(routing), router_bias.to(routing))
        _check_finite(logits, logits.sum().isfinite())
        rows = []
        for row, experts in zip(x.to(dtype).split(1), choose(logits.t(), k).t().tolist(), strict=True):
            y = None
            for e in experts:
                h = F.linear(row, up_weight[e].to(dtype), up_bias[e].to(dtype)).relu_()
                out = F.linear(h, down_weight[e].to(dtype), down_bias[e].to(dtype))
                y = out if y is None else y.add_(out)
            rows.append(y)
        y = rows[0] if len(rows) == 1 else torch.cat(rows)
        return y if k == 1 else y.div_(k)


def choose(scores: Tensor, k: int) -> Tensor:
    """The experts (k, T) of the k largest of scores (E, T); of equal ones the first, in training and in generation alike.

    topk breaks ties as it likes, on each device and for each memory layout differently, and is slower for a small k.
    """
    chosen = [scores.max(0, keepdim=True).indices]
    while len(chosen) < k:
        scores = scores.scatter(0, chosen[-1], -torch.inf)
        chosen.append(scores.max(0, keepdim=True).indices)
    return torch.cat(chosen) if k > 1 else chosen[0]


def block_tokens(x: Tensor) -> int:
    """Number of tokens in a block."""
    return _BLOCK_TOKENS.get(x.device.type, _BLOCK_TOKENS["cuda"])


def _route(x: Tensor, weight: Tensor, bias: Tensor, noise: Tensor | None, settings: Settings, block: int):
    """Choose each token's experts and group the tokens by expert, without padding.

    Returns p (E, T), the softmax of the straight-through gradient; tokens (T k,) int64, token numbers sorted by expert,
    then by position (empty when k = E); bounds (E, blocks + 1) int64 on the CPU: tokens[bounds[e, b]:bounds[e, b + 1]]
    are those of expert e in the b-th block of positions. On a GPU the bounds and the check for non-finite logits
    travel in one copy, the only synchronisation of a call.
    """
    dtype, num_experts, num_tokens = routing_dtype(x), len(weight), len(x)
    logits = torch.addmm(bias.to(dtype).unsqueeze(1), weight.to(dtype), x.to(dtype).t())
    scores = logits if noise is None else logits + noise
    if settings.tau != 1:  # the largest is taken off first: large logits would overflow in the division
        scores = (scores - scores.amax(0)) / settings.tau
    p = torch.softmax(scores, 0)
    offsets = torch.arange(num_experts, device=x.device).unsqueeze(1) * num_tokens
    starts = torch.arange(0, num_tokens, block, device=x.device)
    edges = torch.cat((offsets + starts, offsets + num_tokens), 1)
    if settings.top_k == num_experts:
        tokens, bounds = edges.new_empty(0), edges
    else:
        experts, order = torch.sort(choose(scores, settings.top_k).t().flatten(), stable=True)
        tokens = order
        if settings.top_k > 1:
            # Pair t k + c belongs to token t; looking t up is ten times faster than dividing by k.
            tokens = torch.arange(num_tokens, device=x.device).repeat_interleave(settings.top_k)
            tokens = tokens.index_select(0, order)
        bounds = torch.searchsorted(experts * num_tokens + tokens, edges)
    # A sum is finite only if all its terms are, and costs a tenth of isfinite().all().
    if is_capturing(x.device):
        raise RuntimeError(
            "the mixture of experts cannot be captured in a CUDA graph: it copies the number of tokens of each expert to the "
            "host; capture what is around it, or use torch.compile, which leaves it outside its graphs"
        )
    finite = logits.sum().isfinite().to(torch.int64)
    host = torch.cat((bounds.flatten(), finite.view(1))).cpu()
    _check_finite(logits.t(), host[-1])
    return p, tokens, host[:-1].view(bounds.shape)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on ``device``."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class NonFiniteRouterError(ValueError):
    """A router's logits are infinite or NaN: what training diverged looks like from inside a mixture layer."""


def _check_finite(logits: Tensor, sum_is_finite: Tensor) -> None:
    if not sum_is_finite and (bad := int((~logits.isfinite()).any(1).sum())):
        raise NonFiniteRouterError(
            f"the router's logits are not finite for {bad} of {len(logits)} tokens: the input or the parameters hold NaN or "
            "infinity (is the learning rate too high?); go back to the last good checkpoint"
        )


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (T, D) in the compute dtype, balance (), and p (E, T), tokens, bounds of ``_route`` for the backward.

    With k = E, p holds the gates themselves. Shapes and dtypes of what is given: ``bklm.moe.ops.mixture``.
    """
    num_tokens, num_experts = len(x), len(up_weight)
    k, dtype, block = settings.top_k, settings.compute_dtype, block_tokens(x)
    with autocast_off(x):
        if router_weight is None:
            p, tokens = x.new_ones((1, num_tokens), dtype=routing_dtype(x)), x.new_empty(0, dtype=torch.int64)
            bounds = torch.tensor([[*range(0, num_tokens, block), num_tokens]], device="cpu")
        else:
            p, tokens, bounds = _route(x, router_weight, router_bias, noise, settings, block)
            if k == num_experts and settings.router_gradient == "none":
                p.fill_(1.0 / k)
        balance = _balance_weights(bounds, p) @ p.mean(1)
        xs, up_w, up_b, down_w, down_b = (a.to(dtype) for a in (x, up_weight, up_bias, down_weight, down_bias))
        y = torch.zeros_like(xs) if k < num_experts else p.to(dtype).t() @ down_b
        for e, rows, _ in _groups(tokens, bounds, block, num_tokens, k < num_experts, everywhere=False):
            h = _hidden(_take(xs, rows), up_w[e], up_b[e], _take(keep, rows), settings)
            if k < num_experts:
                y.index_add_(0, rows, scaled_linear(h, down_w[e], down_b[e], 1 / k))
            else:
                add_linear(y[rows], h.mul_(p[e, rows].unsqueeze(1)), down_w[e])
    return y, balance, p, tokens, bounds


def backward(
    grad_y: Tensor,
    grad_balance: Tensor,
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    keep: Tensor | None,
    p: Tensor,
    tokens: Tensor,
    bounds: Tensor,
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the six parameters, each of its input's shape and dtype, in their order; None for the two of a
    router that does not learn. grad_y (T, D) and grad_balance () are those of ``forward``'s y and balance; p, tokens and
    bounds are what it returned.
    """
    num_tokens, num_experts = len(x), len(up_weight)
    k, dtype, block = settings.top_k, settings.compute_dtype, block_tokens(x)
    routed, learns = k < num_experts, settings.router_gradient != "none" and router_weight is not None
    everywhere = learns and settings.router_gradient == "exact"
    gate = 1.0 / k if routed else 1.0
    slope = gate / settings.keep_p
    with autocast_off(x):
        xs, gy, up_w, up_b, down_w, down_b = (
            a.to(dtype).contiguous() for a in (x, grad_y, up_weight, up_bias, down_weight, down_bias)
        )
        gx, g_up_w, g_up_b, g_down_w, g_down_b = (
            torch.zeros_like(a, memory_format=torch.contiguous_format)
            for a in (x, up_weight, up_bias, down_weight, down_bias)
        )
        gbar = torch.zeros_like(p) if learns else None
        for e, rows, chosen in _groups(tokens, bounds, block, num_tokens, routed, everywhere):
            x_rows, gy_rows = _take(xs, rows), _take(gy, rows)
            h = _hidden(x_rows, up_w[e], up_b[e], _take(keep, rows), settings)
            # dL/dh with the factors of gate and dropout.
            u = scaled_linear(gy_rows, down_w[e].t(), scale=slope)
            if learns:
                inner = torch.sum(h * u, 1, dtype=p.dtype).mul_(1.0 / slope)
                _put(gbar[e], rows, inner.add_(gy_rows @ down_b[e]))
            if chosen is not None:
                if not len(chosen):
                    continue
                h, u, x_rows, gy_rows = (a.index_select(0, chosen) for a in (h, u, x_rows, gy_rows))
                rows = chosen + rows.start
            # h > 0 exactly where the unit survived both ReLU and dropout.
            u = torch.ops.aten.threshold_backward(u, h, 0)
            if routed:
                g_down_b[e].add_(gy_rows.sum(0), alpha=gate)
            else:
                weight = p[e, rows]
                h.mul_(weight.unsqueeze(1))
                u.mul_(weight.unsqueeze(1))
                g_down_b[e].add_(weight.to(dtype) @ gy_rows)
            add_weight_gradient(g_down_w[e], gy_rows, h, gate)
            add_weight_gradient(g_up_w[e], u, x_rows)
            g_up_b[e].add_(u.sum(0))
            if routed:
                gx.index_add_(0, rows, scaled_linear(u, up_w[e].t()).to(gx.dtype))
            else:
                add_linear(gx[rows], u, up_w[e].t())
        if not learns:
            return gx, None, None, g_up_w, g_up_b, g_down_w, g_down_b
        gbar.add_((_balance_weights(bounds, p) * (grad_balance / num_tokens)).unsqueeze(1))
        g_logits = gbar.sub_((p * gbar).sum(0)).mul_(p).div_(settings.tau)  # the Jacobian of the softmax
        g_router = (g_logits @ x.to(p.dtype)).to(router_weight.dtype)
        weight = router_weight.to(p.dtype)
        # Of so few experts oneDNN's product takes two to three times as long as MKL's.
        if gx.dtype == p.dtype:
            gx.addmm_(g_logits.t(), weight)
        else:
            gx.add_(g_logits.t() @ weight)
        return gx, g_router, g_logits.sum(1).to(router_bias.dtype), g_up_w, g_up_b, g_down_w, g_down_b


def _hidden(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, settings: Settings) -> Tensor:
    """Hidden activations (n, H) of one expert after ReLU and dropout; ReLU commutes with dropout's factor."""
    scale = 1.0 / settings.keep_p
    hidden = scaled_linear(x, weight, bias, scale).relu_()
    return hidden if keep is None else hidden.mul_(keep)


def _take(a: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    # On a CPU index_select is ten times faster than a[rows].
    return a if a is None else a[rows] if isinstance(rows, slice) else a.index_select(0, rows)


def _put(a: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        a[rows] = values
    else:
        a.index_copy_(0, rows, values)


def _groups(
    tokens: Tensor, bounds: Tensor, block: int, num_tokens: int, routed: bool, everywhere: bool
) -> Iterator[tuple[int, Tensor | slice, Tensor | None]]:
    """Pieces of work (expert, rows, chosen), at most ``block`` rows each.

    Not routed: every expert on every row. Routed: each expert on its own rows. Routed and everywhere: every expert on
    every row, with ``chosen`` the positions within the rows of those that selected it.
    """
    limits = bounds.tolist()
    if routed and not everywhere:
        for e, (first, *_, last) in enumerate(limits):
            for start in range(first, last, block):
                yield e, tokens[start : min(start + block, last)], None
        return
    for b, start in enumerate(range(0, num_tokens, block)):
        for e, row in enumerate(limits):
            chosen = tokens[row[b] : row[b + 1]] - start if routed else None
            yield e, slice(start, min(start + block, num_tokens)), chosen


def _balance_weights(bounds: Tensor, p: Tensor) -> Tensor:
    """E F (E,), with F the fraction of all choices that fell on each expert: Switch's balance is <E F, mean of p>."""
    counts = (bounds[:, -1] - bounds[:, 0]).to(p.dtype)
    return (counts * (len(counts) / counts.sum())).to(p.device)
