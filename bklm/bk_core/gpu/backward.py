"""Triton: the backward kernels of the BK-core, the adjoint scans s, t and m. Names: gpu/lanes.py, formulas: operator.py."""

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
)
from bklm.bk_core.gpu.scan import store_affine


@triton.jit
def _source(gr, gi, br, bi):
    """P = conj(gbar) G^2."""
    ur, ui = mul(gr, gi, gr, gi)
    return mul(ur, ui, br, -bi)


@triton.jit
def adjoint_maps(
    a, k, z, G, gbar, carries, maps, totals, N, T, C, S, NB, blocks, k_row,
    CAUSAL: tl.constexpr, MANY: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The maps u -> A u + B of the adjoint carries over each chunk: tau from the left, s from the right; causal: w from
    the right alone."""
    first, chunk, row, start, left, zr, zi = lanes(z, N, T, C, S, NB, True, LANES)
    a = at_row(a, first, N, A_COMPLEX)
    k = at_row(k, first, k_row, K_COMPLEX)
    G = at_row(G, first, N, True)
    gbar = at_row(gbar, first, N, True)
    at = row * N + start
    at_k = row * k_row + start
    live = left > 0
    zero = tl.zeros_like(zr)
    one = zero + 1.0
    # The map so far: the identity before the first element.
    Ar, Ai, Br, Bi = one, zero, zero, zero
    if CAUSAL:
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            lr, li = load(G, at + j, left - j, zero, True, LANES)
            br, bi = load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # w_i = L_i^2 (conj(gbar_i) + k_i w_{i+1})
                ur, ui = scale(kr[7 - c], ki[7 - c], Br, Bi, K_COMPLEX)
                vr, vi = scale(kr[7 - c], ki[7 - c], Ar, Ai, K_COMPLEX)
                fr, fi = mul(lr[7 - c], li[7 - c], lr[7 - c], li[7 - c])
                Br, Bi = mul(fr, fi, br[7 - c] + ur, ui - bi[7 - c])
                Ar, Ai = mul(fr, fi, vr, vi)
        store_affine(maps, totals, chunk, S, blocks, live, Ar, Ai, Br, Bi, True, MANY, LANES)
    else:
        # The map of s, which comes from the right; built from the left, because it needs L, which runs so.
        xr, xi = load_carry(carries, 0, chunk, S, live)
        for j in range(0, T, STRIP):
            dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            gr, gi = load(G, at + j, left - j, zero, True, LANES)
            br, bi = load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # s_i = P_i + k_i L_i^2 s_{i+1}, appended at the right end of the map
                ur, ui = _source(gr[c], gi[c], br[c], bi[c])
                ur, ui = mul(Ar, Ai, ur, ui)
                Br, Bi = Br + ur, Bi + ui
                lr, li = inv(dr[c] - xr, di[c] - xi)
                xr, xi = scale(kr[c], ki[c], lr, li, K_COMPLEX)
                ur, ui = mul(xr, xi, lr, li)
                Ar, Ai = mul(Ar, Ai, ur, ui)
        store_affine(maps, totals, chunk, S, blocks, live, Ar, Ai, Br, Bi, True, MANY, LANES)
        # The map of tau, which comes from the left; built from the right, because it needs R.
        Ar, Ai, Br, Bi = one, zero, zero, zero
        yr, yi = load_carry(carries, 1, chunk, S, live)
        for jj in range(0, T, STRIP):
            j = T - STRIP - jj
            dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
            kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
            gr, gi = load(G, at + j, left - j, zero, True, LANES)
            br, bi = load(gbar, at + j, left - j, zero, True, LANES)
            for c in tl.static_range(8):
                # tau_i = k_i (P_i + R_i^2 tau_{i-1}), appended at the left end of the map
                hr, hi = scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
                yr, yi = inv(dr[7 - c] - hr, di[7 - c] - hi)
                Ar, Ai = scale(kr[7 - c], ki[7 - c], Ar, Ai, K_COMPLEX)
                ur, ui = _source(gr[7 - c], gi[7 - c], br[7 - c], bi[7 - c])
                ur, ui = mul(Ar, Ai, ur, ui)
                Br, Bi = Br + ur, Bi + ui
                ur, ui = mul(yr, yi, yr, yi)
                Ar, Ai = mul(Ar, Ai, ur, ui)
        store_affine(maps, totals, chunk, S, blocks, live, Ar, Ai, Br, Bi, False, MANY, LANES)


@triton.jit
def adjoint_sweep_causal(
    k, z, G, gbar, carries, grad_a, K, D_sums, N, T, C, S, k_row,
    CHUNKED: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_Z: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """D_i = -w_i and K_i = L_i w_{i+1}, where w_i = L_i^2 (conj(gbar_i) + k_i w_{i+1}); the sum of D over each chunk."""
    first, chunk, row, start, left, zr, _ = lanes(z, N, T, C, S, 1, False, LANES)
    k = at_row(k, first, k_row, K_COMPLEX)
    G = at_row(G, first, N, True)
    gbar = at_row(gbar, first, N, True)
    grad_a = at_row(grad_a, first, N, A_COMPLEX)
    K = at_row(K, first, N - 1, True)
    at = row * N + start
    at_k = row * k_row + start
    zero = tl.zeros_like(zr)
    # w enters from the right: from the scan, or 0 where the chunk is the whole row.
    wr, wi, sum_r, sum_i = zero, zero, zero, zero
    if CHUNKED:
        wr, wi = load_carry(carries, 1, chunk, S, left > 0)
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        lr, li = load(G, at + j, left - j, zero, True, LANES)
        br, bi = load(gbar, at + j, left - j, zero, True, LANES)
        Dr, Di, Kr, Ki = (), (), (), ()
        for c in tl.static_range(8):
            # K_i = L_i w_{i+1}, then w_i, and D_i = -w_i.
            ur, ui = mul(lr[7 - c], li[7 - c], wr, wi)
            Kr, Ki = (ur,) + Kr, (ui,) + Ki
            ur, ui = scale(kr[7 - c], ki[7 - c], wr, wi, K_COMPLEX)
            fr, fi = mul(lr[7 - c], li[7 - c], lr[7 - c], li[7 - c])
            wr, wi = mul(fr, fi, br[7 - c] + ur, ui - bi[7 - c])
            Dr, Di = (-wr,) + Dr, (-wi,) + Di
            sum_r, sum_i = sum_r - wr, sum_i - wi
        store(grad_a, at + j, left - j, Dr, Di, A_COMPLEX, LANES)
        if NEEDS_K:
            store(K, at - row + j, left - 1 - j, Kr, Ki, True, LANES)
    if NEEDS_Z:
        store_carry(D_sums, 0, chunk, S, left > 0, sum_r, sum_i)


@triton.jit
def adjoint_sweep(
    a, k, z, G, gbar, carries, adjoint_carries, grad_a, K, scratch, D_sums, N, T, C, S, k_row,
    CHUNKED: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_Z: tl.constexpr,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Bidirectional D and K, and the sum of D over each chunk, in three sweeps. With u_i = L_i s_{i+1} and
    e_i = s_i - P_i = k_i L_i u_i: D_i = -e_i - t_i, K_i = u_i + R_{i+1} t_i. From sweep to sweep, ``scratch`` (rows, N)
    complex holds L_i, then R_{i+1}; grad_a holds -e; K holds u."""
    first, chunk, row, start, left, zr, zi = lanes(z, N, T, C, S, 1, False, LANES)
    a = at_row(a, first, N, A_COMPLEX)
    k = at_row(k, first, k_row, K_COMPLEX)
    G = at_row(G, first, N, True)
    gbar = at_row(gbar, first, N, True)
    grad_a = at_row(grad_a, first, N, A_COMPLEX)
    K = at_row(K, first, N - 1, True)
    scratch = at_row(scratch, first, N, True)
    at = row * N + start
    at_k = row * k_row + start
    zero = tl.zeros_like(zr)
    # Into the chunk: x = k L and tau from the left, y = R and s from the right; 0 where the chunk is the whole row.
    xr, xi, yr, yi, sr, si, tr, ti = zero, zero, zero, zero, zero, zero, zero, zero
    sum_r, sum_i = zero, zero
    if CHUNKED:
        live = left > 0
        xr, xi = load_carry(carries, 0, chunk, S, live)
        yr, yi = load_carry(carries, 1, chunk, S, live)
        tr, ti = load_carry(adjoint_carries, 0, chunk, S, live)
        sr, si = load_carry(adjoint_carries, 1, chunk, S, live)

    # First sweep, to the right: L into the scratch.
    sweep_left(a, at, k, at_k, left, T, zr, zi, xr, xi, scratch, at, left, "L", A_COMPLEX, K_COMPLEX, LANES)
    tl.debug_barrier()
    # Second sweep, to the left: s and R. -e goes to grad_a, u to K, and R_{i+1} into the scratch, where L was.
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        gr, gi = load(G, at + j, left - j, zero, True, LANES)
        br, bi = load(gbar, at + j, left - j, zero, True, LANES)
        lr, li = load(scratch, at + j, left - j, zero, True, LANES)
        er, ei, ur, ui, nr, ni = (), (), (), (), (), ()
        for c in tl.static_range(8):
            if NEEDS_K:
                vr, vi = mul(lr[7 - c], li[7 - c], sr, si)
                ur, ui = (vr,) + ur, (vi,) + ui
            # (k L) L s, not k (L (L s)): a third power of L would leave the range before e does
            vr, vi = scale(kr[7 - c], ki[7 - c], lr[7 - c], li[7 - c], K_COMPLEX)
            vr, vi = mul(vr, vi, lr[7 - c], li[7 - c])
            vr, vi = mul(vr, vi, sr, si)
            er, ei = (-vr,) + er, (-vi,) + ei
            sum_r, sum_i = sum_r - vr, sum_i - vi
            pr, pi = _source(gr[7 - c], gi[7 - c], br[7 - c], bi[7 - c])
            # s_i = P_i + e_i; the R that is kept is the one before the step, R_{i+1}.
            sr, si = pr + vr, pi + vi
            nr, ni = (yr,) + nr, (yi,) + ni
            hr, hi = scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
            yr, yi = inv(dr[7 - c] - hr, di[7 - c] - hi)
        # Every lane has its L before R takes the place.
        tl.debug_barrier()
        store(grad_a, at + j, left - j, er, ei, A_COMPLEX, LANES)
        store(scratch, at + j, left - j, nr, ni, True, LANES)
        if NEEDS_K:
            store(K, at - row + j, left - 1 - j, ur, ui, True, LANES)
    tl.debug_barrier()
    # Third sweep, to the right: t, which completes D_i = -e_i - t_i and K_i = u_i + R_{i+1} t_i.
    for j in range(0, T, STRIP):
        kr, ki = load(k, at_k + j, left - 1 - j, zero, K_COMPLEX, LANES)
        gr, gi = load(G, at + j, left - j, zero, True, LANES)
        br, bi = load(gbar, at + j, left - j, zero, True, LANES)
        nr, ni = load(scratch, at + j, left - j, zero, True, LANES)
        er, ei = load(grad_a, at + j, left - j, zero, A_COMPLEX, LANES)
        if NEEDS_K:
            ur, ui = load(K, at - row + j, left - 1 - j, zero, True, LANES)
        Dr, Di, Kr, Ki = (), (), (), ()
        for c in tl.static_range(8):
            # t_i = P_i + R_i^2 tau_{i-1}; tr, ti hold tau_{i-1} = k_{i-1} t_{i-1}
            vr, vi = mul(yr, yi, yr, yi)
            vr, vi = mul(vr, vi, tr, ti)
            pr, pi = _source(gr[c], gi[c], br[c], bi[c])
            vr, vi = pr + vr, pi + vi
            Dr, Di = Dr + (er[c] - vr,), Di + (ei[c] - vi,)
            sum_r, sum_i = sum_r - vr, sum_i - vi
            if NEEDS_K:
                hr, hi = mul(nr[c], ni[c], vr, vi)
                Kr, Ki = Kr + (ur[c] + hr,), Ki + (ui[c] + hi,)
            tr, ti = scale(kr[c], ki[c], vr, vi, K_COMPLEX)
            yr, yi = nr[c], ni[c]
        store(grad_a, at + j, left - j, Dr, Di, A_COMPLEX, LANES)
        if NEEDS_K:
            store(K, at - row + j, left - 1 - j, Kr, Ki, True, LANES)
    if NEEDS_Z:
        store_carry(D_sums, 0, chunk, S, left > 0, sum_r, sum_i)
