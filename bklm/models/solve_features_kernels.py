"""CPU kernels of ``solve_features``: one pass over the positions forward, one backward; nothing between the steps is stored
but y and L.

Formulas and names: ``bklm.models.solve_features``. A part is some heads of one sequence: heads do not meet, and the numbers
of a position lie side by side. Conventions on addresses and unsigned indices: ``bklm.bk_core.cpu.scratch``.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import uintp
from torch import Tensor

from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu.jit import inlined, jit, summing
from bklm.bk_core.cpu.scratch import reals_at
from bklm.models.exponential import exponential

THREADS_FROM = 2**19  # elements of read; fewer take as long as sharing them
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
_NUMPY = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}


@inlined
def _next(x, y_re, y_im, re, im, b):
    """y = L (x - b y_before), from y_before = y_re + i y_im and L = re + i im."""
    v, w = x - b * y_re, -b * y_im
    return re * v - im * w, re * w + im * v


@inlined
def _gradient(s, r, q, y, o, carry):
    """What reaches the real or the imaginary part of y, before conj(L)."""
    return s * r * o - q * y + carry


@summing
def _next_size(read, at_x, y, before, d, re, im, b, width):
    """The sum of |y|^2 over a head's channels, before y is written."""
    total = y.dtype.type(0)
    for c in range(width):
        v, w = _next(read[at_x + c], y[before + c], y[before + d + c], re, im, b)
        total += v * v + w * w
    return total


@summing
def _size_and_projection(y, at, d, o, s, width):
    """The sums of |y|^2 and of s Re(conj(o) y)."""
    total, along = y.dtype.type(0), y.dtype.type(0)
    for c in range(width):
        v, w = y[at + c], y[at + d + c]
        total += v * v + w * w
        along += s[c] * (o[at + c] * v + o[at + d + c] * w)
    return total, along


@summing
def _products(y, at, before, d, o, s, r, q, carry, own, width):
    """The sums of conj(y) g and of conj(y_before) g, g the ``_gradient``; each real and imaginary."""
    zero = y.dtype.type(0)
    s_re, s_im, b_re, b_im = zero, zero, zero, zero
    for c in range(width):
        v, w = y[at + c], y[at + d + c]
        g_re = _gradient(s[c], r, q, v, o[at + c], carry[own + c])
        g_im = _gradient(s[c], r, q, w, o[at + d + c], carry[d + own + c])
        s_re += v * g_re + w * g_im
        s_im += v * g_im - w * g_re
        b_re += y[before + c] * g_re + y[before + d + c] * g_im
        b_im += y[before + c] * g_im - y[before + d + c] * g_re
    return s_re, s_im, b_re, b_im


