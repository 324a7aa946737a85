"""The mixture of experts as one differentiable function, by one of three roads to the same numbers:

- torch.compile, tracing, fake and meta tensors, dispatch modes: the registered operators bklm::moe_*, which a compiler
  treats as opaque. Sizes that depend on the data stay inside, and a seeded run draws what it draws in eager mode.
- torch.func, forward mode, gradients in batches and gradients that are differentiated again: ``bklm.moe.plain``.
- plain eager calls: an autograd.Function that calls the operators' code directly, since the bookkeeping of a registered
  operator costs more than routing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from bklm.moe.analytic import Settings, backward, block_tokens, forward, routing_dtype
from bklm.moe.plain import plain_draw, plain_gradients, plain_mixture
from bklm.moe.tracing import is_ordinary, is_transformed

# In CUDA graphs of torch.compile the operators stay outside: group sizes travel to the host. Where torch has no such tag
# (2.6 cannot even be given one) nothing is said.
_TAGGED = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def mixture(
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the selected experts on their tokens; differentiable any number of times in x, the router and the experts.

    x (T, D); router (E, D) and (E,), or None when there is one expert; up (E, H, D), (E, H); down (E, D, H), (E, D);
    noise (E, T) added to the logits, or None; keep (T, H) uint8, 1 where a hidden unit survives dropout, or None.
    Returns y (T, D) in the compute dtype; the Switch balance, a scalar that is 1 for uniform usage; counts (E,) int64
    on the CPU, the tokens of each expert, or None where a transform or a meta tensor leaves no numbers to count. Raises
    ValueError for non-finite logits, RuntimeError while a CUDA graph is captured.
    """
    inputs = (x, router_weight, router_bias, up_weight, up_bias, down_weight, down_bias, noise, keep)
    if is_transformed(*inputs):
        return *plain_mixture(*inputs, settings), None
    if is_ordinary(x):
        y, balance, bounds = _Mixture.apply(*inputs, settings)
    else:
        y, balance, _, _, bounds = torch.ops.bklm.moe_forward(*inputs, *settings)
    has_values = type(bounds) is Tensor and not bounds.is_meta and not x.is_meta
    return y, balance, bounds[:, -1] - bounds[:, 0] if has_values else None


def in_backward() -> bool:
    """Whether a backward pass is running: a forward inside one is a recomputation, as activation checkpointing does it."""
    return torch._C._current_graph_task_id() >= 0


@torch.library.custom_op("bklm::moe_counted_once", mutates_args=())
def counted_once(counts: Tensor) -> Tensor:
    """``counts``, or zeros within a recomputation; an operator, so that compiled code asks at every call."""
    return torch.zeros_like(counts) if in_backward() else counts.clone()


@counted_once.register_fake
def _(counts: Tensor) -> Tensor:
    return torch.empty_like(counts)


def draw(
    x: Tensor, num_experts: int, hidden: int, dropout_p: float
) -> tuple[Tensor | None, Tensor | None, float]:
    """Draw the randomness of one training forward from the global generator of x's device.

    x (T, D). Returns standard Gumbel noise (num_experts, T), or None when num_experts is 0; the dropout mask (T, hidden)
    uint8, 1 for keep, or None when dropout_p is 0; and the probability of keeping. The mask is drawn 16 bits a unit, so that
    dropout_p is rounded to a multiple of 2^-16 and the returned probability is that of the rounded value.
    """
    dropped = min(round(dropout_p * 2**16), 2**16 - 1)
    if is_transformed(x):
        noise, keep = plain_draw(x, num_experts, hidden, dropped)
    elif is_ordinary(x):
        noise, keep = _draw(x, num_experts, hidden, dropped)
    else:
        noise, keep = torch.ops.bklm.moe_draw(x.detach(), num_experts, hidden, dropped)
    return noise if num_experts else None, keep if dropped else None, 1.0 - dropped / 2**16


def _draw(x: Tensor, num_experts: int, hidden: int, dropped: int) -> tuple[Tensor, Tensor]:
    # torch.rand may return 0, whose noise would be minus infinity.
    uniform = torch.rand((num_experts, len(x)), device=x.device, dtype=routing_dtype(x)).clamp_min_(2.0**-26)
    noise = uniform.log_().neg_().log_().neg_()
    count = len(x) * hidden if dropped else 0
    bits = torch.empty((count + 3) // 4, device=x.device, dtype=torch.int64).random_(-(2**63), None)
    # In place, without a boolean tensor: comparisons that produce booleans are not vectorised on a CPU.
    keep = bits.view(torch.int16)[:count].ge_(dropped - 2**15).to(torch.uint8)
    return noise, keep.view(-1, hidden)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *args) -> tuple[Tensor, Tensor, Tensor]:
        y, balance, p, tokens, bounds = forward(*args)
        *parameters, _noise, keep, ctx.settings = args
        ctx.save_for_backward(*parameters, keep, p, tokens, bounds)
        ctx.mark_non_differentiable(bounds)
        return y, balance, bounds

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_balance: Tensor, _) -> tuple[Tensor | None, ...]:
        # once_differentiable is no way to refuse a second derivative: autograd.grad drops what it marks without a word.
        again = torch.is_grad_enabled() or is_transformed(grad_y, grad_balance)
        gradients = plain_gradients if again else _gradients
        return *gradients(grad_y, grad_balance, ctx.saved_tensors, ctx.settings), None, None, None


