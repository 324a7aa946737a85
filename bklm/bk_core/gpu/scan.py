"""Triton: what a chunk does to the carries that cross it, and the scans that give every chunk its carries.

Resolvent. Over a chunk, a carry u changes to (p u + q) / (r u + s). For x = k L that map is the product over the chunk of
[[0, k], [-1, d]]; up to sign and coupling its entries are the four determinants D(i..j), D(i+1..j), D(i..j-1) and
D(i+1..j-1). Transposed, the same product takes -y = -R from the right end to the left one: one reduction serves both
directions. Only ratios count, so that maps may be rescaled. Held as eight reals: p, q, r, s, real parts first.

Adjoint. A carry changes to A u + B. Held as four reals, one set of maps a direction.

Both scans: a program multiplies up the products of the blocks between the end of the row and its own (``totals``, at most
ORDER of them), then scans the maps of its own chunks. Direction 0 runs from the left, 1 from the right with flipped
indices. What the ends of a row have in common with a masked lane is the identity; what enters a row is 0.
"""

import triton
import triton.language as tl

from bklm.bk_core.gpu.lanes import inv, mul, store_carry


@triton.jit
def rescale(pr, pi, qr, qi, rr, ri, sr, si):
    """Divide a resolvent map by its largest entry."""
    largest = tl.maximum(
        tl.maximum(tl.maximum(tl.abs(pr), tl.abs(pi)), tl.maximum(tl.abs(qr), tl.abs(qi))),
        tl.maximum(tl.maximum(tl.abs(rr), tl.abs(ri)), tl.maximum(tl.abs(sr), tl.abs(si))),
    )
    f = 1.0 / largest
    return pr * f, pi * f, qr * f, qi * f, rr * f, ri * f, sr * f, si * f


@triton.jit
def compose(apr, api, aqr, aqi, arr, ari, asr, asi, bpr, bpi, bqr, bqi, brr, bri, bsr, bsi):
    """The map "first a, then b": the matrix product b a."""
    pr = bpr * apr - bpi * api + bqr * arr - bqi * ari
    pi = bpr * api + bpi * apr + bqr * ari + bqi * arr
    qr = bpr * aqr - bpi * aqi + bqr * asr - bqi * asi
    qi = bpr * aqi + bpi * aqr + bqr * asi + bqi * asr
    rr = brr * apr - bri * api + bsr * arr - bsi * ari
    ri = brr * api + bri * apr + bsr * ari + bsi * arr
    sr = brr * aqr - bri * aqi + bsr * asr - bsi * asi
    si = brr * aqi + bri * aqr + bsr * asi + bsi * asr
    if apr.dtype == tl.float32:
        # 64 bits have room for the products of a block of rescaled maps, and division is dear there
        pr, pi, qr, qi, rr, ri, sr, si = rescale(pr, pi, qr, qi, rr, ri, sr, si)
    return pr, pi, qr, qi, rr, ri, sr, si


@triton.jit
def compose_affine(aAr, aAi, aBr, aBi, bAr, bAi, bBr, bBi):
    """The map "first a, then b": u -> bA (aA u + aB) + bB."""
    Ar, Ai = mul(bAr, bAi, aAr, aAi)
    Br, Bi = mul(bAr, bAi, aBr, aBi)
    return Ar, Ai, Br + bBr, Bi + bBi


@triton.jit
def compose_affine_right(aAr, aAi, aBr, aBi, bAr, bAi, bBr, bBi):
    """As ``compose_affine`` for maps that run from the right: first b, then a."""
    return compose_affine(bAr, bAi, bBr, bBi, aAr, aAi, aBr, aBi)


