"""Which code computes a call: the names of the backends, where each is usable, and the one dispatch rule.

A backend is a module with two functions on rows flattened to M (N >= 1, M >= 1, one device, one precision):

    forward(a, k, z, causal) -> (G, saved)
        a (M, N) real or complex; k (M or 1, N - 1) real or complex, k_i = b_i c_i; z (M,) complex; G (M, N) complex;
        saved: a tuple of tensors that its own backward may use
    backward(gbar, a, k, z, G, saved, causal, needs_k, needs_z) -> (grad_a, K, Dsum)
        gbar = dL/dRe G + i dL/dIm G (M, N); saved may be (): recompute. grad_a (M, N) is Re D for real a, D for complex;
        K (M, N - 1) complex or None; Dsum (M,) = sum of D_i, complex, or None. Formulas: operator.py.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from bklm.bk_core import reference, torch_backend

NAMES = ("reference", "torch", "cpu", "triton")


class BackendUnavailableError(OSError):
    """The named backend cannot run on this machine or on the device of the tensors."""


@functools.cache
def cpu_backend() -> ModuleType:
    """The numba backend, imported on first use: numba takes longer to import than all the rest of the operator."""
    from bklm.bk_core.cpu import backend as cpu

    return cpu


@functools.cache
def _gpu() -> ModuleType | None:
    """The Triton backend, imported on first use; None where it says that it is not usable."""
    from bklm.bk_core.gpu import backend as gpu

    return gpu if gpu.is_available() else None


def available_backends() -> list[str]:
    """Names that ``resolvent_diagonal(backend=...)`` accepts on this machine, besides "auto".

    "triton" is listed with CUDA and Triton, or with Triton's interpreter (``TRITON_INTERPRET=1``), which runs on CPU
    tensors and is for tests.
    """
    return [name for name in NAMES if name != "triton" or _gpu() is not None]


class _Reference:
    """reference.left_right behind the backend contract, and its adjoint."""

    @staticmethod
    def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return reference.left_right(a, k, torch.ones_like(k), z, causal), ()

    @staticmethod
    def backward(gbar, a, k, z, G, saved, causal, needs_k, needs_z):
        # Not autograd through the loop: below a registered op nothing is recorded, so that it fails under transforms.
        D, K = reference.left_right_adjoint(gbar, a, k, torch.ones_like(k), z, causal)
        return D if a.is_complex() else D.real, K if needs_k else None, D.sum(-1) if needs_z else None


def select(name: str, device: torch.device) -> ModuleType | type[_Reference]:
    """The backend for a call: what has the ``forward`` and ``backward`` of this module's docstring.

    The rule behind "auto": numba on the CPU, Triton on CUDA where usable, else torch.

    Raises:
        BackendUnavailableError: the named backend does not run here, or not on this device.
        ValueError: there is none of that name.
    """
    kind = device.type
    if name == "auto":
        if kind == "cpu":
            return cpu_backend()
        return (kind == "cuda" and _gpu()) or torch_backend
    if name == "torch":
        return torch_backend
    if name == "reference":
        return _Reference
    if name == "cpu":
        if kind != "cpu":
            raise BackendUnavailableError(
                f"backend='cpu' needs CPU tensors, the inputs are on {device}: move them, or use backend='auto'."
            )
        return cpu_backend()
    if name == "triton":
        gpu = _gpu()
        if gpu is None:
            raise BackendUnavailableError(
                f"backend='triton' is not usable here (Triton with CUDA, or TRITON_INTERPRET=1, is needed): "
                f"use one of {available_backends()} or 'auto'."
            )
        return gpu
    raise ValueError(f"backend={name!r} is unknown: use 'auto' or one of {list(NAMES)}.")
