"""CPU kernels of ``dropout``: one pass that reads 16-bit draws and leaves one byte a unit for the backward.

Conventions on addresses: ``bklm.bk_core.cpu.scratch``.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import uintp
from torch import Tensor

from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu.jit import jit
from bklm.bk_core.cpu.scratch import reals_at

THREADS_FROM = 2**19  # units; waking a thread takes as long as half of them
LIKE = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}
_CHUNK = np.uintp(2**13)
_INT16, _BYTE = np.zeros(0, np.int16), np.zeros(0, np.uint8)


@jit
def _keep(like, first, last, x, branch, noise, least, scale, out, kept):
    """out = x + scale branch where noise >= least, else x, for first <= i < last; x = 0 where it is not there."""
    first, last, zero = uintp(first), uintp(last), like.dtype.type(0)
    noise_view, kept_view = reals_at(noise, last, _INT16), reals_at(kept, last, _BYTE)
    branch_view, out_view = reals_at(branch, last, like), reals_at(out, last, like)
    x_view = reals_at(x, last, like)
    scale, least = like.dtype.type(scale), np.int16(least)
    # Chunk by chunk, so that the bytes written are still at hand when they are read.
    for begin in range(first, last, _CHUNK):
        end = min(last, begin + _CHUNK)
        for i in range(begin, end):
            kept_view[i] = noise_view[i] >= least
        if x:
            for i in range(begin, end):
                out_view[i] = x_view[i] + branch_view[i] * (scale if kept_view[i] else zero)
        else:
            for i in range(begin, end):
                out_view[i] = branch_view[i] * (scale if kept_view[i] else zero)


@jit
def _scale_kept(like, first, last, d, kept, scale, out):
    """out = scale d where kept, else 0, for first <= i < last."""
    first, last, zero = uintp(first), uintp(last), like.dtype.type(0)
    kept_view = reals_at(kept, last, _BYTE)
    d_view, out_view = reals_at(d, last, like), reals_at(out, last, like)
    scale = like.dtype.type(scale)
    for i in range(first, last):
        out_view[i] = d_view[i] * (scale if kept_view[i] else zero)


def keep(x: Tensor | None, branch: Tensor, noise: Tensor, least: int, scale: float) -> tuple[Tensor, Tensor]:
    """x + scale branch where the int16 noise is at least ``least``, else x; and where, as bytes. All contiguous."""
    out, kept = torch.empty_like(branch), torch.empty_like(branch, dtype=torch.uint8)
    at = 0 if x is None else x.data_ptr()
    rest = branch.data_ptr(), noise.data_ptr(), least, scale, out.data_ptr(), kept.data_ptr()
    _run(_keep, branch, (at, *rest))
    return out, kept


def scale_kept(d: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Scale d where kept, else 0; contiguous."""
    out = torch.empty_like(d)
    _run(_scale_kept, d, (d.data_ptr(), kept.data_ptr(), scale, out.data_ptr()))
    return out


def _run(kernel, like: Tensor, arguments: tuple) -> None:
    def part(first: int, last: int) -> None:
        kernel(LIKE[like.dtype], first, last, *arguments)

    threads.split(part, like.numel(), like.numel() >= THREADS_FROM)
