"""CPU kernel of ``linear_cross_entropy``: logits become the gradient of their loss in place, a row at a time in the cache.

Conventions on addresses: ``bklm.bk_core.cpu.scratch``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import uintp
from torch import Tensor

from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu.jit import SUMS, jit
from bklm.bk_core.cpu.scratch import reals_at
from bklm.models.exponential import exponential

THREADS_FROM = 2**16  # logits
LIKE = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}
_INT64 = np.zeros(0, np.int64)
_0, _LANES = np.uintp(0), np.uintp(32)


def _losses(like, first, last, logits, targets, losses, width):
    """losses and, in place of the logits (M, V), softmax - onehot(target), for the rows first ... last - 1."""
    first, last, width = uintp(first), uintp(last), uintp(width)
    view, losses_view = reals_at(logits, last * width, like), reals_at(losses, last, like)
    targets_view, one = reals_at(targets, last, _INT64), like.dtype.type(1)
    largest = np.empty(_LANES, like.dtype)
    for row in range(first, last):
        at = row * width
        # Lane by lane, because a maximum of all would have to mind NaN in each step; NaN shows in the sum below.
        largest[:] = -np.inf
        whole = width - width % _LANES
        for begin in range(_0, whole, _LANES):
            for lane in range(_LANES):
                v = view[at + begin + lane]
                largest[lane] = v if v > largest[lane] else largest[lane]
        for i in range(whole, width):
            v = view[at + i]
            largest[_0] = v if v > largest[_0] else largest[_0]
        top = largest[_0]
        for lane in range(_LANES):
            top = largest[lane] if largest[lane] > top else top
        target = at + uintp(targets_view[row])
        wanted, total = view[target], like.dtype.type(0)
        for i in range(width):
            e = exponential(view[at + i] - top)
            view[at + i] = e
            total += e
        losses_view[row] = top - wanted + like.dtype.type(math.log(total))
        share = one / total
        for i in range(width):
            view[at + i] *= share
        view[target] -= one


# Its one sum writes each number where it read it: no two arrays whose distance LLVM would ask for.
_losses = jit(_losses, fastmath=SUMS)


def losses_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy (M,) of each row of logits (M, V), which become its gradient; contiguous, targets int64.

    Raises:
        IndexError: a target outside [0, V), as torch's own loss does.
    """
    losses, (rows, width) = logits.new_empty(len(logits)), logits.shape
    low, high = (int(t) for t in targets.aminmax()) if rows else (0, 0)
    if low < 0 or high >= width:
        raise IndexError(
            f"targets: got {low if low < 0 else high}; a vocabulary of {width} has 0 to {width - 1}: take its tokenizer's ids."
        )
    addresses = logits.data_ptr(), targets.data_ptr(), losses.data_ptr()

    def part(first: int, last: int) -> None:
        _losses(LIKE[logits.dtype], first, last, *addresses, width)

    threads.split(part, rows, logits.numel() >= THREADS_FROM)
    return losses
