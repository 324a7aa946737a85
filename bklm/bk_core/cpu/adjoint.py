"""SIMD kernels of the adjoint recursions, one group of tiles after the other, all tiles independent of each other.

Formulas: operator.py. Layout and conventions: cpu/groups.py and cpu/tiles.py. Products run as (gbar G) G and (k L) L: the
square of L or G alone leaves the range of the numbers where the product does not.
"""

from __future__ import annotations

from bklm.bk_core.cpu.groups import (
    ADJOINT,
    AT_BETWEEN,
    BETWEEN,
    COUPLING,
    FACTOR_S,
    FACTOR_T,
    FIELDS,
    IMAGINARY,
    ITEM,
    LANES,
    LEFT,
    REAL,
    RIGHT,
    SINGLES,
    SOURCE,
    SUM,
    get,
    lane,
    load_coupling,
    load_diagonal,
    load_pair,
    load_states,
    pack_complex,
    place,
    places_in,
    put,
    reciprocal,
    recursion,
    singles,
    store_pair,
    stride,
    unpack_complex,
    unpack_real,
    vectors_for,
)
from bklm.bk_core.cpu.jit import NO, inlined, jit, part
from bklm.bk_core.cpu.vectors import any_of, kept, lanes_of, load, nowhere, pointer, splat, store

SUMMARY = 8  # reals that describe the adjoint recursions of a tile: s, its factor, t, its factor


@inlined
def _product(re, im, x, y):
    return re * x - im * y, re * y + im * x


@inlined
def _weighed(k, re, im):
    """(k x) x."""
    return _product(k * re, k * im, re, im)


@inlined
def _driven(g_re, g_im, re, im):
    """(conj(gbar) x) x."""
    return _product(g_re * re + g_im * im, g_re * im - g_im * re, re, im)


@inlined
def _multiply(p, at, q_re, q_im):
    """One more factor of a tile's product."""
    re, im = load_pair(p, at)
    re, im = kept(*_product(q_re, q_im, re, im))
    store_pair(p, at, re, im)


@inlined
def _add(p, at, re, im):
    x, y = load_pair(p, at)
    store_pair(p, at, x + re, y + im)


@part
def _start(p, tile, vectors):
    """Products at one, the sum of D at zero."""
    lanes, once = lanes_of(p), singles(p, tile, vectors)
    one, nil = splat(p, 1.0), splat(p, 0.0)
    for v in range(vectors):
        single = once + v * SINGLES * lanes
        store_pair(p, single + FACTOR_S * lanes, one, nil)
        store_pair(p, single + FACTOR_T * lanes, one, nil)
        store_pair(p, single + SUM * lanes, nil, nil)


@part
def _descend(p, tile, vectors, summarise, scaled):
    """R, P = conj(gbar) G^2 in place of gbar, and s, from the last step to the first; whether a square was out of range.

    L and R again, and G: cheaper than to read them.
    """
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    one = splat(p, 1.0)
    bad = nowhere(p)
    for c in range(tile):
        at = (tile - c) * step
        for v in range(vectors):
            now, single = at + v * FIELDS * lanes, once + v * SINGLES * lanes
            # R_j = 1 / (d_j - k_j R_{j+1}).
            k, (re, im) = load(p, now + COUPLING * lanes), load_pair(p, now + step + RIGHT * lanes)
            re, im = load(p, now + REAL * lanes) - k * re, load(p, single + IMAGINARY * lanes) - k * im
            r_re, r_im, wild = reciprocal(re, im, one, scaled)
            store_pair(p, now + RIGHT * lanes, r_re, r_im)
            # G_j, and P_j = (conj(gbar_j) G_j) G_j.
            before, (x, y) = load(p, now - step + COUPLING * lanes), load_pair(p, now - step + LEFT * lanes)
            g_re, g_im, wild_too = reciprocal(re - before * x, im - before * y, one, scaled)
            bad = bad | wild | wild_too
            x, y = load_pair(p, now + SOURCE * lanes)
            p_re, p_im = _driven(x, y, g_re, g_im)
            store_pair(p, now + SOURCE * lanes, p_re, p_im)
            # s_j = P_j + ((k_j L_j) L_j) s_{j+1}.
            x, y = load_pair(p, now + LEFT * lanes)
            q_re, q_im = _weighed(k, x, y)
            if summarise:
                _multiply(p, single + FACTOR_S * lanes, q_re, q_im)
            x, y = load_pair(p, now + step + ADJOINT * lanes)
            x, y = _product(q_re, q_im, x, y)
            store_pair(p, now + ADJOINT * lanes, p_re + x, p_im + y)
    return any_of(bad)


