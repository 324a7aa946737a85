"""Which code solves: beside each backend of backends.py stands its solver, chosen by the same rule.

A solver is a module with functions on rows flattened to M (M, N, D >= 1, one device, one precision). x (M, N, D) real or
complex, left (M, N) complex (L of operator.py, left to right), b and c (1 or M, N - 1) real or complex; all contiguous:

    causal_rows(x, left, c, reverse) -> y
        y_i = L_i (x_i - c_{i-1} y_{i-1}); with ``reverse`` y_i = L_i (x_i - c_i y_{i+1})
    tridiagonal_rows(x, left, b, c) -> y
        w_i = L_i (x_i - c_{i-1} w_{i-1}), y_i = w_i - L_i b_i y_{i+1}

and, where one pass can do it ("cpu"), the first derivatives. gbar (M, N, D) is dl/dRe y + i dl/dIm y; g (M, N, D) is the
gradient of x in the same convention, its real part where ``real``; the sums, None without ``sums``, run over D columns:

    causal_adjoint(gbar, left, c, y, reverse, real, sums) -> (g, S, C)
        S_i = sum g_i conj(y_i) (M, N),  C_i = -sum g_{i+1} conj(y_i) (M, N - 1), with ``reverse`` -sum g_i conj(y_{i+1})
    tridiagonal_adjoint(gbar, left, b, c, y, real, sums) -> (g, S, B, C)
        B_i = -sum g_i conj(y_{i+1}) (M, N - 1), S and C as above; g complex in all sums
"""

from __future__ import annotations

from types import ModuleType

import torch

from bklm.bk_core import backends, solve_reference, solve_torch, torch_backend


def select(name: str, device: torch.device) -> ModuleType:
    """The solver for a call. Raises as :func:`bklm.bk_core.backends.select` does, whose rule this is."""
    chosen = backends.select(name, device)
    if chosen is torch_backend:
        return solve_torch
    if chosen is backends.select("reference", device):
        return solve_reference
    if name == "cpu" or (name == "auto" and device.type == "cpu"):
        from bklm.bk_core.cpu import solve as cpu_solve

        return cpu_solve
    from bklm.bk_core.gpu import solve as gpu_solve

    return gpu_solve
