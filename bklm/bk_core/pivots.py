"""Checks on values: the shift, and the pivots of the recursions where nothing guarantees that they stay away from zero.

For real ``a`` and ``k = b c >= 0`` every pivot has modulus at least |Im z|. For negative or complex ``k``, or complex
``a``, a leading block of ``T - z`` can be singular although the whole is not; the recursion then divides by (almost)
nothing. That is never clamped: every pivot is compared with the terms whose difference it is. What cancels in one step
is thereby bounded; cancellations of several steps in a row can still multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Sweep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(a, k, z) -> L, the causal result."""
LEAST_MARGIN = 1000
"""In rounding units: |pivot| over the size of its terms, below which fewer than three digits are left."""


class SmallPivotError(ValueError):
    """A recursion divided by a number too small for the precision. ``row`` and ``pivot`` say where and how small."""

    def __init__(self, message: str, row: int, pivot: float):
        super().__init__(message)
        self.row = row
        self.pivot = pivot

    def __reduce__(self):
        return type(self), (str(self), self.row, self.pivot)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on ``device``: values cannot be asked for then, and checks of them are off."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


LARGEST_32_BIT_SHIFT = 2.0**40
"""Of |z| and 1 / |Im z|: beyond it the derivative by b c, up to the third power of the result, leaves 32 bits."""


def fits_32_bits(z: complex) -> bool:
    """Whether 32 bits suffice for the derivatives at this shift."""
    return abs(z.imag) >= 1 / LARGEST_32_BIT_SHIFT and math.hypot(z.real, z.imag) <= LARGEST_32_BIT_SHIFT


def check_shift(z: Tensor) -> bool:
    """Refuse a shift that is not finite or lies on the real axis; return whether 32 bits suffice (True: unknown)."""
    if is_capturing(z.device):
        return True
    # numpy asks a few numbers several times as fast as torch.
    values = z.numpy() if z.device.type == "cpu" else z
    with np.errstate(over="ignore", invalid="ignore"):
        fits = (abs(values.imag) >= 1 / LARGEST_32_BIT_SHIFT) & (abs(values) <= LARGEST_32_BIT_SHIFT)
    if bool(fits.all()):
        return True
    bad = ~(torch.isfinite(z) & (z.imag != 0))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"z = {complex(z.flatten()[row])} (entry {row}): every z must be finite with Im z != 0, because the resolvent "
            f"has its poles on the real axis; add an imaginary part, for instance 1j."
        )
    return False


def _reversed_sweep(a: Tensor, k: Tensor, z: Tensor, sweep: Sweep) -> Tensor:
    """R (M, N): the causal result of the reversed row."""
    return sweep(a.flip(-1), k.flip(-1), z).flip(-1)


def _finite_rows(a: Tensor, k: Tensor, z: Tensor) -> Tensor:
    return torch.isfinite(a).all(-1) & torch.isfinite(k).all(-1) & torch.isfinite(z)


@torch.no_grad()
def smallest_pivot(a: Tensor, k: Tensor, z: Tensor, G: Tensor, causal: bool, sweep: Sweep) -> Tensor:
    """Smallest |pivot| that the sweeps met, per row: (M,) real, 0 where a sweep broke down, NaN where an input is NaN.

    The pivots are the reciprocals of L, R and G. Plain operations around ``sweep``: compiled and mapped as that is.
    """
    found = [G] if causal else [G, sweep(a, k, z), _reversed_sweep(a, k, z, sweep)]
    pivot = 1 / torch.stack([x.abs().amax(-1) for x in found]).amax(0)
    return torch.where(torch.isnan(pivot) & _finite_rows(a, k, z), torch.zeros_like(pivot), pivot)


def _none_negative(k: Tensor) -> bool:
    """NaN counts as neither. The smallest first: it takes no memory, and is NaN where anything is."""
    return k.numel() == 0 or bool(k.amin() >= 0) or not bool((k < 0).any())


@torch.no_grad()
def check(a: Tensor, k: Tensor, z: Tensor, G: Tensor, causal: bool, sweep: Sweep) -> None:
    """Raise :class:`SmallPivotError` where k is negative or complex, or a complex, and a pivot is too small.

    Too small: ``|pivot_i| < 1000 u (|d_i| + |k_{i-1} L_{i-1}| + |k_i R_{i+1}|)``, of those terms that the pivot is the sum
    of, u the rounding unit. Large entries elsewhere in the row do not count: their rounding stays with them.
    """
    if is_capturing(a.device) or (not (a.is_complex() or k.is_complex()) and _none_negative(k)):
        return
    pad = torch.nn.functional.pad
    L = G if causal else sweep(a, k, z)
    d = (a - z[:, None]).abs()
    to_L = d + pad((k * L[:, :-1]).abs(), (1, 0))
    sums = [(L, to_L)]
    if not causal:
        R = _reversed_sweep(a, k, z, sweep)
        from_right = pad((k * R[:, 1:]).abs(), (0, 1))
        sums += [(R, d + from_right), (G, to_L + from_right)]
    # The first sweep that breaks down leaves NaN behind: at once 0 over what it was the sum of.
    margins = torch.stack([(1 / (result.abs() * terms)).nan_to_num(0.0, torch.inf) for result, terms in sums])
    limit = LEAST_MARGIN * torch.finfo(d.dtype).eps
    margin, position = margins.amin(0).min(-1)
    small = (margin < limit) & _finite_rows(a, k, z)
    if not bool(small.any()):
        return
    row = int(torch.where(small, margin, torch.inf).argmin())
    place, worst = int(position[row]), float(margin[row])
    results = torch.stack([result[row, place].abs() for result, _ in sums])
    smallest = float((1 / results).nan_to_num(0.0).min())
    raise SmallPivotError(
        f"row {row} (of the flattened batch) meets at position {place} a pivot of modulus {smallest:.3g}, {worst:.2g} of "
        f"the terms that cancel in it, where {str(G.dtype).removeprefix('torch.')} needs {limit:.2g}; b*c is negative or "
        f"complex (or a is), so nothing keeps pivots away from zero: enlarge |Im z|, use 64-bit inputs, or pass "
        f"return_min_pivot=True to get the pivot instead.",
        row,
        smallest,
    )
