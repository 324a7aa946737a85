"""SIMD kernels of the solve for several columns: one position after the other, the columns side by side in the lanes.

With L known (cpu/tiles.py) what is left is linear, ``v_i = x_i - q v_{i-1}`` or ``y_i = L_i v_i - q y_{i+1}``, with factors q
that all columns share. Columns are taken BLOCK at a time; the state of a block lives in scratch, real and imaginary parts
apart, and the interleaved rows of the arrays are read and written as they are. Conventions on addresses, unsigned indices
and fused multiply-add: cpu/scratch.py.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import NO, YES, inlined, jit
from bklm.bk_core.cpu.scratch import reals_at

BLOCK = 128
_BLOCK = np.uintp(BLOCK)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
# Fields of BLOCK numbers each; a complex one takes two. STATE comes first, so that distances are constants.
STATE = np.uintp(0)


@inlined
def factor(left, e, complex_e, at_left, at_e, sign):
    """q = L e and L: complex numbers from an interleaved L and a real or interleaved coupling, conjugated by ``sign``."""
    re, im = left[_2 * at_left], sign * left[_2 * at_left + _1]
    if complex_e:
        e_re, e_im = e[_2 * at_e], sign * e[_2 * at_e + _1]
        return re * e_re - im * e_im, re * e_im + im * e_re
    e_re = e[at_e]
    return re * e_re, im * e_re


@inlined
def clear(s, field, width):
    for w in range(width):
        s[field + w] = 0
        s[field + _BLOCK + w] = 0


@inlined
def write(s, field, target, at, width, real):
    """A field as interleaved complex numbers, or its real parts."""
    if real:
        for w in range(width):
            target[at + w] = s[field + w]
    else:
        for w in range(width):
            target[_2 * (at + w)] = s[field + w]
            target[_2 * (at + w) + _1] = s[field + _BLOCK + w]


@inlined
def moved(x, y, re, im, l_re, l_im, q_re, q_im):
    """L (x + i y) - q (re + i im)."""
    return l_re * x - l_im * y - q_re * re + q_im * im, l_re * y + l_im * x - q_re * im - q_im * re


@inlined
def advance(s, source, real, at, width, l_re, l_im, q_re, q_im):
    """STATE = L source - q STATE for a block of columns."""
    if real:
        for w in range(width):
            x = source[at + w]
            re, im = s[STATE + w], s[STATE + _BLOCK + w]
            s[STATE + w] = l_re * x - q_re * re + q_im * im
            s[STATE + _BLOCK + w] = l_im * x - q_re * im - q_im * re
    else:
        for w in range(width):
            x, y = source[_2 * (at + w)], source[_2 * (at + w) + _1]
            re, im = moved(x, y, s[STATE + w], s[STATE + _BLOCK + w], l_re, l_im, q_re, q_im)
            s[STATE + w], s[STATE + _BLOCK + w] = re, im


@inlined
def eliminate(
    s, x, real, out, left, e, complex_e, at_row, at_out, at_left, at_e, n, columns, block, width, sign
):
    """v_i = x_i - e_{i-1} L_{i-1} v_{i-1} of one block of columns, into ``out``; v_i = w_i / L_i."""
    one, nil = s.dtype.type(1), s.dtype.type(0)
    clear(s, STATE, width)
    q_re, q_im = nil, nil
    for i in range(n):
        at = i * columns + block
        advance(s, x, real, at_row + at, width, one, nil, q_re, q_im)
        write(s, STATE, out, at_out + at, width, NO)
        if i + _1 < n:
            q_re, q_im = factor(left, e, complex_e, at_left + i, at_e + i, sign)


@inlined
def substitute(s, x, real, out, left, e, complex_e, at_row, at_left, at_e, n, columns, block, width, reverse):
    """y_i = L_i (x_i - e y_before) of one block of columns; ``before`` is i - 1, with ``reverse`` i + 1."""
    one, nil = s.dtype.type(1), s.dtype.type(0)
    clear(s, STATE, width)
    for step in range(n):
        i = n - _1 - step if reverse else step
        q_re, q_im = nil, nil
        if step > _0:
            q_re, q_im = factor(left, e, complex_e, at_left + i, at_e + (i if reverse else i - _1), one)
        at = at_row + i * columns + block
        advance(s, x, real, at, width, left[_2 * (at_left + i)], left[_2 * (at_left + i) + _1], q_re, q_im)
        write(s, STATE, out, at, width, NO)


@jit
def causal_columns(s, first, last, x, real, out, left, c, c_stride, complex_c, rows, n, columns, reverse):
    """y (M, N, D) for rows ``first <= row < last``.

    Addresses: x, y, L (M, N), c (1 or M, N - 1; c_stride = N - 1 or 0)."""
    rows, n, columns, c_stride = uintp(rows), uintp(n), uintp(columns), uintp(c_stride)
    x_view = reals_at(x, _2 * rows * n * columns, s)
    out_view = reals_at(out, _2 * rows * n * columns, s)
    left_view, c_view = reals_at(left, _2 * rows * n, s), reals_at(c, _2 * rows * n, s)
    for row in range(uintp(first), uintp(last)):
        for block in range(_0, columns, _BLOCK):
            width = min(_BLOCK, columns - block)
            substitute(
                s, x_view, real, out_view, left_view, c_view, complex_c,
                row * n * columns, row * n, row * c_stride, n, columns, block, width, reverse,
            )  # fmt: skip


@jit
def tridiagonal_columns(
    s, first, last, x, real, out, left, b, b_stride, complex_b, c, c_stride, complex_c, rows, n, columns
):
    """As :func:`causal_columns`: elimination from the left into ``out``, substitution from the right in place."""
    rows, n, columns = uintp(rows), uintp(n), uintp(columns)
    b_stride, c_stride = uintp(b_stride), uintp(c_stride)
    x_view = reals_at(x, _2 * rows * n * columns, s)
    out_view = reals_at(out, _2 * rows * n * columns, s)
    left_view = reals_at(left, _2 * rows * n, s)
    b_view, c_view = reals_at(b, _2 * rows * n, s), reals_at(c, _2 * rows * n, s)
    one = s.dtype.type(1)
    for row in range(uintp(first), uintp(last)):
        at_row, at_left = row * n * columns, row * n
        for block in range(_0, columns, _BLOCK):
            width = min(_BLOCK, columns - block)
            eliminate(
                s, x_view, real, out_view, left_view, c_view, complex_c,
                at_row, at_row, at_left, row * c_stride, n, columns, block, width, one,
            )  # fmt: skip
            substitute(
                s, out_view, NO, out_view, left_view, b_view, complex_b,
                at_row, at_left, row * b_stride, n, columns, block, width, YES,
            )  # fmt: skip