@triton.jit
def _last(v, ORDER: tl.constexpr):
    """Last entry of a vector, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, ORDER) == ORDER - 1, v, 0.0), axis=0)


@triton.jit
def _positions(C, NB, right, ORDER: tl.constexpr, LANES: tl.constexpr):
    """In the order of the scan: blocks and whether they come before the program's own; lanes -> chunk in the row, the
    chunk before it, and whether that one belongs to the same block."""
    block = tl.program_id(0) % NB
    order = tl.arange(0, ORDER)
    blocks = tl.where(right == 1, NB - 1 - order, order)
    before = order < tl.where(right == 1, NB - 1 - block, block)
    lane = tl.arange(0, LANES)
    in_row = block * LANES + tl.where(right == 1, LANES - 1 - lane, lane)
    previous = tl.where(right == 1, in_row + 1, in_row - 1)
    return blocks, before, in_row, previous, (lane > 0) & (previous < C)


# --- resolvent --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_map(maps, at, stride, mask, right):
    """The maps at ``at``, the identity where masked; transposed (q and r exchanged) for the scan from the right."""
    q = 2 + 2 * right
    r = 4 - 2 * right
    return (
        tl.load(maps + at, mask=mask, other=1.0),
        tl.load(maps + at + stride, mask=mask, other=0.0),
        tl.load(maps + at + q * stride, mask=mask, other=0.0),
        tl.load(maps + at + (q + 1) * stride, mask=mask, other=0.0),
        tl.load(maps + at + r * stride, mask=mask, other=0.0),
        tl.load(maps + at + (r + 1) * stride, mask=mask, other=0.0),
        tl.load(maps + at + 6 * stride, mask=mask, other=1.0),
        tl.load(maps + at + 7 * stride, mask=mask, other=0.0),
    )


@triton.jit
def _write_map(maps, at, stride, mask, pr, pi, qr, qi, rr, ri, sr, si):
    tl.store(maps + at, pr, mask=mask)
    tl.store(maps + at + stride, pi, mask=mask)
    tl.store(maps + at + 2 * stride, qr, mask=mask)
    tl.store(maps + at + 3 * stride, qi, mask=mask)
    tl.store(maps + at + 4 * stride, rr, mask=mask)
    tl.store(maps + at + 5 * stride, ri, mask=mask)
    tl.store(maps + at + 6 * stride, sr, mask=mask)
    tl.store(maps + at + 7 * stride, si, mask=mask)


@triton.jit
def store_maps(
    maps, totals, chunk, S, blocks, live, pr, pi, qr, qi, rr, ri, sr, si,
    MANY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the maps of a block's chunks (8, S) and, where a row has MANY blocks, their product to totals (8, blocks)."""
    _write_map(maps, chunk, S, live, pr, pi, qr, qi, rr, ri, sr, si)
    if MANY:
        pr, sr = tl.where(live, pr, 1.0), tl.where(live, sr, 1.0)
        pi, qr, qi = tl.where(live, pi, 0.0), tl.where(live, qr, 0.0), tl.where(live, qi, 0.0)
        rr, ri, si = tl.where(live, rr, 0.0), tl.where(live, ri, 0.0), tl.where(live, si, 0.0)
        pr, pi, qr, qi, rr, ri, sr, si = tl.associative_scan((pr, pi, qr, qi, rr, ri, sr, si), 0, compose)
        pr, pi, qr, qi, rr, ri, sr, si = rescale(pr, pi, qr, qi, rr, ri, sr, si)
        lane = tl.arange(0, LANES)
        at = tl.program_id(0) + lane * 0
        _write_map(totals, at, blocks, lane == LANES - 1, pr, pi, qr, qi, rr, ri, sr, si)


