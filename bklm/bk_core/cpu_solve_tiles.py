"""SIMD kernels of the solve for few columns: tiles of many lines side by side in the lanes, all independent of each other.

A line is one column of one row, cut into tiles as in cpu_scratch.py, whose scratch buffer and conventions these kernels
use. With L known (cpu_tiles.py) the solve is linear:

    elimination   v_j = x_j - Q_{j-1} v_{j-1},       Q = L c  (left out by the causal solve: v = x)
    substitution  y_j = L_j v_j - P_j y_{j+1},       P = L b

A tile is first run as if nothing entered it, together with its answers to a unit that enters from either side: five
numbers that tell what leaves it. A join from tile to tile gives what really enters, in double precision, and a second run
gives the results. A causal solve runs from the left: its lines are read and written the other way round (``flip``).
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu_scratch import LANES, at, put, reals_at, vectors
from bklm.bk_core.cpu_solve_columns import factor
from bklm.bk_core.jit import jit

_LANES = np.uintp(LANES)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
# Fields of cpu_scratch, two each.
_X = np.uintp(0)  # x, then v, then y
_L = np.uintp(2)
_Q = np.uintp(4)
_P = np.uintp(6)
_FROM_LEFT = np.uintp(8)  # the answer of v to a unit before the tile
_OUT = np.uintp(10)  # a step alone: y, its answer to a unit after the tile, to a unit before it
SUMMARY = 10
"""Reals of a tile: v at its end, its factor; y at its start, its factors from the right and from the left."""
_SUMMARY = np.uintp(SUMMARY)


@jit
def _pack_source(s, x, real, line, stride, begin, count, n, tile, lane, flip):
    """x of the tile into steps 1 ... tile, zeros after it."""
    for j in range(count):
        place = line + (n - _1 - begin - j if flip else begin + j) * stride
        if real:
            put(s, j + _1, _X, lane, x[place], 0)
        else:
            put(s, j + _1, _X, lane, x[_2 * place], x[_2 * place + _1])
    for j in range(count, tile):
        put(s, j + _1, _X, lane, 0, 0)


@jit
def _pack_left(s, left, at_left, begin, count, n, tile, lane, flip, sign):
    for j in range(count):
        place = at_left + (n - _1 - begin - j if flip else begin + j)
        put(s, j + _1, _L, lane, left[_2 * place], sign * left[_2 * place + _1])
    for j in range(count, tile):
        put(s, j + _1, _L, lane, 0, 0)


@jit
def _pack_elimination(s, left, e, complex_e, at_left, at_e, begin, count, n, tile, lane, sign):
    """Q of the position before the tile and of the tile, which lead to the next position each."""
    re, im = s.dtype.type(0), s.dtype.type(0)
    if begin > _0:
        re, im = factor(left, e, complex_e, at_left + begin - _1, at_e + begin - _1, sign)
    put(s, _0, _Q, lane, re, im)
    inside = min(count, n - _1 - begin)
    for j in range(inside):
        re, im = factor(left, e, complex_e, at_left + begin + j, at_e + begin + j, sign)
        put(s, j + _1, _Q, lane, re, im)
    for j in range(inside, tile):
        put(s, j + _1, _Q, lane, 0, 0)


@jit
def _pack_substitution(s, left, e, complex_e, at_left, at_e, begin, count, n, tile, lane, flip, sign):
    """P of the tile, zero at the end of the line."""
    inside = min(count, n - _1 - begin)
    for j in range(inside):
        place = n - _1 - begin - j if flip else begin + j
        re, im = factor(left, e, complex_e, at_left + place, at_e + (place - _1 if flip else place), sign)
        put(s, j + _1, _P, lane, re, im)
    for j in range(inside, tile):
        put(s, j + _1, _P, lane, 0, 0)


@jit
def _eliminate(s, tile, lanes):
    """v in place of x, from what stands at step 0."""
    for j in range(_1, tile + _1):
        for w in range(lanes):
            q_re, q_im = s[at(j - _1, _Q) + w], s[at(j - _1, _Q + _1) + w]
            re, im = s[at(j - _1, _X) + w], s[at(j - _1, _X + _1) + w]
            s[at(j, _X) + w] = s[at(j, _X) + w] - (q_re * re - q_im * im)
            s[at(j, _X + _1) + w] = s[at(j, _X + _1) + w] - (q_re * im + q_im * re)


@jit
def _answer_from_left(s, tile, lanes):
    for w in range(lanes):
        s[at(_0, _FROM_LEFT) + w] = 1
        s[at(_0, _FROM_LEFT + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            q_re, q_im = s[at(j - _1, _Q) + w], s[at(j - _1, _Q + _1) + w]
            re, im = s[at(j - _1, _FROM_LEFT) + w], s[at(j - _1, _FROM_LEFT + _1) + w]
            s[at(j, _FROM_LEFT) + w] = q_im * im - q_re * re
            s[at(j, _FROM_LEFT + _1) + w] = -(q_re * im) - q_im * re


@jit
def _substitute(s, tile, lanes):
    """y in place of v, from what stands at step tile + 1."""
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            l_re, l_im = s[at(j, _L) + w], s[at(j, _L + _1) + w]
            v_re, v_im = s[at(j, _X) + w], s[at(j, _X + _1) + w]
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(j + _1, _X) + w], s[at(j + _1, _X + _1) + w]
            s[at(j, _X) + w] = (l_re * v_re - l_im * v_im) - (p_re * re - p_im * im)
            s[at(j, _X + _1) + w] = (l_re * v_im + l_im * v_re) - (p_re * im + p_im * re)


@jit
def _answer_from_right(s, tile, lanes):
    """The product of -P over the tile, at step 1 of _OUT."""
    for w in range(lanes):
        s[at(_1, _OUT) + w] = 1
        s[at(_1, _OUT + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(_1, _OUT) + w], s[at(_1, _OUT + _1) + w]
            s[at(_1, _OUT) + w] = p_im * im - p_re * re
            s[at(_1, _OUT + _1) + w] = -(p_re * im) - p_im * re


@jit
def _answer_through(s, tile, lanes):
    """What y at the tile's start answers to a unit of v before the tile, at step 2 of _OUT."""
    for w in range(lanes):
        s[at(_2, _OUT) + w] = 0
        s[at(_2, _OUT + _1) + w] = 0
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            l_re, l_im = s[at(j, _L) + w], s[at(j, _L + _1) + w]
            v_re, v_im = s[at(j, _FROM_LEFT) + w], s[at(j, _FROM_LEFT + _1) + w]
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(_2, _OUT) + w], s[at(_2, _OUT + _1) + w]
            s[at(_2, _OUT) + w] = (l_re * v_re - l_im * v_im) - (p_re * re - p_im * im)
            s[at(_2, _OUT + _1) + w] = (l_re * v_im + l_im * v_re) - (p_re * im + p_im * re)


