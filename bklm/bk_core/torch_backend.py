"""The operator in vectorised torch operations: any device, any number of derivatives, O(N) work in O(log N) launches.

The recursion ``L_i = 1 / (d_i - k_{i-1} L_{i-1})`` is a composition of Moebius maps, hence a product of 2 x 2 matrices
``[[0, 1], [-k_{i-1}, d_i]]`` of which only ratios count. A recursive pairwise scan (reduce neighbours, scan half as many,
fill in the others; Blelloch 1990) forms all prefix products, rescaled to modulus about 1 at every combination so that
no length overflows. 32-bit inputs are scanned in complex128: a scan amplifies rounding more than the sequential
sweep does, and 64 bits leave room for it. 64-bit inputs have no wider type to go to; one Newton step on the recursion
(a linear scan of the residual) brings them back to the accuracy of the sequential sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import conjugate


def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """G (M, N) for a (M, N), k (1 or M, N - 1), z (M,). Differentiable in a, k and z; nothing is saved."""
    d, k128 = _diagonal(a, k, z)
    left = _sweep(d, k128)
    if causal:
        return left.to(z.dtype), ()
    right = _sweep(d.flip(-1), k128.flip(-1)).flip(-1)
    G = 1 / (d - _shift_right(k128 * left[:, :-1]) - _shift_left(k128 * right[:, 1:]))
    return G.to(z.dtype), ()


def backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor,
    saved: tuple[Tensor, ...],
    causal: bool,
    needs_k: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_a, K or None, sum of D or None); the adjoint recursions of operator.py as linear scans.

    Built of differentiable operations on ``gbar``, ``a``, ``k`` and ``z`` only (``G`` is formed again), so that it can
    be differentiated itself.
    """
    d, k128 = _diagonal(a, k, z)
    left = _sweep(d, k128)
    cotangent = conjugate(gbar).to(torch.complex128)
    if causal:
        ratio = k128 * left[:, 1:] ** 2
        m = _linear_scan(_shift_left(ratio).flip(-1), cotangent.flip(-1)).flip(-1)
        D = -(left**2) * m
        K = -left[:, :-1] * D[:, 1:] if needs_k else None
    else:
        right = _sweep(d.flip(-1), k128.flip(-1)).flip(-1)
        full = 1 / (d - _shift_right(k128 * left[:, :-1]) - _shift_left(k128 * right[:, 1:]))
        P = cotangent * full**2
        s = _linear_scan(_shift_left(k128 * left[:, :-1] ** 2).flip(-1), P.flip(-1)).flip(-1)
        t = _linear_scan(_shift_right(k128 * right[:, 1:] ** 2), P)
        D = P - s - t
        K = left[:, :-1] * s[:, 1:] + right[:, 1:] * t[:, :-1] if needs_k else None
    grad_a = D.to(z.dtype) if a.is_complex() else D.real.to(a.dtype)
    return grad_a, None if K is None else K.to(z.dtype), D.sum(-1).to(z.dtype) if needs_z else None


def _diagonal(a: Tensor, k: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """d = a - z (M, N) and k (M, N - 1), both complex128."""
    d = a.to(torch.complex128) - z.to(torch.complex128)[:, None]
    return d, k.to(torch.complex128).expand(a.shape[0], -1)


def _shift_right(x: Tensor) -> Tensor:
    """(M, N - 1) -> (M, N) with a zero in front."""
    return torch.nn.functional.pad(x, (1, 0))


def _shift_left(x: Tensor) -> Tensor:
    """(M, N - 1) -> (M, N) with a zero at the end."""
    return torch.nn.functional.pad(x, (0, 1))


def _sweep(d: Tensor, k: Tensor) -> Tensor:
    """L (M, N) complex128 from d (M, N) and k (M, N - 1): scan, then one Newton step."""
    coupling = -_shift_right(k)
    top = torch.stack([torch.zeros_like(d), torch.ones_like(d)], dim=-1)
    bottom = torch.stack([coupling, d], dim=-1)
    products = _matrix_scan(torch.stack([top, bottom], dim=-2))
    L = products[..., 0, 1] / products[..., 1, 1]
    # Newton on F_i(L) = L_i - f_i(L_{i-1}): the error e solves e_i = f_i'(L_{i-1}) e_{i-1} + residual_i, f' = k f^2.
    image = 1 / (d + coupling * torch.nn.functional.pad(L[:, :-1], (1, 0)))
    return L + _linear_scan(-coupling * image**2, image - L)


def _matrix_scan(x: Tensor) -> Tensor:
    """Prefix products x_i ... x_0 along dimension 1 of (M, N, 2, 2), each up to a positive factor."""
    n = x.shape[1]
    if n == 1:
        return x
    even = x[:, 0::2]
    odd = _matrix_scan(_multiply(x[:, 1::2], even[:, : n // 2]))
    rest = _multiply(even[:, 1:], odd[:, : (n - 1) // 2])
    return _interleave(torch.cat([even[:, :1], rest], dim=1), odd)


def _linear_scan(q: Tensor, p: Tensor) -> Tensor:
    """x_i = q_i x_{i-1} + p_i along the last dimension of (M, N), x_{-1} = 0."""
    n = p.shape[1]
    if n == 1:
        return p
    even_q, odd_q, even_p, odd_p = q[:, 0::2], q[:, 1::2], p[:, 0::2], p[:, 1::2]
    half = n // 2
    odd = _linear_scan(odd_q * even_q[:, :half], odd_q * even_p[:, :half] + odd_p)
    rest = even_q[:, 1:] * odd[:, : (n - 1) // 2] + even_p[:, 1:]
    return _interleave(torch.cat([even_p[:, :1], rest], dim=1), odd)


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """Matrix products over the last two dimensions, divided by their largest modulus."""
    product = (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)
    scale = product.detach().abs().amax(dim=(-2, -1), keepdim=True)
    return product / torch.where(scale > 0, scale, torch.ones_like(scale))


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even_0, odd_0, even_1, odd_1, ... along dimension 1; ``even`` has as many entries as ``odd`` or one more."""
    n = even.shape[1] + odd.shape[1]
    if even.shape[1] > odd.shape[1]:
        odd = torch.cat([odd, even[:, -1:]], dim=1)
    return torch.stack([even, odd], dim=2).flatten(1, 2)[:, :n]
