"""The numba backend: ``forward`` and ``backward`` on CPU tensors, rows flattened to M. Contract: see backends.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import cpu_rows


def _array(x: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array."""
    return x.detach().numpy()


def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """G (M, N) for a (M, N), k (1 or M, N - 1), z (M,); nothing is saved."""
    m, n = a.shape
    G = torch.empty(m, n, dtype=z.dtype)
    scratch = np.empty(1 if causal else n, np.complex128)
    cpu_rows.forward_rows(_array(a), _array(k), _array(z), causal, _array(G), scratch, 0, m)
    return G, ()


def backward(
    gbar: Tensor,
    a: Tensor,
    k: Tensor,
    z: Tensor,
    G: Tensor,
    saved: tuple[Tensor, ...],
    causal: bool,
    needs_k: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_a, K or None, sum of D or None) as in backends.py."""
    m, n = a.shape
    D = np.empty((m, n), np.complex128)
    K = torch.empty((m, n - 1) if needs_k else (0, 0), dtype=z.dtype)
    Dsum = torch.empty(m, dtype=z.dtype)
    args = (D, _array(K), needs_k, _array(Dsum))
    if causal:
        cpu_rows.backward_causal_rows(_array(gbar), _array(k), _array(G), 0, m, *args)
    else:
        left, right = np.empty(n, np.complex128), np.empty(n, np.complex128)
        cpu_rows.backward_rows(
            _array(gbar), _array(a), _array(k), _array(z), _array(G), 0, m, left, right, *args
        )
    grad = torch.from_numpy(D if a.is_complex() else D.real).to(a.dtype)
    return grad.contiguous(), K if needs_k else None, Dsum if needs_z else None
