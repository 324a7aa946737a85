"""SIMD kernels of the diagonal, one group of tiles after the other, all tiles independent of each other.

Formulas: operator.py. Layout and conventions: cpu/scratch.py. The number of ``lanes`` is known at run time only, which keeps
LLVM from unrolling the lane loops before it has vectorised them.

The square of a modulus leaves the range of the numbers long before the modulus does: |pivot|^2 overflows from 1.8e19 on
in 32 bits, and 1 / |pivot|^2 below 1e-19. So every result is looked at (a pass over scratch that is in the cache), and
where one is not well inside that range the tiles are swept again with pivots scaled by exact powers of two. The scaling
is decided element by element, by 1 where the square is safe: no result depends on what other positions hold.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import jit
from bklm.bk_core.cpu.scratch import (
    COUPLING,
    EXTRA,
    LANES,
    LEFT,
    REAL,
    RIGHT,
    SOURCE,
    at,
    coupling_at,
    load,
    reals_at,
    unpack_complex,
    vectors,
)

_LANES = np.uintp(LANES)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
_4 = np.uintp(4)


@jit
def left(s, tile, lanes, used):
    """L at steps 1 ... tile."""
    _left(s, tile, lanes)
    if any_out_of_range(s, LEFT, tile, used):
        _left_of_any_modulus(s, tile, lanes)


@jit
def right_and_diagonal(s, tile, lanes, used, target):
    """R and G (in the field ``target``), from the last step to the first."""
    _right_and_diagonal(s, tile, lanes, target)
    if any_out_of_range(s, RIGHT, tile, used) or any_out_of_range(s, target, tile, used):
        _right_and_diagonal_of_any_modulus(s, tile, lanes, target)


@jit
def _left(s, tile, lanes):
    one = s.dtype.type(1)
    for j in range(_1, tile + _1):
        for w in range(lanes):
            k = s[at(j - _1, COUPLING) + w]
            re = s[at(j, REAL) + w] - k * s[at(j - _1, LEFT) + w]
            im = s[at(_0, EXTRA + _1) + w] - k * s[at(j - _1, LEFT + _1) + w]
            scale = one / (re * re + im * im)
            s[at(j, LEFT) + w] = re * scale
            s[at(j, LEFT + _1) + w] = -im * scale


@jit
def _right_and_diagonal(s, tile, lanes, target):
    one = s.dtype.type(1)
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            # R_j = 1 / (d_j - k_j R_{j+1}).
            k = s[at(j, COUPLING) + w]
            re = s[at(j, REAL) + w] - k * s[at(j + _1, RIGHT) + w]
            im = s[at(_0, EXTRA + _1) + w] - k * s[at(j + _1, RIGHT + _1) + w]
            scale = one / (re * re + im * im)
            s[at(j, RIGHT) + w] = re * scale
            s[at(j, RIGHT + _1) + w] = -im * scale
            # G_j = 1 / (d_j - k_j R_{j+1} - k_{j-1} L_{j-1}): the same pivot, less what the left side takes from it.
            before = s[at(j - _1, COUPLING) + w]
            re -= before * s[at(j - _1, LEFT) + w]
            im -= before * s[at(j - _1, LEFT + _1) + w]
            scale = one / (re * re + im * im)
            s[at(j, target) + w] = re * scale
            s[at(j, target + _1) + w] = -im * scale


@jit
def any_out_of_range(s, field, tile, used):
    """Whether a result at steps 1 ... tile of the first ``used`` lanes is NaN, or may come from a square out of range."""
    least, most = _safe_moduli(s)
    found = False
    if used == _LANES:  # a field's steps lie one after the other: one long loop
        re, im = at(_1, field), at(_1, field + _1)
        for i in range(tile * _LANES):
            size = abs(s[re + i]) + abs(s[im + i])
            found |= not (least <= size <= most)
        return found
    for j in range(_1, tile + _1):
        for w in range(used):
            size = abs(s[at(j, field) + w]) + abs(s[at(j, field + _1) + w])
            found |= not (least <= size <= most)
    return found


@jit
def _safe_moduli(s):
    """Between these, moduli and their reciprocals can be squared with room to spare."""
    most = 2.0**60 if s.itemsize == _4 else 2.0**500
    return s.dtype.type(1 / most), s.dtype.type(most)


@jit
def _factor(s, size):
    """A power of two that brings a modulus into the range of :func:`_safe_moduli`; 1 inside it."""
    least, most = _safe_moduli(s)
    shrink = s.dtype.type(2.0**-66 if s.itemsize == _4 else 2.0**-530)
    one = s.dtype.type(1)
    if size > most:
        return shrink
    return one / shrink if size < least else one


@jit
def _left_of_any_modulus(s, tile, lanes):
    one = s.dtype.type(1)
    for j in range(_1, tile + _1):
        for w in range(lanes):
            k = s[at(j - _1, COUPLING) + w]
            re = s[at(j, REAL) + w] - k * s[at(j - _1, LEFT) + w]
            im = s[at(_0, EXTRA + _1) + w] - k * s[at(j - _1, LEFT + _1) + w]
            # As ``_left``, with a pivot whose modulus can be squared: 1 / p = factor / (factor p), exact for powers of two.
            factor = _factor(s, max(abs(re), abs(im)))
            re, im = re * factor, im * factor
            scale = one / (re * re + im * im)
            s[at(j, LEFT) + w] = re * scale * factor
            s[at(j, LEFT + _1) + w] = -im * scale * factor


@jit
def _right_and_diagonal_of_any_modulus(s, tile, lanes, target):
    one = s.dtype.type(1)
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            # As ``_right_and_diagonal``, the pivots of R and of G scaled each for itself.
            k = s[at(j, COUPLING) + w]
            re = s[at(j, REAL) + w] - k * s[at(j + _1, RIGHT) + w]
            im = s[at(_0, EXTRA + _1) + w] - k * s[at(j + _1, RIGHT + _1) + w]
            factor = _factor(s, max(abs(re), abs(im)))
            x, y = re * factor, im * factor
            scale = one / (x * x + y * y)
            s[at(j, RIGHT) + w] = x * scale * factor
            s[at(j, RIGHT + _1) + w] = -y * scale * factor
            before = s[at(j - _1, COUPLING) + w]
            re -= before * s[at(j - _1, LEFT) + w]
            im -= before * s[at(j - _1, LEFT + _1) + w]
            factor = _factor(s, max(abs(re), abs(im)))
            x, y = re * factor, im * factor
            scale = one / (x * x + y * y)
            s[at(j, target) + w] = x * scale * factor
            s[at(j, target + _1) + w] = -y * scale * factor


@jit
def forward_tiles(
    s, first, last, a, k, k_stride, z, G, enter_left, enter_right, rows, n, tile, n_tiles, causal
):
    """G for groups ``first <= group < last`` of the M n_tiles tiles.

    Addresses: a (M, N), k (M or 1, N - 1; k_stride = N - 1 or 0), z (M,) complex, G (M, N) complex, the states entering
    each tile (M, n_tiles) complex (not looked at where n_tiles = 1).
    """
    rows, n, tile, n_tiles = uintp(rows), uintp(n), uintp(tile), uintp(n_tiles)
    k_stride, items = uintp(k_stride), rows * n_tiles
    a_view, z_view, k_view = (
        reals_at(a, rows * n, s),
        reals_at(z, _2 * rows, s),
        coupling_at(k, k_stride, rows, n, s),
    )
    G_view = reals_at(G, _2 * rows * n, s)
    left_view, right_view = reals_at(enter_left, _2 * items, s), reals_at(enter_right, _2 * items, s)
    for group in range(uintp(first), uintp(last)):
        first_item = group * _LANES
        used = min(_LANES, items - first_item)
        lanes = vectors(used)
        # Transpose the tiles into the lanes, with the L and R that enter each.
        load(s, first_item, used, a_view, k_view, k_stride, z_view, left_view, right_view, n, tile, n_tiles)
        # L is all that the causal form needs; the other takes R and G in one sweep back.
        left(s, tile, lanes, used)
        if not causal:
            right_and_diagonal(s, tile, lanes, used, SOURCE)
        # G back into rows, without the padding.
        for w in range(used):
            item = first_item + w
            row = item // n_tiles
            begin = (item - row * n_tiles) * tile
            count = min(tile, n - begin)
            unpack_complex(s, LEFT if causal else SOURCE, G_view, row * n + begin, count, w)
