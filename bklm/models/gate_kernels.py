"""Kernels of ``normalised_gate`` for a CPU: one pass over y forward, one over y and the gradient backward.

Formulas and names: ``bklm.models.normalised_gate``. A head's channels at one position are a short row of interleaved real
and imaginary parts, read twice while it lies in the cache: for its size (backward: and its gradient's sum), then for the
results. Conventions on addresses and unsigned indices: ``bklm.bk_core.cpu.scratch``.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import uintp
from torch import Tensor

from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu.jit import inlined, jit, summing
from bklm.bk_core.cpu.scratch import reals_at

THREADS_FROM = 2**15  # elements of y
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
_NUMPY = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}


@summing
def _inverse_size(y, at, width, eps):
    """r of the channels at y[at], ..."""
    total = y.dtype.type(0)
    for c in range(_2 * width):
        total += y[at + c] * y[at + c]
    return y.dtype.type(1) / np.sqrt(total / y.dtype.type(_2 * width) + y.dtype.type(eps))


@summing
def _projection(y, at_y, o, s, at_re, at_im, at_s, width):
    """q: the sum of s (o_Re Re y + o_Im Im y)."""
    total = y.dtype.type(0)
    for c in range(width):
        at = at_y + _2 * c
        total += s[at_s + c] * (o[at_re + c] * y[at] + o[at_im + c] * y[at + _1])
    return total


@inlined
def _places(position, head, heads, length, width):
    """Where a head's numbers at a position b N + n begin in y (B, H, N, w), in s (B, N, H w), in out (B, N, 2, H w)."""
    row = position // length
    n = position - row * length
    at_y = _2 * ((row * heads + head) * length + n) * width
    return at_y, (position * heads + head) * width, (_2 * position * heads + head) * width


@jit
def _forward(like, first, last, y, s, out, rows, heads, length, width, eps):
    """out (B, N, 2, H w) of y (B, H, N, w) and s (B, N, H w), for first <= b N + n < last of the B N positions."""
    rows, heads, length, width = uintp(rows), uintp(heads), uintp(length), uintp(width)
    d = heads * width
    count = rows * length * d
    y_view, s_view, out_view = (
        reals_at(y, _2 * count, like),
        reals_at(s, count, like),
        reals_at(out, _2 * count, like),
    )
    for position in range(uintp(first), uintp(last)):
        for head in range(heads):
            at_y, at_s, at_re = _places(position, head, heads, length, width)
            r = _inverse_size(y_view, at_y, width, eps)
            for c in range(width):
                factor = s_view[at_s + c] * r
                out_view[at_re + c] = factor * y_view[at_y + _2 * c]
                out_view[at_re + d + c] = factor * y_view[at_y + _2 * c + _1]


@jit
def _backward(like, first, last, y, s, o, d_y, d_s, rows, heads, length, width, eps):
    """d_y (B, H, N, w) and d_s (B, N, H w) of the gradient o (B, N, 2, H w); positions as in the forward."""
    rows, heads, length, width = uintp(rows), uintp(heads), uintp(length), uintp(width)
    d = heads * width
    count = rows * length * d
    y_view, s_view, o_view = (
        reals_at(y, _2 * count, like),
        reals_at(s, count, like),
        reals_at(o, _2 * count, like),
    )
    d_y_view, d_s_view = reals_at(d_y, _2 * count, like), reals_at(d_s, count, like)
    for position in range(uintp(first), uintp(last)):
        for head in range(heads):
            at_y, at_s, at_re = _places(position, head, heads, length, width)
            r = _inverse_size(y_view, at_y, width, eps)
            q = _projection(y_view, at_y, o_view, s_view, at_re, at_re + d, at_s, width)
            pull = r * r * r * q / like.dtype.type(_2 * width)
            for c in range(width):
                o_re, o_im = o_view[at_re + c], o_view[at_re + d + c]
                y_re, y_im = y_view[at_y + _2 * c], y_view[at_y + _2 * c + _1]
                factor = s_view[at_s + c] * r
                d_s_view[at_s + c] = r * (o_re * y_re + o_im * y_im)
                d_y_view[at_y + _2 * c] = factor * o_re - pull * y_re
                d_y_view[at_y + _2 * c + _1] = factor * o_im - pull * y_im


def forward(y: Tensor, s: Tensor, eps: float) -> Tensor:
    """out (B, N, 2, H w) of y (B, H, N, w) complex and s = silu(gates) (B, N, H w); both contiguous, on the CPU."""
    batch, heads, length, width = y.shape
    out = torch.empty(batch, length, 2, heads * width, dtype=s.dtype, device="cpu")
    _run(_forward, y, (y.data_ptr(), s.data_ptr(), out.data_ptr()), eps)
    return out


def backward(y: Tensor, s: Tensor, o: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dL/dy and dL/ds of the gradient o of out; all contiguous, on the CPU."""
    d_y, d_s = torch.empty_like(y), torch.empty_like(s)
    _run(_backward, y, tuple(t.data_ptr() for t in (y, s, o, d_y, d_s)), eps)
    return d_y, d_s


def _run(kernel, y: Tensor, addresses: tuple[int, ...], eps: float) -> None:
    batch, heads, length, width = y.shape
    like = _NUMPY[y.real.dtype]

    def part(first: int, last: int) -> None:
        kernel(like, first, last, *addresses, batch, heads, length, width, eps)

    threads.split(part, batch * length, y.numel() >= THREADS_FROM)
