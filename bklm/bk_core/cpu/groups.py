"""A group of tiles side by side in scratch: where its numbers lie, how it is read from memory, and its reciprocals.

A row is cut into tiles of ``tile`` positions. A group of up to LANES tiles is transposed into a scratch buffer, where every
step of a recursion is a few vector instructions (cpu/tiles.py for the diagonal, cpu/adjoint.py for its backward). L and R
are never kept: a tile needs only the two states that enter it, L before its first and R after its last position, so all
tiles are independent of each other once these are known (cpu/sweep.py), and the memory beside inputs and outputs is a few
bytes per tile. A row of one tile needs no states at all.

Step 0 is the position before the tile, steps 1 ... tile are the tile, step tile + 1 is the position after it. A vector of
tiles has one record for each step: FIELDS vectors one after the other, so that one address reaches all of them. The records
of the vectors of a step are neighbours. Behind the steps each vector has SINGLES vectors of what there is once. Complex
arrays of memory are interleaved reals, so they are packed and unpacked like real ones of twice the length. Padding beyond
a row's end has k = 0 and is inert; lanes without a tile repeat the last one's.

All arrays are passed as addresses (a tenth of the cost of an array argument; the caller keeps them alive).
"""

from __future__ import annotations

import numpy as np

from bklm.bk_core.cpu.jit import inlined, part
from bklm.bk_core.cpu.scratch import LANES, SCRATCH_LENGTH
from bklm.bk_core.cpu.transpose import pack, unpack
from bklm.bk_core.cpu.vectors import (
    any_of,
    apart,
    integers,
    lanes_of,
    load,
    nowhere,
    outside,
    power_for,
    splat,
    store,
)

# Vectors of a record; a complex field takes two.
REAL = np.intp(0)  # Re d; in the backward Re D
COUPLING = np.intp(1)  # coupling of a step to the next
LEFT = np.intp(2)  # L; in the forward then G
SOURCE = np.intp(4)  # gbar, then P, then t
RIGHT = np.intp(6)
ADJOINT = np.intp(8)  # s; in causal mode u = L^2 m
FIELDS = np.intp(10)
# Vectors behind the steps.
IMAGINARY = np.intp(0)  # Im d
SHIFT = np.intp(1)  # Re z
NIL = np.intp(2)
STATE = np.intp(3)  # of a recursion under way
FACTOR_S = np.intp(5)
FACTOR_T = np.intp(7)
SUM = np.intp(9)  # of D
SINGLES = np.intp(11)
REALS, COMPLEX = np.intp(1), np.intp(2)  # numbers of an element
_0 = np.intp(0)
# What a group knows of its lanes: LANES whole numbers each, behind all else in scratch. (Numbers of numpy: see jit.NO.)
ITEM = np.intp(0 * LANES)
ROW = np.intp(1 * LANES)
AT = np.intp(2 * LANES)  # where the tile begins in an array (M, N)
AT_COUPLING = np.intp(3 * LANES)  # in k
AT_BETWEEN = np.intp(4 * LANES)  # in an array (M, N - 1)
# Of the tile, what the row has: positions, and places behind them that have a position behind.
COUNT = np.intp(5 * LANES)
BETWEEN = np.intp(6 * LANES)
_PLACES = SCRATCH_LENGTH - 20 * LANES  # 64-bit numbers take the room of two of 32 bits


@inlined
def places_in(s):
    """Pointer to what a group knows of its lanes."""
    return integers(s.ctypes.data + _PLACES * s.itemsize)


@inlined
def vectors_for(p, used):
    """Vectors to compute with when the first ``used`` lanes hold something."""
    return (used + lanes_of(p) - 1) // lanes_of(p)


@inlined
def stride(p, vectors):
    """Numbers from one step to the next."""
    return vectors * FIELDS * lanes_of(p)


@inlined
def singles(p, tile, vectors):
    """Index of what the first vector has once; the next vector's lies SINGLES lanes_of(p) further."""
    return (tile + 2) * stride(p, vectors)


