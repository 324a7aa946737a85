"""torch.ops.bklm.resolvent_diagonal and its backward: registered in torch.library, and made to compose with torch.func.

Values are checked inside the ops, where tensors are real whatever traces or compiles around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bklm.bk_core import backends, pivots, torch_backend
from bklm.bk_core.gradients import differentiable_backward, in_torch_convention, materialised, rows_backward


@torch.library.custom_op("bklm::resolvent_diagonal", mutates_args=())
def resolvent_diagonal(
    a: Tensor,
    k: Tensor,
    z: Tensor,
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
    check_pivots: bool = True,
) -> Tensor:
    """G (M, N) of a (M, N), k (M or 1, N - 1) and z (M,); see backends.py."""
    chosen = backends.select(backend, a.device)
    a, k, z = (materialised(x) for x in (a, k, z))
    pivots.check_shift(z)
    G = chosen.forward(a, k, z, causal)[0]
    if check_pivots:
        pivots.check(a, k, z, G, causal, lambda *rows: chosen.forward(*rows, True)[0])
    return G


@torch.library.custom_op("bklm::resolvent_diagonal_backward", mutates_args=())
def resolvent_diagonal_backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor,
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
    needs_k: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a (M, N), of k per row (M, N - 1) and of z (M,) in D's convention; empty where not needed."""
    gbar, a, k, z, G = (materialised(x) for x in (gbar, a, k, z, G))
    grads = rows_backward(gbar, a, k, z, G, (), causal, gradient, grad_blend, backend, needs_k, needs_z)
    return tuple(z.new_empty(0) if x is None else x for x in grads)


@resolvent_diagonal.register_fake
def _(a, k, z, causal, gradient, grad_blend, backend, check_pivots=True):
    return torch.empty(a.shape, dtype=z.dtype, device=a.device)


@resolvent_diagonal_backward.register_fake
def _(gbar, a, k, z, G, causal, gradient, grad_blend, backend, needs_k, needs_z):
    m, n = a.shape
    grad_a = torch.empty((m, n), dtype=a.dtype, device=a.device)
    return grad_a, z.new_empty((m, n - 1) if needs_k else 0), z.new_empty(m if needs_z else 0)


def _setup(ctx, inputs, output):
    a, k, z, *settings, _check_pivots = inputs
    ctx.save_for_backward(a, k, z, output)
    ctx.save_for_forward(a, k, z)
    ctx.settings = tuple(settings)


