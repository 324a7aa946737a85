"""The BK-core on a GPU: Triton kernels, forward and exact backward, causal and bidirectional.

Formulas: operator.py. The contract of ``forward`` and ``backward``: backends.py. The kernels: gpu/forward.py and
gpu/backward.py, over gpu/lanes.py (one lane's work) and gpu/scan.py (the joining of chunks).

How a call is cut up (``plan``). Short rows, or very many rows: one lane a row, one launch forward and one backward.
Otherwise rows are cut into chunks, one lane a chunk, in three launches each way:

    1. maps     what each chunk does to the numbers that cross it
    2. carries  a scan over those maps: the number that enters each chunk
    3. sweep    the sequential recurrences, started from the carries

Accuracy in 32 bits, measured on a NumPy model of these steps (Gaussian, periodic and smooth potentials, N = 32768,
Im z = 1e-3). If all of it is float32, the scan makes L up to 270 times less accurate than a sequential sweep does. Two
remedies:

- where float64 is fast (P100, V100, A100, H100, B200), maps and scan are float64 and the sweeps float32: within 1.6
  times of the sequential sweep at any length of chunk;
- elsewhere (a T4 has 1/32 of its speed in float64), and for 64-bit inputs, step 3 polishes: each lane first walks the
  chunk before its own (for R, the one after) from the scanned carry, so that it starts from a neighbour's computed end.
  Errors of the carry shrink on the way, as the recurrences contract; chunks of 128 elements make it long enough: within
  1.9 times of the sequential sweep, against up to 70 times with chunks of 32.

The adjoint scans are linear and need neither: in float32 they were as accurate as the sequential recurrence at every
length of chunk tried.

Predicted memory traffic in bytes per element, for float32 a and k that rows do not share. A sweep walks its chunk two or
three times; what it reads again is counted once, as it stays in cache. Maps and carries (about 200 / T) are left out.

    launch                reads                       writes                           bytes
    forward    maps       a 4, k 4                                                         8
               sweep      a 4, k 4                    G 8                                 16
    backward   maps       a 4, k 4, G 8, gbar 8                                           24
               sweep      a 4, k 4, G 8, gbar 8       grad_a 4, K 8, scratch 8            44   in all 92
    causal     maps       k 4, G 8, gbar 8                                                20
    backward   sweep      k 4, G 8, gbar 8            grad_a 4, K 8                       32   in all 76

With one lane a row there are no maps: 60, causal 48. The least possible is 52 (it counts b and c in place of k).
Peak extra memory is the scratch, 8 bytes per element, besides the outputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheels for this platform: the operator then uses the torch path, see backends.py
    triton = None
else:
    from bklm.bk_core.gpu import backward as gpu_backward
    from bklm.bk_core.gpu import forward as gpu_forward
    from bklm.bk_core.gpu import scan as gpu_scan

SWEEP_LANES = 32  # one warp a program: the exchanges between lanes need no barrier
BLOCK_LANES = 128  # chunks whose maps one program scans
MAX_BLOCKS = 256  # blocks of a row; longer rows get longer chunks
SEQUENTIAL_N = 256  # up to here a row is not cut
SEQUENTIAL_ROWS = 32768  # so many rows fill a GPU by themselves
FULL_GPU = 32768  # lanes that an H100 holds at once; with more, longer chunks cost less scanning

MAX_N = 2**28  # offsets within a program are 32-bit and reach over two rows of complex numbers

# compute capabilities whose float64 runs at half the speed of float32
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


class Plan(NamedTuple):
    """How (rows, n) is cut up: ``chunks`` of ``chunk`` elements a row, in ``blocks`` of ``block`` lanes; maps in ``wide``."""

    chunk: int
    chunks: int
    block: int
    blocks: int
    wide: torch.dtype
    polish: bool

    @property
    def period(self) -> int:
        """Elements between two rescalings of a map. A modulus that can be squared in the working precision, as every
        pivot must be, can be raised to the power of 8 in one twice as wide."""
        return 2 if self.polish else 8

    @property
    def warps(self) -> int:
        """Of a program that holds a block."""
        return max(1, self.block // 32)


@functools.lru_cache(maxsize=256)
def plan(rows: int, n: int, dtype: torch.dtype, fast_float64: bool) -> Plan:
    """The dispatch rule. dtype is the real precision of the computation, torch.float32 or torch.float64."""
    wide = torch.float64 if fast_float64 else dtype
    polish = wide == dtype
    if n <= SEQUENTIAL_N or rows >= SEQUENTIAL_ROWS:
        return Plan(_round_up(n, 8), 1, 1, 1, wide, polish)
    least = 128 if polish else 32
    chunk = max(least, _cdiv(rows * n, FULL_GPU), _cdiv(n, BLOCK_LANES * MAX_BLOCKS))
    chunk = _round_up(chunk, 32)
    return cut(n, chunk, wide, polish)


def cut(n: int, chunk: int, wide: torch.dtype, polish: bool) -> Plan:
    """The plan with a given chunk length (a multiple of 8)."""
    chunks = _cdiv(n, chunk)
    block = min(BLOCK_LANES, max(32, _power_of_two(chunks)))
    return Plan(chunk, chunks, block, _cdiv(chunks, block), wide, polish)


def is_available() -> bool:
    """Whether ``forward`` and ``backward`` run here: Triton with a CUDA device of compute capability 7.0 or newer, or
    Triton's interpreter (TRITON_INTERPRET=1 when this module was first imported), which takes CPU tensors."""
    if triton is None:
        return False
    if _interpreted():
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)


