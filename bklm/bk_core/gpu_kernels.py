"""Triton kernels of the BK-core: what one lane does with its chunk, and how chunks are joined.

A row of N elements is cut into C chunks of T elements. One lane owns one chunk and walks it element by element, so that
every recurrence runs in the order, and with the rounding, of the sequential formulas. What a lane must know of the
chunks beside it is one complex number a recurrence, its carry (chunk i..j):

    x = k_{i-1} L_{i-1}  from the left,  y = R_{j+1}  from the right;
    adjoint scans: tau = k_{i-1} t_{i-1} from the left, s_{j+1} from the right; causal: w_{j+1} = L_{j+1}^2 m_{j+1}.

Over a chunk, a carry u changes to (p u + q) / (r u + s). For x that map is the product over the chunk of
[[0, k], [-1, d]] (its entries are the four determinants D(i..j), D(i+1..j), D(i..j-1), D(i+1..j-1), up to sign and
coupling); transposed, the same product takes -y from the right end to the left one: one reduction serves both
directions. The adjoint scans are the affine case r = 0, s = 1. Maps are joined by `associative_scan`, over the chunks
of a block and over the products of whole blocks.

Memory: Triton has no complex type. Complex operands arrive as interleaved reals (`torch.view_as_real`) and are parted
after loading. A lane reads STRIP consecutive elements at once, so that memory sees whole 32-byte sectors. Elements past
the end of a row get k = 0, which cuts them off from the row, and a diagonal of modulus >= 1, which keeps them finite.

Arguments: a, k, z, G, gbar, ... pointers to real storage; N elements in a row, T in a chunk, C chunks in a row, NB
blocks of chunks in a row, S = rows * C chunks in all; k_row 0 where all rows share k, else N - 1. A_COMPLEX, K_COMPLEX:
is that operand interleaved; LANES: chunks per program.
"""

import triton
import triton.language as tl

STRIP = tl.constexpr(8)  # elements that a lane loads at once: one 32-byte sector of float32


# --- complex numbers as (real, imaginary) -----------------------------------------------------------------------------


@triton.jit
def _mul(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _inv(xr, xi):
    """1 / x; |x|^2 must be representable."""
    scale = 1.0 / (xr * xr + xi * xi)
    return xr * scale, -xi * scale


@triton.jit
def _scale(kr, ki, xr, xi, K_COMPLEX: tl.constexpr):
    """k x for real or complex k."""
    if K_COMPLEX:
        yr, yi = _mul(kr, ki, xr, xi)
    else:
        yr, yi = kr * xr, kr * xi
    return yr, yi


# --- strips: (LANES, STRIP) tiles in memory, STRIP vectors of one number a lane in registers --------------------------


@triton.jit
def _columns(tile, LANES: tl.constexpr):
    """The 8 columns of a (LANES, 8) tile."""
    even, odd = tl.split(tl.reshape(tile, (LANES, 4, 2)))
    c04, c26 = tl.split(tl.reshape(even, (LANES, 2, 2)))
    c15, c37 = tl.split(tl.reshape(odd, (LANES, 2, 2)))
    c0, c4 = tl.split(c04)
    c2, c6 = tl.split(c26)
    c1, c5 = tl.split(c15)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _tile(c, LANES: tl.constexpr):
    """Inverse of `_columns`."""
    even = tl.reshape(tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6])), (LANES, 4))
    odd = tl.reshape(tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7])), (LANES, 4))
    return tl.reshape(tl.join(even, odd), (LANES, 8))


