"""Checks on values: the shift, and the pivots of the recursions where nothing guarantees that they stay away from zero.

For real ``a`` and ``k = b c >= 0`` every pivot has modulus at least |Im z|. For negative or complex ``k``, or complex
``a``, a leading block of ``T - z`` can be singular although the whole is not; the recursion then divides by (almost)
nothing. That is never clamped: the smallest |pivot| met is compared with what the precision resolves.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SmallPivotError(ValueError):
    """A recursion divided by a number too small for the precision. ``row`` and ``pivot`` say where and how small."""

    def __init__(self, message: str, row: int, pivot: float):
        super().__init__(message)
        self.row = row
        self.pivot = pivot

    def __reduce__(self):
        return type(self), (str(self), self.row, self.pivot)


def check_shift(z: Tensor) -> None:
    """Refuse a shift that is not finite or lies on the real axis."""
    bad = ~(torch.isfinite(z) & (z.imag != 0))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"z = {complex(z.flatten()[row])} (entry {row}): every z must be finite with Im z != 0, because the resolvent "
            f"has its poles on the real axis; add an imaginary part, for instance 1j."
        )


def smallest_pivot(a: Tensor, k: Tensor, z: Tensor, G: Tensor, causal: bool, backend) -> Tensor:
    """Smallest |pivot| that the sweeps met, per row: (M,) real, 0 where a sweep broke down, NaN where an input is NaN.

    The pivots are the reciprocals of L, R and G; R is the causal result of the reversed row.
    """
    with torch.no_grad():
        found = [G]
        if not causal:
            found.append(backend.forward(a, k, z, True)[0])
            found.append(backend.forward(a.flip(-1), k.flip(-1), z, True)[0])
        largest = torch.stack([x.abs().amax(-1) for x in found]).amax(0)
        pivot = 1 / largest
        finite = torch.isfinite(a).all(-1) & torch.isfinite(k).all(-1) & torch.isfinite(z)
        return torch.where(torch.isnan(pivot) & finite, torch.zeros_like(pivot), pivot)


def check(a: Tensor, k: Tensor, z: Tensor, G: Tensor, causal: bool, backend) -> None:
    """Raise :class:`SmallPivotError` where k is negative or complex, or a complex, and a pivot is too small.

    Too small: below ``1000 u (max|d| + 2 sqrt(max|k|))`` of the row, u the rounding unit; fewer than three digits would
    be left.
    """
    if not (a.is_complex() or k.is_complex()) and not bool((k < 0).any()):
        return
    pivot = smallest_pivot(a, k, z, G, causal, backend)
    scale = (a - z[:, None]).abs().amax(-1)
    if k.shape[-1]:
        scale = scale + 2 * k.abs().amax(-1).sqrt()
    limit = 1000 * torch.finfo(pivot.dtype).eps * scale
    small = pivot < limit
    if not bool(small.any()):
        return
    row = int(torch.where(small, pivot / limit, torch.inf).argmin())
    smallest, allowed = float(pivot[row]), float(limit[row])
    raise SmallPivotError(
        f"row {row} (of the flattened batch) meets a pivot of modulus {smallest:.3g}, below the {allowed:.3g} that "
        f"{str(G.dtype).removeprefix('torch.')} resolves there; b*c is negative or complex (or a is), so nothing keeps pivots "
        f"away from zero: enlarge |Im z|, use 64-bit inputs, or pass return_min_pivot=True to get the pivot instead.",
        row,
        smallest,
    )
