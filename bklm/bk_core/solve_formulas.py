"""Derivatives of the two solves, in torch's convention, written with the solves themselves: so they hold at any order.

Causal, ``y_i = L_i (x_i - c_{i-1} y_{i-1})``: a bidiagonal system with diagonal ``1 / L``. Bidirectional,
``y = (T - z)^-1 x``. For ``A y = x`` and a cotangent gbar, ``g = A^-H gbar`` is the gradient of x, and
``-g_i conj(y_j)``, summed over the columns, that of ``A_ij``. ``A^H`` is a system of the same kind: the causal one read
from the right, or the tridiagonal one with b and c exchanged; all of its entries are conjugates.

Every function takes the solve to use (``solve``: a registered op or one of the autograd.Functions), so that each road of
solve_autograd.py differentiates along itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bklm.bk_core.reference import conjugate

Solve = Callable[..., Tensor]


def conjugated(x: Tensor) -> Tensor:
    """The conjugate of a complex tensor, a real one as it is."""
    return conjugate(x) if x.is_complex() else x


def like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient (M, ...) for ``x`` real or complex, (M, ...) or (1, ...) where rows share it."""
    if not x.is_complex():
        grad = grad.real
    return grad.sum(0, keepdim=True) if x.shape[0] == 1 and grad.shape[0] != 1 else grad


def causal_sums(g: Tensor, y: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """S (M, N) and C (M, N - 1) of solve_backends.py."""
    bar = conjugate(y)
    if reverse:
        return (g * bar).sum(-1), -(g[:, :-1] * bar[:, 1:]).sum(-1)
    return (g * bar).sum(-1), -(g[:, 1:] * bar[:, :-1]).sum(-1)


def causal_vjp(
    solve: Solve, gbar: Tensor, left: Tensor, c: Tensor, y: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(g complex, S, C) of solve_backends.py."""
    g = solve(gbar, conjugate(left), conjugated(c), not reverse, backend)
    return g, *causal_sums(g, y, reverse)


def gradient_of_left(S: Tensor, left: Tensor) -> Tensor:
    """From the sum S (M, N). Divided twice: the square of L may leave the range of the numbers."""
    bar = conjugate(left)
    return S / bar / bar


def causal_jvp(
    solve: Solve, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], reverse: bool, backend: str
) -> Tensor:
    """dy for (x, left, c) moving along ``tangents``."""
    x, left, c = primals
    x_dot, left_dot, c_dot = tangents
    y = solve(x, left, c, reverse, backend)
    source = x_dot + (left_dot / left / left)[..., None] * y
    moved = _from_after(c_dot, y) if reverse else _from_before(c_dot, y)
    return solve(source - moved, left, c, reverse, backend)


def tridiagonal_vjp(
    solve: Solve,
    gbar: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    left: Tensor,
    y: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(g complex, S, B, C) of solve_backends.py."""
    flipped = (conjugated(t) for t in (a, c, b, z, left))
    g = solve(gbar, *flipped, backend)
    bar = conjugate(y)
    return g, (g * bar).sum(-1), -(g[:, :-1] * bar[:, 1:]).sum(-1), -(g[:, 1:] * bar[:, :-1]).sum(-1)


def tridiagonal_gradients(
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
    a: Tensor,
    b: Tensor,
    c: Tensor,
    needs: tuple[bool, ...] = (True,) * 4,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a, b, c and z from S, B and C; None where not needed."""
    S, B, C = sums
    return (
        -like(S, a) if needs[0] else None,
        like(B, b) if needs[1] else None,
        like(C, c) if needs[2] else None,
        S.sum(-1) if needs[3] else None,
    )


def tridiagonal_jvp(
    solve: Solve, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], backend: str
) -> Tensor:
    """dy for (x, a, b, c, z) moving along ``tangents``; ``primals`` has left as well, which follows from the others."""
    x, *entries = primals
    x_dot, a_dot, b_dot, c_dot, z_dot = tangents
    y = solve(x, *entries, backend)
    moved = (a_dot - z_dot[:, None])[..., None] * y + _from_after(b_dot, y) + _from_before(c_dot, y)
    return solve(x_dot - moved, *entries, backend)


def _from_before(c: Tensor, y: Tensor) -> Tensor:
    """c_{i-1} y_{i-1}, 0 at the first position."""
    return torch.nn.functional.pad(c[..., None] * y[:, :-1], (0, 0, 1, 0))


def _from_after(b: Tensor, y: Tensor) -> Tensor:
    """b_i y_{i+1}, 0 at the last position."""
    return torch.nn.functional.pad(b[..., None] * y[:, 1:], (0, 0, 0, 1))