def _gradients(
    grad_y: Tensor, grad_balance: Tensor, saved: tuple[Tensor | None, ...], settings: Settings
) -> tuple[Tensor | None, ...]:
    return backward(grad_y, grad_balance, *saved, settings)


torch.library.define(
    "bklm::moe_draw",
    "(Tensor x, int num_experts, int hidden, int dropped) -> (Tensor, Tensor)",
    tags=torch.Tag.nondeterministic_seeded,
)
torch.library.impl("bklm::moe_draw", "CompositeExplicitAutograd")(_draw)


@torch.library.register_fake("bklm::moe_draw")
def _(x: Tensor, num_experts: int, hidden: int, dropped: int) -> tuple[Tensor, Tensor]:
    noise = x.new_empty((num_experts, x.shape[0]), dtype=routing_dtype(x))
    return noise, x.new_empty((x.shape[0] if dropped else 0, hidden), dtype=torch.uint8)


_PARAMETERS = (
    "Tensor x, Tensor? router_weight, Tensor? router_bias, "
    "Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias"
)
_SETTINGS = "int top_k, float tau, str router_gradient, float keep_p, ScalarType compute_dtype"


@torch.library.custom_op(
    "bklm::moe_forward",
    mutates_args=(),
    schema=f"({_PARAMETERS}, Tensor? noise, Tensor? keep, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    **_TAGGED,
)
def _forward_op(*args):
    return forward(*args[:9], Settings(*args[9:]))


@_forward_op.register_fake
def _(x, router_weight, router_bias, up_weight, up_bias, down_weight, down_bias, noise, keep, *settings):
    settings, num_experts, num_tokens = Settings(*settings), up_weight.shape[0], x.shape[0]
    block = block_tokens(x)
    pairs = 0 if settings.top_k == num_experts else num_tokens * settings.top_k
    return (
        x.new_empty(x.shape, dtype=settings.compute_dtype),
        x.new_empty((), dtype=routing_dtype(x)),
        x.new_empty((num_experts, num_tokens), dtype=routing_dtype(x)),
        x.new_empty(pairs, dtype=torch.int64),
        torch.empty((num_experts, (num_tokens + block - 1) // block + 1), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op(
    "bklm::moe_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_balance, {_PARAMETERS}, Tensor? keep, Tensor p, Tensor tokens, Tensor bounds, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    **_TAGGED,
)
def _backward_op(*args):
    # An operator cannot return None: a router that learns nothing gets an empty tensor.
    grads = backward(*args[:13], Settings(*args[13:]))
    return tuple(args[0].new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(grad_y, grad_balance, *args):
    settings = Settings(*args[11:])
    learns = args[1] is not None and settings.router_gradient != "none"
    return tuple(
        grad_y.new_empty(0)
        if i in (1, 2) and not learns
        else torch.empty_like(a, memory_format=torch.contiguous_format)
        for i, a in enumerate(args[:7])
    )


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, _, p, tokens, bounds = output
    *parameters, _noise, keep = inputs[:9]
    ctx.save_for_backward(*parameters, keep, p, tokens, bounds)
    ctx.settings = Settings(*inputs[9:])


def _differentiate(ctx: FunctionCtx, grad_y: Tensor, grad_balance: Tensor, *_) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing computes it anew at every reading
    # A compiler traces first derivatives only, and has grad mode on where it likes.
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed(grad_y, grad_balance)):
        grads = plain_gradients(grad_y, grad_balance, saved, ctx.settings)
    else:
        grads = torch.ops.bklm.moe_backward(grad_y, grad_balance, *saved, *ctx.settings)
    learns = saved[1] is not None and ctx.settings.router_gradient != "none"
    grads = [g if learns or i not in (1, 2) else None for i, g in enumerate(grads)]
    return *grads, None, None, *(None for _ in ctx.settings)


_forward_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.bklm.moe_forward)
def _forward_flops(x, router_weight, router_bias, up_weight, *args, out_shape=None, **_) -> int:
    """Twice the multiplications of the router, on all experts, and of the experts that each token visits."""
    top_k, router_gradient = args[5], args[7]
    return _flops(x, router_weight, up_weight, top_k, router_gradient)[0]


@register_flop_formula(torch.ops.bklm.moe_backward)
def _backward_flops(
    grad_y, grad_balance, x, router_weight, router_bias, up_weight, *args, out_shape=None, **_
) -> int:
    top_k, router_gradient = args[7], args[9]
    return _flops(x, router_weight, up_weight, top_k, router_gradient)[1]


def _flops(x, router_weight, up_weight, top_k: int, router_gradient: str) -> tuple[int, int]:
    """Of forward and backward, from shapes. The backward computes hidden activations again, and with the exact router
    gradient so do the experts that a token did not visit."""
    (tokens, width), (experts, hidden, _) = x, up_weight
    product = 2 * tokens * width * hidden
    router = 0 if router_weight is None else 2 * tokens * width * experts
    visited = experts if router_gradient == "exact" and router_weight is not None else top_k
    learns = router_gradient != "none"
    return router + 2 * top_k * product, (2 * router if learns else 0) + (2 * visited + 3 * top_k) * product
