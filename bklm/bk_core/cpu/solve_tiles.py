"""SIMD kernels of the solve for few columns: tiles of many lines side by side in the lanes, all independent of each other.

A line is one column of one row, cut into tiles of at most TILE positions, of which LANES at a time are transposed into
scratch; conventions as in cpu/scratch.py, with a layout of its own. With L known (cpu/tiles.py) the solve is linear:

    elimination   v_j = x_j - Q_{j-1} v_{j-1},       Q = L c  (left out by the causal solve: v = x)
    substitution  y_j = L_j v_j - P_j y_{j+1},       P = L b

A tile is first run as if nothing entered it, together with its answers to a unit that enters from either side: five
numbers that tell what leaves it. A join from tile to tile gives what really enters, in double precision, and a second run
gives the results. The causal solve is a substitution ``from_left``: ``y_j = L_j x_j - P_j y_{j-1}``, ``P_j = L_j c_{j-1}``.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import NO, YES, inlined, jit
from bklm.bk_core.cpu.scratch import reals_at, vectors
from bklm.bk_core.cpu.solve_columns import factor

LANES = 16
TILE = 64
"""Positions of a tile at most. Eight fields of so many steps stay in a first-level cache of 32 kB while they are packed."""
SUMMARY = 10
"""Reals of a tile: v at its end, its factor; y at its start, its factors from the right and from the left."""
_LANES, _STEPS, _SUMMARY = np.uintp(LANES), np.uintp(TILE + 2), np.uintp(SUMMARY)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
# Fields, two each. Step 0 is the position before the tile, steps 1 ... tile are the tile, tile + 1 is the one after it.
_X = np.uintp(0)  # x, then v, then y
_L = np.uintp(2)
_Q = np.uintp(4)
_P = np.uintp(6)
_FROM_LEFT = np.uintp(8)  # the answer of v to a unit before the tile
# Step 1: the factor of y over the tile; step 2: what y answers to a unit of v before the tile.
_OUT = np.uintp(10)


@inlined
def at(step, field):
    """Index of lane 0 of a field at a step."""
    return (field * _STEPS + step) * _LANES


@inlined
def put(s, step, field, lane, re, im):
    """Store one complex number."""
    s[at(step, field) + lane] = re
    s[at(step, field + _1) + lane] = im


@inlined
def _pack_source(s, x, real, start, stride, count, tile, lane):
    """x of the tile into steps 1 ... tile, zeros after it."""
    if real:
        for j in range(count):
            put(s, j + _1, _X, lane, x[start + j * stride], 0)
    else:
        for j in range(count):
            put(s, j + _1, _X, lane, x[_2 * (start + j * stride)], x[_2 * (start + j * stride) + _1])
    for j in range(count, tile):
        put(s, j + _1, _X, lane, 0, 0)


@inlined
def _pack_left(s, left, start, count, tile, lane, sign):
    for j in range(count):
        put(s, j + _1, _L, lane, left[_2 * (start + j)], sign * left[_2 * (start + j) + _1])
    for j in range(count, tile):
        put(s, j + _1, _L, lane, 0, 0)


@inlined
def _pack_products(s, field, left, e, complex_e, at_left, at_e, skip, inside, tile, lane, sign):
    """L e of positions skip ... inside - 1 of the tile, zero elsewhere."""
    for j in range(skip):
        put(s, j + _1, field, lane, 0, 0)
    if complex_e:
        for j in range(skip, inside):
            re, im = factor(left, e, YES, at_left + j, at_e + j, sign)
            put(s, j + _1, field, lane, re, im)
    else:
        for j in range(skip, inside):
            re, im = factor(left, e, NO, at_left + j, at_e + j, sign)
            put(s, j + _1, field, lane, re, im)
    for j in range(inside, tile):
        put(s, j + _1, field, lane, 0, 0)


@inlined
def _eliminate(s, tile, lanes):
    """v in place of x, from what stands at step 0."""
    for j in range(_1, tile + _1):
        for w in range(lanes):
            q_re, q_im = s[at(j - _1, _Q) + w], s[at(j - _1, _Q + _1) + w]
            re, im = s[at(j - _1, _X) + w], s[at(j - _1, _X + _1) + w]
            s[at(j, _X) + w] = s[at(j, _X) + w] - q_re * re + q_im * im
            s[at(j, _X + _1) + w] = s[at(j, _X + _1) + w] - q_re * im - q_im * re


@inlined
def _kept(s, re, im):
    """0 for what is too small to matter to a unit: answers decay, and denormal numbers take a hundred times as long."""
    least = s.dtype.type(2.0**-100 if s.itemsize == np.uintp(4) else 2.0**-900)
    small = abs(re) + abs(im) < least
    nil = s.dtype.type(0)
    return nil if small else re, nil if small else im


@inlined
def _answer_from_left(s, tile, lanes):
    for w in range(lanes):
        s[at(_0, _FROM_LEFT) + w] = 1
        s[at(_0, _FROM_LEFT + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            q_re, q_im = s[at(j - _1, _Q) + w], s[at(j - _1, _Q + _1) + w]
            re, im = s[at(j - _1, _FROM_LEFT) + w], s[at(j - _1, _FROM_LEFT + _1) + w]
            re, im = _kept(s, q_im * im - q_re * re, -(q_re * im) - q_im * re)
            s[at(j, _FROM_LEFT) + w], s[at(j, _FROM_LEFT + _1) + w] = re, im


@inlined
def _substitute(s, tile, lanes):
    """y in place of v, from what stands at step tile + 1."""
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            l_re, l_im = s[at(j, _L) + w], s[at(j, _L + _1) + w]
            v_re, v_im = s[at(j, _X) + w], s[at(j, _X + _1) + w]
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(j + _1, _X) + w], s[at(j + _1, _X + _1) + w]
            s[at(j, _X) + w] = l_re * v_re - l_im * v_im - p_re * re + p_im * im
            s[at(j, _X + _1) + w] = l_re * v_im + l_im * v_re - p_re * im - p_im * re


@inlined
def _substitute_from_left(s, tile, lanes):
    """y_j = L_j x_j - P_j y_{j-1} in place of x, from what stands at step 0."""
    for j in range(_1, tile + _1):
        for w in range(lanes):
            l_re, l_im = s[at(j, _L) + w], s[at(j, _L + _1) + w]
            v_re, v_im = s[at(j, _X) + w], s[at(j, _X + _1) + w]
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(j - _1, _X) + w], s[at(j - _1, _X + _1) + w]
            s[at(j, _X) + w] = l_re * v_re - l_im * v_im - p_re * re + p_im * im
            s[at(j, _X + _1) + w] = l_re * v_im + l_im * v_re - p_re * im - p_im * re


@inlined
def _answer_to_y(s, tile, lanes):
    """The product of -P over the tile, at step 1 of _OUT; in either direction."""
    for w in range(lanes):
        s[at(_1, _OUT) + w] = 1
        s[at(_1, _OUT + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            p_re, p_im = s[at(j, _P) + w], s[at(j, _P + _1) + w]
            re, im = s[at(_1, _OUT) + w], s[at(_1, _OUT + _1) + w]
            re, im = _kept(s, p_im * im - p_re * re, -(p_re * im) - p_im * re)
            s[at(_1, _OUT) + w], s[at(_1, _OUT + _1) + w] = re, im


@inlined
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
            x = l_re * v_re - l_im * v_im - p_re * re + p_im * im
            y = l_re * v_im + l_im * v_re - p_re * im - p_im * re
            s[at(_2, _OUT) + w], s[at(_2, _OUT + _1) + w] = _kept(s, x, y)


@inlined
def _take(s, step, field, lane, target, place):
    target[place] = s[at(step, field) + lane]
    target[place + _1] = s[at(step, field + _1) + lane]


@inlined
def _summarise(s, tile, lanes, used, first_item, both, from_left, summary):
    if both:
        _eliminate(s, tile, lanes)
        _answer_from_left(s, tile, lanes)
        _answer_through(s, tile, lanes)
        for w in range(used):
            place = _SUMMARY * (first_item + w)
            _take(s, tile, _X, w, summary, place)
            _take(s, tile, _FROM_LEFT, w, summary, place + _2)
            _take(s, _2, _OUT, w, summary, place + _2 * _2 * _2)
    if from_left:
        _substitute_from_left(s, tile, lanes)
    else:
        _substitute(s, tile, lanes)
    _answer_to_y(s, tile, lanes)
    for w in range(used):
        place = _SUMMARY * (first_item + w) + _2 * _2
        _take(s, tile if from_left else _1, _X, w, summary, place)
        _take(s, _1, _OUT, w, summary, place + _2)


@jit
def solve_tiles(
    s, first, last, x, real, out, left, e, e_stride, complex_e, f, f_stride, complex_f, summary, entering,
    rows, n, columns, tile, n_tiles, both, from_left, conjugate, summarise,
):  # fmt: skip
    """y (M, N, D) for groups ``first <= group < last`` of the M D n_tiles tiles; with ``summarise`` their summaries instead.

    Addresses: x and y, L (M, N), the couplings of the substitution e and of the elimination f (``both``; else not looked
    at), summary (M D n_tiles, SUMMARY) and what enters each tile, (M D n_tiles, 2) complex: v (``from_left`` y) from the
    left, y from the right (not looked at where n_tiles = 1). ``conjugate``: L, e and f are to be conjugated.
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
            position, between = row * n + begin, begin - (_1 if from_left else _0)
            start = position * columns + (line - row * columns)
            inside = min(count, n - _1 - begin)
            skip = _1 if from_left and begin == _0 else _0
            _pack_source(s, x_view, real, start, columns, count, tile, w)
            _pack_left(s, left_view, position, count, tile, w, sign)
            _pack_products(
                s, _P, left_view, e_view, complex_e, position, row * e_stride + between,
                skip, count if from_left else inside, tile, w, sign,
            )  # fmt: skip
            if both:
                _pack_products(
                    s,
                    _Q,
                    left_view,
                    f_view,
                    complex_f,
                    position,
                    row * f_stride + begin,
                    _0,
                    inside,
                    tile,
                    w,
                    sign,
                )
                re, im = s.dtype.type(0), s.dtype.type(0)
                if begin > _0:
                    re, im = factor(
                        left_view, f_view, complex_f, position - _1, row * f_stride + begin - _1, sign
                    )
                put(s, _0, _Q, w, re, im)
            before, after = _2 * _2 * item, _2 * _2 * item + _2
            if n_tiles > _1 and not summarise:
                put(s, _0, _X, w, enters[before], enters[before + _1])
                put(s, tile + _1, _X, w, enters[after], enters[after + _1])
            else:
                put(s, _0, _X, w, 0, 0)
                put(s, tile + _1, _X, w, 0, 0)
        if summarise:
            _summarise(s, tile, lanes, used, first_item, both, from_left, summaries)
            continue
        if both:
            _eliminate(s, tile, lanes)
        if from_left:
            _substitute_from_left(s, tile, lanes)
        else:
            _substitute(s, tile, lanes)
        for w in range(used):
            item = first_item + w
            line = item // n_tiles
            begin = (item - line * n_tiles) * tile
            row = line // columns
            start = (row * n + begin) * columns + (line - row * columns)
            for j in range(min(tile, n - begin)):
                out_view[_2 * (start + j * columns)] = s[at(j + _1, _X) + w]
                out_view[_2 * (start + j * columns) + _1] = s[at(j + _1, _X + _1) + w]