@triton.jit
def scan_carries(
    maps, totals, carries, C, S, NB, blocks,
    ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """x into every chunk from the left and R from the right: carries (2, S) complex. The second axis of the grid is the
    direction."""
    row = (tl.program_id(0) // NB).to(tl.int64)
    right = tl.program_id(1)
    others, before, in_row, previous, inner = _positions(C, NB, right, ORDER, LANES)
    head = tl.arange(0, LANES) == 0
    # The maps of this block's chunks, each lane that of the chunk before its own.
    pr, pi, qr, qi, rr, ri, sr, si = _load_map(maps, row * C + previous, S, inner, right)
    # the first lane holds the map of every u onto the block's carry, which is the image of 0 under the blocks before
    pr = tl.where(head, 0.0, pr)
    # The carry into the block: 0 under the product of the blocks between it and the end of the row.
    if ORDER > 1:
        product = tl.associative_scan(_load_map(totals, row * NB + others, blocks, before, right), 0, compose)
        product = rescale(*product)
        qr, qi = tl.where(head, _last(product[2], ORDER), qr), tl.where(head, _last(product[3], ORDER), qi)
        sr, si = tl.where(head, _last(product[6], ORDER), sr), tl.where(head, _last(product[7], ORDER), si)
    # Multiplied up lane by lane; the carry into a chunk is the image of 0, q / s. From the right that is -R.
    product = tl.associative_scan((pr, pi, qr, qi, rr, ri, sr, si), 0, compose)
    product = rescale(*product)
    inv_r, inv_i = inv(product[6], product[7])
    ur, ui = mul(product[2], product[3], inv_r, inv_i)
    ur, ui = tl.where(right == 1, -ur, ur), tl.where(right == 1, -ui, ui)
    store_carry(carries, right, row * C + in_row, S, in_row < C, ur, ui)


# --- adjoint ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_affine(maps, at, stride, mask):
    """The maps at ``at``, the identity where masked."""
    return (
        tl.load(maps + at, mask=mask, other=1.0),
        tl.load(maps + at + stride, mask=mask, other=0.0),
        tl.load(maps + at + 2 * stride, mask=mask, other=0.0),
        tl.load(maps + at + 3 * stride, mask=mask, other=0.0),
    )


@triton.jit
def _write_affine(maps, at, stride, mask, Ar, Ai, Br, Bi):
    tl.store(maps + at, Ar, mask=mask)
    tl.store(maps + at + stride, Ai, mask=mask)
    tl.store(maps + at + 2 * stride, Br, mask=mask)
    tl.store(maps + at + 3 * stride, Bi, mask=mask)


@triton.jit
def store_affine(
    maps, totals, chunk, S, blocks, live, Ar, Ai, Br, Bi,
    RIGHT: tl.constexpr, MANY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """As ``store_maps``; maps (2, 4, S) and totals (2, 4, blocks), of which the part of one direction is written."""
    maps += 4 * S * RIGHT
    totals += 4 * blocks * RIGHT
    _write_affine(maps, chunk, S, live, Ar, Ai, Br, Bi)
    if MANY:
        Ar, Ai = tl.where(live, Ar, 1.0), tl.where(live, Ai, 0.0)
        Br, Bi = tl.where(live, Br, 0.0), tl.where(live, Bi, 0.0)
        if RIGHT:
            Ar, Ai, Br, Bi = tl.associative_scan((Ar, Ai, Br, Bi), 0, compose_affine_right)
        else:
            Ar, Ai, Br, Bi = tl.associative_scan((Ar, Ai, Br, Bi), 0, compose_affine)
        lane = tl.arange(0, LANES)
        at = tl.program_id(0) + lane * 0
        _write_affine(totals, at, blocks, lane == LANES - 1, Ar, Ai, Br, Bi)


@triton.jit
def scan_affine(
    maps, totals, carries, C, S, NB, blocks,
    FIRST: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The adjoint carries into every chunk, (2, S) complex; directions FIRST, ... along the second axis of the grid."""
    row = (tl.program_id(0) // NB).to(tl.int64)
    right = FIRST + tl.program_id(1)
    maps += 4 * S * right
    totals += 4 * blocks * right
    others, before, in_row, previous, inner = _positions(C, NB, right, ORDER, LANES)
    # The maps of this block's chunks, each lane that of the chunk before its own.
    Ar, Ai, Br, Bi = _load_affine(maps, row * C + previous, S, inner)
    # The carry into the block, from the blocks between it and the end of the row.
    if ORDER > 1:
        product = tl.associative_scan(
            _load_affine(totals, row * NB + others, blocks, before), 0, compose_affine
        )
        head = tl.arange(0, LANES) == 0  # holds the map whose constant term is the block's carry
        Br, Bi = tl.where(head, _last(product[2], ORDER), Br), tl.where(head, _last(product[3], ORDER), Bi)
    # Applied one after the other; the carry into a chunk is the image of 0, B.
    product = tl.associative_scan((Ar, Ai, Br, Bi), 0, compose_affine)
    store_carry(carries, right, row * C + in_row, S, in_row < C, product[2], product[3])
