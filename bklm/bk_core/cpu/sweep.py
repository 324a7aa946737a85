"""The values that enter each tile: L and R by a sweep over chunks that is polished until it is sequential, s and t by a join.

A row of many tiles is cut into chunks of consecutive tiles, one chunk a lane. Each chunk is first swept as if the row
began with it. Then every chunk whose true entering state, the computed end of its predecessor, is not what it assumed is
swept again from there, until it meets a state that it had already (the recursion contracts: a few tiles for eta ~ 1) or
passes a new end on to its successor. When no end moves any more every state is the one of the sequential sweep, up to a
few units in the last place at the places of meeting; where nothing contracts, the rounds just become that sweep. No lane
looks at a later position, or at another row, to decide anything, so the future cannot move the past by even one bit.

The adjoint recursions are linear: the tile's own contribution and the factor of what enters it are enough to join the
tiles one after the other, in double precision.
"""

from __future__ import annotations

import numpy as np
from numba import uintp

from bklm.bk_core.cpu.adjoint import SUMMARY
from bklm.bk_core.cpu.jit import jit
from bklm.bk_core.cpu.scratch import (
    COUPLING,
    EXTRA,
    LANES,
    LEFT,
    REAL,
    at,
    coupling_at,
    pack_diagonal,
    put,
    reals_at,
    vectors,
)
from bklm.bk_core.cpu.tiles import left

_LANES, _SUMMARY = np.uintp(LANES), np.uintp(SUMMARY)
_0, _1, _2 = np.uintp(0), np.uintp(1), np.uintp(2)
_4 = np.uintp(4)


@jit
def _same(re, im, old_re, old_im, tolerance):
    """Equal to a few units in the last place, or NaN where the other is."""
    if abs(re - old_re) + abs(im - old_im) <= tolerance * (abs(re) + abs(im)):
        return True
    return np.isnan(re) and np.isnan(im) and np.isnan(old_re) and np.isnan(old_im)


@jit
def _load(s, a, k, row_a, row_k, shift, begin, n, tile, lane, reverse):
    """One lane's tile in the order of its sweep; step j - 1 of COUPLING leads to step j."""
    if not reverse:
        pack_diagonal(s, a, row_a + begin, tile, tile, lane, shift)
        s[at(_0, COUPLING) + lane] = k[row_k + begin - _1] if begin > _0 else 0
        for j in range(_1, tile):
            s[at(j, COUPLING) + lane] = k[row_k + begin + j - _1]
        return
    inside = min(tile, n - begin)
    for j in range(tile):
        place = tile - _1 - j
        s[at(j + _1, REAL) + lane] = a[row_a + begin + place] - shift if place < inside else 0
        s[at(j, COUPLING) + lane] = k[row_k + begin + place] if begin + place < n - _1 else 0


@jit
def sweep(
    s,
    first,
    last,
    a,
    k,
    k_stride,
    z,
    entering,
    chunk_ends,
    moved,
    active,
    n_active,
    rows,
    n,
    tile,
    n_tiles,
    chunk_tiles,
    reverse,
    polish,
    tolerance,
):
    """Sweep groups ``first <= group < last`` of the chunks listed in ``active`` (n_active,) int64.

    A chunk's number is ``row * n_chunks + c``; chunks cut the n_tiles - 1 tiles whose end enters another one.
    ``entering`` (M, n_tiles) complex, in the order of the sweep (from the end of the row with ``reverse``), holds the
    state that enters each tile and is filled in; ``chunk_ends`` (M, n_chunks) complex receives the ends of the chunks and
    ``moved`` (M, n_chunks) uint8 whether they changed. The first state of a chunk is read from ``entering``.
    """
    # Addresses and counts as arrays and unsigned numbers, once for all groups.
    rows, n, tile, n_tiles = uintp(rows), uintp(n), uintp(tile), uintp(n_tiles)
    k_stride, chunk_tiles = uintp(k_stride), uintp(chunk_tiles)
    swept = n_tiles - _1
    n_chunks = (swept + chunk_tiles - _1) // chunk_tiles
    a_view, z_view, k_view = (
        reals_at(a, rows * n, s),
        reals_at(z, _2 * rows, s),
        coupling_at(k, k_stride, rows, n, s),
    )
    states = reals_at(entering, _2 * rows * n_tiles, s)
    ends = reals_at(chunk_ends, _2 * rows * n_chunks, s)
    running = np.empty(LANES, np.uint8)
    for group in range(uintp(first), uintp(last)):
        used = min(_LANES, uintp(n_active) - group * _LANES)
        lanes = vectors(used)
        # Each lane takes one chunk; it starts from the state that enters the chunk's first tile.
        for w in range(used):
            chunk = uintp(active[group * _LANES + w])
            row = chunk // n_chunks
            start = row * n_tiles + (chunk - row * n_chunks) * chunk_tiles
            put(s, _0, LEFT, w, states[_2 * start], states[_2 * start + _1])
            s[at(_0, EXTRA + _1) + w] = -z_view[_2 * row + _1]
            running[w] = 1
        # Tile by tile, all lanes side by side: load, sweep, hand the end on.
        for q in range(chunk_tiles):
            any_running = False
            # The q-th tile of every chunk that still runs. The row's last tile is not swept: its end enters nothing.
            for w in range(used):
                chunk = uintp(active[group * _LANES + w])
                row = chunk // n_chunks
                order = (chunk - row * n_chunks) * chunk_tiles + q
                if order >= swept:
                    running[w] = 0
                if running[w]:
                    any_running = True
                    begin = (n_tiles - _1 - order if reverse else order) * tile
                    _load(
                        s, a_view, k_view, row * n, row * k_stride, z_view[_2 * row], begin, n, tile, w, reverse
                    )
            if not any_running:
                break
            # L_i = 1 / (d_i - k_{i-1} L_{i-1}); with ``reverse`` the tile lies mirrored, and this is R.
            left(s, tile, lanes, used)
            # The tile's end is the state that enters the next one, and step 0 of the next round.
            for w in range(used):
                if not running[w]:
                    continue
                chunk = uintp(active[group * _LANES + w])
                row = chunk // n_chunks
                c = chunk - row * n_chunks
                target = row * n_tiles + c * chunk_tiles + q + _1
                re, im = s[at(tile, LEFT) + w], s[at(tile, LEFT + _1) + w]
                put(s, _0, LEFT, w, re, im)
                # An end of the chunk that is new must go on to the next chunk (``hand_over``).
                if q + _1 == chunk_tiles or c * chunk_tiles + q + _1 == swept:
                    if not (polish and _same(re, im, ends[_2 * chunk], ends[_2 * chunk + _1], tolerance)):
                        ends[_2 * chunk], ends[_2 * chunk + _1] = re, im
                        moved[chunk] = 1
                # A state that was there already, as the recursion contracts: everything behind it stands.
                elif polish and _same(re, im, states[_2 * target], states[_2 * target + _1], tolerance):
                    running[w] = 0
                else:
                    states[_2 * target], states[_2 * target + _1] = re, im


