"""The scratch buffer of the SIMD kernels for real ``a`` and real ``k``: its layout, and the ways into and out of it.

A row is cut into tiles of ``tile`` positions. A group of LANES tiles is transposed into a scratch buffer, where every
step of a recursion is one short loop over the lanes that LLVM turns into vector instructions (cpu/tiles.py for the
diagonal, cpu/adjoint.py for its backward). L and R are never stored: a tile needs only the two states that enter it, L
before its first and R after its last position, so all tiles are independent of each other once these are known
(cpu/sweep.py), and the memory beside inputs and outputs is a few bytes per tile. A row of one tile needs no states at all.

Scratch is one flat array, ``s[at(step, field) + lane]``. Step 0 is the position before the tile, steps 1 ... tile are
the tile, step tile + 1 is the position after it. Every index is unsigned and every distance between two accesses is a
constant: this is what lets LLVM see, without run-time checks, that the lanes do not depend on each other.

Complex arrays are passed as interleaved reals, all arrays as addresses (a tenth of the cost of an array argument; the
caller keeps them alive). Fused multiply-add is the only liberty taken with floating point: nothing is reassociated, NaN
and infinities go where IEEE 754 sends them. Padding beyond a row's end has k = 0 and is inert.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from bklm.bk_core.cpu.jit import jit

LANES = 64
LONGEST_TILE = 512
SCRATCH_LENGTH = 12 * (LONGEST_TILE + 2) * LANES  # 14 fields

_LANES = np.uintp(LANES)
_STEPS = np.uintp(LONGEST_TILE + 2)
_0, _1, _2, _15, _16 = np.uintp(0), np.uintp(1), np.uintp(2), np.uintp(15), np.uintp(16)
# Fields; a complex one takes two.
REAL = np.uintp(0)  # Re d
COUPLING = np.uintp(1)  # coupling of a step to the next
LEFT = np.uintp(2)
RIGHT = np.uintp(4)
SOURCE = np.uintp(6)  # conj(gbar), then P, then D; in the forward G
ADJOINT_L = np.uintp(8)  # s; in causal mode u = L^2 m
ADJOINT_R = np.uintp(10)  # t
EXTRA = np.uintp(12)  # K; its imaginary part at step 0 is Im d


@intrinsic
def _pointer(typingctx, address, like):
    """An integer address as a pointer to the element type of the array ``like``."""
    pointer = types.CPointer(like.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), codegen


@jit
def reals_at(address, length, like):
    """The ``length`` elements at an address as an array of the type of ``like``."""
    return carray(_pointer(address, like), (length,))


@jit
def coupling_at(address, k_stride, rows, n, like):
    """k (1 or M, N - 1) at an address, flat."""
    return reals_at(address, (rows if k_stride > _0 else _1) * (n - _1), like)


@jit
def at(step, field):
    """Index of lane 0 of a field at a step."""
    return (field * _STEPS + step) * _LANES


@jit
def put(s, step, field, lane, re, im):
    """Store one complex number."""
    s[at(step, field) + lane] = re
    s[at(step, field + _1) + lane] = im


@jit
def pack_diagonal(s, a, start, count, tile, lane, shift):
    """a[start : start + count] - shift into steps 1 ... tile of one lane, zeros after it."""
    for j in range(count):
        s[at(j + _1, REAL) + lane] = a[start + j] - shift
    for j in range(count, tile):
        s[at(j + _1, REAL) + lane] = 0


@jit
def pack_complex(s, field, source, start, count, tile, lane):
    """Interleaved complex numbers, as :func:`pack_diagonal`."""
    for j in range(count):
        s[at(j + _1, field) + lane] = source[_2 * (start + j)]
        s[at(j + _1, field + _1) + lane] = source[_2 * (start + j) + _1]
    for j in range(count, tile):
        s[at(j + _1, field) + lane] = 0
        s[at(j + _1, field + _1) + lane] = 0


@jit
def pack_conjugate(s, field, source, start, count, tile, lane):
    """As :func:`pack_complex`, conjugated."""
    for j in range(count):
        s[at(j + _1, field) + lane] = source[_2 * (start + j)]
        s[at(j + _1, field + _1) + lane] = -source[_2 * (start + j) + _1]
    for j in range(count, tile):
        s[at(j + _1, field) + lane] = 0
        s[at(j + _1, field + _1) + lane] = 0


@jit
def unpack_complex(s, field, target, start, count, lane):
    """Steps 1 ... count of a complex field into target[start ...], interleaved."""
    for j in range(count):
        target[_2 * (start + j)] = s[at(j + _1, field) + lane]
        target[_2 * (start + j) + _1] = s[at(j + _1, field + _1) + lane]


@jit
def pack_coupling(s, k, row_start, begin, count, tile, n, lane):
    """k_{begin - 1} ... k_{begin + count - 1} into steps 0 ... tile, zero where a position has no neighbour."""
    s[at(_0, COUPLING) + lane] = k[row_start + begin - _1] if begin > _0 else 0
    inside = min(count, n - _1 - begin)
    for j in range(inside):
        s[at(j + _1, COUPLING) + lane] = k[row_start + begin + j]
    for j in range(inside, tile):
        s[at(j + _1, COUPLING) + lane] = 0


@jit
def share_coupling(s, k, n, lanes):
    """One row of k, whole, into every lane."""
    for w in range(lanes):
        s[at(_0, COUPLING) + w] = 0
        s[at(n, COUPLING) + w] = 0
    for j in range(_1, n):
        value = k[j - _1]
        for w in range(lanes):
            s[at(j, COUPLING) + w] = value


@jit
def vectors(used):
    """Lanes to compute with when the first ``used`` hold something: whole AVX-512 registers. The others hold leftovers."""
    return (used + _15) // _16 * _16


@jit
def load(s, first_item, used, a, k, k_stride, z, enter_left, enter_right, n, tile, n_tiles):
    """a - z, k and the entering states of ``used`` tiles, into as many lanes."""
    if n_tiles == _1 and k_stride == _0:
        share_coupling(s, k, n, vectors(used))
    for w in range(used):
        item = first_item + w
        row = item // n_tiles
        place = item - row * n_tiles
        begin = place * tile
        count = min(tile, n - begin)
        pack_diagonal(s, a, row * n + begin, count, tile, w, z[_2 * row])
        s[at(_0, EXTRA + _1) + w] = -z[_2 * row + _1]
        if n_tiles > _1 or k_stride > _0:
            pack_coupling(s, k, row * k_stride, begin, count, tile, n, w)
        if n_tiles > _1:
            other = row * n_tiles + (n_tiles - _1 - place)  # enter_right is kept in the order of its sweep
            put(s, _0, LEFT, w, enter_left[_2 * item], enter_left[_2 * item + _1])
            put(s, tile + _1, RIGHT, w, enter_right[_2 * other], enter_right[_2 * other + _1])
        else:
            put(s, _0, LEFT, w, 0, 0)
            put(s, tile + _1, RIGHT, w, 0, 0)
