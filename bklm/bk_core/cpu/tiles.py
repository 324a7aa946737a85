"""SIMD kernels of the diagonal, one group of tiles after the other, all tiles independent of each other.

Formulas: operator.py. Layout and conventions: cpu/groups.py.

The square of a modulus leaves the range of the numbers long before the modulus does: |pivot|^2 overflows from 1.8e19 on
in 32 bits, and 1 / |pivot|^2 below 1e-19. So every square is looked at, and where one is not well inside that range the
group is computed again with pivots scaled by exact powers of two.
"""

from __future__ import annotations

from bklm.bk_core.cpu.groups import (
    AT,
    COUNT,
    COUPLING,
    FIELDS,
    IMAGINARY,
    LANES,
    LEFT,
    REAL,
    RIGHT,
    SINGLES,
    STATE,
    load_coupling,
    load_diagonal,
    load_pair,
    load_states,
    place,
    places_in,
    reciprocal,
    recursion,
    singles,
    store_pair,
    stride,
    unpack_complex,
    vectors_for,
)
from bklm.bk_core.cpu.jit import NO, YES, jit, part
from bklm.bk_core.cpu.vectors import any_of, apart, lanes_of, load, nowhere, pointer, splat


@part
def _right_and_diagonal(p, tile, vectors, scaled):
    """R, from the last step to the first, and G in place of L; whether a square was out of range."""
    apart()
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    one = splat(p, 1.0)
    bad = nowhere(p)
    old, size = (tile + 1) * step + RIGHT * lanes, FIELDS * lanes
    for c in range(tile):
        at = (tile - c) * step
        for v in range(vectors):
            now, single = at + v * FIELDS * lanes, once + v * SINGLES * lanes
            # R_j = 1 / (d_j - k_j R_{j+1}).
            k, (re, im) = load(p, now + COUPLING * lanes), load_pair(p, old + v * size)
            re, im = load(p, now + REAL * lanes) - k * re, load(p, single + IMAGINARY * lanes) - k * im
            r_re, r_im, wild = reciprocal(re, im, one, scaled)
            store_pair(p, single + STATE * lanes, r_re, r_im)
            # G_j = 1 / (d_j - k_j R_{j+1} - k_{j-1} L_{j-1}): the same pivot, less what the left side takes from it.
            before, (l_re, l_im) = (
                load(p, now - step + COUPLING * lanes),
                load_pair(p, now - step + LEFT * lanes),
            )
            g_re, g_im, wild_too = reciprocal(re - before * l_re, im - before * l_im, one, scaled)
            store_pair(p, now + LEFT * lanes, g_re, g_im)
            bad = bad | wild | wild_too
        old, size = once + STATE * lanes, SINGLES * lanes
    return any_of(bad)


@part
def _diagonal(p, tile, vectors, causal, scaled):
    bad = recursion(p, tile, vectors, NO, scaled)
    if causal or (bad and not scaled):
        return bad
    return _right_and_diagonal(p, tile, vectors, scaled)


@jit
def forward_tiles(
    s, first, last, a, k, k_stride, z, G, enter_left, enter_right, rows, n, tile, n_tiles, causal
):
    """G for groups ``first <= group < last`` of the M n_tiles tiles.

    Addresses: a (M, N), k (M or 1, N - 1; k_stride = N - 1 or 0), z (M,) complex, G (M, N) complex, the states entering
    each tile (M, n_tiles) complex (not looked at where n_tiles = 1). Returns how many groups had to be computed twice.
    """
    p, places = pointer(s.ctypes.data, s), places_in(s)
    a_at, k_at, z_at, G_at = pointer(a, s), pointer(k, s), pointer(z, s), pointer(G, s)
    left_at, right_at = pointer(enter_left, s), pointer(enter_right, s)
    items, again = rows * n_tiles, 0
    for group in range(first, last):
        first_item = group * LANES
        vectors = vectors_for(p, min(LANES, items - first_item))
        # Transpose the tiles into the lanes, with the L and R that enter each.
        count, between = place(places, first_item, items, vectors * lanes_of(p), n, tile, n_tiles, k_stride)
        load_diagonal(p, places, count, a_at, z_at, tile, vectors)
        load_coupling(p, places, between, k_at, k_stride, n, tile, n_tiles, vectors)
        load_states(p, places, left_at, right_at, tile, n_tiles, vectors)
        # L is all that the causal form needs; the other takes R and G in one sweep back.
        if _diagonal(p, tile, vectors, causal, NO):
            _diagonal(p, tile, vectors, causal, YES)
            again += 1
        # G back into rows, without the padding.
        unpack_complex(p, LEFT, G_at, places, AT, count, COUNT, vectors)
    return again
