"""The work around the tiles of solve_tiles.py: the values that enter each tile, and sums over the columns afterwards."""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import NO, YES, jit
from bklm.bk_core.cpu.scratch import reals_at
from bklm.bk_core.cpu.solve_columns import inlined
from bklm.bk_core.cpu.solve_tiles import SUMMARY

BLOCK = 512
_SUMMARY, _BLOCK = np.uintp(SUMMARY), np.uintp(BLOCK)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)


@inlined
def _times(summaries, place, re, im):
    """A factor of a summary times (re, im); 0 for 0, whatever the factor."""
    if re == 0 and im == 0:
        return 0.0, 0.0
    f_re, f_im = np.float64(summaries[place]), np.float64(summaries[place + _1])
    return f_re * re - f_im * im, f_re * im + f_im * re


@jit
def join(s, summary, entering, lines, n_tiles, both, from_left):
    """What enters each tile, from the tiles' summaries: v tile by tile from the left, then y from the right."""
    lines, n_tiles = uintp(lines), uintp(n_tiles)
    summaries = reals_at(summary, _SUMMARY * lines * n_tiles, s)
    enters = reals_at(entering, _2 * _2 * lines * n_tiles, s)
    part = _2 * _2 if from_left else _0
    for line in range(lines):
        v_re, v_im = 0.0, 0.0
        if both or from_left:
            for c in range(n_tiles):
                item = line * n_tiles + c
                place = _SUMMARY * item + part
                enters[_2 * _2 * item], enters[_2 * _2 * item + _1] = v_re, v_im
                re, im = _times(summaries, place + _2, v_re, v_im)
                v_re, v_im = re + summaries[place], im + summaries[place + _1]
        if from_left:
            continue
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
        if columns == _1:  # known to the compiler: one long loop
            _sums(s, g_view, y_view, S_view, B_view, C_view, row, n, _1, reverse, both)
        else:
            _sums(s, g_view, y_view, S_view, B_view, C_view, row, n, columns, reverse, both)


@inlined
def _sums(s, g, y, S, B, C, row, n, columns, reverse, both):
    start, between = row * n * columns, row * (n - _1)
    to_g, to_y = (_0, columns) if reverse else (columns, _0)
    # BLOCK positions at a time: what one loop has read is in the cache for the next.
    for first in range(_0, n, _BLOCK):
        last = min(n, first + _BLOCK)
        for i in range(first, last):
            at = start + i * columns
            _sum(s, g, y, at, at, columns, S, row * n + i, NO)
        last = min(n - _1, last)
        for i in range(first, last):
            at = start + i * columns
            _sum(s, g, y, at + to_g, at + to_y, columns, C, between + i, YES)
        if both:
            for i in range(first, last):
                at = start + i * columns
                _sum(s, g, y, at, at + columns, columns, B, between + i, YES)


@inlined
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
