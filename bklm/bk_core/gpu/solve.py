"""The solve on a GPU: Triton kernels for linear recurrences along rows. Contract: solve_backends.py.

With L from the diagonal's kernels (gpu.py), either solve is one or two linear recurrences (gpu/solve_sweep.py). Many or
short lines take one launch each; otherwise lines are cut into chunks, whose maps are scanned by torch_backend.linear_scan:
the recurrences are linear, and in 32 bits such a scan is as accurate as the sequential recurrence (gpu.py).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from bklm.bk_core.gpu import solve_sweep
from bklm.bk_core.torch_backend import linear_scan

LANES = 32
SEQUENTIAL_N = 256  # up to here a line is not cut
SEQUENTIAL_LINES = 32768  # so many lines fill a GPU by themselves
SHORTEST_CHUNK = 64


def causal_rows(x: Tensor, left: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), c (1 or M, N - 1)."""
    return _recurrence(x, left, c, reverse, scaled=True)


def tridiagonal_rows(x: Tensor, left: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y (M, N, D) for x (M, N, D), left (M, N), b and c (1 or M, N - 1)."""
    return _recurrence(_recurrence(x, left, c, False, scaled=True), left, b, True, scaled=False)


def chunk_length(lines: int, n: int) -> int:
    """Positions of a chunk, a multiple of 8; at least n where lines are not cut."""
    if n <= SEQUENTIAL_N or lines >= SEQUENTIAL_LINES:
        return -(-n // 8) * 8
    return max(SHORTEST_CHUNK, -(-lines * n // SEQUENTIAL_LINES // 8) * 8)


def _recurrence(x: Tensor, left: Tensor, e: Tensor, reverse: bool, scaled: bool) -> Tensor:
    """y_i = L_i x_i - L_i e y_before, not ``scaled`` x_i - L_i e y_before; before is i - 1, with ``reverse`` i + 1."""
    m, n, columns = x.shape
    chunk = chunk_length(m * columns, n)
    chunks = -(-n // chunk)
    y = torch.empty(x.shape, dtype=left.dtype, device=x.device)
    sizes = n, chunk, chunks, columns, m * chunks * columns, e.shape[1] if e.shape[0] > 1 else 0
    flags = {"REVERSE": reverse, "SCALED": scaled, "CHUNKED": chunks > 1}
    entering = maps = y  # not touched by a launch that does not cut lines
    if chunks > 1:
        maps = torch.empty((2, m, chunks, columns), dtype=left.dtype, device=x.device)
        _launch(x, left, e, entering, y, maps, sizes, MAPS=True, **flags)
        factor, own = (t.flip(1) for t in maps) if reverse else maps
        ends = torch.stack([linear_scan(factor[..., d], own[..., d]) for d in range(columns)], dim=-1)
        entering = torch.zeros_like(own)
        entering[:, 1:] = ends[:, :-1]
        entering = entering.flip(1).contiguous() if reverse else entering
    _launch(x, left, e, entering, y, maps, sizes, MAPS=False, **flags)
    return y


def _launch(
    x: Tensor,
    left: Tensor,
    e: Tensor,
    entering: Tensor,
    y: Tensor,
    maps: Tensor,
    sizes: tuple[int, ...],
    **flags: bool,
) -> None:
    """Start the kernel on the device of ``x``, which need not be the current one."""
    operands = (torch.view_as_real(t) if t.is_complex() else t for t in (x, left, e, entering, y, maps))
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device:
        solve_sweep.linear_sweep[(-(-sizes[4] // LANES),)](
            *operands,
            *sizes,
            X_COMPLEX=x.is_complex(),
            E_COMPLEX=e.is_complex(),
            LANES=LANES,
            num_warps=1,
            **flags,
        )
