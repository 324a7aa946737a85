"""Triton: the forward kernels of the BK-core. Names and the division of labour: gpu/lanes.py."""

# ruff: noqa: RUF005 (tuples grow by +: Triton knows no unpacking)

import triton
import triton.language as tl

from bklm.bk_core.gpu.lanes import (
    STRIP,
    at_row,
    inv,
    lanes,
    load,
    load_carry,
    load_diagonal,
    mul,
    scale,
    store,
    store_carry,
    sweep_left,
    sweep_right,
)
from bklm.bk_core.gpu.scan import rescale, store_maps


@triton.jit
def moebius_maps(
    a, k, z, maps, totals, N, T, C, S, NB, blocks, k_row,
    PERIOD: tl.constexpr, MANY: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The product over each chunk of [[0, k], [-1, d]], in the precision of ``maps``, rescaled every PERIOD elements."""
    wide = maps.dtype.element_ty
    # Which chunk is this lane's, and where it lies.
    first, chunk, row, start, left, zr, zi = lanes(z, N, T, C, S, NB, True, LANES)
    a = at_row(a, first, N, A_COMPLEX)
    k = at_row(k, first, k_row, K_COMPLEX)
    at = row * N + start
    at_k = row * k_row + start
    zero = tl.zeros_like(zr)
    # The product so far, [[p, q], [r, s]]: the identity before the first element.
    nil = zero.to(wide)
    pr, pi, qr, qi, rr, ri, sr, si = nil + 1.0, nil, nil, nil, nil, nil, nil + 1.0, nil
    for j in range(0, T, STRIP):
        # z is subtracted in the working precision, as in the sweeps: both see the same matrix
        dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        for c in tl.static_range(8):
            er, ei = dr[c].to(wide), di[c].to(wide)
            hr, hi = kr[c].to(wide), ki[c].to(wide)
            # [[0, k], [-1, d]] times the product.
            ur, ui = mul(er, ei, rr, ri)
            vr, vi = mul(er, ei, sr, si)
            ur, ui, vr, vi = ur - pr, ui - pi, vr - qr, vi - qi
            pr, pi = scale(hr, hi, rr, ri, K_COMPLEX)
            qr, qi = scale(hr, hi, sr, si, K_COMPLEX)
            rr, ri, sr, si = ur, ui, vr, vi
            # Only ratios count: what would leave the range is divided by its largest entry.
            if (c + 1) % PERIOD == 0:
                pr, pi, qr, qi, rr, ri, sr, si = rescale(pr, pi, qr, qi, rr, ri, sr, si)
    store_maps(maps, totals, chunk, S, blocks, left > 0, pr, pi, qr, qi, rr, ri, sr, si, MANY, LANES)


@triton.jit
def resolvent_sweep(
    a, k, z, carries, polished, G, N, T, C, S, k_row,
    CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, POLISH: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G from the carries of each chunk. POLISH first walks the neighbouring chunk from the scanned carry, which undoes
    the rounding of the scan: sequential accuracy. The carries really used go to ``polished``, for the backward."""
    # Which chunk is this lane's, and where it lies.
    first, chunk, row, start, left, zr, zi = lanes(z, N, T, C, S, 1, False, LANES)
    a = at_row(a, first, N, A_COMPLEX)
    k = at_row(k, first, k_row, K_COMPLEX)
    G = at_row(G, first, N, True)
    at = row * N + start
    at_k = row * k_row + start
    zero = tl.zeros_like(zr)
    xr, xi, yr, yi = zero, zero, zero, zero
    # What enters the chunk: x from the left, y from the right; 0 at the ends of a row.
    if CHUNKED:
        if POLISH:
            inner = (left > 0) & (start > 0)
            xr, xi = load_carry(carries, 0, chunk - 1, S, inner)
            # Walk the chunk before this one from its scanned carry: the error of the scan shrinks on the way. A row's first
            # chunk has nothing before it: x comes out as 0.
            before = (left + T) * inner.to(tl.int32)
            xr, xi = sweep_left(
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
                # The same from the right, through the chunk after this one.
                yr, yi = load_carry(carries, 1, chunk + 1, S, left > T)
                yr, yi = sweep_right(
                    a, at + T, k, at_k + T, left - T, T, zr, zi, yr, yi, A_COMPLEX, K_COMPLEX, LANES
                )
        else:
            xr, xi = load_carry(carries, 0, chunk, S, left > 0)
            if not CAUSAL:
                yr, yi = load_carry(carries, 1, chunk, S, left > 0)
        if POLISH and not CAUSAL:
            store_carry(polished, 0, chunk, S, left > 0, xr, xi)
            store_carry(polished, 1, chunk, S, left > 0, yr, yi)
    # The sequential sweeps from these carries.
    if CAUSAL:
        sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, G, at, left, "L", A_COMPLEX, K_COMPLEX, LANES)
    else:
        # G holds the pivots 1 / L between the two sweeps: G = 1 / (1/L_i - k_i R_{i+1}) term by term as published
        sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, G, at, left, "pivot", A_COMPLEX, K_COMPLEX, LANES)
        tl.debug_barrier()
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            pr, pi = load(G, at + j, left - j, zero + 1.0, True, LANES)
            re = ()
            im = ()
            for c in tl.static_range(8):
                hr, hi = scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
                # G_i = 1 / (1 / L_i - k_i R_{i+1}), then R_i = 1 / (d_i - k_i R_{i+1}).
                gr, gi = inv(pr[7 - c] - hr, pi[7 - c] - hi)
                yr, yi = inv(dr[7 - c] - hr, di[7 - c] - hi)
                re = (gr,) + re
                im = (gi,) + im
            store(G, at + j, left - j, re, im, True, LANES)
