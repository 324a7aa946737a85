"""``resolvent_solve``: ``(T - z I)^-1 x`` and its causal form for a tridiagonal T, differentiable, O(N) a column.

With T, ``d``, ``k`` and L as in operator.py (super-diagonal b, sub-diagonal c):

    causal          y_i = L_i (x_i - c_{i-1} y_{i-1})
    bidirectional   w_i = L_i (x_i - c_{i-1} w_{i-1}),  y_i = w_i - L_i b_i y_{i+1}

The causal form is the first half of the bidirectional one: w_i is the last entry of the solution on the leading block
T[0..i, 0..i], so the weights of x_0 ... x_i in it are the last row of that block's resolvent. For real ``a`` and
``b = c`` (Hermitian T) no row or column of a resolvent is longer than ``1 / |Im z|``, so no length overflows; where b and
c differ, entry (i, j) carries the factor ``prod c_m / b_m`` to the power 1/2 besides, which is T's own.

L comes from the diagonal's kernels, once, and keeps their rules for range and pivots; what is left is linear. Derivatives
are solves with the adjoint matrix (solve_formulas.py): two scans for either form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bklm.bk_core import autograd, solve_autograd
from bklm.bk_core.arguments import (
    as_number,
    as_precision,
    as_rows,
    between_rows,
    check_broadcast,
    coupling,
    precision_of,
    shift,
    widened,
)
from bklm.bk_core.gradients import materialised
from bklm.bk_core.operator import check_options


def resolvent_solve(
    x: Tensor,
    a: Tensor,
    b: Tensor | complex,
    c: Tensor | complex,
    z: Tensor | complex,
    *,
    causal: bool = False,
    backend: str = "auto",
    return_left: bool = False,
    grad_blend: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(T - z I)^-1 x`` (..., N, D), complex64 for inputs of 32 bits or fewer, complex128 for 64-bit ones.

    Args:
        x: right-hand sides, (..., N, D), N and D >= 1, real or complex floating point. All D columns share T and z.
        a: diagonal of T, (..., N), real or complex. The batch dimensions of x and a broadcast to those of the result.
        b: super-diagonal, a number or a tensor that broadcasts to (..., N - 1), real or complex.
        c: sub-diagonal, likewise.
        z: shift, a number or a tensor that broadcasts to (...), finite, ``Im z != 0``. Takes the precision of x, a, b, c.
        causal: row i is the last entry of the solution on the leading block T[0..i, 0..i]: it depends on positions 0..i
            only, bit for bit, and streams (:func:`solve_step`).
        backend: "auto", or one of :func:`bklm.bk_core.available_backends`.
        return_left: also return L (..., N), the causal diagonal of the resolvent, which the solve forms anyway; with its
            gradient. Its last entry and that of the result are the state from which :func:`solve_step` goes on.
            Needs ``causal=True``.
        grad_blend: alpha in [0, 1], for experiments: the derivative of L with respect to ``a``, through which alone y
            depends on it, is ``(1 - alpha) * exact + alpha * hypothesis-7`` as in
            :func:`bklm.bk_core.resolvent_diagonal`; x, b, c and z keep their exact gradient. Forward mode gives the exact
            tangent. Needs ``causal=True``.

    Every input has its exact gradient (but for grad_blend), in forward mode too and to any order. Rules for NaN, 16-bit
    inputs and range are those of :func:`bklm.bk_core.resolvent_diagonal`; the products ``b_i L_i`` and ``c_i L_i`` must
    be representable too.

    Raises:
        TypeError: not tensors or numbers, integer, boolean or sparse tensors, causal neither True nor False.
        ValueError: wrong shapes, mixed devices, N = 0, D = 0, Im z = 0, return_left or grad_blend without causal,
            grad_blend outside [0, 1].
        SmallPivotError (a ValueError): negative or complex b c, or complex a, for which a pivot is lost in rounding. The
            solve does not exchange rows: it may be raised where T - z is far from singular.
        BackendUnavailableError (an OSError): the named backend does not run here.
    """
    check_options(causal, "exact", grad_blend)
    if return_left and not causal:
        raise ValueError(
            "return_left=True needs causal=True: the bidirectional diagonal is resolvent_diagonal's."
        )
    if grad_blend and not causal:
        raise ValueError(
            f"grad_blend={grad_blend} needs causal=True: the bidirectional solve has its exact gradient."
        )
    b = b if isinstance(b, Tensor) else as_number("b", b)
    c = c if isinstance(c, Tensor) else as_number("c", c)
    batch, n, columns = _shape(x, a)
    precision = precision_of({"x": x, "a": a, "b": b, "c": c})
    m, shape = math.prod(batch), (*batch, n)
    owner = f"x of shape {tuple(x.shape)} and a of shape {tuple(a.shape)}"
    rows_z, fits_32_bits = shift(z, batch, x.device, precision, ("x", owner))
    if precision == torch.float32 and not fits_32_bits:
        options = {"causal": causal, "backend": backend, "return_left": return_left, "grad_blend": grad_blend}
        result = resolvent_solve(*widened((x, a, b, c, z)), **options)
        return tuple(t.to(torch.complex64) for t in result) if return_left else result.to(torch.complex64)
    a = a.to(as_precision(a.dtype, precision))
    x = x.to(as_precision(x.dtype, precision))
    k, bounded = coupling(b, c, shape, a, owner)
    if m == 0:
        # nothing to compute, but gradients of the right shape for everything that wants one
        empty = a.expand(shape) + k.sum() + rows_z.reshape(*batch, 1)
        y = x + empty[..., None]
        return (y, empty) if return_left else y
    rows_x = as_rows(x, (*shape, columns), (m, n, columns))
    rows_a = materialised(as_rows(a, shape, (m, n)))
    bounded = bounded and not a.is_complex()
    lower = between_rows(c, (*batch, n - 1), a)
    if causal:
        left = autograd.apply(rows_a, k, rows_z, True, "exact", float(grad_blend), backend, bounded)
        y = solve_autograd.causal(rows_x, left, lower, False, backend)
        y = as_rows(y, (m, n, columns), (*shape, columns))
        return (y, as_rows(left, (m, n), shape)) if return_left else y
    fixed = (materialised(t.detach()) for t in (rows_a, k, rows_z))
    left = autograd.apply(*fixed, True, "exact", 0.0, backend, bounded)
    upper = between_rows(b, (*batch, n - 1), a)
    y = solve_autograd.tridiagonal(rows_x, rows_a, upper, lower, rows_z, left, backend)
    return as_rows(y, (m, n, columns), (*shape, columns))