def vjp(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor,
    settings: tuple[bool, str, float, str],
    needs_k: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a, k and z in torch's convention, of their shapes and dtypes; None for k and z where not needed.

    ``backward`` is the backward op in one of its forms, gbar and G are (M, N) complex, ``settings`` are causal, gradient,
    grad_blend and backend.
    """
    grads = backward(gbar, a, k, z, G, *settings, needs_k, needs_z)
    kept = grads[0], grads[1] if needs_k else None, grads[2] if needs_z else None
    return in_torch_convention(kept, a, k)


def _vjp(ctx, gbar, backward):
    grads = vjp(backward, gbar, *ctx.saved_tensors, ctx.settings, *ctx.needs_input_grad[1:3])
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - 3))


def _backward_setup(ctx, inputs, output):
    gbar, a, k, z, _G, *settings = inputs
    ctx.save_for_backward(gbar, a, k, z)
    ctx.save_for_forward(gbar, a, k, z)
    ctx.settings = tuple(settings)


def _backward_vjp(ctx, *cotangents):
    """Second derivatives, through the differentiable form of the backward. G counts as a function of a, k and z."""
    causal, gradient, grad_blend, _backend, needs_k, needs_z = ctx.settings

    def formula(gbar, a, k, z):
        grads = differentiable_backward(gbar, a, k, z, causal, gradient, grad_blend, needs_k, needs_z)
        return tuple(x for x in grads if x is not None)

    used = tuple(c for c, needed in zip(cotangents, (True, needs_k, needs_z), strict=True) if needed)
    _, pull_back = torch.func.vjp(formula, *ctx.saved_tensors)
    return (*pull_back(used), None) + (None,) * 6


def tangent(primals: tuple[Tensor, Tensor, Tensor], tangents: Sequence[Tensor | None], causal: bool) -> Tensor:
    """Forward mode: dG (M, N) complex, the exact derivative whatever direction ``gradient`` names for the backward.

    ``primals`` are a (M, N), k (1 or M, N - 1) and z (M,); ``tangents`` have their shapes and dtypes, None stands for 0.
    """
    return torch_backend.tangent(*primals, causal, *_tangents(primals, tangents))


def _jvp(ctx, *tangents):
    return tangent(ctx.saved_tensors, tangents[:3], ctx.settings[0])


def _backward_jvp(ctx, gbar_dot, a_dot, k_dot, z_dot, *_):
    causal, gradient, grad_blend, _backend, needs_k, needs_z = ctx.settings
    empty = ctx.saved_tensors[3].new_empty(0)

    def formula(*x):
        grads = differentiable_backward(*x, causal, gradient, grad_blend, needs_k, needs_z)
        return tuple(empty if y is None else y for y in grads)

    tangents = _tangents(ctx.saved_tensors, (gbar_dot, a_dot, k_dot, z_dot))
    return torch.func.jvp(formula, ctx.saved_tensors, tangents)[1]


def _tangents(primals, tangents):
    return tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))


def rows_of(x: Tensor, dim: int | None) -> int:
    """M of an argument (M, ...) that may be batched along ``dim``."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A batched (or repeated unbatched) argument as (size * M, ...)."""
    rows = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    return rows.flatten(0, 1)


def fold_k(k: Tensor, dim: int | None, size: int, m: int) -> Tensor:
    """As :func:`fold` for k (M or 1, N - 1): one row shared by everything stays one row."""
    if dim is None and k.shape[0] == 1:
        return k
    rows = k.movedim(dim, 0) if dim is not None else k.expand(size, *k.shape)
    return rows.expand(size, m, k.shape[-1]).flatten(0, 1)


def _vmap(op, info, in_dims, a, k, z, *settings):
    size, m = info.batch_size, rows_of(a, in_dims[0])
    rows_a, rows_z = fold(a, in_dims[0], size), fold(z, in_dims[2], size)
    G = op(rows_a, fold_k(k, in_dims[1], size, m), rows_z, *settings)
    return G.unflatten(0, (size, m)), 0


def _backward_vmap(op, info, in_dims, gbar, a, k, z, G, *settings):
    size, m = info.batch_size, rows_of(a, in_dims[1])
    rows = [fold(x, in_dims[i], size) for i, x in ((0, gbar), (1, a), (3, z), (4, G))]
    rows.insert(2, fold_k(k, in_dims[2], size, m))
    grads = op(*rows, *settings)
    kept = (True, *settings[-2:])  # needs_k, needs_z
    unfolded = [
        x.unflatten(0, (size, m)) if keep else x.expand(size, 0) for x, keep in zip(grads, kept, strict=True)
    ]
    return tuple(unfolded), (0, 0, 0)


resolvent_diagonal.register_autograd(
    lambda ctx, gbar: _vjp(ctx, gbar, resolvent_diagonal_backward), setup_context=_setup
)
resolvent_diagonal.register_vmap(lambda *args: _vmap(resolvent_diagonal, *args))
resolvent_diagonal_backward.register_autograd(_backward_vjp, setup_context=_backward_setup)
resolvent_diagonal_backward.register_vmap(lambda *args: _backward_vmap(resolvent_diagonal_backward, *args))


class Transformable(torch.autograd.Function):
    """The op for torch.func: the autograd that custom_op generates does not compose with grad, jacrev or hessian."""

    @staticmethod
    def forward(*args):
        return resolvent_diagonal(*args)

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, gbar):
        return _vjp(ctx, gbar, TransformableBackward.apply)

    jvp = staticmethod(_jvp)

    @staticmethod
    def vmap(*args):
        return _vmap(Transformable.apply, *args)


class TransformableBackward(torch.autograd.Function):
    """As :class:`Transformable` for the backward op."""

    @staticmethod
    def forward(*args):
        return resolvent_diagonal_backward(*args)

    setup_context = staticmethod(_backward_setup)
    backward = staticmethod(_backward_vjp)
    jvp = staticmethod(_backward_jvp)

    @staticmethod
    def vmap(*args):
        return _backward_vmap(TransformableBackward.apply, *args)
