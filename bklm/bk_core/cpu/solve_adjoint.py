"""Adjoint of the solve for several columns: the gradient of x and its sums with the result, one pass over gbar and y.

Formulas: solve_formulas.py and solve_backends.py; layout: solve_columns.py. The sums over the columns of a position are
the one place where the order of additions is left to the compiler (it fixes one for a processor), because in a fixed order
they could not use vector registers.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import NO, YES, inlined, jit, summing
from bklm.bk_core.cpu.scratch import reals_at
from bklm.bk_core.cpu.solve_columns import (
    BLOCK,
    STATE,
    advance,
    clear,
    eliminate,
    factor,
    write,
)

_BLOCK = np.uintp(BLOCK)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)


@summing
def _sums(s, y, here, after, before, width, both):
    """Sums over a block of columns of STATE conj(y), each complex: with y from ``here``, from ``after`` and, with ``both``,
    from ``before``."""
    nil = s.dtype.type(0)
    S_re, S_im, C_re, C_im, B_re, B_im = nil, nil, nil, nil, nil, nil
    for w in range(width):
        re, im = s[STATE + w], s[STATE + _BLOCK + w]
        y_re, y_im = y[_2 * (here + w)], y[_2 * (here + w) + _1]
        S_re += re * y_re + im * y_im
        S_im += im * y_re - re * y_im
        y_re, y_im = y[_2 * (after + w)], y[_2 * (after + w) + _1]
        C_re += re * y_re + im * y_im
        C_im += im * y_re - re * y_im
        if both:
            y_re, y_im = y[_2 * (before + w)], y[_2 * (before + w) + _1]
            B_re += re * y_re + im * y_im
            B_im += im * y_re - re * y_im
    return S_re, S_im, C_re, C_im, B_re, B_im


@inlined
def _add(target, at, re, im, keep):
    """Add to (``keep``), or set, one interleaved complex number."""
    target[_2 * at] = target[_2 * at] + re if keep else re
    target[_2 * at + _1] = target[_2 * at + _1] + im if keep else im


@inlined
def _descend(
    s, source, at_source, out, real, y, left, c, complex_c, S, B, C, at_row, at_left, at_c, at_between,
    n, columns, block, width, reverse, sums, both,
):  # fmt: skip
    """g_i = conj(L_i) (source_i - conj(c) g_before), and what g_i adds to S, C and (``both``) B."""
    sign = -s.dtype.type(1)
    clear(s, STATE, width)
    keep = block > _0
    for step in range(n):
        i = step if reverse else n - _1 - step
        between = i - _1 if reverse else i
        at = i * columns + block
        q_re, q_im = s.dtype.type(0), s.dtype.type(0)
        if step > _0:
            q_re, q_im = factor(left, c, complex_c, at_left + i, at_c + between, sign)
        l_re, l_im = left[_2 * (at_left + i)], sign * left[_2 * (at_left + i) + _1]
        advance(s, source, NO, at_source + at, width, l_re, l_im, q_re, q_im)
        if sums:
            # Rows of y of the positions that come after and before this one here; at an end this one, and nothing is added.
            here = at_row + at
            up, down = here + columns, here - columns
            after = here if step + _1 == n else up if reverse else down
            before = here if step == _0 else down if reverse else up
            if both:
                S_re, S_im, C_re, C_im, B_re, B_im = _sums(s, y, here, after, before, width, YES)
            else:
                S_re, S_im, C_re, C_im, B_re, B_im = _sums(s, y, here, after, before, width, NO)
            _add(S, at_left + i, S_re, S_im, keep)
            if step + _1 < n:
                _add(C, at_between + (i if reverse else i - _1), -C_re, -C_im, keep)
            if both and step > _0:
                _add(B, at_between + i, -B_re, -B_im, keep)
        write(s, STATE, out, at_row + at, width, real)


@jit
def adjoint_columns(
    s, first, last, gbar, buffer, out, real, y, left, b, b_stride, complex_b, c, c_stride, complex_c,
    S, B, C, rows, n, columns, reverse, sums, both,
):  # fmt: skip
    """g (M, N, D) for rows ``first <= row < last``, real parts if ``real``; S (M, N), C and (``both``) B (M, N - 1).

    Addresses throughout. ``both``: the tridiagonal solve, whose elimination goes into ``buffer`` (N, D) complex, of this
    call alone.
    """
    rows, n, columns = uintp(rows), uintp(n), uintp(columns)
    b_stride, c_stride = uintp(b_stride), uintp(c_stride)
    items = _2 * rows * n * columns
    gbar_view, out_view, y_view = reals_at(gbar, items, s), reals_at(out, items, s), reals_at(y, items, s)
    buffer_view, left_view = reals_at(buffer, _2 * n * columns, s), reals_at(left, _2 * rows * n, s)
    b_view, c_view = reals_at(b, _2 * rows * n, s), reals_at(c, _2 * rows * n, s)
    S_view, B_view, C_view = (
        reals_at(S, _2 * rows * n, s),
        reals_at(B, _2 * rows * n, s),
        reals_at(C, _2 * rows * n, s),
    )
    sign = -s.dtype.type(1)
    for row in range(uintp(first), uintp(last)):
        at_row, at_left = row * n * columns, row * n
        for block in range(_0, columns, _BLOCK):
            width = min(_BLOCK, columns - block)
            if both:
                eliminate(
                    s, gbar_view, NO, buffer_view, left_view, b_view, complex_b,
                    at_row, _0, at_left, row * b_stride, n, columns, block, width, sign,
                )  # fmt: skip
            _descend(
                s, buffer_view if both else gbar_view, _0 if both else at_row, out_view, real, y_view,
                left_view, c_view, complex_c, S_view, B_view, C_view, at_row, at_left, row * c_stride,
                row * (n - _1), n, columns, block, width, reverse, sums, both,
            )  # fmt: skip
