"""From gbar to the gradients of a, k and z: the exact adjoint, the local and published directions, and their blend."""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core import backends, torch_backend
from bklm.bk_core.reference import conjugate, hypothesis7_gradient, local_gradient, original_gradient


def materialised(x: Tensor) -> Tensor:
    """Contiguous memory with its values as they are: no pending conjugation or negation (views such as x.conj().imag)."""
    if not torch.compiler.is_compiling() and x.is_contiguous() and not (x.is_conj() or x.is_neg()):
        return x
    return x.resolve_conj().resolve_neg().contiguous()


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(grad_a, K, Dsum) as in backends.py: (M, N) real for real a, else complex; (M, N - 1) and (M,) complex, or None."""


def rows_backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor,
    saved: tuple[Tensor, ...],
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
    needs_k: bool,
    needs_z: bool,
) -> Grads:
    """The chosen direction for ``a`` in place of D; K and Dsum are exact, and None where not needed.

    gbar and G (M, N) complex, a (M, N), k (1 or M, N - 1), z (M,) complex, all of one precision; ``saved`` is what the
    backend's forward returned, or (). Not differentiable.
    """
    if (gradient == "exact" and grad_blend < 1) or needs_k or needs_z:
        chosen = backends.select(backend, a.device)
        grad_a, K, Dsum = chosen.backward(gbar, a, k, z, G, saved, causal, needs_k, needs_z)
    else:
        grad_a = K = Dsum = None
    return _direction(grad_a, gbar, G, a.is_complex(), gradient, grad_blend), K, Dsum


def differentiable_backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    causal: bool,
    gradient: str,
    grad_blend: float,
    needs_k: bool,
    needs_z: bool,
) -> Grads:
    """As :func:`rows_backward`, shapes and dtypes too, in differentiable torch operations of gbar, a, k and z."""
    grad_a = K = Dsum = G = None
    if (gradient == "exact" and grad_blend < 1) or needs_k or needs_z:
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


def in_torch_convention(grads, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_a, K, Dsum) as the gradients of a, k (summed over rows where k is shared) and z: conjugates for complex."""
    grad_a, K, Dsum = grads
    if a.is_complex():
        grad_a = conjugate(grad_a)
    if K is not None:
        K = conjugate(K) if k.is_complex() else K.real
        if k.shape[0] == 1:
            K = K.sum(0, keepdim=True)
    return grad_a, K, None if Dsum is None else -conjugate(Dsum)