@jit
def _forward(like, first, last, read, eta, out, y, left, groups, heads, length, width, eps):
    """out and y (B, N, 2, H w), and L (B, H, N, 2), of read (B, N, 2 H w + 2 H), for the parts first ... last - 1."""
    heads, length, width, groups = uintp(heads), uintp(length), uintp(width), uintp(groups)
    d = heads * width
    stride = _2 * (d + heads)
    one, zero, real = like.dtype.type(1), like.dtype.type(0), like.dtype.type
    # y before the first position
    nothing = np.zeros(_2 * d, like.dtype)
    for part in range(uintp(first), uintp(last)):
        row, group = part // groups, part % groups
        end = (row + _1) * length
        read_view, eta_view = reals_at(read, end * stride, like), reals_at(eta, heads, like)
        out_view, y_view = reals_at(out, end * _2 * d, like), reals_at(y, end * _2 * d, like)
        left_view = reals_at(left, end * _2 * heads, like)
        for n in range(length):
            position = row * length + n
            at_read, at_y = position * stride, position * _2 * d
            for head in range(group * heads // groups, (group + _1) * heads // groups):
                b, re, im = zero, zero, zero
                at_left = _2 * ((row * heads + head) * length + n)
                if n > _0:
                    b = one / (one + exponential(-read_view[at_read + _2 * d + heads + head]))
                    re, im = left_view[at_left - _2], left_view[at_left - _1]
                re = read_view[at_read + _2 * d + head] - b * b * re
                im = -eta_view[head] - b * b * im
                size = re * re + im * im
                re, im = re / size, -im / size
                left_view[at_left], left_view[at_left + _1] = re, im
                own = head * width
                at_x, at = at_read + own, at_y + own
                if n > _0:
                    before_view, before = y_view, at - _2 * d
                else:
                    before_view, before = nothing, own
                total = _next_size(read_view, at_x, before_view, before, d, re, im, b, width)
                r = one / np.sqrt(total / real(_2 * width) + real(eps))
                for c in range(width):
                    v, w = _next(
                        read_view[at_x + c], before_view[before + c], before_view[before + d + c], re, im, b
                    )
                    y_view[at + c], y_view[at + d + c] = v, w
                    g = read_view[at_x + d + c]
                    g = r * g / (one + exponential(-g))
                    out_view[at + c], out_view[at + d + c] = g * v, g * w


@jit
def _backward(like, first, last, read, y, left, o, d_read, d_eta, groups, heads, length, width, eps):
    """d_read, and d_eta (B, H), of the gradient o (B, N, 2, H w) of out, for the parts first ... last - 1."""
    heads, length, width, groups = uintp(heads), uintp(length), uintp(width), uintp(groups)
    d = heads * width
    stride = _2 * (d + heads)
    one, zero, real = like.dtype.type(1), like.dtype.type(0), like.dtype.type
    # What reaches y and L of a position from the next one.
    carry, pull_of_left = np.zeros(_2 * d, like.dtype), np.zeros(_2 * heads, like.dtype)
    s, slope = np.empty(width, like.dtype), np.empty(width, like.dtype)
    for part in range(uintp(first), uintp(last)):
        row, group = part // groups, part % groups
        end = (row + _1) * length
        read_view, d_read_view = reals_at(read, end * stride, like), reals_at(d_read, end * stride, like)
        o_view, y_view = reals_at(o, end * _2 * d, like), reals_at(y, end * _2 * d, like)
        left_view, d_eta_view = (
            reals_at(left, end * _2 * heads, like),
            reals_at(d_eta, (row + _1) * heads, like),
        )
        carry[:], pull_of_left[:] = zero, zero
        for head in range(group * heads // groups, (group + _1) * heads // groups):
            d_eta_view[row * heads + head] = zero
        for step in range(length):
            n = length - _1 - step
            position = row * length + n
            at_read, at_y = position * stride, position * _2 * d
            for head in range(group * heads // groups, (group + _1) * heads // groups):
                at_x, at, own = at_read + head * width, at_y + head * width, head * width
                before = at - _2 * d if n > _0 else at
                at_left = _2 * ((row * heads + head) * length + n)
                re, im, b = left_view[at_left], left_view[at_left + _1], zero
                if n > _0:
                    b = one / (one + exponential(-read_view[at_read + _2 * d + heads + head]))
                for c in range(width):
                    g = read_view[at_x + d + c]
                    sigmoid = one / (one + exponential(-g))
                    s[c] = g * sigmoid
                    slope[c] = sigmoid * (one + g * (one - sigmoid))
                total, q = _size_and_projection(y_view, at, d, o_view, s, width)
                r = one / np.sqrt(total / real(_2 * width) + real(eps))
                q = r * r * r * q / real(_2 * width)
                s_re, s_im, b_re, b_im = _products(y_view, at, before, d, o_view, s, r, q, carry, own, width)
                for c in range(width):
                    v, w = y_view[at + c], y_view[at + d + c]
                    o_re, o_im = o_view[at + c], o_view[at + d + c]
                    g_re = _gradient(s[c], r, q, v, o_re, carry[own + c])
                    g_im = _gradient(s[c], r, q, w, o_im, carry[d + own + c])
                    p_re, p_im = re * g_re + im * g_im, re * g_im - im * g_re
                    d_read_view[at_x + c] = p_re
                    d_read_view[at_x + d + c] = r * (o_re * v + o_im * w) * slope[c]
                    carry[own + c], carry[d + own + c] = -b * p_re, -b * p_im
                size = re * re + im * im
                l_re = (re * s_re - im * s_im) / size + pull_of_left[_2 * head]
                l_im = (re * s_im + im * s_re) / size + pull_of_left[_2 * head + _1]
                # - conj(L^2) l
                q_re, q_im = re * re - im * im, -(re + re) * im
                d_re, d_im = -(q_re * l_re - q_im * l_im), -(q_re * l_im + q_im * l_re)
                pull_of_left[_2 * head], pull_of_left[_2 * head + _1] = -b * b * d_re, -b * b * d_im
                d_read_view[at_read + _2 * d + head] = d_re
                d_eta_view[row * heads + head] -= d_im
                d_bond = zero
                if n > _0:
                    # The sum of Re(conj(y_before) conj(L) g)
                    d_b = re * b_re + im * b_im
                    along = left_view[at_left - _2] * d_re + left_view[at_left - _1] * d_im
                    d_bond = -(d_b + (b + b) * along) * b * (one - b)
                d_read_view[at_read + _2 * d + heads + head] = d_bond


def forward(read: Tensor, eta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """out and y (B, N, 2, d), and L (B, H, N, 2), of read (B, N, 2 d + 2 H) and eta (H,), contiguous on the CPU."""
    heads = len(eta)
    batch, length, d = *read.shape[:2], read.shape[2] // 2 - heads
    out, y = read.new_empty(2, batch, length, 2, d)
    left = read.new_empty(batch, heads, length, 2)
    _run(_forward, read, heads, (read, eta, out, y, left), eps)
    return out, y, left


def backward(read: Tensor, y: Tensor, left: Tensor, o: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dL/dread, and dL/deta for each sequence (B, H)."""
    batch, heads = len(read), left.shape[1]
    d_read, d_eta = torch.empty_like(read), read.new_empty(batch, heads)
    _run(_backward, read, heads, (read, y, left, o, d_read, d_eta), eps)
    return d_read, d_eta


def _run(kernel, read: Tensor, heads: int, tensors: tuple[Tensor, ...], eps: float) -> None:
    like, (batch, length, stride) = _NUMPY[read.dtype], read.shape
    addresses, width = tuple(t.data_ptr() for t in tensors), (stride // 2 - heads) // heads
    # Fewer sequences than threads are cut between their heads, whose numbers lie in the same lines of the cache.
    groups = min(heads, -(-torch.get_num_threads() // max(1, batch)))

    def part(first: int, last: int) -> None:
        kernel(like, first, last, *addresses, groups, heads, length, width, eps)

    threads.split(part, batch * groups, read.numel() >= THREADS_FROM)