@inlined
def lane(p, w, size):
    """Where lane w lies behind lane 0 in vectors that are ``size`` vectors apart (FIELDS or SINGLES)."""
    lanes = lanes_of(p)
    return w // lanes * size * lanes + w % lanes


@inlined
def load_pair(p, at):
    """A complex field, two vectors."""
    return load(p, at), load(p, at + lanes_of(p))


@inlined
def store_pair(p, at, re, im):
    """As :func:`load_pair`."""
    store(p, at, re)
    store(p, at + lanes_of(p), im)


@inlined
def put(p, at, re, im):
    """One complex number into one lane of a complex field."""
    p[at] = re
    p[at + lanes_of(p)] = im


@inlined
def get(p, at):
    """As :func:`put`."""
    return p[at], p[at + lanes_of(p)]


@inlined
def reciprocal(re, im, one, scaled):
    """1 / (re + i im), and where |re + i im|^2 is too large or too small for that.

    With ``scaled`` such numbers are multiplied by a power of two before: right for any modulus, and with the same bits where
    the square is safe, so that no result depends on what other positions hold.
    """
    if scaled:
        factor = power_for(re, im)
        x, y = re * factor, im * factor
        square = x * x + y * y
        scale = one / square
        return x * scale * factor, -(y * scale * factor), outside(square)
    square = re * re + im * im
    scale = one / square
    return re * scale, -(im * scale), outside(square)


@part
def place(places, first_item, items, lanes, n, tile, n_tiles, k_stride):
    """Fill ``places`` for the tiles ``first_item``, ... of ``items``.

    Returns:
        the positions that every tile has, and the places between; -1 where tiles at the end of a row differ from others.
    """
    item = min(first_item, items - 1)
    row = item // n_tiles
    order = item - row * n_tiles
    ends = False
    for w in range(lanes):
        ends |= set_place(places, w, item, row, order * tile, n, tile, k_stride)
        if item + 1 < items:
            item += 1
            order += 1
            if order == n_tiles:
                row, order = row + 1, 0
    if n_tiles == 1:
        return n, n - 1
    return (-1, -1) if ends else (tile, tile)


@inlined
def set_place(places, w, item, row, begin, n, tile, k_stride):
    """One lane takes the tile of a row that begins at position ``begin``; whether the row ends there."""
    places[ITEM + w], places[ROW + w] = item, row
    places[AT + w] = row * n + begin
    places[AT_COUPLING + w] = row * k_stride + begin
    places[AT_BETWEEN + w] = row * (n - 1) + begin
    places[COUNT + w], places[BETWEEN + w] = min(tile, n - begin), min(tile, n - 1 - begin)
    return n - 1 - begin < tile


@part
def pack_complex(p, field, source, places, same, tile, vectors):
    """A complex array (M, N) into a field of steps 1 ... tile."""
    apart()
    lanes, step = lanes_of(p), stride(p, vectors)
    nil = singles(p, tile, vectors) + NIL * lanes
    for w in range(lanes):
        p[nil + w] = 0
    pack(
        p, step + field * lanes, lanes, step, tile, source, places, AT, COMPLEX, same, COUNT, nil, vectors, FIELDS * lanes, _0
    )  # fmt: skip


@part
def unpack_complex(p, field, target, places, at, same, count, vectors):
    """The reverse, for arrays (M, N), or (M, N - 1) with AT_BETWEEN and BETWEEN."""
    apart()
    lanes, step = lanes_of(p), stride(p, vectors)
    unpack(
        p, step + field * lanes, lanes, step, target, places, at, COMPLEX, same, count, vectors, FIELDS * lanes
    )


@part
def unpack_real(p, field, target, places, same, vectors):
    """A real field into an array (M, N)."""
    lanes, step = lanes_of(p), stride(p, vectors)
    unpack(
        p, step + field * lanes, step, 2 * step, target, places, AT, REALS, same, COUNT, vectors, FIELDS * lanes
    )