def forward(a: Tensor, k: Tensor, z: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """G (M, N) complex and what the backward reuses: the carries (2, M * chunks), or nothing.

    a (M, N) float32, float64, complex64 or complex128; k (1 or M, N - 1) real or complex; z (M,) complex; one device.

    Raises:
        TypeError: operands of different precision.
        ValueError: shapes that do not fit, or tensors on a device that Triton does not serve here.
    """
    _check(a, k, z)
    a, k, z = (x.resolve_conj().contiguous() for x in (a, k, z))
    m, n = a.shape
    p = _plan_for(a, z)
    G = torch.empty((m, n), dtype=z.dtype, device=a.device)
    chunked, s = p.chunks > 1, m * p.chunks
    carries = polished = G  # not touched by a launch that does not cut rows
    if chunked:
        carries = _forward_carries(p, a, k, z, causal)
        polished = torch.empty_like(carries) if p.polish and not causal else carries
    _launch(
        a.device, gpu_forward.resolvent_sweep, (_cdiv(s, SWEEP_LANES),),
        _real(a), _real(k), _real(z), _real(carries), _real(polished), _real(G),
        n, p.chunk, p.chunks, s, _row_stride(k),
        CAUSAL=causal, CHUNKED=chunked, POLISH=p.polish and chunked,
        A_COMPLEX=a.is_complex(), K_COMPLEX=k.is_complex(), LANES=SWEEP_LANES, num_warps=1,
    )  # fmt: skip
    return G, (polished,) if chunked and not causal else ()


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
    """(grad_a, K or None, sum of D or None), for gbar = dL/dRe G + i dL/dIm G (M, N).

    grad_a (M, N) is Re D for real a, D for complex a; K (M, N - 1) and the sum (M,) are complex. With saved = () the
    carries are computed again, to the same numbers. Deterministic. Raises as ``forward`` does.
    """
    _check(a, k, z)
    gbar, a, k, z, G = (x.resolve_conj().contiguous() for x in (gbar, a, k, z, G))
    m, n = a.shape
    p = _plan_for(a, z)
    chunked, s = p.chunks > 1, m * p.chunks
    carries = adjoint_carries = G  # not touched by a launch that does not cut rows
    if chunked:
        if not causal:
            (carries,) = saved or forward(a, k, z, causal)[1]
        adjoint_carries = _adjoint_carries(p, a, k, z, G, gbar, carries, causal)
    complex_like = functools.partial(torch.empty, dtype=z.dtype, device=a.device)
    grad_a = torch.empty_like(a)
    K = complex_like((m, n - 1)) if needs_k else G
    sums = complex_like((m, p.chunks)) if needs_z else G
    flags = {
        "CHUNKED": chunked, "NEEDS_K": needs_k, "NEEDS_Z": needs_z, "A_COMPLEX": a.is_complex(),
        "K_COMPLEX": k.is_complex(), "LANES": SWEEP_LANES, "num_warps": 1,
    }  # fmt: skip
    sizes = n, p.chunk, p.chunks, s, _row_stride(k)
    grid = (_cdiv(s, SWEEP_LANES),)
    outputs = _real(grad_a), _real(K)
    if causal:
        _launch(
            a.device, gpu_backward.adjoint_sweep_causal, grid,
            _real(k), _real(z), _real(G), _real(gbar), _real(adjoint_carries), *outputs, _real(sums), *sizes, **flags,
        )  # fmt: skip
    else:
        scratch = complex_like((m, n))
        _launch(
            a.device, gpu_backward.adjoint_sweep, grid,
            _real(a), _real(k), _real(z), _real(G), _real(gbar), _real(carries), _real(adjoint_carries),
            *outputs, _real(scratch), _real(sums), *sizes, **flags,
        )  # fmt: skip
    total = (sums.sum(1) if chunked else sums[:, 0]) if needs_z else None
    return grad_a, K if needs_k else None, total


def _forward_carries(p: Plan, a: Tensor, k: Tensor, z: Tensor, causal: bool) -> Tensor:
    """x and R at the ends of every chunk, (2, M * chunks) complex; for causal calls only [0] is filled."""
    m, n = a.shape
    s, blocks = m * p.chunks, m * p.blocks
    maps = torch.empty((8, s), dtype=p.wide, device=a.device)
    totals = torch.empty((8, blocks), dtype=p.wide, device=a.device)
    carries = torch.empty((2, s), dtype=z.dtype, device=a.device)
    _launch(
        a.device, gpu_forward.moebius_maps, (blocks,),
        _real(a), _real(k), _real(z), maps, totals,
        n, p.chunk, p.chunks, s, p.blocks, blocks, _row_stride(k),
        PERIOD=p.period, MANY=p.blocks > 1, A_COMPLEX=a.is_complex(), K_COMPLEX=k.is_complex(),
        LANES=p.block, num_warps=p.warps,
    )  # fmt: skip
    _launch(
        a.device, gpu_scan.scan_carries, (blocks, 1 if causal else 2),
        maps, totals, _real(carries), p.chunks, s, p.blocks, blocks,
        ORDER=_power_of_two(p.blocks), LANES=p.block, num_warps=p.warps,
    )  # fmt: skip
    return carries


def _adjoint_carries(
    p: Plan, a: Tensor, k: Tensor, z: Tensor, G: Tensor, gbar: Tensor, carries: Tensor, causal: bool
) -> Tensor:
    """tau from the left and s from the right of every chunk, (2, M * chunks) complex; causal: w from the right in [1]."""
    m, n = a.shape
    s, blocks = m * p.chunks, m * p.blocks
    maps = torch.empty((2, 4, s), dtype=z.real.dtype, device=a.device)
    totals = torch.empty((2, 4, blocks), dtype=z.real.dtype, device=a.device)
    adjoint_carries = torch.empty((2, s), dtype=z.dtype, device=a.device)
    _launch(
        a.device, gpu_backward.adjoint_maps, (blocks,),
        _real(a), _real(k), _real(z), _real(G), _real(gbar), _real(carries), maps, totals,
        n, p.chunk, p.chunks, s, p.blocks, blocks, _row_stride(k),
        CAUSAL=causal, MANY=p.blocks > 1, A_COMPLEX=a.is_complex(), K_COMPLEX=k.is_complex(),
        LANES=p.block, num_warps=p.warps,
    )  # fmt: skip
    _launch(
        a.device, gpu_scan.scan_affine, (blocks, 1 if causal else 2),
        maps, totals, _real(adjoint_carries), p.chunks, s, p.blocks, blocks,
        FIRST=1 if causal else 0, ORDER=_power_of_two(p.blocks), LANES=p.block, num_warps=p.warps,
    )  # fmt: skip
    return adjoint_carries


def _launch(device: torch.device, kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Start one kernel on ``device``, which need not be the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, as decided when they were defined."""
    return not isinstance(gpu_forward.resolvent_sweep, triton.JITFunction)


@functools.cache
def _fast_float64(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_FLOAT64


def _plan_for(a: Tensor, z: Tensor) -> Plan:
    dtype = torch.float64 if z.dtype == torch.complex128 else torch.float32
    return plan(a.shape[0], a.shape[1], dtype, _fast_float64(a.device))


def _check(a: Tensor, k: Tensor, z: Tensor) -> None:
    if triton is None:
        raise OSError("Triton is not installed here: use another backend, backend='torch' runs on any device.")
    if a.device.type != "cuda" and not (a.device.type == "cpu" and _interpreted()):
        raise ValueError(
            f"a is on {a.device}: Triton kernels take CUDA tensors, or CPU tensors under TRITON_INTERPRET=1; move it."
        )
    m, n = a.shape
    if n < 1 or k.shape not in ((1, n - 1), (m, n - 1)) or z.shape != (m,):
        raise ValueError(
            f"a {tuple(a.shape)}, k {tuple(k.shape)}, z {tuple(z.shape)} do not fit: "
            f"(M, N), (1 or M, N - 1) and (M,) with N >= 1 are needed."
        )
    if n > MAX_N:
        raise ValueError(
            f"rows of {n} elements are longer than the kernels address ({MAX_N}): use backend='torch'."
        )
    pair = {torch.complex64: (torch.float32,), torch.complex128: (torch.float64,)}.get(z.dtype, ())
    if any(x.dtype not in (*pair, z.dtype) for x in (a, k)) or not pair:
        raise TypeError(
            f"a is {a.dtype}, k {k.dtype}, z {z.dtype}: z must be complex64 or complex128, a and k of its precision."
        )


def _real(x: Tensor) -> Tensor:
    """The real storage of a contiguous tensor, interleaved where it is complex."""
    return torch.view_as_real(x) if x.is_complex() else x


def _row_stride(k: Tensor) -> int:
    return 0 if k.shape[0] == 1 else k.shape[1]


def _cdiv(x: int, y: int) -> int:
    return -(-x // y)


def _round_up(x: int, multiple: int) -> int:
    return _cdiv(x, multiple) * multiple


def _power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << (x - 1).bit_length()
