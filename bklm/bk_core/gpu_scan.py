"""Triton: what a chunk does to the carries that cross it, and the scan that gives every chunk its carries.

Over a chunk, a carry u changes to (p u + q) / (r u + s). For x = k L that map is the product over the chunk of
[[0, k], [-1, d]]; up to sign and coupling its entries are the four determinants D(i..j), D(i+1..j), D(i..j-1) and
D(i+1..j-1). Transposed, the same product takes -y = -R from the right end to the left one: one reduction serves both
directions. The adjoint scans are the affine case r = 0, s = 1. Only ratios count, so that maps are rescaled freely.

A map is held as eight reals: p, q, r, s, each real part first.
"""

import triton
import triton.language as tl

from .gpu_lanes import inv, mul, store_carry


@triton.jit
def rescale(pr, pi, qr, qi, rr, ri, sr, si):
    """Divide a map by its largest entry: only ratios count, and nothing overflows."""
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
    return rescale(pr, pi, qr, qi, rr, ri, sr, si)


@triton.jit
def load_map(maps, at, stride, mask, transposed):
    """The eight numbers of the maps at `at`, the identity where masked; `transposed` 1 exchanges q and r."""
    q = 2 + 2 * transposed
    r = 4 - 2 * transposed
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
def store_maps(
    maps, totals, chunk, S, blocks, live, pr, pi, qr, qi, rr, ri, sr, si,
    MANY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the maps of a block's chunks (8, S) and, where a row has MANY blocks, their product to totals (8, blocks)."""
    tl.store(maps + chunk, pr, mask=live)
    tl.store(maps + S + chunk, pi, mask=live)
    tl.store(maps + 2 * S + chunk, qr, mask=live)
    tl.store(maps + 3 * S + chunk, qi, mask=live)
    tl.store(maps + 4 * S + chunk, rr, mask=live)
    tl.store(maps + 5 * S + chunk, ri, mask=live)
    tl.store(maps + 6 * S + chunk, sr, mask=live)
    tl.store(maps + 7 * S + chunk, si, mask=live)
    if MANY:
        pr, sr = tl.where(live, pr, 1.0), tl.where(live, sr, 1.0)
        pi, qr, qi = tl.where(live, pi, 0.0), tl.where(live, qr, 0.0), tl.where(live, qi, 0.0)
        rr, ri, si = tl.where(live, rr, 0.0), tl.where(live, ri, 0.0), tl.where(live, si, 0.0)
        pr, pi, qr, qi, rr, ri, sr, si = tl.associative_scan((pr, pi, qr, qi, rr, ri, sr, si), 0, compose)
        lane = tl.arange(0, LANES)
        last = lane == LANES - 1
        at = tl.program_id(0) + lane * 0
        tl.store(totals + at, pr, mask=last)
        tl.store(totals + blocks + at, pi, mask=last)
        tl.store(totals + 2 * blocks + at, qr, mask=last)
        tl.store(totals + 3 * blocks + at, qi, mask=last)
        tl.store(totals + 4 * blocks + at, rr, mask=last)
        tl.store(totals + 5 * blocks + at, ri, mask=last)
        tl.store(totals + 6 * blocks + at, sr, mask=last)
        tl.store(totals + 7 * blocks + at, si, mask=last)


@triton.jit
def _last(v, ORDER: tl.constexpr):
    """Last entry of a vector, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, ORDER) == ORDER - 1, v, 0.0), axis=0)


@triton.jit
def scan_carries(
    maps, totals, carries, C, S, NB, blocks, direction_maps, direction_totals, first_direction,
    NEGATE_RIGHT: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The carry into every chunk, carries (2, S) complex: direction 0 from the left, 1 from the right. Each program
    multiplies up the products of the blocks before its own (at most ORDER of them), then scans its own chunks.
    direction_maps and direction_totals lead from the maps of direction 0 to those of direction 1 (0: the same maps)."""
    row = (tl.program_id(0) // NB).to(tl.int64)
    block = tl.program_id(0) % NB
    right = first_direction + tl.program_id(1)
    maps += right * direction_maps
    totals += right * direction_totals
    lane = tl.arange(0, LANES)
    if ORDER > 1:
        before = tl.arange(0, ORDER)
        other = tl.where(right == 1, NB - 1 - before, before)
        mine = tl.where(right == 1, NB - 1 - block, block)
        product = tl.associative_scan(
            load_map(totals, row * NB + other, blocks, before < mine, right), 0, compose
        )
        # nothing enters a row: the carry into the block is the image of 0
        qr, qi = _last(product[2], ORDER), _last(product[3], ORDER)
        sr, si = _last(product[6], ORDER), _last(product[7], ORDER)
    else:
        sr = tl.sum(tl.zeros((LANES,), maps.dtype.element_ty), axis=0) + 1.0
        qr, qi, si = sr - 1.0, sr - 1.0, sr - 1.0
    in_row = block * LANES + tl.where(right == 1, LANES - 1 - lane, lane)
    neighbour = tl.where(right == 1, in_row + 1, in_row - 1)
    inner = (lane > 0) & (neighbour < C)
    p0, p1, q0, q1, r0, r1, s0, s1 = load_map(maps, row * C + neighbour, S, inner, right)
    head = lane == 0  # the first lane holds the constant map onto the block's carry
    p0, q0, q1 = tl.where(head, 0.0, p0), tl.where(head, qr, q0), tl.where(head, qi, q1)
    s0, s1 = tl.where(head, sr, s0), tl.where(head, si, s1)
    product = tl.associative_scan((p0, p1, q0, q1, r0, r1, s0, s1), 0, compose)
    inv_r, inv_i = inv(product[6], product[7])
    ur, ui = mul(product[2], product[3], inv_r, inv_i)
    if NEGATE_RIGHT:
        ur, ui = tl.where(right == 1, -ur, ur), tl.where(right == 1, -ui, ui)
    store_carry(carries, right, row * C + in_row, S, in_row < C, ur, ui)