@jit
def _take(s, step, field, lane, target, place):
    target[place] = s[at(step, field) + lane]
    target[place + _1] = s[at(step, field + _1) + lane]


@jit
def _summarise(s, tile, lanes, used, first_item, both, summary):
    if both:
        _eliminate(s, tile, lanes)
        _answer_from_left(s, tile, lanes)
        _answer_through(s, tile, lanes)
        for w in range(used):
            place = _SUMMARY * (first_item + w)
            _take(s, tile, _X, w, summary, place)
            _take(s, tile, _FROM_LEFT, w, summary, place + _2)
            _take(s, _2, _OUT, w, summary, place + _2 * _2 * _2)
    _substitute(s, tile, lanes)
    _answer_from_right(s, tile, lanes)
    for w in range(used):
        place = _SUMMARY * (first_item + w) + _2 * _2
        _take(s, _1, _X, w, summary, place)
        _take(s, _1, _OUT, w, summary, place + _2)


@jit
def solve_tiles(
    s, first, last, x, real, out, left, e, e_stride, complex_e, f, f_stride, complex_f, summary, entering,
    rows, n, columns, tile, n_tiles, both, flip, conjugate, summarise,
):  # fmt: skip
    """y (M, N, D) for groups ``first <= group < last`` of the M D n_tiles tiles; with ``summarise`` their summaries instead.

    Addresses: x and y, L (M, N), the couplings of the substitution e and of the elimination f (``both``; else not looked
    at), summary (M D n_tiles, SUMMARY) and what enters each tile, (M D n_tiles, 2) complex: v from the left, y from the
    right (not looked at where n_tiles = 1). ``conjugate``: L, e and f are to be conjugated.
    """
    rows, n, columns, tile, n_tiles = uintp(rows), uintp(n), uintp(columns), uintp(tile), uintp(n_tiles)
    e_stride, f_stride = uintp(e_stride), uintp(f_stride)
    items = rows * columns * n_tiles
    x_view, out_view = reals_at(x, _2 * rows * n * columns, s), reals_at(out, _2 * rows * n * columns, s)
    left_view = reals_at(left, _2 * rows * n, s)
    e_view, f_view = reals_at(e, _2 * rows * n, s), reals_at(f, _2 * rows * n, s)
    summaries, enters = reals_at(summary, _SUMMARY * items, s), reals_at(entering, _2 * _2 * items, s)
    sign = s.dtype.type(-1 if conjugate else 1)
    for group in range(uintp(first), uintp(last)):
        first_item = group * _LANES
        used = min(_LANES, items - first_item)
        lanes = vectors(used)
        for w in range(used):
            item = first_item + w
            line = item // n_tiles
            begin = (item - line * n_tiles) * tile
            count = min(tile, n - begin)
            row = line // columns
            start = row * n * columns + (line - row * columns)
            _pack_source(s, x_view, real, start, columns, begin, count, n, tile, w, flip)
            _pack_left(s, left_view, row * n, begin, count, n, tile, w, flip, sign)
            _pack_substitution(
                s, left_view, e_view, complex_e, row * n, row * e_stride, begin, count, n, tile, w, flip, sign
            )
            put(s, _0, _X, w, 0, 0)
            put(s, tile + _1, _X, w, 0, 0)
            if both:
                _pack_elimination(
                    s, left_view, f_view, complex_f, row * n, row * f_stride, begin, count, n, tile, w, sign
                )
            if n_tiles > _1 and not summarise:
                place = _2 * _2 * item
                put(s, _0, _X, w, enters[place], enters[place + _1])
                put(s, tile + _1, _X, w, enters[place + _2], enters[place + _2 + _1])
        if summarise:
            _summarise(s, tile, lanes, used, first_item, both, summaries)
            continue
        if both:
            _eliminate(s, tile, lanes)
        _substitute(s, tile, lanes)
        for w in range(used):
            item = first_item + w
            line = item // n_tiles
            begin = (item - line * n_tiles) * tile
            count = min(tile, n - begin)
            row = line // columns
            start = row * n * columns + (line - row * columns)
            for j in range(count):
                place = start + (n - _1 - begin - j if flip else begin + j) * columns
                out_view[_2 * place] = s[at(j + _1, _X) + w]
                out_view[_2 * place + _1] = s[at(j + _1, _X + _1) + w]


