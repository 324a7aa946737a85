"""Dropout with masks of 16-bit draws, on a CPU a third of the time of torch's.

On a CPU torch draws one float per unit. Here four units share one of the generator's 64-bit numbers, and one pass drops,
scales and adds (``bklm.models.dropout_kernels``). Elsewhere, and where torch.compile traces, these functions are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.bk_core import pivots
from bklm.bk_core.gradients import materialised
from bklm.models import dropout_kernels as kernels
from bklm.models.checks import is_without_numbers, values_at_hand
from bklm.moe.tracing import is_transformed

_STEPS = 2**16  # of the dropout probability


def keep_masks(shape: tuple[int, ...], dropout_p: float, like: Tensor) -> Tensor:
    """Masks of ``like``'s dtype: 0 with probability p, else 1 / (1 - p), for p rounded to a multiple of 1/65536.

    Four 16-bit draws come from each of the generator's 64-bit numbers: on a CPU a third of the time of bernoulli_.
    """
    return keep(shape, dropout_p, like.device).to(like.dtype).mul_(keep_scale(dropout_p))


def keep(shape: tuple[int, ...], dropout_p: float, device: torch.device) -> Tensor:
    """Which units stay: a mask of booleans."""
    count = torch.Size(shape).numel()
    return draws(1, count, device)[0, :count].view(shape) >= dropped_from(dropout_p)


def draws(masks: int, count: int, device: torch.device) -> Tensor:
    """The 16-bit draws of ``keep`` for so many masks of ``count`` units, one after the other: (masks, at least count)."""
    noise = torch.empty(masks, -(-count // 4), dtype=torch.int64, device=device)
    return noise.random_(-(2**63), None).view(torch.int16)


def dropped_from(dropout_p: float) -> int:
    """The least of the 16-bit draws that keeps its unit."""
    return dropped_steps(dropout_p) - _STEPS // 2


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
    return _Dropout.apply(None, x, p)


def add_dropout(x: Tensor, branch: Tensor, p: float, training: bool) -> Tensor:
    """x + F.dropout(branch, p, training), for a residual branch of x's shape."""
    alike = branch.dtype == x.dtype and branch.shape == x.shape
    if not (alike and _draws_here(branch, p, training)):
        return x + F.dropout(branch, p, training)
    return _Dropout.apply(x, branch, p)


class _Dropout(torch.autograd.Function):
    """x (None: 0) + branch dropped and scaled."""

    @staticmethod
    def forward(ctx, x, branch, p):
        ctx.scale, ctx.has_x = keep_scale(p), x is not None
        if branch.dtype in kernels.LIKE:
            noise = draws(1, branch.numel(), branch.device)
            x = None if x is None else materialised(x)
            out, kept = kernels.keep(x, materialised(branch), noise, dropped_from(p), ctx.scale)
        else:
            kept = keep(tuple(branch.shape), p, branch.device)
            out = branch * kept * ctx.scale if x is None else torch.addcmul(x, branch, kept, value=ctx.scale)
        ctx.save_for_backward(kept)
        return out

    @staticmethod
    def backward(ctx, d):
        (kept,) = ctx.saved_tensors
        # Operations that may be differentiated again, or mapped over.
        if torch.is_grad_enabled() or is_transformed(d) or d.dtype not in kernels.LIKE:
            return d if ctx.has_x else None, d * kept * ctx.scale, None
        return d if ctx.has_x else None, kernels.scale_kept(materialised(d), kept, ctx.scale), None


def draw_number(x: Tensor) -> int:
    """A number for ``numbered_dropout`` of x, drawn from torch's generator of the CPU; the next 4095 are its own too.

    Below 0 where none can be had: in transforms, tracers, compilers and the capture of a CUDA graph, which would replay one
    number for ever, and for a tensor without values.
    """
    # Not where seeds of neighbouring draws could meet: each number is the seed of its mask.
    if torch.compiler.is_compiling() or is_without_numbers(x) or pivots.is_capturing(x.device):
        return -(2**12)
    return int(torch.randint(2**40, (), device="cpu")) * 2**12


def numbered_dropout(x: Tensor, p: float, number: int) -> Tensor:
    """x with each unit 0 with probability p, else times 1 / (1 - p): for one number always the same units.

    For a number below 0 this is F.dropout.
    """
    if p == 0 or number < 0:
        return F.dropout(x, p)
    generator = torch.Generator(x.device).manual_seed(number)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * kept / (1 - p)


def _draws_here(x: Tensor, p: float, training: bool) -> bool:
    # A draw in place cannot be told apart for the samples of a vmap.
    return training and 0 < p < 1 and values_at_hand(x)
