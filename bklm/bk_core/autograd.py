"""The operator on rows, with its gradients: registered in torch.library, and the shorter road of eager mode.

    torch.ops.bklm.resolvent_diagonal(a, k, z, causal, gradient, grad_blend, backend) -> G

Shapes as in backends.py. torch.compile, vmap, torch.func and tracing go through the registered op. Plain eager calls go
through an autograd.Function that does the same with a fraction of the overhead and may keep what the backend saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, pivots, torch_backend
from .reference import hypothesis7_gradient, local_gradient, original_gradient


def apply(
    a: Tensor,
    k: Tensor,
    z: Tensor,
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
    contracts: bool,
) -> Tensor:
    """G (M, N). ``contracts``: the caller knows that k >= 0, a is real and Im z != 0, so pivots need no check."""
    if _plain_eager(a, k, z):
        return _Eager.apply(a, k, z, causal, gradient, grad_blend, backend, contracts)
    return _op(a, k, z, causal, gradient, grad_blend, backend)


def _plain_eager(*tensors: Tensor) -> bool:
    """No tracing, no functorch transform, no dispatch mode, no tensor subclass."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, k, z, causal, gradient, grad_blend, backend, contracts):
        chosen = backends.select(backend, a.device)
        G, saved = chosen.forward(a, k, z, causal)
        if not contracts:
            pivots.check(a, k, z, G, causal, chosen)
        ctx.save_for_backward(a, k, z, G, *saved)
        ctx.settings = causal, gradient, grad_blend, backend
        return G

    @staticmethod
    def backward(ctx, gbar):
        a, k, z, G, *saved = ctx.saved_tensors
        causal, gradient, grad_blend, backend = ctx.settings
        needs_k, needs_z = ctx.needs_input_grad[1:3]
        settings = causal, gradient, grad_blend
        if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
            grads = _differentiable_backward(gbar, a, k, z, *settings, needs_k, needs_z)
        else:
            grads = _backward(gbar, a, k, z, G, tuple(saved), *settings, backend, needs_k, needs_z)
        return _in_torch_convention(grads, a, k) + (None,) * 5


def _backward(gbar, a, k, z, G, saved, causal, gradient, grad_blend, backend, needs_k, needs_z):
    """(grad_a, K, Dsum) of backends.py with the chosen direction in place of D for ``a``."""
    if gradient == "exact" and grad_blend < 1 or needs_k or needs_z:
        chosen = backends.select(backend, a.device)
        grad_a, K, Dsum = chosen.backward(gbar.contiguous(), a, k, z, G, saved, causal, needs_k, needs_z)
    else:
        grad_a = K = Dsum = None
    return _direction(grad_a, gbar, G, a.is_complex(), gradient, grad_blend), K, Dsum


def _differentiable_backward(gbar, a, k, z, causal, gradient, grad_blend, needs_k, needs_z):
    """As :func:`_backward` in differentiable operations of gbar, a, k and z."""
    grad_a = K = Dsum = G = None
    if gradient == "exact" and grad_blend < 1 or needs_k or needs_z:
        grad_a, K, Dsum = torch_backend.backward(gbar, a, k, z, None, (), causal, needs_k, needs_z)
    if gradient != "exact" or grad_blend > 0:
        G = torch_backend.forward(a, k, z, causal)[0]
    return _direction(grad_a, gbar, G, a.is_complex(), gradient, grad_blend), K, Dsum


def _direction(exact, gbar, G, complex_a, gradient, grad_blend):
    """The theory gradient blended with hypothesis-7, for ``a``; D's convention for complex ``a``."""
    if gradient == "original":
        return original_gradient(gbar, G, grad_blend)
    if grad_blend == 0:
        return exact if gradient == "exact" else local_gradient(gbar, G, complex_a)
    other = hypothesis7_gradient(gbar, G, complex_a)
    if grad_blend == 1:
        return other
    theory = exact if gradient == "exact" else local_gradient(gbar, G, complex_a)
    return (1 - grad_blend) * theory + grad_blend * other


