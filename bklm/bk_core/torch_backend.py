"""The operator in vectorised torch operations: any device, any number of derivatives, O(N) work in O(log N) launches.

The recursion ``L_i = 1 / (d_i - k_{i-1} L_{i-1})`` is a composition of Moebius maps, hence a product of 2 x 2 matrices
``[[0, 1], [-k_{i-1}, d_i]]`` of which only ratios count. A recursive pairwise scan (reduce neighbours, scan half as many,
fill in the others; Blelloch 1990) forms all prefix products, rescaled on the way so that no length overflows. 32-bit
inputs are scanned in complex128: a scan amplifies rounding more than the sequential sweep does, and 64 bits leave room
for it. 64-bit inputs have no wider type to go to; one Newton step on the recursion (a linear scan of the residual) brings
them back to the accuracy of the sequential sweep. Every product is rescaled: the entries of one
matrix spread over the third power of the moduli in it, so that 64 bits hold rows of moduli all about 2^-340 or 2^340.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core.reference import conjugate

Matrix = tuple[Tensor, Tensor, Tensor, Tensor]
"""Entries (0, 0), (0, 1), (1, 0), (1, 1) of 2 x 2 matrices, (M, N) each: four plain tensors are several times faster than
one with dimensions of length 2."""
SMALLEST = torch.finfo(torch.float64).tiny


def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """G (M, N) for a (M, N), k (1 or M, N - 1), z (M,). Differentiable in a, k and z. Saved: L, and R, in complex128."""
    d, k128 = _diagonal(a, k, z)
    left = _sweep(d, k128, z.dtype)
    if causal:
        return left.to(z.dtype), (left,)
    right = _sweep(d.flip(-1), k128.flip(-1), z.dtype).flip(-1)
    return _join(d, k128, left, right).to(z.dtype), (left, right)


def backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor | None,
    saved: tuple[Tensor, ...],
    causal: bool,
    needs_k: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_a, K or None, sum of D or None); the adjoint recursions of operator.py as linear scans.

    With ``saved`` empty it is built of differentiable operations on ``gbar``, ``a``, ``k`` and ``z`` only (G is formed
    again), so that it can be differentiated itself.
    """
    d, k128 = _diagonal(a, k, z)
    cotangent = conjugate(gbar).to(torch.complex128)
    left = saved[0] if saved else _sweep(d, k128, z.dtype)
    if causal:
        ratio = (k128 * left[:, 1:]) * left[:, 1:]  # left**2 alone may leave the range of the numbers; so below
        m = linear_scan(shift_left(ratio).flip(-1), cotangent.flip(-1)).flip(-1)
        D = -left * (left * m)
        K = -left[:, :-1] * D[:, 1:] if needs_k else None
    else:
        right = saved[1] if saved else _sweep(d.flip(-1), k128.flip(-1), z.dtype).flip(-1)
        diagonal = _join(d, k128, left, right)
        P = (cotangent * diagonal) * diagonal
        s = linear_scan(shift_left((k128 * left[:, :-1]) * left[:, :-1]).flip(-1), P.flip(-1)).flip(-1)
        t = linear_scan(shift_right((k128 * right[:, 1:]) * right[:, 1:]), P)
        D = P - s - t
        K = left[:, :-1] * s[:, 1:] + right[:, 1:] * t[:, :-1] if needs_k else None
    grad_a = D.to(z.dtype) if a.is_complex() else D.real.to(a.dtype)
    return grad_a, None if K is None else K.to(z.dtype), D.sum(-1).to(z.dtype) if needs_z else None


def tangent(
    a: Tensor, k: Tensor, z: Tensor, causal: bool, a_dot: Tensor, k_dot: Tensor, z_dot: Tensor
) -> Tensor:
    """dG (M, N) in the direction (a_dot, k_dot, z_dot), shapes and dtypes those of a, k and z.

    The recursion differentiated: ``dL_i = L_i^2 (k_{i-1} dL_{i-1} + dk_{i-1} L_{i-1} - dd_i)``, a linear scan, R likewise,
    and ``dG = G^2 (d(kL) + d(kR) - dd)``. Plain operations: differentiable, and mapped by any vmap.
    """
    d, k128 = _diagonal(a, k, z)
    d_dot, k128_dot = _diagonal(a_dot, k_dot, z_dot)
    left = _sweep(d, k128, z.dtype)
    left_dot = _sweep_tangent(left, k128, d_dot, k128_dot)
    if causal:
        return left_dot.to(z.dtype)
    right = _sweep(d.flip(-1), k128.flip(-1), z.dtype)
    right_dot = _sweep_tangent(right, k128.flip(-1), d_dot.flip(-1), k128_dot.flip(-1)).flip(-1)
    right = right.flip(-1)
    from_left = shift_right(k128_dot * left[:, :-1] + k128 * left_dot[:, :-1])
    from_right = shift_left(k128_dot * right[:, 1:] + k128 * right_dot[:, 1:])
    return (_join(d, k128, left, right) ** 2 * (from_left + from_right - d_dot)).to(z.dtype)