@jit
def hand_over(s, entering, chunk_ends, moved, active, rows, n_tiles, chunk_tiles):
    """Pass ends that moved on to the tiles they enter; list the chunks that must be swept again. Returns their number."""
    rows, n_tiles, chunk_tiles = uintp(rows), uintp(n_tiles), uintp(chunk_tiles)
    swept = n_tiles - _1
    n_chunks = (swept + chunk_tiles - _1) // chunk_tiles
    states = reals_at(entering, _2 * rows * n_tiles, s)
    ends = reals_at(chunk_ends, _2 * rows * n_chunks, s)
    n_active = 0
    for chunk in range(rows * n_chunks):
        if not moved[chunk]:
            continue
        moved[chunk] = 0
        # The end enters the first tile of the next chunk, or the row's last tile.
        row = chunk // n_chunks
        c = chunk - row * n_chunks
        target = row * n_tiles + min((c + _1) * chunk_tiles, swept)
        states[_2 * target], states[_2 * target + _1] = ends[_2 * chunk], ends[_2 * chunk + _1]
        # A chunk whose entering state has moved is swept again; the row's last tile has no chunk behind it.
        if c + _1 < n_chunks:
            active[n_active] = chunk + _1
            n_active += 1
    return n_active


@jit
def _passed_on(tiles, at_tile, re, im):
    """What leaves a tile that (re, im) enters: its own part + factor * (re, im), and its own part where nothing enters."""
    own_re, own_im = np.float64(tiles[at_tile]), np.float64(tiles[at_tile + _1])
    if re == 0 and im == 0:
        return own_re, own_im
    q_re, q_im = tiles[at_tile + _2], tiles[at_tile + _2 + _1]
    return own_re + (q_re * re - q_im * im), own_im + (q_re * im + q_im * re)


@jit
def join(s, summary, enter_s, enter_t, rows, n_tiles, causal):
    """The adjoint states that enter each tile, (M, n_tiles) complex each, from the tiles' summaries."""
    rows, n_tiles = uintp(rows), uintp(n_tiles)
    tiles = reals_at(summary, _SUMMARY * rows * n_tiles, s)
    s_states, t_states = reals_at(enter_s, _2 * rows * n_tiles, s), reals_at(enter_t, _2 * rows * n_tiles, s)
    for row in range(rows):
        # s (causal: u) runs from the row's end to its beginning; nothing enters the last tile.
        re, im = 0.0, 0.0
        for c in range(n_tiles):
            tile = row * n_tiles + n_tiles - _1 - c
            s_states[_2 * tile], s_states[_2 * tile + _1] = re, im
            at_tile = _SUMMARY * tile
            re, im = _passed_on(tiles, at_tile, re, im)
        if causal:
            continue
        # t runs from the beginning to the end.
        re, im = 0.0, 0.0
        for c in range(n_tiles):
            tile = row * n_tiles + c
            t_states[_2 * tile], t_states[_2 * tile + _1] = re, im
            at_tile = _SUMMARY * tile + _4
            re, im = _passed_on(tiles, at_tile, re, im)