@part
def _ascend(p, tile, vectors, summarise):
    """t in place of P, from the first step to the last; Re D in place of Re d; the sum of D."""
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    for j in range(1, tile + 1):
        for v in range(vectors):
            now, single = j * step + v * FIELDS * lanes, once + v * SINGLES * lanes
            # t_j = P_j + ((k_{j-1} R_j) R_j) t_{j-1}.
            x, y = load_pair(p, now + RIGHT * lanes)
            q_re, q_im = _weighed(load(p, now - step + COUPLING * lanes), x, y)
            if summarise:
                _multiply(p, single + FACTOR_T * lanes, q_re, q_im)
            p_re, p_im = load_pair(p, now + SOURCE * lanes)
            x, y = load_pair(p, now - step + SOURCE * lanes)
            x, y = _product(q_re, q_im, x, y)
            t_re, t_im = p_re + x, p_im + y
            store_pair(p, now + SOURCE * lanes, t_re, t_im)
            # D_j = P_j - s_j - t_j.
            x, y = load_pair(p, now + ADJOINT * lanes)
            re, im = p_re - x - t_re, p_im - y - t_im
            store(p, now + REAL * lanes, re)
            _add(p, single + SUM * lanes, re, im)


@part
def _descend_causal(p, tile, vectors, summarise):
    """u_j = L_j^2 conj(gbar_j) + k_j L_j^2 u_{j+1}, from the last step to the first; D_j = -u_j."""
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    for c in range(tile):
        at = (tile - c) * step
        for v in range(vectors):
            now, single = at + v * FIELDS * lanes, once + v * SINGLES * lanes
            re, im = load_pair(p, now + LEFT * lanes)
            q_re, q_im = _weighed(load(p, now + COUPLING * lanes), re, im)
            if summarise:
                _multiply(p, single + FACTOR_S * lanes, q_re, q_im)
            x, y = load_pair(p, now + SOURCE * lanes)
            p_re, p_im = _driven(x, y, re, im)
            x, y = load_pair(p, now + step + ADJOINT * lanes)
            x, y = _product(q_re, q_im, x, y)
            re, im = p_re + x, p_im + y
            store_pair(p, now + ADJOINT * lanes, re, im)
            store(p, now + REAL * lanes, -re)
            _add(p, single + SUM * lanes, -re, -im)


@part
def _couplings(p, tile, vectors, causal):
    """K_j = L_j s_{j+1} + R_{j+1} t_j (causal: L_j u_{j+1}) in place of L."""
    lanes, step = lanes_of(p), stride(p, vectors)
    for j in range(1, tile + 1):
        for v in range(vectors):
            now = j * step + v * FIELDS * lanes
            re, im = load_pair(p, now + LEFT * lanes)
            x, y = load_pair(p, now + step + ADJOINT * lanes)
            k_re, k_im = _product(re, im, x, y)
            if not causal:
                re, im = load_pair(p, now + step + RIGHT * lanes)
                x, y = load_pair(p, now + SOURCE * lanes)
                re, im = _product(re, im, x, y)
                k_re, k_im = k_re + re, k_im + im
            store_pair(p, now + LEFT * lanes, k_re, k_im)


@part
def _enter(p, places, enter_s, enter_t, joined, tile, vectors):
    """What enters from the right, s (causal: u) after the tile's last position, and from the left, t before its first."""
    lanes = lanes_of(p)
    right, left = (tile + 1) * stride(p, vectors) + ADJOINT * lanes, SOURCE * lanes
    for w in range(vectors * lanes):
        at = lane(p, w, FIELDS)
        if joined:
            item = places[ITEM + w]
            put(p, right + at, enter_s[2 * item], enter_s[2 * item + 1])
            put(p, left + at, enter_t[2 * item], enter_t[2 * item + 1])
        else:
            put(p, right + at, 0, 0)
            put(p, left + at, 0, 0)