@jit
def _times(summaries, place, re, im):
    """A factor of a summary times (re, im); 0 for 0, whatever the factor."""
    if re == 0 and im == 0:
        return 0.0, 0.0
    f_re, f_im = np.float64(summaries[place]), np.float64(summaries[place + _1])
    return f_re * re - f_im * im, f_re * im + f_im * re


@jit
def join(s, summary, entering, lines, n_tiles, both):
    """What enters each tile, from the tiles' summaries: v tile by tile from the left, then y from the right."""
    lines, n_tiles = uintp(lines), uintp(n_tiles)
    summaries = reals_at(summary, _SUMMARY * lines * n_tiles, s)
    enters = reals_at(entering, _2 * _2 * lines * n_tiles, s)
    for line in range(lines):
        v_re, v_im = 0.0, 0.0
        for c in range(n_tiles):
            item = line * n_tiles + c
            place = _SUMMARY * item
            enters[_2 * _2 * item], enters[_2 * _2 * item + _1] = v_re, v_im
            if both:
                re, im = _times(summaries, place + _2, v_re, v_im)
                v_re, v_im = re + summaries[place], im + summaries[place + _1]
        y_re, y_im = 0.0, 0.0
        for c in range(n_tiles):
            item = line * n_tiles + n_tiles - _1 - c
            place = _SUMMARY * item + _2 * _2
            right = _2 * _2 * item + _2
            enters[right], enters[right + _1] = y_re, y_im
            y_re, y_im = _times(summaries, place + _2, y_re, y_im)
            y_re, y_im = y_re + summaries[place], y_im + summaries[place + _1]
            if both:
                v_re, v_im = np.float64(enters[right - _2]), np.float64(enters[right - _1])
                re, im = _times(summaries, place + _2 * _2, v_re, v_im)
                y_re, y_im = y_re + re, y_im + im


@jit
def sum_columns(s, first, last, g, y, S, B, C, n, columns, reverse, both):
    """S, C and (``both``) B of solve_backends.py for rows ``first <= row < last``, from g and y (M, N, D) complex."""
    n, columns, first, last = uintp(n), uintp(columns), uintp(first), uintp(last)
    items = _2 * last * n
    g_view, y_view = reals_at(g, items * columns, s), reals_at(y, items * columns, s)
    S_view, B_view, C_view = reals_at(S, items, s), reals_at(B, items, s), reals_at(C, items, s)
    for row in range(first, last):
        for i in range(n):
            here = row * n + i
            _sum(s, g_view, y_view, here * columns, here * columns, columns, S_view, here, False)
        for i in range(n - _1):
            here, between = (row * n + i) * columns, row * (n - _1) + i
            after = here + columns
            if reverse:
                _sum(s, g_view, y_view, here, after, columns, C_view, between, True)
            else:
                _sum(s, g_view, y_view, after, here, columns, C_view, between, True)
            if both:
                _sum(s, g_view, y_view, here, after, columns, B_view, between, True)


@jit
def _sum(s, g, y, at_g, at_y, columns, target, place, negative):
    """The sum over the columns of g conj(y), or its negative."""
    re, im = s.dtype.type(0), s.dtype.type(0)
    for w in range(columns):
        g_re, g_im = g[_2 * (at_g + w)], g[_2 * (at_g + w) + _1]
        y_re, y_im = y[_2 * (at_y + w)], y[_2 * (at_y + w) + _1]
        re += g_re * y_re + g_im * y_im
        im += g_im * y_re - g_re * y_im
    target[_2 * place] = -re if negative else re
    target[_2 * place + _1] = -im if negative else im
