"""The operator on rows, with its gradients: registered in torch.library, and the shorter road of eager mode.

    torch.ops.bklm.resolvent_diagonal(a, k, z, causal, gradient, grad_blend, backend) -> G

Shapes as in backends.py. Three roads to the same numbers, chosen in :func:`apply`:

- tracing, torch.compile, tensor subclasses: the registered op (torch.library), see ops.py;
- torch.func transforms: the same op inside an autograd.Function that composes with them, see ops.py;
- plain eager calls: an autograd.Function that skips the dispatcher and may keep what the backend saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, ops, pivots
from .gradients import differentiable_backward, in_torch_convention, materialised, rows_backward


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
    if is_plain(a, k, z):
        if not (torch.is_grad_enabled() and (a.requires_grad or k.requires_grad or z.requires_grad)):
            return _forward(a, k, z, causal, backend, contracts)[0]
        return _Eager.apply(a, k, z, causal, gradient, grad_blend, backend, contracts)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return ops.resolvent_diagonal(a, k, z, causal, gradient, grad_blend, backend)
    return ops.Transformable.apply(a, k, z, causal, gradient, grad_blend, backend)


def is_plain(*tensors: Tensor) -> bool:
    """Eager, and no functorch transform, no dispatch mode, no tensor subclass: values may be looked at."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _forward(a, k, z, causal, backend, contracts):
    """(G, what the backend wants to keep), checked."""
    chosen = backends.select(backend, a.device)
    G, saved = chosen.forward(a, k, z, causal)
    if not contracts:
        pivots.check(a, k, z, G, causal, chosen)
    return G, saved


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, k, z, causal, gradient, grad_blend, backend, contracts):
        G, saved = _forward(a, k, z, causal, backend, contracts)
        ctx.save_for_backward(a, k, z, G, *saved)
        ctx.settings = causal, gradient, grad_blend, backend
        return G

    @staticmethod
    def backward(ctx, gbar):
        a, k, z, G, *saved = ctx.saved_tensors
        gbar = materialised(gbar)
        causal, gradient, grad_blend, backend = ctx.settings
        needs_k, needs_z = ctx.needs_input_grad[1:3]
        settings = causal, gradient, grad_blend
        if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
            grads = differentiable_backward(gbar, a, k, z, *settings, needs_k, needs_z)
        else:
            grads = rows_backward(gbar, a, k, z, G, tuple(saved), *settings, backend, needs_k, needs_z)
        return in_torch_convention(grads, a, k) + (None,) * 5
