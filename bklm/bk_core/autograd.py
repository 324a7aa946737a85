"""The operator on rows, with its gradients: registered in torch.library, with a shorter way for plain eager calls.

    torch.ops.bklm.resolvent_diagonal(a, k, z, causal, gradient, grad_blend, backend) -> G

Shapes as in backends.py. Three ways to the same numbers, chosen in :func:`apply`:

- tracing, torch.compile, tensor subclasses: the registered op (torch.library), see ops.py;
- torch.func transforms: the same op inside an autograd.Function that composes with them, see ops.py;
- plain eager calls: an autograd.Function that skips the dispatcher and may keep what the backend saved. Its backward
  takes one of the other roads when only then something traces or maps over it (``is_grads_batched=True``).

Forward mode (torch.autograd.forward_ad) is an autograd.Function's business on either of the last two roads; the
registered op knows nothing of it, and would drop the tangent without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bklm.bk_core import backends, ops, pivots
from bklm.bk_core.gradients import differentiable_backward, in_torch_convention, materialised, rows_backward

Settings = tuple[bool, str, float, str, bool]
"""causal, gradient, grad_blend, backend, and whether pivots need no check; see :func:`apply`."""
Known = tuple[Tensor, Tensor, Settings, Any]
"""k, z and the settings of an earlier call, and what computes it: a backend, None where something else is to be done too."""

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
"""Of the vmap older than torch.func, which torch.autograd itself still maps with: its tensors show no other sign."""


def apply(
    a: Tensor,
    k: Tensor,
    z: Tensor,
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
    bounded: bool,
) -> Tensor:
    """G (M, N). ``bounded``: the caller knows that k >= 0, a is real and Im z != 0, so pivots need no check."""
    if is_plain(a, k, z):
        return eager(a, k, z, (causal, gradient, grad_blend, backend, bounded))
    if a.is_meta:
        # A named one that needs another device is refused here, as with values.
        backends.select(backend, a.device)
    composes = torch._C._are_functorch_transforms_active() or in_forward_mode()
    op = ops.Transformable.apply if composes and not torch.compiler.is_compiling() else ops.resolvent_diagonal
    return op(a, k, z, causal, gradient, grad_blend, backend, not bounded)


def eager(a: Tensor, k: Tensor, z: Tensor, settings: Settings) -> Tensor:
    """As :func:`apply` where everything :func:`is_plain`."""
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or k.requires_grad or z.requires_grad)
    if needs_grad or in_forward_mode():
        return _Eager.apply(a, k, z, settings)
    return _forward(a, k, z, settings)[0]


def known(a: Tensor, earlier: Known) -> Tensor:
    """As :func:`eager` with the k, z and settings of an earlier call, none of which wants a gradient; a (M, N) is real."""
    k, z, settings, backend = earlier
    if backend is None or in_forward_mode():
        return eager(a, k, z, settings)
    if a.requires_grad and torch.is_grad_enabled():
        return _Known.apply(a, earlier)
    return backend.forward(a, k, z, settings[0])[0]


def is_plain(*tensors: Tensor) -> bool:
    """Eager, and no vmap or other transform, no trace, no dispatch mode, no tensor subclass, no meta tensor: values may be
    looked at."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta and not _is_legacy_batched(t) for t in tensors
    )


def in_forward_mode() -> bool:
    """Inside forward_ad.dual_level: tensors may carry tangents."""
    return forward_ad._current_level >= 0


def _forward(a, k, z, settings):
    """G, checked, and the tensors that the backend keeps for the backward."""
    causal, _gradient, _grad_blend, backend, bounded = settings
    chosen = backends.select(backend, a.device)
    G, saved = chosen.forward(a, k, z, causal)
    if not bounded:
        pivots.check(a, k, z, G, causal, lambda *rows: chosen.forward(*rows, True)[0])
    return G, saved


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, k, z, settings):
        G, saved = _forward(a, k, z, settings)
        ctx.save_for_backward(a, k, z, G, *saved)
        if in_forward_mode():
            ctx.save_for_forward(a, k, z)
        ctx.settings = settings
        return G

    @staticmethod
    def backward(ctx, gbar):
        _, needs_k, needs_z, _ = ctx.needs_input_grad
        a, k, z, G, *saved = ctx.saved_tensors
        return (*_pull_back(gbar, a, k, z, G, saved, ctx.settings, needs_k, needs_z), None)

    @staticmethod
    def jvp(ctx, *tangents):
        return ops.tangent(ctx.saved_tensors, tangents[:3], ctx.settings[0])


class _Known(torch.autograd.Function):
    """As :class:`_Eager`, of :func:`known`: two tensors to keep in place of four, and nothing to decide."""

    @staticmethod
    def forward(ctx, a, earlier):
        k, z, settings, backend = earlier
        G, saved = backend.forward(a, k, z, settings[0])
        ctx.save_for_backward(a, G, *saved)
        ctx.earlier = earlier
        return G

    @staticmethod
    def backward(ctx, gbar):
        a, G, *saved = ctx.saved_tensors
        k, z, settings, backend = ctx.earlier
        if torch.is_grad_enabled() or in_forward_mode() or not is_plain(gbar):
            return _pull_back(gbar, a, k, z, G, saved, settings, False, False)[0], None
        return backend.backward(materialised(gbar), a, k, z, G, saved, settings[0], False, False)[0], None


def _pull_back(gbar, a, k, z, G, saved, settings, needs_k, needs_z):
    """Gradients of a, k and z in torch's convention, by the road that ``gbar`` asks for."""
    causal, gradient, grad_blend, backend, _bounded = settings
    if not is_plain(gbar):
        transforms = torch._C._are_functorch_transforms_active()
        op = ops.TransformableBackward.apply if transforms else ops.resolvent_diagonal_backward
        return ops.vjp(op, gbar, a, k, z, G, settings[:4], needs_k, needs_z)
    gbar = materialised(gbar)
    # These gradients will be differentiated, or already are.
    if torch.is_grad_enabled() or in_forward_mode():
        grads = differentiable_backward(gbar, a, k, z, causal, gradient, grad_blend, needs_k, needs_z)
    else:
        grads = rows_backward(gbar, a, k, z, G, saved, causal, gradient, grad_blend, backend, needs_k, needs_z)
    return in_torch_convention(grads, a, k)
