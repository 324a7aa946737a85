"""Device functions shared by the BK-core's Triton kernels: what one lane does with its chunk of a row.

A row of N elements is cut into C chunks of T elements (T a multiple of STRIP). One lane owns one chunk and walks it
element by element, so that every recurrence runs in the order, and with the rounding, of the sequential formulas. What
it must know of the chunks beside it is one complex number a recurrence, its carry (chunk i..j):

    x = k_{i-1} L_{i-1}  from the left,  y = R_{j+1}  from the right;
    adjoint scans: tau = k_{i-1} t_{i-1} from the left, s_{j+1} from the right; causal: w_{j+1} = L_{j+1}^2 m_{j+1}.

Memory. Triton has no complex type: complex operands arrive as interleaved reals (``torch.view_as_real``) and are parted
after loading. A lane reads STRIP consecutive elements at once, so that memory sees whole 32-byte sectors. Elements past
the end of a row get k = 0, which cuts them off from the row, and a diagonal of modulus >= 1, which keeps them finite.
Offsets are 32-bit and count from the first row of a program, see ``lanes``.

Names in all kernels: a, k, z, G, gbar, ... pointers to real storage; N, T, C as above; S chunks in all rows together;
k_row the row stride of k, 0 where all rows share it; left the number of elements from the start of a chunk to the end
of its row; A_COMPLEX, K_COMPLEX is that operand interleaved; LANES chunks per program.
"""

# ruff: noqa: RUF005 (tuples grow by +: Triton knows no unpacking)

import triton
import triton.language as tl

STRIP = tl.constexpr(8)  # elements that a lane loads at once: one 32-byte sector of float32


# --- complex numbers as (real, imaginary) -----------------------------------------------------------------------------


@triton.jit
def mul(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def inv(xr, xi):
    """1 / x; NaN, not 0 or a number with few digits left, where |x|^2 or its reciprocal is not a normal number."""
    square = xr * xr + xi * xi
    most = 8.5e37 if square.dtype == tl.float32 else 4.49e307  # 2^126 and 2^1022, a little less
    normal = (square >= 1.0 / most) & (square <= most)
    scale = tl.where(normal, 1.0 / square, float("nan"))
    return xr * scale, -xi * scale


@triton.jit
def scale(kr, ki, xr, xi, K_COMPLEX: tl.constexpr):
    """k x for real or complex k."""
    if K_COMPLEX:
        yr, yi = mul(kr, ki, xr, xi)
    else:
        yr, yi = kr * xr, kr * xi
    return yr, yi


# --- strips: (LANES, STRIP) tiles in memory, STRIP vectors of one number a lane in registers --------------------------


@triton.jit
def columns(tile, LANES: tl.constexpr):
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
def tile(c, LANES: tl.constexpr):
    """Inverse of ``columns``."""
    even = tl.reshape(tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6])), (LANES, 4))
    odd = tl.reshape(tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7])), (LANES, 4))
    return tl.reshape(tl.join(even, odd), (LANES, 8))


