"""The solve in vectorised torch operations: linear scans, any device, O(N) work in O(log N) launches.

32-bit inputs are scanned in complex128, as in torch_backend.py. Contract: solve_backends.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core.torch_backend import linear_scan, shift_left, shift_right


def causal_rows(x: Tensor, left: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), c (1 or M, N - 1)."""
    wide_left, wide_c = left.to(torch.complex128), c.to(torch.complex128)
    source = wide_left[..., None] * x
    if reverse:
        factor = -shift_left(wide_c.expand(left.shape[0], -1)) * wide_left
        return _scan_back(factor, source).to(left.dtype)
    factor = -shift_right(wide_c.expand(left.shape[0], -1)) * wide_left
    return linear_scan(factor[..., None], source).to(left.dtype)


def tridiagonal_rows(x: Tensor, left: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), b and c (1 or M, N - 1)."""
    wide_left = left.to(torch.complex128)
    down = -shift_right(c.to(torch.complex128).expand(left.shape[0], -1)) * wide_left
    up = -shift_left(b.to(torch.complex128).expand(left.shape[0], -1)) * wide_left
    return _scan_back(up, linear_scan(down[..., None], wide_left[..., None] * x)).to(left.dtype)


def _scan_back(factor: Tensor, source: Tensor) -> Tensor:
    """x_i = factor_i x_{i+1} + source_i."""
    return linear_scan(factor.flip(1)[..., None], source.flip(1)).flip(1)