@part
def load_coupling(p, places, between, k, k_stride, n, tile, n_tiles, vectors):
    """k of a group's tiles."""
    apart()
    lanes, step = lanes_of(p), stride(p, vectors)
    first = COUPLING * lanes
    if n_tiles == 1 and k_stride == 0:  # one row of k, whole, in every lane
        for j in range(tile + 1):
            value = splat(p, k[j - 1]) if 0 < j < n else splat(p, 0.0)
            for v in range(vectors):
                store(p, first + (j * vectors + v) * FIELDS * lanes, value)
        return
    for w in range(vectors * lanes):
        # AT_COUPLING counts from the row's beginning; a tile that begins there has nothing before it.
        before = places[AT_COUPLING + w] - places[ROW + w] * k_stride > 0
        p[first + lane(p, w, FIELDS)] = k[places[AT_COUPLING + w] - 1] if before else 0
    nil = singles(p, tile, vectors) + NIL * lanes
    for w in range(lanes):
        p[nil + w] = 0
    pack(
        p, first + step, step, 2 * step, tile, k, places, AT_COUPLING, REALS, between, BETWEEN, nil, vectors,
        FIELDS * lanes, _0,
    )  # fmt: skip


@part
def load_diagonal(p, places, count, a, z, tile, vectors):
    """Re d and Im d of a group's tiles."""
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    for w in range(vectors * lanes):
        row, at = places[ROW + w], once + lane(p, w, SINGLES)
        p[at + SHIFT * lanes] = z[2 * row]
        p[at + IMAGINARY * lanes] = -z[2 * row + 1]
    pack(
        p, step + REAL * lanes, step, 2 * step, tile, a, places, AT, REALS, count, COUNT, once + SHIFT * lanes, vectors,
        FIELDS * lanes, SINGLES * lanes,
    )  # fmt: skip


@part
def load_states(p, places, enter_left, enter_right, tile, n_tiles, vectors):
    """The L and the R that enter a group's tiles; none where a row is one tile."""
    lanes = lanes_of(p)
    left, right = LEFT * lanes, (tile + 1) * stride(p, vectors) + RIGHT * lanes
    for w in range(vectors * lanes):
        at = lane(p, w, FIELDS)
        if n_tiles > 1:
            item, row = places[ITEM + w], places[ROW + w]
            other = row * n_tiles + (n_tiles - 1 - (item - row * n_tiles))  # kept in the order of its sweep
            put(p, left + at, enter_left[2 * item], enter_left[2 * item + 1])
            put(p, right + at, enter_right[2 * other], enter_right[2 * other + 1])
        else:
            put(p, left + at, 0, 0)
            put(p, right + at, 0, 0)


@part
def recursion(p, tile, vectors, reverse, scaled):
    """L (with ``reverse`` R) in LEFT, steps 1 ... tile, from the state before (after) them.

    Returns whether a square was out of range.
    """
    apart()
    lanes, step, once = lanes_of(p), stride(p, vectors), singles(p, tile, vectors)
    one = splat(p, 1.0)
    bad = nowhere(p)
    # The step before in the order of the sweep, and the step whose coupling leads from there.
    back, at_k = (step, 0) if reverse else (-step, -step)
    for c in range(1, tile + 1):
        at = (tile + 1 - c if reverse else c) * step
        for v in range(vectors):
            # L_j = 1 / (d_j - k_{j-1} L_{j-1}), R_j = 1 / (d_j - k_j R_{j+1}).
            now = at + v * FIELDS * lanes
            k, (re, im) = load(p, now + at_k + COUPLING * lanes), load_pair(p, now + back + LEFT * lanes)
            re = load(p, now + REAL * lanes) - k * re
            im = load(p, once + (v * SINGLES + IMAGINARY) * lanes) - k * im
            re, im, wild = reciprocal(re, im, one, scaled)
            store_pair(p, now + LEFT * lanes, re, im)
            bad = bad | wild
    return any_of(bad)