@triton.jit
def load(ptr, first, count, other, COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Columns (real parts, imaginary parts) of the strips that begin at element ``first`` (LANES,) and hold ``count``
    (LANES,) elements; ``other`` (LANES,) is the real part of the rest. A real operand comes twice: ignore the second."""
    if COMPLEX:
        i = tl.arange(0, 16)[None, :]
        fill = tl.where(i % 2 == 0, other[:, None], 0.0)
        pairs = tl.load(ptr + (2 * first[:, None] + i), mask=i < 2 * count[:, None], other=fill)
        re_tile, im_tile = tl.split(tl.reshape(pairs, (LANES, 8, 2)))
        re = columns(re_tile, LANES)
        im = columns(im_tile, LANES)
    else:
        i = tl.arange(0, 8)[None, :]
        re = columns(tl.load(ptr + (first[:, None] + i), mask=i < count[:, None], other=other[:, None]), LANES)
        im = re
    return re, im


@triton.jit
def store(ptr, first, count, re, im, COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Inverse of ``load``."""
    if COMPLEX:
        i = tl.arange(0, 16)[None, :]
        pairs = tl.reshape(tl.join(tile(re, LANES), tile(im, LANES)), (LANES, 16))
        tl.store(ptr + (2 * first[:, None] + i), pairs, mask=i < 2 * count[:, None])
    else:
        i = tl.arange(0, 8)[None, :]
        tl.store(ptr + (first[:, None] + i), tile(re, LANES), mask=i < count[:, None])


@triton.jit
def load_diagonal(a, first, count, zr, zi, A_COMPLEX: tl.constexpr, LANES: tl.constexpr):
    """Columns of d = a - z; past the end of a row d = 1 - i Im z."""
    ar, ai = load(a, first, count, zr + 1.0, A_COMPLEX, LANES)
    dr = ()
    di = ()
    for c in tl.static_range(8):
        dr = dr + (ar[c] - zr,)
        di = di + ((ai[c] if A_COMPLEX else tl.zeros_like(zi)) - zi,)
    return dr, di


@triton.jit
def at_row(ptr, first, length, COMPLEX: tl.constexpr):
    """Pointer to row ``first`` (64-bit) of an operand whose rows hold ``length`` elements."""
    return ptr + first * length * (1 + COMPLEX)


@triton.jit
def lanes(z, N, T, C, S, NB, BY_ROW: tl.constexpr, LANES: tl.constexpr):
    """Lane -> (the program's first row, chunk number, row counted from the first one, first element in the row, left,
    Re z, Im z). Chunks are dealt to programs one after the other, or, BY_ROW, in NB programs a row that hold no other
    row's chunks. For a lane without a chunk, left = 0: it reads and writes nothing."""
    lane = tl.arange(0, LANES)
    if BY_ROW:
        first = tl.program_id(0) // NB
        row = lane * 0
        in_row = tl.program_id(0) % NB * LANES + lane
        live = in_row < C
    else:
        number = tl.program_id(0) * LANES + lane
        live = number < S
        first = tl.program_id(0) * LANES // C
        row = number // C - first
        in_row = number - (row + first) * C
    # products rather than tl.where, through which the compiler loses what it knows of alignment
    left = (N - in_row * T) * live.to(tl.int32)
    at_z = 2 * (first + row)
    zr, zi = tl.load(z + at_z, mask=live, other=0.0), tl.load(z + at_z + 1, mask=live, other=1.0)
    return first.to(tl.int64), (first + row) * C + in_row, row, in_row * T, left, zr, zi


# --- sweeps of one lane over its chunk --------------------------------------------------------------------------------


@triton.jit
def sweep_left(
    a, at, k, at_k, left, T, zr, zi, xr, xi, out, at_out, n_out,
    WRITE: tl.constexpr, A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Carry x = k L from the chunk's left end to its right end; on the way write L ("L") or 1 / L ("pivot") to ``out``."""
    for j in range(0, T, STRIP):
        dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
        re = ()
        im = ()
        for c in tl.static_range(8):
            # 1 / L_i = d_i - k_{i-1} L_{i-1}, then x = k_i L_i.
            pr, pi = dr[c] - xr, di[c] - xi
            lr, li = inv(pr, pi)
            xr, xi = scale(kr[c], ki[c], lr, li, K_COMPLEX)
            if WRITE == "L":
                re = re + (lr,)
                im = im + (li,)
            else:
                re = re + (pr,)
                im = im + (pi,)
        if WRITE != "nothing":
            store(out, at_out + j, n_out - j, re, im, True, LANES)
    return xr, xi


@triton.jit
def sweep_right(
    a, at, k, at_k, left, T, zr, zi, yr, yi,
    A_COMPLEX: tl.constexpr, K_COMPLEX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Carry y = R from the chunk's right end to its left end."""
    for jj in range(0, T, STRIP):
        j = T - STRIP - jj
        dr, di = load_diagonal(a, at + j, left - j, zr, zi, A_COMPLEX, LANES)
        kr, ki = load(k, at_k + j, left - 1 - j, zr * 0.0, K_COMPLEX, LANES)
        for c in tl.static_range(8):
            # R_i = 1 / (d_i - k_i R_{i+1}).
            hr, hi = scale(kr[7 - c], ki[7 - c], yr, yi, K_COMPLEX)
            yr, yi = inv(dr[7 - c] - hr, di[7 - c] - hi)
    return yr, yi


@triton.jit
def load_carry(carries, direction, chunk, S, mask):
    """Complex carry of a chunk, 0 where masked; carries (2, S) complex, direction 0 from the left, 1 from the right."""
    at = 2 * (direction * S + chunk)
    return tl.load(carries + at, mask=mask, other=0.0), tl.load(carries + at + 1, mask=mask, other=0.0)


@triton.jit
def store_carry(carries, direction, chunk, S, mask, xr, xi):
    at = 2 * (direction * S + chunk)
    tl.store(carries + at, xr, mask=mask)
    tl.store(carries + at + 1, xi, mask=mask)
