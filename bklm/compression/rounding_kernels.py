"""Kernels of int8 products for a CPU: one pass over the activations before the product, one over the sums after it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core.cpu.jit import jit

LEVELS = np.float32(127.0)
WITHOUT_SIGN = np.int32(0x7FFFFFFF)
LEAST = np.float32(1e-30)  # of a scale: its inverse must be finite


@jit
def _largest(x, factors):
    """The largest magnitude of each row of x (T, K) times factors (K,); infinity or NaN where one is.

    Compared as integers: without their sign, floats have the order of their bits, NaN above infinity, and a maximum of
    integers is one vector instruction.
    """
    found, products = np.empty(len(x), np.int32), np.empty(len(factors), np.float32)
    bits = products.view(np.int32)
    for t in range(len(x)):
        row, largest = x[t], np.int32(0)
        for k in range(len(factors)):
            products[k] = row[k] * factors[k]
        for k in range(len(factors)):
            largest = max(largest, bits[k] & WITHOUT_SIGN)
        found[t] = largest
    return found.view(np.float32)


@jit
def _rounded(x, factors, steps, out):
    """out (T, K) int8: x times factors, in units of its row's step; 0 where that is not finite."""
    for t in range(len(x)):
        row, to = x[t], out[t]
        if not np.isfinite(steps[t]):
            to[:] = 0
            continue
        inverse = np.float32(1) / steps[t]
        for k in range(len(factors)):
            to[k] = np.int8(np.int32(np.rint(row[k] * factors[k] * inverse)))


@jit
def _scaled(sums, steps, scales, bias, out):
    """out (T, V): integer sums times the step of their row and the scale of their column, plus bias (V,)."""
    for t in range(len(sums)):
        row, to, step = sums[t], out[t], steps[t]
        for v in range(len(scales)):
            to[v] = np.float32(row[v]) * step * scales[v] + bias[v]


def rounded(x: Tensor, factors: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Integers (T, K) int8 of activations x (T, K) times factors (K,), and the step of each row (T,), all float32.

    ``per`` "tensor": one step for all. A row that is not finite has step NaN.
    """
    x, factors = x.detach().contiguous().numpy(), factors.numpy()
    largest = _largest(x, factors)
    if per == "tensor":
        largest[:] = largest.max()
    steps = np.where(np.isfinite(largest), np.maximum(largest, LEAST) / LEVELS, np.float32(np.nan))
    out = np.empty(x.shape, np.int8)
    _rounded(x, factors, steps, out)
    return torch.from_numpy(out), torch.from_numpy(steps)


def scaled(sums: Tensor, steps: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """float32 (T, V) of integer sums (T, V): times steps (T,) and scales (V,), plus bias (V,)."""
    out = torch.empty(sums.shape, dtype=torch.float32)
    _scaled(sums.numpy(), steps.numpy(), scales.numpy(), bias.numpy(), out.numpy())
    return out
