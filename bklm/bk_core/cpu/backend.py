"""The numba backend: ``forward`` and ``backward`` on CPU tensors, rows flattened to M. Contract: backends.py.

Dispatch, whose limits were measured once by hand on 2 cores:

- ``a`` and ``k`` real: SIMD tiles (cpu/tiles.py). A row of at most SHORT_ROW positions, or LONGEST_TILE of
  ENOUGH_ROWS rows, is one tile; a longer one is cut into tiles of LONG_ROW_TILE, and into chunks where there
  are fewer than SWEEP_LANES rows. How a row is cut depends on M and N alone, never on the number of threads: results are
  deterministic.
- anything complex: scalar rows (cpu/rows.py).
- more than one thread from THREADS_FROM elements on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core.cpu import adjoint as cpu_adjoint
from bklm.bk_core.cpu import rows as cpu_rows
from bklm.bk_core.cpu import sweep as cpu_sweep
from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu import tiles as cpu_tiles
from bklm.bk_core.cpu.scratch import LANES, LONGEST_TILE, SCRATCH_LENGTH

SHORT_ROW = 256
LONG_ROW_TILE = 64
ENOUGH_ROWS = 16
SWEEP_LANES = 256
SHORTEST_CHUNK = 8
"""Tiles; polishing redoes one or two of them at eta ~ 1."""
THREADS_FROM = 2**17
"""Elements; below, one thread."""

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_SCRATCH = {dtype: (SCRATCH_LENGTH, like) for dtype, like in _NUMPY.items()}
_NO_STATES: tuple[Tensor, ...] = ()


def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """G (M, N) for a (M, N), k (1 or M, N - 1), z (M,). Saved: the states entering each tile, (M, tiles) each."""
    if a.is_complex() or k.is_complex():
        return _forward_rows(a, k, z, causal), ()
    m, n = a.shape
    tile, n_tiles = _tiling(m, n)
    states = _NO_STATES
    if n_tiles > 1:
        states = (_sweep(a, k, z, tile, n_tiles, False),)
        if not causal:
            states += (_sweep(a, k, z, tile, n_tiles, True),)
    G = torch.empty(m, n, dtype=z.dtype, device="cpu")
    rest = (*_inputs(a, k, z), G.data_ptr(), *_addresses(states), m, n, tile, n_tiles, causal)
    threads.run(cpu_tiles.forward_tiles, _groups(m * n_tiles), m * n >= THREADS_FROM, _SCRATCH[a.dtype], rest)
    return G, states


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
    if a.is_complex() or k.is_complex():
        return _backward_rows(gbar, a, k, z, G, causal, needs_k, needs_z)
    m, n = a.shape
    tile, n_tiles = _tiling(m, n)
    states = saved
    if n_tiles > 1 and not causal and not states:
        states = _sweep(a, k, z, tile, n_tiles, False), _sweep(a, k, z, tile, n_tiles, True)
    grad_a = torch.empty_like(a)
    K = torch.empty(m, n - 1, dtype=z.dtype, device="cpu") if needs_k else None
    Dsum = torch.empty(m, n_tiles, dtype=z.dtype, device="cpu") if needs_z else None
    joined = (0, 0, 0)
    if n_tiles > 1:
        adjoint = torch.empty(2, m, n_tiles, dtype=z.dtype, device="cpu")
        summary = torch.empty(m, n_tiles, cpu_adjoint.SUMMARY, dtype=a.dtype, device="cpu")
        joined = adjoint[0].data_ptr(), adjoint[1].data_ptr(), summary.data_ptr()
    rest = (
        *(gbar.data_ptr(), *_inputs(a, k, z), G.data_ptr(), *_addresses(states), *joined),
        *(grad_a.data_ptr(), K.data_ptr() if needs_k else 0, Dsum.data_ptr() if needs_z else 0),
        *(m, n, tile, n_tiles, causal),
    )
    kernel, groups, many, buffer = (
        cpu_adjoint.backward_tiles,
        _groups(m * n_tiles),
        m * n >= THREADS_FROM,
        _SCRATCH[a.dtype],
    )
    if n_tiles > 1:
        threads.run(kernel, groups, many, buffer, (*rest, True, needs_k))
        cpu_sweep.join(threads.scratch(*buffer), summary.data_ptr(), *joined[:2], m, n_tiles, causal)
    threads.run(kernel, groups, many, buffer, (*rest, False, needs_k))
    if not needs_z:
        return grad_a, K, None
    return grad_a, K, Dsum.sum(-1, dtype=torch.complex128).to(z.dtype) if n_tiles > 1 else Dsum[:, 0]


def _tiling(m: int, n: int) -> tuple[int, int]:
    """(positions per tile, tiles per row)."""
    if n <= SHORT_ROW or (n <= LONGEST_TILE and m >= ENOUGH_ROWS):
        return n, 1
    return LONG_ROW_TILE, -(-n // LONG_ROW_TILE)


def _groups(lanes: int) -> int:
    return -(-lanes // LANES)


def _inputs(a: Tensor, k: Tensor, z: Tensor) -> tuple[int, ...]:
    """Addresses of a and k, the row stride of k, the address of z."""
    return a.data_ptr(), k.data_ptr(), a.shape[1] - 1 if k.shape[0] > 1 else 0, z.data_ptr()


def _addresses(states: tuple[Tensor, ...]) -> tuple[int, int]:
    """Addresses of the states from the left and from the right; the kernels load both, and ignore what they do not need."""
    if not states:
        return 0, 0
    return states[0].data_ptr(), states[-1].data_ptr()


def _sweep(a: Tensor, k: Tensor, z: Tensor, tile: int, n_tiles: int, reverse: bool) -> Tensor:
    """The states (M, n_tiles) of L (of R with ``reverse``) that enter each tile, in the order of the sweep."""
    m, n = a.shape
    swept = n_tiles - 1
    n_chunks = max(1, min(-(-SWEEP_LANES // m), swept // SHORTEST_CHUNK))
    chunk_tiles = -(-swept // n_chunks)
    n_chunks = -(-swept // chunk_tiles)
    states = torch.zeros(m, n_tiles, dtype=z.dtype, device="cpu")
    ends = torch.empty(m, n_chunks, dtype=z.dtype, device="cpu")
    moved = np.zeros(m * n_chunks, np.uint8)
    active = np.arange(m * n_chunks)
    buffer = _SCRATCH[a.dtype]
    tolerance = 4 * torch.finfo(a.dtype).eps
    n_active, polish = active.size, False
    while n_active:
        arguments = (*_inputs(a, k, z), states.data_ptr(), ends.data_ptr(), moved, active, n_active)
        arguments += (m, n, tile, n_tiles, chunk_tiles, reverse, polish, tolerance)

        worth_it = n_active * chunk_tiles * tile >= THREADS_FROM
        threads.run(cpu_sweep.sweep, _groups(n_active), worth_it, buffer, arguments)
        n_active = cpu_sweep.hand_over(
            threads.scratch(*buffer),
            *(states.data_ptr(), ends.data_ptr(), moved, active, m, n_tiles, chunk_tiles),
        )
        polish = True
    return states


def _forward_rows(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> Tensor:
    m, n = a.shape
    G = torch.empty(m, n, dtype=z.dtype, device="cpu")
    arrays = _array(a), _array(k), _array(z), causal, _array(G)

    def part(first: int, last: int) -> None:
        cpu_rows.forward_rows(*arrays, np.empty(1 if causal else n, np.complex128), first, last)

    threads.split(part, m, m * n >= THREADS_FROM)
    return G


def _backward_rows(gbar, a, k, z, G, causal, needs_k, needs_z):
    m, n = a.shape
    D = torch.empty(m, n, dtype=z.dtype, device="cpu")
    K = torch.empty((m, n - 1) if needs_k else (1, 1), dtype=z.dtype, device="cpu")
    Dsum = torch.empty(m, dtype=z.dtype, device="cpu")
    outputs = _array(D), _array(K), needs_k, _array(Dsum)
    inputs = [_array(x) for x in (gbar, a, k, z, G)]

    def part(first: int, last: int) -> None:
        if causal:
            cpu_rows.backward_causal_rows(inputs[0], inputs[2], inputs[4], first, last, *outputs)
        else:
            left, right = np.empty(n, np.complex128), np.empty(n, np.complex128)
            cpu_rows.backward_rows(*inputs, first, last, left, right, *outputs)

    threads.split(part, m, m * n >= THREADS_FROM)
    grad_a = D if a.is_complex() else D.real.contiguous()
    return grad_a, K if needs_k else None, Dsum if needs_z else None


def _array(x: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array."""
    return x.detach().numpy()
