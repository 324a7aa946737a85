"""Dropout with masks of 16-bit draws, on a CPU a third of the time of torch's.

On a CPU torch draws one float per unit. Here four units share one of the generator's 64-bit numbers. Elsewhere, and where
torch.compile traces, these functions are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.moe.plain import is_transformed

_STEPS = 2**16  # of the dropout probability


def keep_masks(shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor:
    """Masks of ``like``'s dtype: 0 with probability p, else 1 / (1 - p), for p rounded to a multiple of 1/65536.

    Four 16-bit draws come from each of the generator's 64-bit numbers: on a CPU a third of the time of bernoulli_.
    """
    return keep(shape, dropout_p, like.device).to(like.dtype).mul_(keep_scale(dropout_p))


def keep(shape: tuple[int, ...], dropout_p: float, device: torch.device) -> Tensor:
    """Which units stay: a mask of booleans."""
    count = torch.Size(shape).numel()
    noise = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return noise.view(torch.int16)[:count].view(shape) >= dropped_steps(dropout_p) - _STEPS // 2


def dropped_steps(dropout_p: float) -> int:
    """The probability in units of 1/65536, below 1."""
    return min(round(dropout_p * _STEPS), _STEPS - 1)


def keep_scale(dropout_p: float) -> float:
    """1 / (1 - p) for the rounded p."""
    return _STEPS / (_STEPS - dropped_steps(dropout_p))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout(x, p, training)."""
    if not _draws_here(x, p, training):
        return F.dropout(x, p, training)
    return x * keep_masks(tuple(x.shape), p, x)


def add_dropout(x: Tensor, branch: Tensor, p: float, training: bool) -> Tensor:
    """x + F.dropout(branch, p, training), for a residual branch of x's shape."""
    if not _draws_here(branch, p, training) or branch.dtype != x.dtype:
        return x + F.dropout(branch, p, training)
    kept = keep(tuple(branch.shape), p, branch.device).to(branch.dtype)
    return torch.addcmul(x, branch, kept, value=keep_scale(p))


def _draws_here(x: Tensor, p: float, training: bool) -> bool:
    # A draw in place cannot be told apart for the samples of a vmap.
    is_seen_into = torch.compiler.is_compiling() or is_transformed(x)
    return training and p > 0 and x.device.type == "cpu" and not is_seen_into