@triton.jit
def _load(ptr, first, count, other, COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Columns (real parts, imaginary parts) of the strips that begin at element `first` (LANES,) and hold `count`
    (LANES,) elements; `other` (LANES,) is the real part of the rest. A real operand comes twice: ignore the second."""
    if COMPLEX:
        i = tl.arange(0, 16)[None, :]
        fill = tl.where(i % 2 == 0, other[:, None], 0.0)
        pairs = tl.load(ptr + (2 * first[:, None] + i), mask=i < 2 * count[:, None], other=fill)
        re_tile, im_tile = tl.split(tl.reshape(pairs, (LANES, 8, 2)))
        re = _columns(re_tile, LANES)
        im = _columns(im_tile, LANES)
    else:
        i = tl.arange(0, 8)[None, :]
        re = _columns(tl.load(ptr + (first[:, None] + i), mask=i < count[:, None], other=other[:, None]), LANES)
        im = re
    return re, im


@triton.jit
def _store(ptr, first, count, re, im, COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Inverse of `_load`."""
    if COMPLEX:
        i = tl.arange(0, 16)[None, :]
        pairs = tl.reshape(tl.join(_tile(re, LANES), _tile(im, LANES)), (LANES, 16))
        tl.store(ptr + (2 * first[:, None] + i), pairs, mask=i < 2 * count[:, None])
    else:
        i = tl.arange(0, 8)[None, :]
        tl.store(ptr + (first[:, None] + i), _tile(re, LANES), mask=i < count[:, None])


@triton.jit
def _load_diagonal(a, first, count, zr, zi, A_COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Columns of d = a - z; past the end of a row d = 1 - i Im z."""
    ar, ai = _load(a, first, count, zr + 1.0, A_COMPLEX, LANES)
    dr = ()
    di = ()
    for c in tl.static_range(8):
        dr = dr + (ar[c] - zr,)  # noqa: RUF005 (Triton has no unpacking)
        if A_COMPLEX:
            di = di + (ai[c] - zi,)  # noqa: RUF005
        else:
            di = di + (-zi,)  # noqa: RUF005
    return dr, di


@triton.jit
def _lanes(z, N, T, C, S, NB, BY_ROW: tl.constexpr, LANES: tl.constexpr):
    """Lane -> (chunk number, row, first element in the row, elements from there to the row's end, Re z, Im z).

    Chunks are dealt to programs one after the other, or, BY_ROW, in NB programs a row that hold no other row's chunks.
    A lane without a chunk has 0 elements (and must not write)."""
    if BY_ROW:
        row = (tl.program_id(0) // NB).to(tl.int64) + tl.zeros((LANES,), tl.int64)
        in_row = tl.program_id(0) % NB * LANES + tl.arange(0, LANES)
        chunk = row * C + in_row
        live = in_row < C
    else:
        chunk = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
        live = chunk < S
        row = tl.where(live, chunk // C, 0)
        in_row = (chunk - row * C).to(tl.int32)
    start = tl.where(live, in_row * T, 0)
    left = tl.where(live, N - start, 0)
    return chunk, row, start, left, tl.load(z + 2 * row), tl.load(z + 2 * row + 1)


# --- sweeps of one lane over its chunk --------------------------------------------------------------------------------


@triton.jit
def _sweep_left(
    a, at, k, at_k, left, T, zr, zi, xr, xi, out, at_out, n_out,
    WRITE: tl.constexpr, A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Carry x = k L from the chunk's left end to its right end; on the way write L ("L") or 1 / L ("pivot") to `out`."""
    for j in range(0, T, STRIP):
        dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = _load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
        re = ()
        im = ()
        for c in tl.static_range(8):
            pr, pi = dr[c] - xr, di[c] - xi
            lr, li = _inv(pr, pi)
            xr, xi = _scale(kr[c], ki[c], lr, li, K_COMPLEX)
            if WRITE == "L":
                re = re + (lr,)  # noqa: RUF005
                im = im + (li,)  # noqa: RUF005
            else:
                re = re + (pr,)  # noqa: RUF005
                im = im + (pi,)  # noqa: RUF005
        if WRITE != "nothing":
            _store(out, at_out + j, n_out - j, re, im, True, LANES)
    return xr, xi


@triton.jit
def _sweep_right(
    a, at, k, at_k, left, T, zr, zi, yr, yi,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Carry y = R from the chunk's right end to its left end."""
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = _load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
        for c in tl.static_range(8):
            hr, hi = _scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
            yr, yi = _inv(dr[7 - c] - hr, di[7 - c] - hi)
    return yr, yi


@triton.jit
def _load_carry(carries, direction, chunk, S, mask):
    """Complex carry of a chunk, 0 where masked; carries (2, S) complex."""
    at = 2 * (direction * S + chunk)
    return tl.load(carries + at, mask=mask, other=0.0), tl.load(carries + at + 1, mask=mask, other=0.0)


@triton.jit
def _store_carry(carries, direction, chunk, S, mask, xr, xi):
    at = 2 * (direction * S + chunk)
    tl.store(carries + at, xr, mask=mask)
    tl.store(carries + at + 1, xi, mask=mask)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def resolvent_sweep(
    a, k, z, carries, polished, G, N, T, C, S, k_row,
    CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, POLISH: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G from the carries of each chunk. POLISH first walks the neighbouring chunk from the scanned carry, which undoes
    the rounding of the scan: sequential accuracy. The carries really used go to `polished`, for the backward."""
    chunk, row, start, left, zr, zi = _lanes(z, N, T, C, S, 1, False, LANES)
    at = row * N + start
    at_k = row * k_row + start
    xr, xi, yr, yi = zr * 0.0, zr * 0.0, zr * 0.0, zr * 0.0
    if CHUNKED:
        if POLISH:
            first = start == 0
            xr, xi = _load_carry(carries, 0, chunk - 1, S, (left > 0) & (start > 0))
            before = tl.where(first, 0, left + T)  # no elements before the first chunk: x comes out as 0
            xr, xi = _sweep_left(
                a,
                at - T,
                k,
                at_k - T,
                before,
                T,
                zr,
                zi,
                xr,
                xi,
                G,
                at,
                left,
                "nothing",
                A_COMPLEX,
                K_COMPLEX,
                LANES,
            )
            if not CAUSAL:
                yr, yi = _load_carry(carries, 1, chunk + 1, S, left > T)
                yr, yi = _sweep_right(
                    a, at + T, k, at_k + T, left - T, T, zr, zi, yr, yi, A_COMPLEX, K_COMPLEX, LANES
                )
        else:
            xr, xi = _load_carry(carries, 0, chunk, S, left > 0)
            if not CAUSAL:
                yr, yi = _load_carry(carries, 1, chunk, S, left > 0)
        if POLISH and not CAUSAL:
            _store_carry(polished, 0, chunk, S, left > 0, xr, xi)
            _store_carry(polished, 1, chunk, S, left > 0, yr, yi)
    if CAUSAL:
        _sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, G, at, left, "L", A_COMPLEX, K_COMPLEX, LANES)
    else:
        # G holds the pivots 1 / L between the two sweeps: G = 1 / (1/L_i - k_i R_{i+1}) term by term as published
        _sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, G, at, left, "pivot", A_COMPLEX, K_COMPLEX, LANES)
        tl.debug_barrier()
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = _load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
            pr, pi = _load(G, at + j, left - j, zr * 0.0 + 1.0, True, LANES)
            re = ()
            im = ()
            for c in tl.static_range(8):
                hr, hi = _scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
                gr, gi = _inv(pr[7 - c] - hr, pi[7 - c] - hi)
                yr, yi = _inv(dr[7 - c] - hr, di[7 - c] - hi)
                re = (gr,) + re  # noqa: RUF005
                im = (gi,) + im  # noqa: RUF005
            _store(G, at + j, left - j, re, im, True, LANES)


# --- maps of chunks, and their scan -----------------------------------------------------------------------------------


@triton.jit
def _rescale(pr, pi, qr, qi, rr, ri, sr, si):
    """Divide a map by its largest entry: only ratios count, and nothing overflows."""
    largest = tl.maximum(
        tl.maximum(tl.maximum(tl.abs(pr), tl.abs(pi)), tl.maximum(tl.abs(qr), tl.abs(qi))),
        tl.maximum(tl.maximum(tl.abs(rr), tl.abs(ri)), tl.maximum(tl.abs(sr), tl.abs(si))),
    )
    f = 1.0 / largest
    return pr * f, pi * f, qr * f, qi * f, rr * f, ri * f, sr * f, si * f


@triton.jit
def _compose(apr, api, aqr, aqi, arr, ari, asr, asi, bpr, bpi, bqr, bqi, brr, bri, bsr, bsi):
    """The map "first a, then b": the matrix product b a."""
    pr = bpr * apr - bpi * api + bqr * arr - bqi * ari
    pi = bpr * api + bpi * apr + bqr * ari + bqi * arr
    qr = bpr * aqr - bpi * aqi + bqr * asr - bqi * asi
    qi = bpr * aqi + bpi * aqr + bqr * asi + bqi * asr
    rr = brr * apr - bri * api + bsr * arr - bsi * ari
    ri = brr * api + bri * apr + bsr * ari + bsi * arr
    sr = brr * aqr - bri * aqi + bsr * asr - bsi * asi
    si = brr * aqi + bri * aqr + bsr * asi + bsi * asr
    return _rescale(pr, pi, qr, qi, rr, ri, sr, si)


@triton.jit
def _load_map(maps, at, stride, mask, transposed):
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
def _last(v, ORDER: tl.constexpr):
    """Last entry of a vector, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, ORDER) == ORDER - 1, v, 0.0), axis=0)


@triton.jit
def _store_maps(
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
        pr, pi, qr, qi, rr, ri, sr, si = tl.associative_scan((pr, pi, qr, qi, rr, ri, sr, si), 0, _compose)
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
def moebius_maps(
    a, k, z, maps, totals, N, T, C, S, NB, blocks, k_row,
    MANY: tl.constexpr, A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The product over each chunk of [[0, k], [-1, d]], in the precision of `maps`."""
    wide = maps.dtype.element_ty
    chunk, row, start, left, zr, zi = _lanes(z, N, T, C, S, NB, True, LANES)
    at = row * N + start
    at_k = row * k_row + start
    zero = (zr * 0.0).to(wide)
    pr, pi, qr, qi, rr, ri, sr, si = zero + 1.0, zero, zero, zero, zero, zero, zero + 1.0, zero
    for j in range(0, T, STRIP):
        # z is subtracted in the working precision, as in the sweeps: both see the same matrix
        dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = _load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
        for c in tl.static_range(8):
            er, ei = dr[c].to(wide), di[c].to(wide)
            hr, hi = kr[c].to(wide), ki[c].to(wide)
            ur, ui = _mul(er, ei, rr, ri)
            vr, vi = _mul(er, ei, sr, si)
            ur, ui, vr, vi = ur - pr, ui - pi, vr - qr, vi - qi
            pr, pi = _scale(hr, hi, rr, ri, K_COMPLEX)
            qr, qi = _scale(hr, hi, sr, si, K_COMPLEX)
            rr, ri, sr, si = ur, ui, vr, vi
            if c % 2 == 1:
                pr, pi, qr, qi, rr, ri, sr, si = _rescale(pr, pi, qr, qi, rr, ri, sr, si)
    _store_maps(maps, totals, chunk, S, blocks, left > 0, pr, pi, qr, qi, rr, ri, sr, si, MANY, LANES)


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
            _load_map(totals, row * NB + other, blocks, before < mine, right), 0, _compose
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
    p0, p1, q0, q1, r0, r1, s0, s1 = _load_map(maps, row * C + neighbour, S, inner, right)
    head = lane == 0  # the first lane holds the constant map onto the block's carry
    p0, q0, q1 = tl.where(head, 0.0, p0), tl.where(head, qr, q0), tl.where(head, qi, q1)
    s0, s1 = tl.where(head, sr, s0), tl.where(head, si, s1)
    product = tl.associative_scan((p0, p1, q0, q1, r0, r1, s0, s1), 0, _compose)
    inv_r, inv_i = _inv(product[6], product[7])
    ur, ui = _mul(product[2], product[3], inv_r, inv_i)
    if NEGATE_RIGHT:
        ur, ui = tl.where(right == 1, -ur, ur), tl.where(right == 1, -ui, ui)
    _store_carry(carries, right, row * C + in_row, S, in_row < C, ur, ui)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _source(gr, gi, br, bi):
    """P = conj(gbar) G^2."""
    ur, ui = _mul(gr, gi, gr, gi)
    return _mul(ur, ui, br, -bi)


@triton.jit
def adjoint_maps(
    a, k, z, G, gbar, carries, maps, totals, N, T, C, S, NB, blocks, k_row,
    CAUSAL: tl.constexpr, MANY: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The affine maps u -> A u + B of the adjoint carries over each chunk. Bidirectional: tau (maps 0) and s (maps 1);
    causal: w (maps 0). Those that run from the right are stored transposed, as `scan_carries` reads them."""
    chunk, row, start, left, zr, zi = _lanes(z, N, T, C, S, NB, True, LANES)
    at = row * N + start
    at_k = row * k_row + start
    live = left > 0
    zero = zr * 0.0
    one = zero + 1.0
    Ar, Ai, Br, Bi = one, zero, zero, zero
    if CAUSAL:
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            lr, li = _load(G, at + j, left - j, zero, True, LANES)
            br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # w_i = L_i^2 (conj(gbar_i) + k_i w_{i+1})
                ur, ui = _scale(kr[7 - c], ki[7 - c], Br, Bi, K_COMPLEX)
                vr, vi = _scale(kr[7 - c], ki[7 - c], Ar, Ai, K_COMPLEX)
                fr, fi = _mul(lr[7 - c], li[7 - c], lr[7 - c], li[7 - c])
                Br, Bi = _mul(fr, fi, br[7 - c] + ur, ui - bi[7 - c])
                Ar, Ai = _mul(fr, fi, vr, vi)
        _store_maps(maps, totals, chunk, S, blocks, live, Ar, Ai, zero, zero, Br, Bi, one, zero, MANY, LANES)
    else:
        xr, xi = _load_carry(carries, 0, chunk, S, live)
        for j in range(0, T, STRIP):
            dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            gr, gi = _load(G, at + j, left - j, zero, True, LANES)
            br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # s_i = P_i + k_i L_i^2 s_{i+1}, appended at the right end of the map
                ur, ui = _source(gr[c], gi[c], br[c], bi[c])
                ur, ui = _mul(Ar, Ai, ur, ui)
                Br, Bi = Br + ur, Bi + ui
                lr, li = _inv(dr[c] - xr, di[c] - xi)
                xr, xi = _scale(kr[c], ki[c], lr, li, K_COMPLEX)
                ur, ui = _mul(xr, xi, lr, li)
                Ar, Ai = _mul(Ar, Ai, ur, ui)
        _store_maps(
            maps + 8 * S, totals + 8 * blocks, chunk, S, blocks, live,
            Ar, Ai, zero, zero, Br, Bi, one, zero, MANY, LANES,
        )  # fmt: skip
        Ar, Ai, Br, Bi = one, zero, zero, zero
        yr, yi = _load_carry(carries, 1, chunk, S, live)
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            gr, gi = _load(G, at + j, left - j, zero, True, LANES)
            br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # tau_i = k_i (P_i + R_i^2 tau_{i-1}), appended at the left end of the map
                hr, hi = _scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
                yr, yi = _inv(dr[7 - c] - hr, di[7 - c] - hi)
                Ar, Ai = _scale(kr[7 - c], ki[7 - c], Ar, Ai, K_COMPLEX)
                ur, ui = _source(gr[7 - c], gi[7 - c], br[7 - c], bi[7 - c])
                ur, ui = _mul(Ar, Ai, ur, ui)
                Br, Bi = Br + ur, Bi + ui
                ur, ui = _mul(yr, yi, yr, yi)
                Ar, Ai = _mul(Ar, Ai, ur, ui)
        _store_maps(maps, totals, chunk, S, blocks, live, Ar, Ai, Br, Bi, zero, zero, one, zero, MANY, LANES)


@triton.jit
def adjoint_sweep_causal(
    k, z, G, gbar, carries, grad_a, K, D_sums, N, T, C, S, k_row,
    CHUNKED: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_Z: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """D_i = -w_i and K_i = L_i w_{i+1}, where w_i = L_i^2 (conj(gbar_i) + k_i w_{i+1}); the sum of D over each chunk."""
    chunk, row, start, left, zr, zi = _lanes(z, N, T, C, S, 1, False, LANES)
    at = row * N + start
    at_k = row * k_row + start
    zero = zr * 0.0
    wr, wi, sum_r, sum_i = zero, zero, zero, zero
    if CHUNKED:
        wr, wi = _load_carry(carries, 1, chunk, S, left > 0)
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        lr, li = _load(G, at + j, left - j, zero, True, LANES)
        br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
        Dr, Di, Kr, Ki = (), (), (), ()
        for c in tl.static_range(8):
            ur, ui = _mul(lr[7 - c], li[7 - c], wr, wi)
            Kr, Ki = (ur,) + Kr, (ui,) + Ki  # noqa: RUF005
            ur, ui = _scale(kr[7 - c], ki[7 - c], wr, wi, K_COMPLEX)
            fr, fi = _mul(lr[7 - c], li[7 - c], lr[7 - c], li[7 - c])
            wr, wi = _mul(fr, fi, br[7 - c] + ur, ui - bi[7 - c])
            Dr, Di = (-wr,) + Dr, (-wi,) + Di  # noqa: RUF005
            sum_r, sum_i = sum_r - wr, sum_i - wi
        _store(grad_a, at + j, left - j, Dr, Di, A_COMPLEX, LANES)
        if NEEDS_K:
            _store(K, at - row + j, left - 1 - j, Kr, Ki, True, LANES)
    if NEEDS_Z:
        _store_carry(D_sums, 0, chunk, S, left > 0, sum_r, sum_i)


@triton.jit
def adjoint_sweep(
    a, k, z, G, gbar, carries, adjoint_carries, grad_a, K, R_next, D_sums, N, T, C, S, k_row,
    CHUNKED: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_Z: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Bidirectional D and K, in three sweeps. `K` and `R_next`, both (rows, N - 1) complex, hold what one sweep leaves
    for the next: K first L, then L_i s_{i+1}, at last K (where it is not wanted it is scratch); R_next R_{i+1}.
    With e_i = s_i - P_i = k_i L_i^2 s_{i+1}, D_i = -e_i - t_i; grad_a holds -e between the sweeps."""
    chunk, row, start, left, zr, zi = _lanes(z, N, T, C, S, 1, False, LANES)
    at = row * N + start
    at_k = row * k_row + start
    at_link = row * (N - 1) + start
    zero = zr * 0.0
    xr, xi, yr, yi, sr, si, tr, ti = zero, zero, zero, zero, zero, zero, zero, zero
    sum_r, sum_i = zero, zero
    if CHUNKED:
        live = left > 0
        xr, xi = _load_carry(carries, 0, chunk, S, live)
        yr, yi = _load_carry(carries, 1, chunk, S, live)
        tr, ti = _load_carry(adjoint_carries, 0, chunk, S, live)
        sr, si = _load_carry(adjoint_carries, 1, chunk, S, live)

    _sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, K, at_link, left - 1, "L", A_COMPLEX, K_COMPLEX, LANES)
    tl.debug_barrier()
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        dr, di = _load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        gr, gi = _load(G, at + j, left - j, zero, True, LANES)
        br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
        lr, li = _load(K, at_link + j, left - 1 - j, zero, True, LANES)
        er, ei, ur, ui, nr, ni = (), (), (), (), (), ()
        for c in tl.static_range(8):
            vr, vi = _mul(lr[7 - c], li[7 - c], sr, si)
            ur, ui = (vr,) + ur, (vi,) + ui  # noqa: RUF005
            vr, vi = _mul(lr[7 - c], li[7 - c], vr, vi)
            vr, vi = _scale(kr[7 - c], ki[7 - c], vr, vi, K_COMPLEX)
            er, ei = (-vr,) + er, (-vi,) + ei  # noqa: RUF005
            sum_r, sum_i = sum_r - vr, sum_i - vi
            pr, pi = _source(gr[7 - c], gi[7 - c], br[7 - c], bi[7 - c])
            sr, si = pr + vr, pi + vi
            nr, ni = (yr,) + nr, (yi,) + ni  # noqa: RUF005
            hr, hi = _scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
            yr, yi = _inv(dr[7 - c] - hr, di[7 - c] - hi)
        _store(grad_a, at + j, left - j, er, ei, A_COMPLEX, LANES)
        _store(R_next, at_link + j, left - 1 - j, nr, ni, True, LANES)
        if NEEDS_K:
            _store(K, at_link + j, left - 1 - j, ur, ui, True, LANES)
    tl.debug_barrier()
    for j in range(0, T, STRIP):
        kr, ki = _load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        gr, gi = _load(G, at + j, left - j, zero, True, LANES)
        br, bi = _load(gbar, at + j, left - j, zero, True, LANES)
        nr, ni = _load(R_next, at_link + j, left - 1 - j, zero, True, LANES)
        er, ei = _load(grad_a, at + j, left - j, zero, A_COMPLEX, LANES)
        if NEEDS_K:
            ur, ui = _load(K, at_link + j, left - 1 - j, zero, True, LANES)
        Dr, Di, Kr, Ki = (), (), (), ()
        for c in tl.static_range(8):
            # t_i = P_i + R_i^2 tau_{i-1}; tr, ti hold tau_{i-1} = k_{i-1} t_{i-1}
            vr, vi = _mul(yr, yi, yr, yi)
            vr, vi = _mul(vr, vi, tr, ti)
            pr, pi = _source(gr[c], gi[c], br[c], bi[c])
            vr, vi = pr + vr, pi + vi
            Dr, Di = Dr + (er[c] - vr,), Di + (ei[c] - vi,)  # noqa: RUF005
            sum_r, sum_i = sum_r - vr, sum_i - vi
            if NEEDS_K:
                hr, hi = _mul(nr[c], ni[c], vr, vi)
                Kr, Ki = Kr + (ur[c] + hr,), Ki + (ui[c] + hi,)  # noqa: RUF005
            tr, ti = _scale(kr[c], ki[c], vr, vi, K_COMPLEX)
            yr, yi = nr[c], ni[c]
        _store(grad_a, at + j, left - j, Dr, Di, A_COMPLEX, LANES)
        if NEEDS_K:
            _store(K, at_link + j, left - 1 - j, Kr, Ki, True, LANES)
    if NEEDS_Z:
        _store_carry(D_sums, 0, chunk, S, left > 0, sum_r, sum_i)
