"""Matrix products on the faster of the libraries that torch carries.

On a CPU torch.mm and F.linear call MKL for float32, and MKL keeps to AVX2 on processors that are not Intel's; oneDNN,
which torch also carries and torch.compile calls, uses what there is. On an AMD EPYC with AVX-512 a training step takes
0.55 to 0.8 of the time with it (benchmarks/products.py: products, limits and steps, by both); on an Intel Xeon with AVX-512,
two threads, measured once by hand, a large x W^T takes as long, a thin one and a weight's gradient 1.4 to 1.7 times. So on
Intel's processors and everywhere else (double, half precision, an accelerator, a torch built without oneDNN) these
functions are the ordinary products.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.moe.autocast import autocast_dtype
from bklm.moe.tracing import is_ordinary, is_transformed

ONEDNN_FROM = 2**21
"""Multiplications of a product; below, preparing oneDNN's call takes longer than it saves (benchmarks/products.py)."""
WEIGHT_GRADIENT_FROM = 2**23
"""The same for the gradient of a weight, which has to lay out a matrix besides (benchmarks/products.py)."""
RAGGED_FROM = 2**25
"""The same for either where the number of rows is no multiple of ``WHOLE``, perhaps another at every call, as an expert's
tokens are: oneDNN takes 0.1 ms and more to prepare itself for a number it has not seen, and keeps a thousand of them
(benchmarks/products.py)."""
WHOLE = 64
FEWEST_FOR_A_SLICE = 64
"""Rows of x; below, laying out a weight that is a slice of another takes longer than oneDNN saves (benchmarks/products.py)."""


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's, where MKL uses all of it."""
    info = Path("/proc/cpuinfo")
    # Linux tells it there, the other systems in the processor's name.
    return "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())


def onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN takes the products of x: float32 on a CPU that is not Intel's; never for what has no values."""
    # Compiling is asked first: torch.compile cannot trace the question for oneDNN, and need not.
    return (
        is_ordinary(x)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not is_intel()
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (V, K) transposed, plus bias: the operator that torch.compile puts in place of F.linear."""
    # A slice of a matrix would take oneDNN's reference loop, a thousand times slower.
    if not _is_laid_out(weight):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _is_laid_out(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with all its gradients: x (..., K) times weight (V, K) transposed, plus bias (V,)."""
    given = (x, weight) if bias is None else (x, weight, bias)
    # Who compiles or traces is asked for first: a question for the size would be compiled in, or warned of.
    if (
        torch.compiler.is_compiling()
        or is_transformed(*given)
        or x.numel() * len(weight) < ONEDNN_FROM
        or not all(map(onednn_serves, given))
        or autocast_dtype(x) is not None
        or not (_is_laid_out(weight) or x.numel() >= FEWEST_FOR_A_SLICE * x.shape[-1])
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Linear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale (x W^T + bias) of x (M, K), weight (V, K) and bias (V,), all of one dtype, for code with a backward of its own:
    it records nothing."""
    if _is_served(x, weight):
        y = onednn_linear(x, weight, bias)
        return y if scale == 1 else y.mul_(scale)
    if bias is None:
        # Of beta 0 the first argument lends its dtype alone; one rounding, where a product and its multiple have two.
        return torch.addmm(x.new_empty(1), x, weight.t(), beta=0, alpha=scale)
    return torch.addmm(bias, x, weight.t(), beta=scale, alpha=scale)


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total (M, V) += x W^T of x (M, K) and weight (V, K), summed in the dtype of ``total``; it records nothing."""
    if total.dtype == x.dtype and not _is_served(x, weight):
        total.addmm_(x, weight.t())
    else:
        total.add_(scaled_linear(x, weight))


def _is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes x (M, K) times weight (V, K) transposed, and is worth calling."""
    return (
        _is_worth_it(len(x), x.shape[1] * len(weight), ONEDNN_FROM)
        and onednn_serves(x)
        and onednn_serves(weight)
    )


def _is_worth_it(rows: int, weights: int, least: int) -> bool:
    return rows * weights >= (RAGGED_FROM if rows % WHOLE else least)


class Linear(nn.Linear):
    """nn.Linear whose products go to the library that serves them best, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """``onednn_linear`` with its gradients; where these are differentiated again, or mapped over, ordinary products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        ordinary = torch.is_grad_enabled() or is_transformed(g) or not onednn_serves(g)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = g @ weight if ordinary else onednn_linear(g, weight.t(), None)
        rows = g.reshape(-1, len(weight))
        if needs_weight:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ordinary else weight_gradient(g, x)
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


class PreparedLinear:
    """x (M, K) -> x W^T + b, or its ReLU, for one weight (V, K) and many x: the weight is laid out once for all of them.

    ``rows`` is about what M will be.

    Without gradients; the weight's later changes are not seen.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, rows: int, relu: bool = False) -> None:
        self.bias, self.relu = bias, relu
        self.by_onednn = onednn_serves(weight) and rows > 0
        weight = weight.detach()
        if self.by_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            # MKL takes 0.5 to 0.7 of the time for a thin product when it need not transpose.
            self.weight = weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if self.by_onednn:
            y = onednn_linear(x, self.weight, self.bias)
        else:
            y = torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)
        # Not oneDNN's own ReLU, which turns NaN into 0 and would hide a diverged weight.
        return y.relu_() if self.relu else y


def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Gradient (V, K) of a weight from all rows at once: d^T x of d (..., V) and x (..., K). Its layout is of either kind."""
    d, x = d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1]).to(d.dtype)
    if not onednn_serves(d) or d.shape[1] * x.numel() < WEIGHT_GRADIENT_FROM:
        return d.t() @ x
    # One of both is laid out anew: the narrower.
    if d.shape[1] > x.shape[1]:
        return onednn_linear(x.t().contiguous(), d.t(), None).t()
    return onednn_linear(d.t().contiguous(), x.t(), None)


def add_weight_gradient(total: Tensor, d: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """total (V, K) += scale d^T x of d (M, V) and x (M, K), summed in the dtype of ``total`` so that blocks in a lower
    precision do not lose what they add."""
    is_worth_it = _is_worth_it(len(d), d.shape[1] * x.shape[1], WEIGHT_GRADIENT_FROM)
    if is_worth_it and onednn_serves(d) and onednn_serves(x):
        total.add_(weight_gradient(d, x), alpha=scale)
    elif total.dtype == d.dtype:
        total.addmm_(d.t(), x, alpha=scale)
    else:
        total.add_(d.t() @ x, alpha=scale)
