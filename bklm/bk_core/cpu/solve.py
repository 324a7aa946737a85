"""The numba solver. Contract: solve_backends.py.

Dispatch, whose limits were measured once by hand on 2 cores:

- fewer than COLUMNS columns: lines, one column of one row each. Short ones side by side in the lanes (solve_tiles.py), others
  one after the other in one pass (solve_lines.py), or, bidirectional with a long memory, cut into tiles. How depends on M, N
  and D alone, so results are deterministic.
- else SIMD over the columns of one row after the other (solve_columns.py, solve_adjoint.py).
- more than one thread from THREADS_FROM elements of y on, in more than one part each from PARTS_FROM on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core.cpu import solve_adjoint, solve_columns, solve_join, solve_lines, solve_tiles, threads
from bklm.bk_core.cpu.scratch import SCRATCH_LENGTH

COLUMNS = 8
LINES_FROM = solve_tiles.TILE
"""Positions; up to here a tile is a whole line."""
THREADS_FROM = 2**16
"""Below, waking another thread costs about what it saves."""
PARTS_FROM = 2**20
"""Below, a thread has one part: four took a quarter to two fifths longer at (32, 128, 32) (measured once by hand)."""

_NUMPY = {torch.complex64: np.float32, torch.complex128: np.float64}


def causal_rows(x: Tensor, left: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), c (1 or M, N - 1)."""
    m, n, columns = x.shape
    if columns < COLUMNS:
        return _few_columns(x, left, None, c, from_left=not reverse, conjugate=False)
    y = torch.empty(x.shape, dtype=left.dtype, device="cpu")
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
    _run(solve_columns.causal_columns, rest, m, y)
    return y


def tridiagonal_rows(x: Tensor, left: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), b and c (1 or M, N - 1)."""
    m, n, columns = x.shape
    if columns < COLUMNS:
        return _few_columns(x, left, c, b, from_left=False, conjugate=False)
    y = torch.empty(x.shape, dtype=left.dtype, device="cpu")
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
    _run(solve_columns.tridiagonal_columns, rest, m, y)
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
    both = b is not None
    S = torch.empty(m, n, dtype=left.dtype, device="cpu") if sums else None
    B = torch.empty(m, n - 1, dtype=left.dtype, device="cpu") if sums and both else None
    C = torch.empty(m, n - 1, dtype=left.dtype, device="cpu") if sums else None
    found = tuple(0 if t is None else t.data_ptr() for t in (S, B, C))
    dtype = _NUMPY[left.dtype]
    if columns < COLUMNS:
        g = _few_columns(gbar, left, b, c, from_left=reverse, conjugate=True)
        if sums:
            rest = (g.data_ptr(), y.data_ptr(), *found, n, columns, reverse, both)
            _run(solve_join.sum_columns, rest, m, g)
        return g.real.contiguous() if real else g, S, B, C
    g = torch.empty(gbar.shape, dtype=left.real.dtype if real else left.dtype, device="cpu")
    rest = (
        *(g.data_ptr(), real, y.data_ptr(), left.data_ptr(), *_between(b if both else c), *_between(c), *found),
        *(m, n, columns, reverse, sums, both),
    )

    def part(first: int, last: int) -> None:
        buffer = np.empty(2 * n * columns if both else 0, dtype)
        solve_adjoint.adjoint_columns(
            threads.scratch(SCRATCH_LENGTH, dtype), first, last, gbar.data_ptr(), buffer.ctypes.data, *rest
        )

    _split(part, m, g)
    return g, S, B, C


def _few_columns(
    x: Tensor, left: Tensor, f: Tensor | None, e: Tensor, from_left: bool, conjugate: bool
) -> Tensor:
    """y (M, N, D) with the couplings f of the elimination (None: there is none) and e of the substitution."""
    m, n, columns = x.shape
    if n <= LINES_FROM:
        return _tiles(x, left, f, e, from_left, conjugate)
    y, left_out = _lines(x, left, f, e, from_left, conjugate)
    if left_out is not None:
        tiled = _tiles(x, left, f, e, from_left, conjugate)
        y = torch.where(left_out.view(m, 1, columns), tiled, y)
    return y


def _tiles(x: Tensor, left: Tensor, f: Tensor | None, e: Tensor, from_left: bool, conjugate: bool) -> Tensor:
    """As :func:`_few_columns`, tiles of lines side by side."""
    m, n, columns = x.shape
    lines = m * columns
    n_tiles = -(-n // solve_tiles.TILE)
    tile = -(-n // n_tiles)
    y = torch.empty(x.shape, dtype=left.dtype, device="cpu")
    both = f is not None
    joined = n_tiles > 1
    summary = (
        torch.empty(lines * n_tiles, solve_tiles.SUMMARY, dtype=left.real.dtype, device="cpu")
        if joined
        else None
    )
    entering = torch.empty(lines * n_tiles, 2, dtype=left.dtype, device="cpu") if joined else None
    addresses = (summary.data_ptr(), entering.data_ptr()) if joined else (0, 0)
    rest = (
        *(
            x.data_ptr(),
            not x.is_complex(),
            y.data_ptr(),
            left.data_ptr(),
            *_between(e),
            *_between(f if both else e),
        ),
        *(*addresses, m, n, columns, tile, n_tiles, both, from_left, conjugate),
    )
    groups = -(-lines * n_tiles // solve_tiles.LANES)
    if joined:
        _run(solve_tiles.solve_tiles, (*rest, True), groups, y)
        solve_join.join(
            threads.scratch(SCRATCH_LENGTH, _NUMPY[left.dtype]), *addresses, lines, n_tiles, both, from_left
        )
    _run(solve_tiles.solve_tiles, (*rest, False), groups, y)
    return y


def _lines(
    x: Tensor, left: Tensor, f: Tensor | None, e: Tensor, from_left: bool, conjugate: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_few_columns`, one line after the other; and which lines (M D) are not done, None for none."""
    m, n, columns = x.shape
    both = f is not None
    n_chunks = -(-n // solve_lines.CHUNK) if both else 1
    y = torch.empty(x.shape, dtype=left.dtype, device="cpu")
    failed = torch.zeros(m * columns, dtype=left.real.dtype, device="cpu")
    rest = (
        *(x.data_ptr(), not x.is_complex(), y.data_ptr(), left.data_ptr()),
        *(*_between(e), *_between(f if both else e), failed.data_ptr()),
        *(m, n, columns, -(-n // n_chunks), n_chunks, both, from_left, conjugate),
    )
    _run(solve_lines.solve_lines, rest, m * columns * n_chunks, y)
    return y, failed != 0 if n_chunks > 1 and failed.any() else None


def _run(kernel, rest: tuple, count: int, y: Tensor) -> None:
    """kernel(scratch, first, last, ...) over ``count`` rows or groups, shared among threads."""
    dtype = _NUMPY[y.dtype]

    def part(first: int, last: int) -> None:
        kernel(threads.scratch(SCRATCH_LENGTH, dtype), first, last, *rest)

    _split(part, count, y)


def _split(part: Callable[[int, int], None], count: int, y: Tensor) -> None:
    parts = threads.PARTS_PER_THREAD if y.numel() >= PARTS_FROM else 1
    threads.split(part, count, y.numel() >= THREADS_FROM, parts)


def _between(c: Tensor) -> tuple[int, int, bool]:
    """Address of b or c, its row stride in elements, whether it is complex."""
    return c.data_ptr(), c.shape[1] if c.shape[0] > 1 else 0, c.is_complex()
