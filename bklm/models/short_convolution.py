"""A short convolution over positions, each channel by itself: on a CPU one pass over rows that lie as they are.

    out_n = bias + sum over k of w_k x_{n + k - before},   k = 0 ... W - 1, x zero outside the text

per channel; ``before = W - 1`` is the causal one. torch's conv1d wants channels before positions, so rows are turned over
twice. Kernels: a block of BLOCK positions at a time, so that the sums for w do not depend on the number of threads;
conventions on addresses and unsigned indices in ``bklm.bk_core.cpu.scratch``.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import uintp
from torch import Tensor
from torch.nn import functional as F

from bklm.bk_core.autograd import in_forward_mode, is_plain
from bklm.bk_core.cpu import threads
from bklm.bk_core.cpu.jit import jit, part
from bklm.bk_core.cpu.scratch import reals_at
from bklm.bk_core.gradients import materialised
from bklm.models.second_derivatives import differentiable_gradients

BLOCK = 128
THREADS_FROM = 2**18  # elements of x
_0, _1, _BLOCK = np.uintp(0), np.uintp(1), np.uintp(BLOCK)
_NUMPY = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
    """out (B, N, d) of x (B, N, d), weight (d, 1, W) and bias (d,), with the exact gradient, to any order."""
    given = x, weight, bias
    same = all(t.dtype == x.dtype for t in given) and x.dtype in _NUMPY
    if not (same and x.device.type == "cpu" and x.numel() and is_plain(*given)) or in_forward_mode():
        return plain_convolution(x, weight, bias, before)
    return _ShortConvolution.apply(x, weight, bias, before)


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
    """The same by torch's conv1d."""
    rows = F.pad(x.transpose(1, 2), (before, weight.shape[2] - 1 - before))
    return F.conv1d(rows, weight, bias, groups=len(weight)).transpose(1, 2)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, before):
        ctx.save_for_backward(x, weight, bias)
        ctx.before = before
        x, taps = materialised(x), weight[:, 0].t().contiguous()
        out = torch.empty_like(x)
        _run(_forward, x, taps, (x, taps, materialised(bias), out), before)
        return out

    @staticmethod
    def backward(ctx, o):
        x, weight, bias = ctx.saved_tensors
        # This gradient will be differentiated, or comes in batches.
        if torch.is_grad_enabled() or not is_plain(o) or in_forward_mode():
            return (*_plain_gradients(x, weight, bias, o, ctx.before), None)
        x, o, taps = materialised(x), materialised(o), weight[:, 0].t().contiguous()
        d_x = torch.empty_like(x)
        # Of each block: the gradient of every tap, and of the bias.
        sums = torch.empty(
            len(x), -(-x.shape[1] // BLOCK), len(taps) + 1, x.shape[2], dtype=x.dtype, device="cpu"
        )
        _run(_backward, x, taps, (x, taps, o, d_x, sums), ctx.before)
        total = sums.sum((0, 1))
        return d_x, total[:-1].t().unsqueeze(1), total[-1], None


def _plain_gradients(x: Tensor, weight: Tensor, bias: Tensor, o: Tensor, before: int) -> tuple[Tensor, ...]:
    """The gradients as functions of all four tensors that may be differentiated again."""
    return tuple(
        differentiable_gradients(lambda *nodes: plain_convolution(*nodes, before), (x, weight, bias), o)
    )


def _run(kernel, x: Tensor, taps: Tensor, tensors: tuple[Tensor, ...], before: int) -> None:
    batch, length, d = x.shape
    like, addresses = _NUMPY[x.dtype], tuple(t.data_ptr() for t in tensors)
    blocks = -(-length // BLOCK)

    def part(first: int, last: int) -> None:
        kernel(like, first, last, *addresses, batch, length, d, len(taps), before)

    threads.split(part, batch * blocks, x.numel() >= THREADS_FROM)


@part
def _add_product(target, at_target, factor, at_factor, source, at_source, d):
    """target += factor * source, channel by channel."""
    for c in range(d):
        target[at_target + c] += factor[at_factor + c] * source[at_source + c]


@jit
def _forward(like, first, last, x, taps, bias, out, batch, length, d, width, before):
    """out for the blocks first ... last - 1 of the batch's rows."""
    batch, length, d, width, before = uintp(batch), uintp(length), uintp(d), uintp(width), uintp(before)
    count = batch * length * d
    x_view, out_view = reals_at(x, count, like), reals_at(out, count, like)
    tap_view, bias_view = reals_at(taps, width * d, like), reals_at(bias, d, like)
    blocks = (length + _BLOCK - _1) // _BLOCK
    for block in range(uintp(first), uintp(last)):
        row = block // blocks
        begin = (block - row * blocks) * _BLOCK
        for n in range(begin, min(length, begin + _BLOCK)):
            at = (row * length + n) * d
            for c in range(d):
                out_view[at + c] = bias_view[c]
            for k in range(width):
                if before <= n + k < length + before:
                    _add_product(out_view, at, tap_view, k * d, x_view, (row * length + n + k - before) * d, d)


@jit
def _backward(like, first, last, x, taps, o, d_x, sums, batch, length, d, width, before):
    """d_x, and each block's sums, for the blocks first ... last - 1."""
    batch, length, d, width, before = uintp(batch), uintp(length), uintp(d), uintp(width), uintp(before)
    count = batch * length * d
    blocks = (length + _BLOCK - _1) // _BLOCK
    x_view, o_view, d_x_view = reals_at(x, count, like), reals_at(o, count, like), reals_at(d_x, count, like)
    tap_view, sum_view = (
        reals_at(taps, width * d, like),
        reals_at(sums, batch * blocks * (width + _1) * d, like),
    )
    for block in range(uintp(first), uintp(last)):
        row = block // blocks
        begin = (block - row * blocks) * _BLOCK
        at_sums = block * (width + _1) * d
        for c in range((width + _1) * d):
            sum_view[at_sums + c] = 0
        for n in range(begin, min(length, begin + _BLOCK)):
            at = (row * length + n) * d
            for c in range(d):
                d_x_view[at + c] = 0
                sum_view[at_sums + width * d + c] += o_view[at + c]
            for k in range(width):
                # out_m reads x_n by tap k where m = n - k + before.
                if k <= n + before < length + k:
                    _add_product(d_x_view, at, tap_view, k * d, o_view, (row * length + n + before - k) * d, d)
                if before <= n + k < length + before:
                    read = (row * length + n + k - before) * d
                    _add_product(sum_view, at_sums + k * d, o_view, at, x_view, read, d)