@part
def _write_summaries(p, places, summary, used, tile, vectors, causal):
    """s (or u) at the first step, its factor, t at the last step, its factor: what a tile adds to what enters it."""
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    for w in range(used):
        target, at, single = SUMMARY * places[ITEM + w], lane(p, w, FIELDS), once + lane(p, w, SINGLES)
        summary[target], summary[target + 1] = get(p, step + at + ADJOINT * lanes)
        summary[target + 2], summary[target + 3] = get(p, single + FACTOR_S * lanes)
        if not causal:
            summary[target + 4], summary[target + 5] = get(p, tile * step + at + SOURCE * lanes)
            summary[target + 6], summary[target + 7] = get(p, single + FACTOR_T * lanes)


@jit
def backward_tiles(
    s, first, last, gbar, a, k, k_stride, z, G, enter_left, enter_right, enter_s, enter_t, summary, grad_a, K, Dsum,
    rows, n, tile, n_tiles, causal, summarise, needs_k,
):  # fmt: skip
    """The adjoint recursions of groups ``first <= group < last`` of the M n_tiles tiles.

    With ``summarise`` the SUMMARY reals of each tile that cpu_sweep.join needs; otherwise Re D (M, N), the sum of D over
    each tile (M, n_tiles) complex (unless its address is 0) and, with ``needs_k``, K (M, N - 1) complex. ``enter_s`` and
    ``enter_t`` (M, n_tiles) complex are the adjoint states that enter each tile from the right and from the left, from
    that join. G is used in causal mode, a, z, enter_left and enter_right in bidirectional mode; other addresses as in
    ``forward_tiles``.
    """
    p, places = pointer(s.ctypes.data, s), places_in(s)
    a_at, k_at, z_at = pointer(a, s), pointer(k, s), pointer(z, s)
    G_at, gbar_at, grad_at, K_at = pointer(G, s), pointer(gbar, s), pointer(grad_a, s), pointer(K, s)
    left_at, right_at, sum_at = pointer(enter_left, s), pointer(enter_right, s), pointer(Dsum, s)
    s_at, t_at, summary_at = pointer(enter_s, s), pointer(enter_t, s), pointer(summary, s)
    lanes, items = lanes_of(p), rows * n_tiles
    # Of a row of several tiles the first pass summarises each tile, cut off from the others; the second starts from what
    # the join has found to enter it.
    joined = n_tiles > 1 and not summarise
    for group in range(first, last):
        first_item = group * LANES
        used = min(LANES, items - first_item)
        vectors = vectors_for(p, used)
        count, between = place(places, first_item, items, vectors * lanes, n, tile, n_tiles, k_stride)
        load_coupling(p, places, between, k_at, k_stride, n, tile, n_tiles, vectors)
        # Again with scaled pivots where one was out of range; what the first attempt wrote over is read anew.
        scaled, again = False, True
        while again:
            again = False
            pack_complex(p, SOURCE, gbar_at, places, count, tile, vectors)
            _enter(p, places, s_at, t_at, joined, tile, vectors)
            _start(p, tile, vectors)
            if causal:
                pack_complex(p, LEFT, G_at, places, count, tile, vectors)
                _descend_causal(p, tile, vectors, summarise)
                continue
            load_diagonal(p, places, count, a_at, z_at, tile, vectors)
            load_states(p, places, left_at, right_at, tile, n_tiles, vectors)
            bad = recursion(p, tile, vectors, NO, scaled)
            bad |= _descend(p, tile, vectors, summarise, scaled)
            again, scaled = bad and not scaled, True
        if not causal:
            _ascend(p, tile, vectors, summarise)
        # First pass: what the tile adds, and the factors of what enters it, are all that the join needs.
        if summarise:
            _write_summaries(p, places, summary_at, used, tile, vectors, causal)
            continue
        # Second pass: dL/da = Re D back into rows, the tile's sum of D for the gradient of z, K for those of b and c.
        unpack_real(p, REAL, grad_at, places, count, vectors)
        for w in range(used if Dsum else 0):
            item, single = places[ITEM + w], singles(p, tile, vectors) + lane(p, w, SINGLES)
            sum_at[2 * item], sum_at[2 * item + 1] = get(p, single + SUM * lanes)
        if needs_k:
            _couplings(p, tile, vectors, causal)
            unpack_complex(p, LEFT, K_at, places, AT_BETWEEN, between, BETWEEN, vectors)