def _shape(x: Tensor, a: Tensor) -> tuple[tuple[int, ...], int, int]:
    """(batch, N, D) of the result."""
    for name, t in (("x", x), ("a", a)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(t).__name__}.")
    if x.dim() < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: (..., N, D) with N and D >= 1 is needed; one column is x[..., None]."
        )
    n, columns = x.shape[-2:]
    if a.dim() == 0 or a.shape[-1] != n:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and x {tuple(x.shape)}: a must be (..., N) = (..., {n}) for x (..., N, D)."
        )
    return _batch(x.shape[:-2], a.shape[:-1]), n, columns


def _batch(of_x: torch.Size, of_a: torch.Size) -> tuple[int, ...]:
    """The batch dimensions of the result."""
    if of_x == of_a:  # broadcast_shapes takes longer than a short solve
        return tuple(of_x)
    try:
        return tuple(torch.broadcast_shapes(of_x, of_a))
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of a and x, {tuple(of_a)} and {tuple(of_x)} do not broadcast: make them equal or 1."
        ) from None


class SolveState(NamedTuple):
    """What the causal solve remembers of a sequence: L of the last position (...) and its row of y (..., D), complex."""

    left: Tensor
    y: Tensor


def solve_step(
    x: Tensor,
    a: Tensor,
    b: Tensor | complex,
    c: Tensor | complex,
    z: Tensor | complex,
    state: SolveState | None = None,
) -> tuple[Tensor, SolveState]:
    """One position of the causal :func:`resolvent_solve`, for generation with a constant state.

    Args:
        x: this position's row, (..., D), real or complex.
        a: this position's diagonal entry, (...); the batch dimensions of x and a broadcast.
        b: b_{i-1}, which couples the position before to this one: a number or a tensor that broadcasts to (...). Not
            looked at without a state.
        c: c_{i-1}, likewise.
        z: shift, as for the whole sequence.
        state: what the position before returned; None at the first position. After a whole pass with
            ``y, left = resolvent_solve(..., causal=True, return_left=True)`` it is
            ``SolveState(left[..., -1], y[..., -1, :])``.

    Returns y_i (..., D), equal to the row of the whole pass to rounding, and the new state. Plain torch operations in the
    precision of the whole pass: differentiable, on any device. Pivots are not checked here. Raises TypeError and
    ValueError as :func:`resolvent_solve` does.
    """
    for name, t in (("x", x), ("a", a)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(t).__name__}.")
    if x.dim() == 0:
        raise ValueError("x is a single number: one row (..., D) is needed.")
    b = b if isinstance(b, Tensor) else as_number("b", b)
    c = c if isinstance(c, Tensor) else as_number("c", c)
    precision = precision_of({"x": x, "a": a, "b": b, "c": c})
    owner = f"x of shape {tuple(x.shape)} and a of shape {tuple(a.shape)}"
    batch = _batch(x.shape[:-1], a.shape)
    rows_z, fits_32_bits = shift(z, batch, x.device, precision, ("x", owner))
    dtype, wide = as_precision(torch.complex64, precision), precision if fits_32_bits else torch.float64
    rows_z = rows_z.to(as_precision(torch.complex64, wide)).reshape(batch)
    if state is not None:
        b, c = (_between(name, value, batch, wide, owner) for name, value in (("b", b), ("c", c)))
    x, a = x.to(as_precision(torch.complex64, wide)), a.to(as_precision(a.dtype, wide))
    left, y = (t.to(dtype) for t in advance(x, a, b, c, rows_z, state))
    return y, SolveState(left, y)


def advance(
    x: Tensor, a: Tensor, b: Tensor | complex, c: Tensor | complex, z: Tensor, state: SolveState | None
) -> SolveState:
    """:func:`solve_step` of what is known to fit: x (..., D), a and z (...) tensors in one precision, z complex, b and c
    numbers or tensors (...). Nothing is checked or converted; the state is in that precision."""
    pivot = a - z
    if state is not None:
        pivot = pivot - b * c * state.left
        x = x - (c[..., None] if isinstance(c, Tensor) else c) * state.y
    left = pivot.reciprocal()
    return SolveState(left, left[..., None] * x)


def _between(
    name: str, value: Tensor | complex, batch: tuple[int, ...], precision: torch.dtype, owner: str
) -> Tensor | complex:
    """b_{i-1} or c_{i-1} in the precision of the pass, before it is multiplied: a product in 16 bits can overflow."""
    if not isinstance(value, Tensor):
        return value
    check_broadcast(name, value, batch, f"(...) = {batch} for {owner}")
    return value.to(as_precision(value.dtype, precision))
