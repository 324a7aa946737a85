"""Scalar kernels of the solve for few columns of long rows: one pass each way, nothing packed, nothing joined.

A line is one column of one row; formulas as in cpu/solve_tiles.py. The causal solve takes a line whole. The bidirectional one
cuts it into chunks of CHUNK positions that do not wait for each other: what enters a chunk is computed anew from as far
before it as its weight there, the product of the factors Q (or P) between, is above 2^-100 (doubles: 2^-500). Where that takes
more than REACH positions, or a number is NaN or infinite, which has to reach the row's ends, the line says so and is left to
the tiles. Chunks depend on N alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import jit
from bklm.bk_core.cpu.scratch import reals_at
from bklm.bk_core.cpu.solve_columns import factor, inlined

CHUNK = 2**14
REACH = 2**11
_REACH = np.uintp(REACH)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)


@inlined
def _least(s):
    """The square of a weight that is nothing: in 32 bits of the largest number beside the smallest, in 64 of a number 2^476
    times as large as its neighbours, as no square below 2^-1000 can be told."""
    return 2.0**-600 if s.itemsize == np.uintp(4) else 2.0**-1000


@inlined
def _square(re, im):
    return np.float64(re) * np.float64(re) + np.float64(im) * np.float64(im)


@inlined
def _first_before(s, left, f, complex_f, at_left, at_f, begin):
    """Where an elimination must start to be right at ``begin``, its factor from i - 1 to i being L_{i-1} f_{i-1}; and
    whether that is near."""
    i, weight = begin, 1.0
    while i > _0 and weight > _least(s):
        if begin - i == _REACH:
            return i, False
        i -= _1
        re, im = factor(left, f, complex_f, at_left + i, at_f + i, s.dtype.type(1))
        weight *= _square(re, im)
    return i, not np.isnan(weight)


@inlined
def _last_after(s, left, e, complex_e, at_left, at_e, end, n):
    """Before which position a substitution must start to be right at end - 1, its factor from i + 1 to i being L_i e_i."""
    i, weight = end, 1.0
    while i < n and weight > _least(s):
        if i - end == _REACH:
            return i, False
        re, im = factor(left, e, complex_e, at_left + i - _1, at_e + i - _1, s.dtype.type(1))
        weight *= _square(re, im)
        i += _1
    return i, not np.isnan(weight)


@inlined
def _entry(x, real, at, nil):
    """Real and imaginary part of entry ``at`` of a row whose entries are real, or pairs."""
    if real:
        return x[at], nil
    return x[_2 * at], x[_2 * at + _1]


@inlined
def _eliminate(s, x, real, out, left, f, complex_f, at_x, at_left, at_f, stride, start, begin, end, stop, sign):
    """v_i = x_i - L_{i-1} f_{i-1} v_{i-1} from ``start``: into ``out`` inside the chunk, into scratch behind it.
    Here and below: whether the last state is finite, which it is not behind one that is not."""
    nil = s.dtype.type(0)
    re, im, q_re, q_im = nil, nil, nil, nil
    for i in range(start, stop):
        at = at_x + i * stride
        x_re, x_im = _entry(x, real, at, nil)
        re, im = x_re - q_re * re + q_im * im, x_im - q_re * im - q_im * re
        if i >= end:
            s[_2 * (i - end)], s[_2 * (i - end) + _1] = re, im
        elif i >= begin:
            out[_2 * at], out[_2 * at + _1] = re, im
        if i + _1 < stop:
            q_re, q_im = factor(left, f, complex_f, at_left + i, at_f + i, sign)
    return re - re == nil and im - im == nil


@inlined
def _step(l_re, l_im, v_re, v_im, p_re, p_im, re, im):
    """L v - P y."""
    return l_re * v_re - l_im * v_im - p_re * re + p_im * im, l_re * v_im + l_im * v_re - p_re * im - p_im * re


@inlined
def _substitute(
    s, v, real, spare, out, left, e, complex_e, at_x, at_left, at_e, stride, begin, end, stop, n, sign
):
    """y_i = L_i v_i - L_i e_i y_{i+1} from stop - 1 down; v behind the chunk is in scratch where it is ``spare``."""
    nil = s.dtype.type(0)
    re, im = nil, nil
    for c in range(stop - begin):
        i = stop - _1 - c
        at = at_x + i * stride
        if spare and i >= end:
            v_re, v_im = _entry(s, False, i - end, nil)
        else:
            v_re, v_im = _entry(v, real, at, nil)
        p_re, p_im = nil, nil
        if i + _1 < n:
            p_re, p_im = factor(left, e, complex_e, at_left + i, at_e + i, sign)
        l_re, l_im = left[_2 * (at_left + i)], sign * left[_2 * (at_left + i) + _1]
        re, im = _step(l_re, l_im, v_re, v_im, p_re, p_im, re, im)
        if i < end:
            out[_2 * at], out[_2 * at + _1] = re, im
    return re - re == nil and im - im == nil


@inlined
def _substitute_from_left(s, x, real, out, left, e, complex_e, at_x, at_left, at_e, stride, n, sign):
    """y_i = L_i x_i - L_i e_{i-1} y_{i-1}."""
    nil = s.dtype.type(0)
    re, im = nil, nil
    for i in range(n):
        at = at_x + i * stride
        x_re, x_im = _entry(x, real, at, nil)
        p_re, p_im = nil, nil
        if i > _0:
            p_re, p_im = factor(left, e, complex_e, at_left + i, at_e + i - _1, sign)
        l_re, l_im = left[_2 * (at_left + i)], sign * left[_2 * (at_left + i) + _1]
        re, im = _step(l_re, l_im, x_re, x_im, p_re, p_im, re, im)
        out[_2 * at], out[_2 * at + _1] = re, im


@jit
def solve_lines(
    s, first, last, x, real, out, left, e, e_stride, complex_e, f, f_stride, complex_f, failed,
    rows, n, columns, chunk, n_chunks, both, from_left, conjugate,
):  # fmt: skip
    """y (M, N, D) for chunks ``first <= item < last`` of the M D n_chunks chunks; without ``both`` a line is one chunk.

    Addresses and couplings as in ``solve_tiles``; ``failed`` (M D) reals, 0 before, are 1 afterwards for lines that are left.
    """
    rows, n, columns, chunk, n_chunks = uintp(rows), uintp(n), uintp(columns), uintp(chunk), uintp(n_chunks)
    e_stride, f_stride = uintp(e_stride), uintp(f_stride)
    x_view, out_view = reals_at(x, _2 * rows * n * columns, s), reals_at(out, _2 * rows * n * columns, s)
    left_view, flags = reals_at(left, _2 * rows * n, s), reals_at(failed, rows * columns, s)
    e_view, f_view = reals_at(e, _2 * rows * n, s), reals_at(f, _2 * rows * n, s)
    sign = s.dtype.type(-1 if conjugate else 1)
    for item in range(uintp(first), uintp(last)):
        line = item // n_chunks
        begin = (item - line * n_chunks) * chunk
        end = min(n, begin + chunk)
        row = line // columns
        at_x, at_left = row * n * columns + (line - row * columns), row * n
        at_e, at_f = row * e_stride, row * f_stride
        if from_left:
            _substitute_from_left(
                s, x_view, real, out_view, left_view, e_view, complex_e, at_x, at_left, at_e, columns, n, sign
            )
            continue
        start, stop = _0, n
        if n_chunks > _1:
            if flags[line] != 0:
                continue
            start, near = _first_before(s, left_view, f_view, complex_f, at_left, at_f, begin)
            stop, near_too = _last_after(s, left_view, e_view, complex_e, at_left, at_e, end, n)
            if not (near and near_too):
                flags[line] = 1
                continue
        fine = True
        if both:
            fine = _eliminate(
                s, x_view, real, out_view, left_view, f_view, complex_f, at_x, at_left, at_f, columns,
                start, begin, end, stop, sign,
            )  # fmt: skip
        fine &= _substitute(
            s, out_view if both else x_view, real and not both, both, out_view, left_view, e_view, complex_e,
            at_x, at_left, at_e, columns, begin, end, stop, n, sign,
        )  # fmt: skip
        if n_chunks > _1 and not fine:
            flags[line] = 1
