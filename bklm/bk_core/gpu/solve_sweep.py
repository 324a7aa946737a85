"""Triton: the one kernel of the solve, a linear recurrence along a chunk of a line.

    y_i = g_i x_i - q_i y_before,   q_i = L_i e_i,   g_i = L_i or 1

``before`` is the position before i, or, REVERSE, after it; e_i couples the two. A line is one column of one row; one lane
owns one chunk of one line, and neighbouring lanes hold neighbouring columns, so that memory sees whole rows of x. As in
gpu/lanes.py a lane reads STRIP positions at once and every recurrence runs in the order of the formulas.
"""

# ruff: noqa: RUF005 (tuples grow by +: Triton knows no unpacking)

import triton
import triton.language as tl

from bklm.bk_core.gpu.lanes import mul, scale

STRIP = tl.constexpr(8)


@triton.jit
def _load(ptr, at, mask, COMPLEX: tl.constexpr):
    """One number a lane, as (real, imaginary); 0 where masked."""
    if COMPLEX:
        re = tl.load(ptr + 2 * at, mask=mask, other=0.0)
        im = tl.load(ptr + 2 * at + 1, mask=mask, other=0.0)
    else:
        re = tl.load(ptr + at, mask=mask, other=0.0)
        im = re * 0.0
    return re, im


@triton.jit
def _store(ptr, at, mask, re, im):
    tl.store(ptr + 2 * at, re, mask=mask)
    tl.store(ptr + 2 * at + 1, im, mask=mask)


@triton.jit
def linear_sweep(
    x, left, e, entering, y, maps, N, T, C, D, S, e_row,
    REVERSE: tl.constexpr, SCALED: tl.constexpr, CHUNKED: tl.constexpr, MAPS: tl.constexpr,
    X_COMPLEX: tl.constexpr, E_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y (M, N, D) complex from what enters each chunk, ``entering`` (M, C, D) complex; or, MAPS, what each chunk does to it:
    ``maps`` (2, M, C, D) complex, the factor of what enters and what leaves where 0 enters.

    x (M, N, D), left (M, N) complex, e (1 or M, N - 1; e_row = 0 or N - 1); S = M C D lanes, T a multiple of STRIP.
    """
    number = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = number < S
    column = number % D
    chunk = (number // D) % C
    row = number // (D * C)
    start = chunk * T
    re, im = _load(entering, number, live & CHUNKED & (not MAPS), True)
    zero = re * 0.0
    f_re, f_im = zero + 1.0, zero
    for jj in range(0, T, STRIP):
        xs, ls, es = (), (), ()
        for k in tl.static_range(8):
            i = start + (T - 1 - jj - k if REVERSE else jj + k)
            inside = live & (i < N)
            xs = xs + (_load(x, (row * N + i) * D + column, inside, X_COMPLEX),)
            ls = ls + (_load(left, row * N + i, inside, True),)
            if REVERSE:
                coupled = inside & (i < N - 1)
                es = es + (_load(e, row * e_row + i, coupled, E_COMPLEX),)
            else:
                coupled = inside & (i > 0)
                es = es + (_load(e, row * e_row + i - 1, coupled, E_COMPLEX),)
        for k in tl.static_range(8):
            i = start + (T - 1 - jj - k if REVERSE else jj + k)
            inside = live & (i < N)
            l_re, l_im = ls[k][0], ls[k][1]
            q_re, q_im = scale(es[k][0], es[k][1], l_re, l_im, E_COMPLEX)
            u_re, u_im = mul(q_re, q_im, re, im)
            if SCALED:
                v_re, v_im = scale(xs[k][0], xs[k][1], l_re, l_im, X_COMPLEX)
            else:
                v_re, v_im = xs[k][0], xs[k][1]
            re, im = tl.where(inside, v_re - u_re, re), tl.where(inside, v_im - u_im, im)
            if MAPS:
                u_re, u_im = mul(q_re, q_im, f_re, f_im)
                f_re, f_im = tl.where(inside, -u_re, f_re), tl.where(inside, -u_im, f_im)
            else:
                _store(y, (row * N + i) * D + column, inside, re, im)
    if MAPS:
        _store(maps, number, live, f_re, f_im)
        _store(maps, number + S, live, re, im)
