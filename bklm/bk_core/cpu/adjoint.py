"""SIMD kernels of the adjoint recursions, one group of tiles after the other, all tiles independent of each other.

Formulas: operator.py. Layout and conventions: cpu/scratch.py and cpu/tiles.py. Products run as (gbar G) G and (k L) L: the
square of L or G alone leaves the range of the numbers where the product does not.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.jit import jit
from bklm.bk_core.cpu.scratch import (
    ADJOINT_L,
    ADJOINT_R,
    COUPLING,
    EXTRA,
    LANES,
    LEFT,
    RIGHT,
    SOURCE,
    at,
    coupling_at,
    load,
    pack_complex,
    pack_conjugate,
    pack_coupling,
    put,
    reals_at,
    share_coupling,
    unpack_complex,
    vectors,
)
from bklm.bk_core.cpu.tiles import left, right_and_diagonal

_LANES = np.uintp(LANES)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
SUMMARY = 8  # reals that describe the adjoint recursions of a tile: s, its factor, t, its factor
_SUMMARY = np.uintp(SUMMARY)


@jit
def _adjoint_left(s, tile, lanes):
    """P = conj(gbar) G^2 (G in the field of t), and s, from the last step to the first."""
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            re, im = s[at(j, ADJOINT_R) + w], s[at(j, ADJOINT_R + _1) + w]
            # P_j = (conj(gbar_j) G_j) G_j.
            p_re, p_im = s[at(j, SOURCE) + w], s[at(j, SOURCE + _1) + w]
            p_re, p_im = p_re * re - p_im * im, p_re * im + p_im * re
            p_re, p_im = p_re * re - p_im * im, p_re * im + p_im * re
            s[at(j, SOURCE) + w] = p_re
            s[at(j, SOURCE + _1) + w] = p_im
            # s_j = P_j + ((k_j L_j) L_j) s_{j+1}.
            re, im = s[at(j, LEFT) + w], s[at(j, LEFT + _1) + w]
            k = s[at(j, COUPLING) + w]
            k_re, k_im = k * re, k * im
            q_re, q_im = k_re * re - k_im * im, k_re * im + k_im * re
            re, im = s[at(j + _1, ADJOINT_L) + w], s[at(j + _1, ADJOINT_L + _1) + w]
            s[at(j, ADJOINT_L) + w] = p_re + (q_re * re - q_im * im)
            s[at(j, ADJOINT_L + _1) + w] = p_im + (q_re * im + q_im * re)


@jit
def _adjoint_right(s, tile, lanes):
    """t, from the first step to the last."""
    for j in range(_1, tile + _1):
        for w in range(lanes):
            # t_j = P_j + ((k_{j-1} R_j) R_j) t_{j-1}.
            re, im = s[at(j, RIGHT) + w], s[at(j, RIGHT + _1) + w]
            k = s[at(j - _1, COUPLING) + w]
            k_re, k_im = k * re, k * im
            q_re, q_im = k_re * re - k_im * im, k_re * im + k_im * re
            re, im = s[at(j - _1, ADJOINT_R) + w], s[at(j - _1, ADJOINT_R + _1) + w]
            s[at(j, ADJOINT_R) + w] = s[at(j, SOURCE) + w] + (q_re * re - q_im * im)
            s[at(j, ADJOINT_R + _1) + w] = s[at(j, SOURCE + _1) + w] + (q_re * im + q_im * re)


@jit
def _adjoint_causal(s, tile, lanes):
    """u_j = L_j^2 conj(gbar_j) + k_j L_j^2 u_{j+1}, from the last step to the first; D_j = -u_j."""
    for c in range(tile):
        j = tile - c
        for w in range(lanes):
            k = s[at(j, COUPLING) + w]
            re, im = s[at(j, LEFT) + w], s[at(j, LEFT + _1) + w]
            # The own part, (conj(gbar_j) L_j) L_j.
            p_re, p_im = s[at(j, SOURCE) + w], s[at(j, SOURCE + _1) + w]
            p_re, p_im = p_re * re - p_im * im, p_re * im + p_im * re
            p_re, p_im = p_re * re - p_im * im, p_re * im + p_im * re
            # What comes from the right is weighed with (k_j L_j) L_j.
            k_re, k_im = k * re, k * im
            q_re, q_im = k_re * re - k_im * im, k_re * im + k_im * re
            re, im = s[at(j + _1, ADJOINT_L) + w], s[at(j + _1, ADJOINT_L + _1) + w]
            s[at(j, ADJOINT_L) + w] = p_re + (q_re * re - q_im * im)
            s[at(j, ADJOINT_L + _1) + w] = p_im + (q_re * im + q_im * re)


@jit
def _factor(s, field, tile, lanes, before):
    """The product over the tile of (coupling to the previous step if ``before`` else to the next) * field^2, into EXTRA."""
    one = s.dtype.type(1)
    for w in range(lanes):
        s[at(_1, EXTRA) + w] = one
        s[at(_1, EXTRA + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            k = s[at(j - before, COUPLING) + w]
            re, im = s[at(j, field) + w], s[at(j, field + _1) + w]
            k_re, k_im = k * re, k * im
            q_re, q_im = k_re * re - k_im * im, k_re * im + k_im * re
            re, im = s[at(_1, EXTRA) + w], s[at(_1, EXTRA + _1) + w]
            s[at(_1, EXTRA) + w] = q_re * re - q_im * im
            s[at(_1, EXTRA + _1) + w] = q_re * im + q_im * re


@jit
def _write_summaries(s, summary, first_item, used, tile, lanes, causal):
    """s (or u) at the first step, its factor, t at the last step, its factor: what a tile adds to what enters it."""
    _factor(s, LEFT, tile, lanes, _0)
    for w in range(used):
        target = _SUMMARY * (first_item + w)
        summary[target] = s[at(_1, ADJOINT_L) + w]
        summary[target + _1] = s[at(_1, ADJOINT_L + _1) + w]
        summary[target + _2] = s[at(_1, EXTRA) + w]
        summary[target + _2 + _1] = s[at(_1, EXTRA + _1) + w]
    if causal:
        return
    _factor(s, RIGHT, tile, lanes, _1)
    for w in range(used):
        target = _SUMMARY * (first_item + w) + _2 + _2
        summary[target] = s[at(tile, ADJOINT_R) + w]
        summary[target + _1] = s[at(tile, ADJOINT_R + _1) + w]
        summary[target + _2] = s[at(_1, EXTRA) + w]
        summary[target + _2 + _1] = s[at(_1, EXTRA + _1) + w]


@jit
def _finish(s, tile, lanes, causal):
    """D into the field of P, its sum over the tile into step 0 of that field, K into EXTRA."""
    for w in range(lanes):
        s[at(_0, SOURCE) + w] = 0
        s[at(_0, SOURCE + _1) + w] = 0
    for j in range(_1, tile + _1):
        for w in range(lanes):
            if causal:
                re, im = -s[at(j, ADJOINT_L) + w], -s[at(j, ADJOINT_L + _1) + w]
            else:
                re = s[at(j, SOURCE) + w] - s[at(j, ADJOINT_L) + w] - s[at(j, ADJOINT_R) + w]
                im = s[at(j, SOURCE + _1) + w] - s[at(j, ADJOINT_L + _1) + w] - s[at(j, ADJOINT_R + _1) + w]
            s[at(j, SOURCE) + w] = re
            s[at(j, SOURCE + _1) + w] = im
            s[at(_0, SOURCE) + w] += re
            s[at(_0, SOURCE + _1) + w] += im


@jit
def _couplings(s, tile, lanes, causal):
    """K_j = L_j s_{j+1} + R_{j+1} t_j (causal: L_j u_{j+1}) into EXTRA."""
    for j in range(_1, tile + _1):
        for w in range(lanes):
            re, im = s[at(j, LEFT) + w], s[at(j, LEFT + _1) + w]
            s_re, s_im = s[at(j + _1, ADJOINT_L) + w], s[at(j + _1, ADJOINT_L + _1) + w]
            k_re, k_im = re * s_re - im * s_im, re * s_im + im * s_re
            if not causal:
                re, im = s[at(j + _1, RIGHT) + w], s[at(j + _1, RIGHT + _1) + w]
                t_re, t_im = s[at(j, ADJOINT_R) + w], s[at(j, ADJOINT_R + _1) + w]
                k_re += re * t_re - im * t_im
                k_im += re * t_im + im * t_re
            s[at(j, EXTRA) + w] = k_re
            s[at(j, EXTRA + _1) + w] = k_im


@jit
def _load_causal(s, first_item, used, k, k_stride, G, n, tile, n_tiles):
    """k and L = G of the tiles, as :func:`load` does for the bidirectional operator."""
    if n_tiles == _1 and k_stride == _0:
        share_coupling(s, k, n, vectors(used))
    for w in range(used):
        item = first_item + w
        row = item // n_tiles
        begin = (item - row * n_tiles) * tile
        count = min(tile, n - begin)
        if n_tiles > _1 or k_stride > _0:
            pack_coupling(s, k, row * k_stride, begin, count, tile, n, w)
        pack_complex(s, LEFT, G, row * n + begin, count, tile, w)


@jit
def backward_tiles(
    s,
    first,
    last,
    gbar,
    a,
    k,
    k_stride,
    z,
    G,
    enter_left,
    enter_right,
    enter_s,
    enter_t,
    summary,
    grad_a,
    K,
    Dsum,
    rows,
    n,
    tile,
    n_tiles,
    causal,
    summarise,
    needs_k,
):
    """The adjoint recursions of groups ``first <= group < last`` of the M n_tiles tiles.

    With ``summarise`` the SUMMARY reals of each tile that cpu_sweep.join needs; otherwise Re D (M, N), the sum of D over
    each tile (M, n_tiles) complex and, with ``needs_k``, K (M, N - 1) complex. ``enter_s`` and ``enter_t`` (M, n_tiles)
    complex are the adjoint states that enter each tile from the right and from the left, from that join. G is used in
    causal mode, a, z, enter_left and enter_right in bidirectional mode; other addresses as in :func:`forward_tiles`.
    """
    # Addresses and counts as arrays and unsigned numbers, once for all groups.
    rows, n, tile, n_tiles = uintp(rows), uintp(n), uintp(tile), uintp(n_tiles)
    k_stride, items = uintp(k_stride), rows * n_tiles
    a_view, z_view, k_view = (
        reals_at(a, rows * n, s),
        reals_at(z, _2 * rows, s),
        coupling_at(k, k_stride, rows, n, s),
    )
    left_view, right_view = reals_at(enter_left, _2 * items, s), reals_at(enter_right, _2 * items, s)
    gbar_view, G_view, grad_view = (
        reals_at(gbar, _2 * rows * n, s),
        reals_at(G, _2 * rows * n, s),
        reals_at(grad_a, rows * n, s),
    )
    s_view, t_view, sum_view = (
        reals_at(enter_s, _2 * items, s),
        reals_at(enter_t, _2 * items, s),
        reals_at(Dsum, _2 * items, s),
    )
    K_view, summary_view = reals_at(K, _2 * rows * (n - _1), s), reals_at(summary, _SUMMARY * items, s)
    # Of a row of several tiles the first pass summarises each tile, cut off from the others; the second starts from what
    # the join has found to enter it.
    joined = n_tiles > _1 and not summarise
    for group in range(uintp(first), uintp(last)):
        first_item = group * _LANES
        used = min(_LANES, items - first_item)
        lanes = vectors(used)
        # Transpose the tiles into the lanes: d, k, and the L and R that enter a tile; in causal mode k and L = G.
        if causal:
            _load_causal(s, first_item, used, k_view, k_stride, G_view, n, tile, n_tiles)
        else:
            load(s, first_item, used, a_view, k_view, k_stride, z_view, left_view, right_view, n, tile, n_tiles)
        # conj(gbar), the source of the adjoint; what enters from the right, s (causal: u) after the tile's last position.
        for w in range(used):
            item = first_item + w
            row = item // n_tiles
            begin = (item - row * n_tiles) * tile
            pack_conjugate(s, SOURCE, gbar_view, row * n + begin, min(tile, n - begin), tile, w)
            if joined:
                put(s, tile + _1, ADJOINT_L, w, s_view[_2 * item], s_view[_2 * item + _1])
            else:
                put(s, tile + _1, ADJOINT_L, w, 0, 0)
        if causal:
            _adjoint_causal(s, tile, lanes)
        else:
            # L, R and G again: cheaper than to read them. G stands in the field of t until P = conj(gbar) G^2 is formed.
            left(s, tile, lanes, used)
            right_and_diagonal(s, tile, lanes, used, ADJOINT_R)
            _adjoint_left(s, tile, lanes)
            # What enters from the left, t before the tile's first position.
            for w in range(used):
                item = first_item + w
                if joined:
                    put(s, _0, ADJOINT_R, w, t_view[_2 * item], t_view[_2 * item + _1])
                else:
                    put(s, _0, ADJOINT_R, w, 0, 0)
            _adjoint_right(s, tile, lanes)
        # First pass: what the tile adds, and the factors of what enters it, are all that the join needs.
        if summarise:
            _write_summaries(s, summary_view, first_item, used, tile, lanes, causal)
            continue
        # Second pass: D_j = P_j - s_j - t_j (causal: -u_j), its sum for the gradient of z, and K for those of b and c.
        _finish(s, tile, lanes, causal)
        if needs_k:
            _couplings(s, tile, lanes, causal)
        # Back to rows: dL/da = Re D, the tile's sum of D, K. Padding beyond the row's end stays behind.
        for w in range(used):
            item = first_item + w
            row = item // n_tiles
            begin = (item - row * n_tiles) * tile
            for j in range(min(tile, n - begin)):
                grad_view[row * n + begin + j] = s[at(j + _1, SOURCE) + w]
            sum_view[_2 * item] = s[at(_0, SOURCE) + w]
            sum_view[_2 * item + _1] = s[at(_0, SOURCE + _1) + w]
            if needs_k:
                unpack_complex(s, EXTRA, K_view, row * (n - _1) + begin, min(tile, n - _1 - begin), w)
