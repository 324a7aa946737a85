"""torch.ops.bklm.causal_solve and tridiagonal_solve: registered in torch.library, and composing with torch.func.

No backward ops: the derivatives of a solve are solves (solve_formulas.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core import solve_backends, solve_formulas
from bklm.bk_core.gradients import materialised
from bklm.bk_core.ops import fold, fold_k, rows_of


@torch.library.custom_op("bklm::causal_solve", mutates_args=())
def causal_solve(x: Tensor, left: Tensor, c: Tensor, reverse: bool, backend: str) -> Tensor:
    """y (M, N, D) of x (M, N, D), left (M, N) and c (M or 1, N - 1); see solve_backends.py."""
    solver = solve_backends.select(backend, x.device)
    return solver.causal_rows(*(materialised(t) for t in (x, left, c)), reverse)


@torch.library.custom_op("bklm::tridiagonal_solve", mutates_args=())
def tridiagonal_solve(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor, left: Tensor, backend: str
) -> Tensor:
    """y (M, N, D) of x (M, N, D), a (M, N), b and c (M or 1, N - 1), z (M,); see solve_backends.py.

    left (M, N) is L, which follows from the others and receives no gradient of its own.
    """
    solver = solve_backends.select(backend, x.device)
    return solver.tridiagonal_rows(*(materialised(t) for t in (x, left, b, c)))


def _like_x(x, left):
    return torch.empty(x.shape, dtype=left.dtype, device=x.device)


@causal_solve.register_fake
def _(x, left, c, reverse, backend):
    return _like_x(x, left)


@tridiagonal_solve.register_fake
def _(x, a, b, c, z, left, backend):
    return _like_x(x, left)


# --- derivatives -------------------------------------------------------------------------------------------------------


def _causal_setup(ctx, inputs, output):
    x, left, c, reverse, backend = inputs
    ctx.save_for_backward(left, c, output)
    ctx.save_for_forward(x, left, c)
    ctx.settings = reverse, backend
    ctx.real = not x.is_complex()


def _causal_backward(ctx, gbar, solve):
    left, c, y = ctx.saved_tensors
    g, S, C = solve_formulas.causal_vjp(solve, gbar, left, c, y, *ctx.settings)
    grads = solve_formulas.gradient_of_left(S, left), solve_formulas.like(C, c)
    return g.real if ctx.real else g, *grads, None, None


def causal_jvp(ctx, tangents, solve):
    primals = ctx.saved_tensors
    return solve_formulas.causal_jvp(solve, primals, _given(primals, tangents), *ctx.settings)


def _tridiagonal_setup(ctx, inputs, output):
    x, a, b, c, z, left, backend = inputs
    ctx.save_for_backward(a, b, c, z, left, output)
    ctx.save_for_forward(x, a, b, c, z, left)
    ctx.backend = backend
    ctx.real = not x.is_complex()


def _tridiagonal_backward(ctx, gbar, solve):
    a, b, c, z, left, y = ctx.saved_tensors
    g, *sums = solve_formulas.tridiagonal_vjp(solve, gbar, a, b, c, z, left, y, ctx.backend)
    grads = solve_formulas.tridiagonal_gradients(sums, a, b, c)
    return g.real if ctx.real else g, *grads, None, None


def tridiagonal_jvp(ctx, tangents, solve):
    primals = ctx.saved_tensors
    return solve_formulas.tridiagonal_jvp(solve, primals, _given(primals, tangents)[:5], ctx.backend)


def _given(primals, tangents):
    tangents = tangents[: len(primals)]
    return tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))


# --- vmap --------------------------------------------------------------------------------------------------------------


def _causal_vmap(op, info, in_dims, x, left, c, *settings):
    size, m = info.batch_size, rows_of(x, in_dims[0])
    rows = fold(x, in_dims[0], size), fold(left, in_dims[1], size), fold_k(c, in_dims[2], size, m)
    return op(*rows, *settings).unflatten(0, (size, m)), 0


def _tridiagonal_vmap(op, info, in_dims, x, a, b, c, z, left, backend):
    size, m = info.batch_size, rows_of(x, in_dims[0])
    rows_x, rows_a, rows_z, rows_left = (
        fold(t, in_dims[i], size) for i, t in ((0, x), (1, a), (4, z), (5, left))
    )
    rows_b, rows_c = fold_k(b, in_dims[2], size, m), fold_k(c, in_dims[3], size, m)
    return op(rows_x, rows_a, rows_b, rows_c, rows_z, rows_left, backend).unflatten(0, (size, m)), 0


causal_solve.register_autograd(
    lambda ctx, gbar: _causal_backward(ctx, gbar, causal_solve), setup_context=_causal_setup
)
causal_solve.register_vmap(lambda *args: _causal_vmap(causal_solve, *args))
tridiagonal_solve.register_autograd(
    lambda ctx, gbar: _tridiagonal_backward(ctx, gbar, tridiagonal_solve), setup_context=_tridiagonal_setup
)
tridiagonal_solve.register_vmap(lambda *args: _tridiagonal_vmap(tridiagonal_solve, *args))


class CausalSolve(torch.autograd.Function):
    """The op for torch.func: the autograd that custom_op generates does not compose with its transforms."""

    @staticmethod
    def forward(*args):
        return causal_solve(*args)

    setup_context = staticmethod(_causal_setup)

    @staticmethod
    def backward(ctx, gbar):
        return _causal_backward(ctx, gbar, CausalSolve.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        return causal_jvp(ctx, tangents, CausalSolve.apply)

    @staticmethod
    def vmap(*args):
        return _causal_vmap(CausalSolve.apply, *args)


class TridiagonalSolve(torch.autograd.Function):
    """As :class:`CausalSolve` for the bidirectional op."""

    @staticmethod
    def forward(*args):
        return tridiagonal_solve(*args)

    setup_context = staticmethod(_tridiagonal_setup)

    @staticmethod
    def backward(ctx, gbar):
        return _tridiagonal_backward(ctx, gbar, TridiagonalSolve.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        return tridiagonal_jvp(ctx, tangents, TridiagonalSolve.apply)

    @staticmethod
    def vmap(*args):
        return _tridiagonal_vmap(TridiagonalSolve.apply, *args)
