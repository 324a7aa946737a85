"""Square blocks of numbers transposed in registers: rows of memory into the lanes of scratch, and back.

A number at a time, as a loop would do it, costs a load and a store for each; a block of W x W costs 2 W loads and stores and
W log2 W shuffles for W^2 numbers. What is left of a row after whole blocks is covered by a block that overlaps the one
before it where rows are long enough, and copied one by one where they are not, or end in different places.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bklm.bk_core.cpu.jit import inlined, part
from bklm.bk_core.cpu.vectors import Vector, apart, ir_load, ir_store, lanes_of, load


def _transposed(builder, rows):
    """The square matrix of width, its rows and columns exchanged: halves of pairs of rows, at every power of two."""
    lanes = len(rows)
    half = lanes // 2
    while half:
        new = list(rows)
        for i in range(lanes):
            if i & half:
                continue
            low, high = rows[i], rows[i + half]
            first = [j if not j & half else lanes + (j ^ half) for j in range(lanes)]
            second = [(j | half) if not j & half else lanes + j for j in range(lanes)]
            for target, order in ((i, first), (i + half, second)):
                order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), order)
                new[target] = builder.shuffle_vector(low, high, order)
        rows, half = new, half // 2
    return rows


@intrinsic
def _block_to_lanes(typingctx, source, offsets, first, size, shift, minus, target, place, odd, pair):
    """The vectors at source[size offsets[first + w] + shift], w = 0, 1, ..., transposed, less ``minus``, to ``target``.

    The i-th of them goes to place + i // 2 * pair + i % 2 * odd.
    """
    vector = Vector(target.dtype)

    def codegen(context, builder, signature, args):
        source, offsets, first, size, shift, minus, target, place, odd, pair = args
        rows = []
        for lane in range(vector.lanes):
            at = _place_of(builder, offsets, first, lane, size, shift)
            rows.append(ir_load(builder, source, at, vector))
        for row, at in zip(
            _transposed(builder, rows), _places(builder, place, odd, pair, vector.lanes), strict=True
        ):
            ir_store(builder, builder.fsub(row, minus), target, at, vector)
        return context.get_dummy_value()

    whole = types.intp
    return types.none(source, offsets, whole, whole, whole, vector, target, whole, whole, whole), codegen


@intrinsic
def _block_to_rows(typingctx, source, place, odd, pair, target, offsets, first, size, shift):
    """The reverse of :func:`_block_to_lanes`, with nothing added."""
    vector = Vector(target.dtype)

    def codegen(context, builder, signature, args):
        source, place, odd, pair, target, offsets, first, size, shift = args
        places = _places(builder, place, odd, pair, vector.lanes)
        rows = [ir_load(builder, source, at, vector) for at in places]
        for lane, row in enumerate(_transposed(builder, rows)):
            ir_store(builder, row, target, _place_of(builder, offsets, first, lane, size, shift), vector)
        return context.get_dummy_value()

    whole = types.intp
    return types.none(source, whole, whole, whole, target, offsets, whole, whole, whole), codegen


def _places(builder, place, odd, pair, count):
    places = []
    for i in range(0, count, 2):
        at = builder.add(place, builder.mul(pair, pair.type(i // 2)))
        places += [at, builder.add(at, odd)]
    return places


def _place_of(builder, offsets, first, lane, size, shift):
    offset = builder.load(builder.gep(offsets, [builder.add(first, first.type(lane))]))
    return builder.add(builder.mul(offset, size), shift)


@part
def _move_in(source, offsets, first, size, shift, minus, target, place, odd, pair):
    apart()
    _block_to_lanes(source, offsets, first, size, shift, load(target, minus), target, place, odd, pair)


@part
def _move_out(source, place, odd, pair, target, offsets, first, size, shift):
    apart()
    _block_to_rows(source, place, odd, pair, target, offsets, first, size, shift)


@part
def _least(places, count, lanes):
    """What all of these lanes have."""
    least = places[count]
    for w in range(1, lanes):
        least = min(least, places[count + w])
    return least


@inlined
def _row_at(i, odd, pair):
    """Where the i-th number of a row lies behind the first; see :func:`pack`."""
    return i // 2 * pair + i % 2 * odd


@part
def pack(
    p, target, odd, pair, length, source, places, at, size, same, count, minus, vectors, record, minus_record
):
    """Rows of memory into the lanes of scratch, ``length`` elements of ``size`` reals (2: complex) of each.

    source[size places[at + w] + i], less the lane's number in the vector at ``minus``, goes to lane w of ``target`` + the
    place of number i: i // 2 * pair + i % 2 * odd. Zeros follow from element places[count + w] on. ``same``: that number
    where no lane has another, else -1. Vectors of a step are ``record`` apart, those at ``minus``
    ``minus_record``.
    ``p`` and ``source`` point to reals, ``places`` to integers.
    """
    apart()
    lanes = lanes_of(p)
    for v in range(vectors):
        first, into, from_minus = v * lanes, target + v * record, minus + v * minus_record
        have = size * (same if same >= 0 else _least(places, count + first, lanes))
        done = 0
        while done + lanes <= have:
            place = into + done // 2 * pair
            _move_in(source, places, at + first, size, done, from_minus, p, place, odd, pair)
            done += lanes
        if done < have and have >= lanes:
            place = into + _row_at(have - lanes, odd, pair)
            _move_in(source, places, at + first, size, have - lanes, from_minus, p, place, odd, pair)
            done = have
        for w in range(lanes if done < size * length else 0):
            end = size * (same if same >= 0 else places[count + first + w])
            for i in range(done, end):
                p[into + _row_at(i, odd, pair) + w] = (
                    source[size * places[at + first + w] + i] - p[from_minus + w]
                )
            for i in range(max(done, end), size * length):
                p[into + _row_at(i, odd, pair) + w] = 0


@part
def unpack(p, source, odd, pair, target, places, at, size, same, count, vectors, record):
    """The lanes of scratch back into rows of memory, up to element places[count + w]; arguments as in :func:`pack`."""
    apart()
    lanes = lanes_of(p)
    for v in range(vectors):
        first, out = v * lanes, source + v * record
        have = size * (same if same >= 0 else _least(places, count + first, lanes))
        done = 0
        while done + lanes <= have:
            _move_out(p, out + done // 2 * pair, odd, pair, target, places, at + first, size, done)
            done += lanes
        if done < have and have >= lanes:
            done = have - lanes
            _move_out(p, out + _row_at(done, odd, pair), odd, pair, target, places, at + first, size, done)
            done = have
        for w in range(lanes if done < have or same < 0 else 0):
            end = size * (same if same >= 0 else places[count + first + w])
            for i in range(done, end):
                target[size * places[at + first + w] + i] = p[out + _row_at(i, odd, pair) + w]
