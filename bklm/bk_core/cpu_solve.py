"""The numba solver: rows shared among threads, kernels for several columns. Contract: solve_backends.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core import cpu_solve_adjoint, cpu_solve_columns, threads
from bklm.bk_core.cpu_scratch import SCRATCH_LENGTH

THREADS_FROM = 2**14
"""Elements of y; below, waking another thread costs about what it saves."""

_NUMPY = {torch.complex64: np.float32, torch.complex128: np.float64}


def causal_rows(x: Tensor, left: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), c (1 or M, N - 1)."""
    m, n, columns = x.shape
    y = torch.empty(x.shape, dtype=left.dtype)
    rest = (
        x.data_ptr(),
        not x.is_complex(),
        y.data_ptr(),
        left.data_ptr(),
        *_between(c),
        m,
        n,
        columns,
        reverse,
    )
    _run(cpu_solve_columns.causal_columns, rest, m, y)
    return y


def tridiagonal_rows(x: Tensor, left: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), b and c (1 or M, N - 1)."""
    m, n, columns = x.shape
    y = torch.empty(x.shape, dtype=left.dtype)
    rest = (
        x.data_ptr(),
        not x.is_complex(),
        y.data_ptr(),
        left.data_ptr(),
        *_between(b),
        *_between(c),
        m,
        n,
        columns,
    )
    _run(cpu_solve_columns.tridiagonal_columns, rest, m, y)
    return y


def causal_adjoint(
    gbar: Tensor, left: Tensor, c: Tensor, y: Tensor, reverse: bool, real: bool, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g, S, C) of solve_backends.py."""
    g, S, _, C = _adjoint(gbar, left, None, c, y, reverse, real, sums)
    return g, S, C


def tridiagonal_adjoint(
    gbar: Tensor, left: Tensor, b: Tensor, c: Tensor, y: Tensor, real: bool, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(g, S, B, C) of solve_backends.py."""
    return _adjoint(gbar, left, b, c, y, False, real, sums)


def _adjoint(gbar, left, b, c, y, reverse, real, sums):
    m, n, columns = gbar.shape
    g = torch.empty(gbar.shape, dtype=left.real.dtype if real else left.dtype)
    S = torch.empty(m, n, dtype=left.dtype) if sums else None
    B = torch.empty(m, n - 1, dtype=left.dtype) if sums and b is not None else None
    C = torch.empty(m, n - 1, dtype=left.dtype) if sums else None
    both = b is not None
    rest = (
        *(g.data_ptr(), real, y.data_ptr(), left.data_ptr(), *_between(c if b is None else b), *_between(c)),
        *(0 if t is None else t.data_ptr() for t in (S, B, C)),
        *(m, n, columns, reverse, sums, both),
    )
    dtype = _NUMPY[left.dtype]

    def part(first: int, last: int) -> None:
        buffer = np.empty(2 * n * columns if both else 0, dtype)
        cpu_solve_adjoint.adjoint_columns(
            threads.scratch(SCRATCH_LENGTH, dtype), first, last, gbar.data_ptr(), buffer.ctypes.data, *rest
        )

    threads.split(part, m, g.numel() >= THREADS_FROM)
    return g, S, B, C


def _run(kernel, rest: tuple, m: int, y: Tensor) -> None:
    """A forward kernel over all rows."""
    dtype = _NUMPY[y.dtype]

    def part(first: int, last: int) -> None:
        kernel(threads.scratch(SCRATCH_LENGTH, dtype), first, last, *rest)

    threads.split(part, m, y.numel() >= THREADS_FROM)


def _between(c: Tensor) -> tuple[int, int, bool]:
    """Address of b or c, its row stride in elements, whether it is complex."""
    return c.data_ptr(), c.shape[1] if c.shape[0] > 1 else 0, c.is_complex()