def _sweep_tangent(L: Tensor, k: Tensor, d_dot: Tensor, k_dot: Tensor) -> Tensor:
    """dL (M, N) of :func:`_sweep`."""
    square = L**2
    return linear_scan(shift_right(k) * square, (shift_right(k_dot * L[:, :-1]) - d_dot) * square)


def _diagonal(a: Tensor, k: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """d = a - z (M, N) and k (M, N - 1), both complex128."""
    d = a.to(torch.complex128) - z.to(torch.complex128)[:, None]
    return d, k.to(torch.complex128).expand(a.shape[0], -1)


def shift_right(x: Tensor) -> Tensor:
    """(M, N - 1) -> (M, N) with a zero in front."""
    return torch.nn.functional.pad(x, (1, 0))


def shift_left(x: Tensor) -> Tensor:
    """(M, N - 1) -> (M, N) with a zero at the end."""
    return torch.nn.functional.pad(x, (0, 1))


def _join(d: Tensor, k: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """G from both sweeps."""
    return 1 / (d - shift_right(k * left[:, :-1]) - shift_left(k * right[:, 1:]))


def _sweep(d: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """L (M, N) complex128 from d (M, N) and k (M, N - 1): scan; one Newton step where ``dtype`` asks for 64 bits."""
    coupling = -shift_right(k)
    scale = 1 / torch.maximum(d.detach().abs(), coupling.detach().abs().clamp(min=1.0))
    _, top, _, bottom = _matrix_scan(
        (torch.zeros_like(d), torch.ones_like(d) * scale, coupling * scale, d * scale)
    )
    L = top / bottom
    if dtype != torch.complex128:
        return L
    # Newton on F_i(L) = L_i - f_i(L_{i-1}): the error e solves e_i = f_i'(L_{i-1}) e_{i-1} + residual_i, f' = k f^2.
    image = 1 / (d + coupling * shift_right(L[:, :-1]))
    return L + linear_scan((coupling * image) * -image, image - L)


def _matrix_scan(x: Matrix) -> Matrix:
    """Prefix products x_i ... x_0 along the last dimension, each up to a positive factor."""
    n = x[0].shape[-1]
    if n == 1:
        return x
    even = [entry[:, 0::2] for entry in x]
    pairs = _multiply([entry[:, 1::2] for entry in x], [entry[:, : n // 2] for entry in even])
    odd = _matrix_scan(_rescaled(pairs))
    rest = _rescaled(_multiply([entry[:, 1:] for entry in even], [entry[:, : (n - 1) // 2] for entry in odd]))
    evens = (torch.cat([first[:, :1], others], dim=1) for first, others in zip(even, rest, strict=True))
    return tuple(_interleave(*entries) for entries in zip(evens, odd, strict=True))


def _rescaled(x: Matrix) -> Matrix:
    """Each matrix divided by its largest entry."""
    scale = torch.stack([entry.detach() for entry in x]).abs().amax(0).clamp(min=SMALLEST).reciprocal()
    return tuple(entry * scale for entry in x)


def _multiply(x, y) -> Matrix:
    """Matrix products x y."""
    a, b, c, d = x
    e, f, g, h = y
    return (
        torch.addcmul(a * e, b, g),
        torch.addcmul(a * f, b, h),
        torch.addcmul(c * e, d, g),
        torch.addcmul(c * f, d, h),
    )


def linear_scan(q: Tensor, p: Tensor) -> Tensor:
    """x_i = q_i x_{i-1} + p_i along dimension 1, x_{-1} = 0: (M, N) both, or q (M, N, 1) and p (M, N, D).

    narrow, because a slice that turns out to keep everything is an operation that torch.autograd's own vmap lacks.
    """
    n = p.shape[1]
    if n == 1:
        return p
    even_q, odd_q, even_p, odd_p = q[:, 0::2], q[:, 1::2], p[:, 0::2], p[:, 1::2]
    half = n // 2
    odd = linear_scan(odd_q * even_q.narrow(1, 0, half), odd_q * even_p.narrow(1, 0, half) + odd_p)
    rest = even_q[:, 1:] * odd.narrow(1, 0, (n - 1) // 2) + even_p[:, 1:]
    return _interleave(torch.cat([even_p.narrow(1, 0, 1), rest], dim=1), odd)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even_0, odd_0, even_1, odd_1, ... along dimension 1; ``even`` has as many entries as ``odd`` or one more."""
    n = even.shape[1] + odd.shape[1]
    if even.shape[1] > odd.shape[1]:
        odd = torch.cat([odd, even[:, -1:]], dim=1)
    pairs = torch.stack([even, odd], dim=2)
    return pairs.reshape(even.shape[0], 2 * pairs.shape[1], *even.shape[2:]).narrow(1, 0, n)