def _in_torch_convention(grads, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_a, K, Dsum) as the gradients of a, k (summed over rows where k is shared) and z: conjugates for complex."""
    grad_a, K, Dsum = grads
    if a.is_complex():
        grad_a = grad_a.conj()
    if K is not None:
        K = K.conj() if k.is_complex() else K.real
        if k.shape[0] == 1:
            K = K.sum(0, keepdim=True)
    return grad_a, K, None if Dsum is None else -Dsum.conj()


# --- the registered op ------------------------------------------------------------------------------------------------


@torch.library.custom_op("bklm::resolvent_diagonal", mutates_args=())
def _op(
    a: Tensor, k: Tensor, z: Tensor, causal: bool, gradient: str, grad_blend: float, backend: str
) -> Tensor:
    chosen = backends.select(backend, a.device)
    pivots.check_shift(z)
    G = chosen.forward(a.contiguous(), k.contiguous(), z.contiguous(), causal)[0]
    pivots.check(a, k, z, G, causal, chosen)
    return G


@torch.library.custom_op("bklm::resolvent_diagonal_backward", mutates_args=())
def _op_backward(
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
    a, k, z, G = a.contiguous(), k.contiguous(), z.contiguous(), G.contiguous()
    grads = _backward(gbar, a, k, z, G, (), causal, gradient, grad_blend, backend, needs_k, needs_z)
    return tuple(z.new_empty(0) if x is None else x for x in grads)


@_op.register_fake
def _(a, k, z, causal, gradient, grad_blend, backend):
    return torch.empty(a.shape, dtype=z.dtype, device=a.device)


@_op_backward.register_fake
def _(gbar, a, k, z, G, causal, gradient, grad_blend, backend, needs_k, needs_z):
    m, n = a.shape
    grad_a = torch.empty((m, n), dtype=a.dtype, device=a.device)
    return grad_a, z.new_empty((m, n - 1) if needs_k else 0), z.new_empty(m if needs_z else 0)


def _op_setup(ctx, inputs, output):
    a, k, z, *settings = inputs
    ctx.save_for_backward(a, k, z, output)
    ctx.settings = tuple(settings)


def _op_vjp(ctx, gbar):
    a, k, z, G = ctx.saved_tensors
    needs_k, needs_z = ctx.needs_input_grad[1:3]
    grads = _op_backward(gbar, a, k, z, G, *ctx.settings, needs_k, needs_z)
    kept = grads[0], grads[1] if needs_k else None, grads[2] if needs_z else None
    return _in_torch_convention(kept, a, k) + (None,) * 4


_op.register_autograd(_op_vjp, setup_context=_op_setup)


def _op_backward_setup(ctx, inputs, output):
    gbar, a, k, z, _G, *settings = inputs
    ctx.save_for_backward(gbar, a, k, z)
    ctx.settings = tuple(settings)


def _op_backward_vjp(ctx, *cotangents):
    causal, gradient, grad_blend, _backend, needs_k, needs_z = ctx.settings

    def formula(gbar, a, k, z):
        grads = _differentiable_backward(gbar, a, k, z, causal, gradient, grad_blend, needs_k, needs_z)
        return tuple(x for x in grads if x is not None)

    used = tuple(c for c, needed in zip(cotangents, (True, needs_k, needs_z), strict=True) if needed)
    _, pull_back = torch.func.vjp(formula, *ctx.saved_tensors)
    return (*pull_back(used), None) + (None,) * 6


_op_backward.register_autograd(_op_backward_vjp, setup_context=_op_backward_setup)


def _rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A batched argument with its batch dimension first, an unbatched one repeated."""
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def _fold(size: int, dims, *tensors: Tensor) -> list[Tensor]:
    """(size, M, ...) -> (size * M, ...) for each argument; ``k`` shared by all rows stays one row."""
    return [_rows(x, dim, size).flatten(0, 1) for x, dim in zip(tensors, dims, strict=True)]


def _fold_k(size: int, dim: int | None, k: Tensor, m: int) -> Tensor:
    if dim is None and k.shape[0] == 1:
        return k
    k = _rows(k, dim, size)
    return k.expand(size, m, k.shape[-1]).flatten(0, 1)


@_op.register_vmap
def _(info, in_dims, a, k, z, *settings):
    size = info.batch_size
    rows_a, rows_z = _fold(size, (in_dims[0], in_dims[2]), a, z)
    m = rows_a.shape[0] // size
    G = _op(rows_a, _fold_k(size, in_dims[1], k, m), rows_z, *settings)
    return G.unflatten(0, (size, m)), 0


@_op_backward.register_vmap
def _(info, in_dims, gbar, a, k, z, G, *settings):
    size = info.batch_size
    dims = in_dims[0], in_dims[1], in_dims[3], in_dims[4]
    rows_gbar, rows_a, rows_z, rows_G = _fold(size, dims, gbar, a, z, G)
    m = rows_a.shape[0] // size
    rows_k = _fold_k(size, in_dims[2], k, m)
    grads = _op_backward(rows_gbar, rows_a, rows_k, rows_z, rows_G, *settings)
    needed = (True, *settings[-2:])
    unfolded = tuple(
        x.unflatten(0, (size, m)) if keep else x.expand(size, 0) for x, keep in zip(grads, needed, strict=True)
    )
    return unfolded, (0, 0, 0)
