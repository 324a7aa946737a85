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

import math

import numpy as np

from bklm.bk_core.cpu.adjoint import SUMMARY
from bklm.bk_core.cpu.groups import (
    AT,
    AT_COUPLING,
    BETWEEN,
    COUNT,
    FIELDS,
    ITEM,
    LANES,
    LEFT,
    get,
    lane,
    load_coupling,
    load_diagonal,
    places_in,
    put,
    recursion,
    set_place,
    stride,
    vectors_for,
)
from bklm.bk_core.cpu.jit import NO, YES, jit, part
from bklm.bk_core.cpu.vectors import lanes_of, pointer


@part
def _same(re, im, old_re, old_im, tolerance):
    """Equal to a few units in the last place, or NaN where the other is."""
    if abs(re - old_re) + abs(im - old_im) <= tolerance * (abs(re) + abs(im)):
        return True
    return math.isnan(re) and math.isnan(im) and math.isnan(old_re) and math.isnan(old_im)


@jit
def sweep(
    s, first, last, a, k, k_stride, z, entering, chunk_ends, moved, active, n_active, rows, n, tile, n_tiles,
    chunk_tiles, reverse, polish, tolerance,
):  # fmt: skip
    """Sweep groups ``first <= group < last`` of the chunks listed in ``active`` (n_active,) int64.

    A chunk's number is ``row * n_chunks + c``; chunks cut the n_tiles - 1 tiles whose end enters another one.
    ``entering`` (M, n_tiles) complex, in the order of the sweep (from the end of the row with ``reverse``), holds the
    state that enters each tile and is filled in; ``chunk_ends`` (M, n_chunks) complex receives the ends of the chunks and
    ``moved`` (M, n_chunks) uint8 whether they changed. The first state of a chunk is read from ``entering``.
    """
    p, places = pointer(s.ctypes.data, s), places_in(s)
    a_at, k_at, z_at = pointer(a, s), pointer(k, s), pointer(z, s)
    states, ends_at = pointer(entering, s), pointer(chunk_ends, s)
    lanes, swept = lanes_of(p), n_tiles - 1
    n_chunks = (swept + chunk_tiles - 1) // chunk_tiles
    rounds, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    shift = -tile if reverse else tile
    for group in range(first, last):
        used = min(LANES, n_active - group * LANES)
        vectors = vectors_for(p, used)
        # Where the state that enters a tile stands, and the one that leaves it.
        enters = (tile + 1 if reverse else 0) * stride(p, vectors) + LEFT * lanes
        leaves = (1 if reverse else tile) * stride(p, vectors) + LEFT * lanes
        # Each lane takes one chunk; it starts from the state that enters the chunk's first tile. Idle ones repeat the last.
        for w in range(vectors * lanes):
            chunk = active[group * LANES + min(w, used - 1)]
            row = chunk // n_chunks
            order = (chunk - row * n_chunks) * chunk_tiles
            begin = (n_tiles - 1 - order if reverse else order) * tile
            set_place(places, w, chunk, row, begin, n, tile, k_stride)
            start = row * n_tiles + order
            put(p, enters + lane(p, w, FIELDS), states[2 * start], states[2 * start + 1])
            # The row's last tile is not swept: its end enters nothing.
            rounds[w] = min(chunk_tiles, swept - order) if w < used else 0
            targets[w] = start
        # Tile by tile, all lanes side by side: load, sweep, hand the end on.
        for q in range(chunk_tiles):
            any_running, same = False, tile
            for w in range(vectors * lanes):
                any_running |= q < rounds[w]
                if places[BETWEEN + w] < tile:  # the row's end, to which a lane that stops there clings
                    same = -1
            if not any_running:
                break
            load_diagonal(p, places, same, a_at, z_at, tile, vectors)
            load_coupling(p, places, same, k_at, k_stride, n, tile, n_tiles, vectors)
            if recursion(p, tile, vectors, reverse, NO):
                recursion(p, tile, vectors, reverse, YES)
            # The tile's end is the state that enters the next one.
            for w in range(used):
                if q >= rounds[w]:
                    continue
                re, im = get(p, leaves + lane(p, w, FIELDS))
                put(p, enters + lane(p, w, FIELDS), re, im)
                chunk, target = places[ITEM + w], targets[w] + q + 1
                # An end of the chunk that is new must go on to the next chunk (``hand_over``).
                if q + 1 == rounds[w]:
                    if not (polish and _same(re, im, ends_at[2 * chunk], ends_at[2 * chunk + 1], tolerance)):
                        ends_at[2 * chunk], ends_at[2 * chunk + 1] = re, im
                        moved[chunk] = 1
                    continue
                # A state that was there already, as the recursion contracts: everything behind it stands.
                if polish and _same(re, im, states[2 * target], states[2 * target + 1], tolerance):
                    rounds[w] = 0
                    continue
                states[2 * target], states[2 * target + 1] = re, im
                places[AT + w] += shift
                places[AT_COUPLING + w] += shift
                places[COUNT + w], places[BETWEEN + w] = tile, tile


@jit
def hand_over(s, entering, chunk_ends, moved, active, rows, n_tiles, chunk_tiles):
    """Pass ends that moved on to the tiles they enter; list the chunks that must be swept again. Returns their number."""
    swept = n_tiles - 1
    n_chunks = (swept + chunk_tiles - 1) // chunk_tiles
    states = pointer(entering, s)
    ends = pointer(chunk_ends, s)
    n_active = 0
    for chunk in range(rows * n_chunks):
        if not moved[chunk]:
            continue
        moved[chunk] = 0
        # The end enters the first tile of the next chunk, or the row's last tile.
        row = chunk // n_chunks
        c = chunk - row * n_chunks
        target = row * n_tiles + min((c + 1) * chunk_tiles, swept)
        states[2 * target], states[2 * target + 1] = ends[2 * chunk], ends[2 * chunk + 1]
        # A chunk whose entering state has moved is swept again; the row's last tile has no chunk behind it.
        if c + 1 < n_chunks:
            active[n_active] = chunk + 1
            n_active += 1
    return n_active


@part
def _passed_on(tiles, at_tile, re, im):
    """What leaves a tile that (re, im) enters: its own part + factor * (re, im), and its own part where nothing enters."""
    own_re, own_im = np.float64(tiles[at_tile]), np.float64(tiles[at_tile + 1])
    if re == 0 and im == 0:
        return own_re, own_im
    q_re, q_im = tiles[at_tile + 2], tiles[at_tile + 3]
    return own_re + (q_re * re - q_im * im), own_im + (q_re * im + q_im * re)


@jit
def join(s, summary, enter_s, enter_t, rows, n_tiles, causal):
    """The adjoint states that enter each tile, (M, n_tiles) complex each, from the tiles' summaries."""
    tiles = pointer(summary, s)
    s_states, t_states = pointer(enter_s, s), pointer(enter_t, s)
    for row in range(rows):
        # s (causal: u) runs from the row's end to its beginning; nothing enters the last tile.
        re, im = 0.0, 0.0
        for c in range(n_tiles):
            tile = row * n_tiles + n_tiles - 1 - c
            s_states[2 * tile], s_states[2 * tile + 1] = re, im
            at_tile = SUMMARY * tile
            re, im = _passed_on(tiles, at_tile, re, im)
        if causal:
            continue
        # t runs from the beginning to the end.
        re, im = 0.0, 0.0
        for c in range(n_tiles):
            tile = row * n_tiles + c
            t_states[2 * tile], t_states[2 * tile + 1] = re, im
            at_tile = SUMMARY * tile + 4
            re, im = _passed_on(tiles, at_tile, re, im)
