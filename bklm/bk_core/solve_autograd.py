"""The solves on rows, with their gradients: the same three roads as in autograd.py.

Plain eager calls take an autograd.Function that skips the dispatcher, and the fused adjoint of the solver where only first
derivatives are wanted; it is the sums over the columns that a fused pass saves from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core import solve_backends, solve_formulas, solve_ops
from bklm.bk_core.autograd import in_forward_mode, is_plain
from bklm.bk_core.gradients import materialised


def causal(x: Tensor, left: Tensor, c: Tensor, reverse: bool, backend: str) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N) and c (1 or M, N - 1)."""
    if not is_plain(x, left, c):
        return _composing(solve_ops.CausalSolve.apply, solve_ops.causal_solve)(x, left, c, reverse, backend)
    x, left, c = (materialised(t) for t in (x, left, c))
    if _needs_graph(x, left, c):
        return _Causal.apply(x, left, c, reverse, backend)
    return solve_backends.select(backend, x.device).causal_rows(x, left, c, reverse)


def tridiagonal(x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor, left: Tensor, backend: str) -> Tensor:
    """y (M, N, D) for x (M, N, D), a (M, N), b and c (1 or M, N - 1), z (M,), and left (M, N), which follows from them."""
    if not is_plain(x, a, b, c, z, left):
        op = _composing(solve_ops.TridiagonalSolve.apply, solve_ops.tridiagonal_solve)
        return op(x, a, b, c, z, left, backend)
    x, a, b, c, z, left = (materialised(t) for t in (x, a, b, c, z, left))
    if _needs_graph(x, a, b, c, z):
        return _Tridiagonal.apply(x, a, b, c, z, left, backend)
    return solve_backends.select(backend, x.device).tridiagonal_rows(x, left, b, c)


def _needs_graph(*tensors: Tensor) -> bool:
    return in_forward_mode() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _composing(transformable, op):
    """The road for tensors that are not plain."""
    composes = torch._C._are_functorch_transforms_active() or in_forward_mode()
    return transformable if composes and not torch.compiler.is_compiling() else op


def _fused(gbar: Tensor, backend: str):
    """The solver where its fused pass gives all that is wanted, else None."""
    if not is_plain(gbar) or torch.is_grad_enabled() or in_forward_mode():
        return None
    solver = solve_backends.select(backend, gbar.device)
    return solver if hasattr(solver, "tridiagonal_adjoint") else None


def _solve_for(gbar: Tensor, plain, transformable, op):
    """The functions that the formulas of a backward call."""
    if is_plain(gbar):
        return plain
    return transformable if torch._C._are_functorch_transforms_active() else op


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, c, reverse, backend):
        y = solve_backends.select(backend, x.device).causal_rows(x, left, c, reverse)
        ctx.save_for_backward(left, c, y)
        if in_forward_mode():
            ctx.save_for_forward(x, left, c)
        ctx.settings = reverse, backend
        ctx.real = not x.is_complex()
        return y

    @staticmethod
    def backward(ctx, gbar):
        left, c, y = ctx.saved_tensors
        reverse, backend = ctx.settings
        solver = _fused(gbar, backend)
        if solver is None:
            solve = _solve_for(gbar, causal, solve_ops.CausalSolve.apply, solve_ops.causal_solve)
            g, S, C = solve_formulas.causal_vjp(solve, gbar, left, c, y, reverse, backend)
            g = g.real if ctx.real else g
        else:
            sums = any(ctx.needs_input_grad[1:3])
            g, S, C = solver.causal_adjoint(materialised(gbar), left, c, y, reverse, ctx.real, sums)
        needs_left, needs_c = ctx.needs_input_grad[1:3]
        grad_left = solve_formulas.gradient_of_left(S, left) if needs_left else None
        return g, grad_left, solve_formulas.like(C, c) if needs_c else None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return solve_ops.causal_jvp(ctx, tangents, causal)


class _Tridiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, c, z, left, backend):
        y = solve_backends.select(backend, x.device).tridiagonal_rows(x, left, b, c)
        ctx.save_for_backward(a, b, c, z, left, y)
        if in_forward_mode():
            ctx.save_for_forward(x, a, b, c, z, left)
        ctx.backend = backend
        ctx.real = not x.is_complex()
        return y

    @staticmethod
    def backward(ctx, gbar):
        a, b, c, z, left, y = ctx.saved_tensors
        solver = _fused(gbar, ctx.backend)
        if solver is None:
            solve = _solve_for(gbar, tridiagonal, solve_ops.TridiagonalSolve.apply, solve_ops.tridiagonal_solve)
            g, *found = solve_formulas.tridiagonal_vjp(solve, gbar, a, b, c, z, left, y, ctx.backend)
            g = g.real if ctx.real else g
        else:
            sums = any(ctx.needs_input_grad[1:5])
            g, *found = solver.tridiagonal_adjoint(materialised(gbar), left, b, c, y, ctx.real, sums)
        needs = ctx.needs_input_grad[1:5]
        return g, *solve_formulas.tridiagonal_gradients(found, a, b, c, needs), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return solve_ops.tridiagonal_jvp(ctx, tangents, tridiagonal)
