"""Cross-entropy of a linear head without its logits: chunk by chunk, the gradient computed in the forward.

With h (M, D) the hidden rows, W (V, D) and b (V,) the head, t (M,) the targets and P = softmax(h W^T + b),

    loss = sum_i w_i (logsumexp_i - logit_i,t_i),      w_i = 0 where t_i is ignored, else 1
    dh = w (P - onehot) W,    dW = (P - onehot)^T (w h),    db = (P - onehot)^T w

All three follow from one chunk of P, so each chunk of logits is made once, used for the loss and the gradients
while it is in the cache, and written over by the next. The backward only multiplies by the incoming scalar.
Peak memory is two chunks and the gradients, against three (M, V) arrays for ``F.cross_entropy(F.linear(...))``;
the matrix products are the same three. torch's own ``F.linear_cross_entropy`` with chunking does the same since
2.13; it is not used, because it was slower where it exists and Colab's torch lacks it.

Ignored rows are left out by what they hold, not by a factor of 0, which would let NaN and infinity through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.data.loaders import IGNORED
from bklm.models import loss_kernels
from bklm.models.checks import is_plain_wanted, values_at_hand
from bklm.models.second_derivatives import differentiable_gradients
from bklm.moe.autocast import autocast_dtype, autocast_off
from bklm.moe.products import onednn_linear, onednn_serves, weight_gradient

# Size of one chunk of logits. On a CPU it should stay near the last-level cache; a GPU wants matrix products
# large enough to fill it. The time is flat around both values (benchmarks/train_step.py --chunks).
CPU_CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
_FEWEST_ROWS = 16
# With few rows, so with many words, the sum into a large gradient is what costs, and MKL adds while it multiplies. At 139
# rows and 30,000 words oneDNN takes 0.5 of MKL's time, at 32 rows and 131,000 words 2.2 (one thread of an AMD EPYC).
_ROWS_FOR_ONEDNN = 64


class TokenLosses(NamedTuple):
    """Per-token scores, shaped like the targets. Where the target is ignored: 0 and False."""

    nll: Tensor  # negative log-likelihood in nats, float32 (float64 for a float64 model)
    correct: Tensor  # bool: the largest logit is the target's


def scored_targets(targets: Tensor, reduction: str, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Which targets are scored, bool of their shape, and how many, int64.

    Raises:
        ValueError: a reduction other than "mean" and "sum"; a mean of which every target is ignored, where its values are at
            hand without waiting for a device.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}; allowed are 'mean' and 'sum'.")
    valid = targets != ignore_index
    count = valid.sum()
    if reduction == "mean" and values_at_hand(targets) and count == 0:
        raise ValueError(
            f"targets: all {targets.numel()} are {ignore_index} (ignored), so there is no loss to average; "
            "leave such a batch out."
        )
    return valid, count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = IGNORED,
    chunk_rows: int | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), targets)`` in nats, a chunk of logits at a time.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D); bias: (V,) or None.
        targets: (...) int64 in [0, V), or ``ignore_index``: such a row adds neither loss nor gradient.
        reduction: "mean" over the targets that are not ignored, or "sum".
        chunk_rows: rows of logits held at once; chosen by device when None.

    Returns:
        A float32 scalar (float64 for float64 inputs), whatever the inputs and autocast: the logits of a
        half-precision head are half precision, softmax, sums and the gradients of weight and bias are float32.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction; on a CPU also when every target is ignored.
            (Elsewhere that would wait for the device at every step; the mean is NaN there.)
        TypeError: targets that are not int64.

    A second derivative, and what torch.func asks for (vmap, grad), is right too; there the logits exist as a whole.
    """
    rows, targets = _flatten(hidden, weight, bias, targets)
    valid, count = scored_targets(targets, reduction, ignore_index)
    readable = values_at_hand(targets)
    chunk_rows = chunk_rows or _rows_per_chunk(weight)
    if is_plain_wanted(rows, weight, bias):
        product = autocast_dtype(rows) or rows.dtype
        total = _plain_losses(rows, weight, bias, targets.masked_fill(~valid, 0), valid, product).nll.sum()
    elif torch.is_grad_enabled():
        # On a CPU counting is cheap, and copying rows of which all are scored is not.
        if not (readable and count == len(targets)):
            rows = rows.masked_fill(~valid.unsqueeze(1), 0.0)
        total = _ChunkedCrossEntropy.apply(
            rows, weight, bias, targets.masked_fill(~valid, 0), valid, chunk_rows
        )
    else:
        total = linear_token_losses(
            rows, weight, bias, targets, ignore_index=ignore_index, chunk_rows=chunk_rows
        ).nll.sum()
    return total / count if reduction == "mean" else total


@torch.no_grad()
def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk_rows: int | None = None,
) -> TokenLosses:
    """The loss of every target and whether it was the likeliest token, without gradients; arguments as above."""
    shape = targets.shape
    rows, targets = _flatten(hidden, weight, bias, targets)
    valid = targets != ignore_index
    targets = targets.masked_fill(~valid, 0)
    if is_plain_wanted(rows, weight, bias):
        nll, correct = _plain_losses(rows, weight, bias, targets, valid, autocast_dtype(rows) or rows.dtype)
        return TokenLosses(nll.view(shape), correct.view(shape))
    head = LinearHead(rows, weight, bias, chunk_rows or _rows_per_chunk(weight))
    nll = rows.new_empty(len(rows), dtype=head.exact)
    correct = torch.empty_like(valid)
    for chunk in head.chunks():
        logits, _, losses = head.softmax(chunk, targets[chunk])
        nll[chunk] = losses
        correct[chunk] = logits.argmax(1) == targets[chunk]
    return TokenLosses(nll.masked_fill_(~valid, 0.0).view(shape), (correct & valid).view(shape))


class LinearHead:
    """The linear head at one call: dtypes, and one pair of buffers that every chunk reuses."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> None:
        # An autograd.Function runs outside autocast's reach: choose the dtype of the products as F.linear
        # would.
        self.product = product = autocast_dtype(rows) or rows.dtype
        self.exact = torch.float32 if product.itemsize < 4 else product
        self.rows, self.weight = rows.to(product), weight.to(product)
        self.bias = None if bias is None else bias.to(product)
        self.chunk_rows = min(chunk_rows, len(rows))
        self.by_onednn = onednn_serves(self.rows)
        self.has_kernel = product in loss_kernels.LIKE and values_at_hand(rows)
        if not self.by_onednn:
            self._logits = rows.new_empty(self.chunk_rows, len(weight), dtype=product)
        self._p: Tensor | None = None
        self._weight_t: Tensor | None = None

    def chunks(self) -> list[slice]:
        starts = range(0, len(self.rows), self.chunk_rows) if len(self.rows) else ()
        return [slice(i, min(i + self.chunk_rows, len(self.rows))) for i in starts]

    def softmax(self, chunk: slice, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, their softmax and the targets' losses for the rows of ``chunk``. The buffers live until the next call."""
        logits = self.logits(self.rows[chunk])
        if self._p is None:
            self._p = logits.new_empty(self.chunk_rows, len(self.weight), dtype=self.exact)
        p = self._p[: len(logits)]
        torch.softmax(logits, 1, dtype=self.exact, out=p)
        # The largest probability is 1 / sum exp(logit - max), which gives the log-sum-exp back for the price of
        # a maximum; -log p[target] would do only until p underflows.
        top = logits.amax(1).to(self.exact)
        target_logit = logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(self.exact)
        return logits, p, top - target_logit - p.amax(1).log()

    def gradient(self, chunk: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The targets' losses, and their gradient for the logits, of the rows of ``chunk``; it lives until the next call."""
        if self.has_kernel:
            p = self.logits(self.rows[chunk])
            return loss_kernels.losses_in_place(p, targets), p
        _, p, losses = self.softmax(chunk, targets)
        p.scatter_add_(1, targets.unsqueeze(1), p.new_full((len(targets), 1), -1.0))
        return losses, p

    def logits(self, h: Tensor) -> Tensor:
        """h (m, D) times the transposed weight, plus bias."""
        if self.by_onednn:
            return onednn_linear(h, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(h, self.weight.t(), out=self._logits[: len(h)])
        return torch.addmm(self.bias, h, self.weight.t(), out=self._logits[: len(h)])

    def towards_rows(self, p: Tensor) -> Tensor:
        """p (m, V) times the weight (V, D)."""
        if not self.by_onednn:
            return p @ self.weight
        if self._weight_t is None:
            self._weight_t = self.weight.t().contiguous()
        return onednn_linear(p, self._weight_t, None)

    def no_weight_gradient(self) -> Tensor:
        """Zeros (V, D), laid out as oneDNN's products are that will be added to them, where it makes them."""
        if self.by_onednn and self.chunk_rows >= _ROWS_FOR_ONEDNN:
            return torch.zeros_like(self.weight.t(), memory_format=torch.contiguous_format).t()
        return torch.zeros_like(self.weight, dtype=self.exact)

    def add_weight_gradient(self, total: Tensor, p: Tensor, h: Tensor) -> None:
        """total (V, D) += p^T h, of p (m, V) and h (m, D)."""
        if self.by_onednn and len(p) >= _ROWS_FOR_ONEDNN:
            total += weight_gradient(p, h)
        else:
            total.addmm_(p.t(), h)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over valid rows of the cross-entropy; the gradients are ready when the forward returns."""

    @staticmethod
    def forward(ctx, rows, weight, bias, targets, valid, chunk_rows):
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = LinearHead(rows, weight, bias, chunk_rows)
        full = head.product == head.exact
        scale = valid.to(head.exact)
        total = scale.new_zeros(())
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_weight = head.no_weight_gradient() if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=head.exact) if needs_bias else None
        for chunk in head.chunks():
            target, w = targets[chunk], scale[chunk]
            losses, p = head.gradient(chunk, target)
            # An ignored row is zero by now, but the bias of the target that stands in for its own may be infinite.
            total += losses.masked_fill_(w == 0, 0.0).dot(w)
            if needs_bias:
                d_bias.addmv_(p.t(), w)
            if full:
                if needs_weight:
                    head.add_weight_gradient(d_weight, p, head.rows[chunk] * w.unsqueeze(1))
            else:
                p = p.to(head.product)
                if needs_weight:
                    d_weight += p.t() @ (head.rows[chunk] * w.unsqueeze(1).to(head.product))
            if needs_rows:
                d_rows[chunk] = head.towards_rows(p) * w.unsqueeze(1)
        ctx.save_for_backward(rows, weight, bias, targets, valid, d_rows, d_weight, d_bias)
        ctx.product = head.product
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        rows, weight, bias, targets, valid, *gradients = ctx.saved_tensors
        # The gradients are constants by now: a second derivative through them would be missing terms, not be zero.
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_plain_wanted(grad_total)):
            inputs = (rows, weight, bias)
            return (*_plain_gradients(grad_total, inputs, targets, valid, ctx.product), None, None, None)
        # Not in place: a graph kept for a second backward must find the gradients as they were.
        grads = (
            None if g is None else (g * grad_total).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None)


def _plain_losses(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, valid: Tensor, product: torch.dtype
) -> TokenLosses:
    """The terms of the sum in ordinary operations, which autograd and torch.func see through."""
    with autocast_off(rows):
        rows = rows.masked_fill(~valid.unsqueeze(-1), 0.0)
        logits = F.linear(rows.to(product), weight.to(product), None if bias is None else bias.to(product))
        exact = torch.float32 if product.itemsize < 4 else product
        logp = torch.log_softmax(logits, -1, dtype=exact)
        nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return TokenLosses(nll.masked_fill(~valid, 0.0), (logits.detach().argmax(-1) == targets) & valid)


def _plain_gradients(
    grad_total: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    valid: Tensor,
    product: torch.dtype,
) -> list[Tensor | None]:
    """What the backward returns, as functions that may be differentiated again."""
    return differentiable_gradients(
        lambda *nodes: _plain_losses(*nodes, targets, valid, product).nll.sum(), inputs, grad_total
    )


def _rows_per_chunk(weight: Tensor) -> int:
    budget = CPU_CHUNK_BYTES if weight.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(_FEWEST_ROWS, budget // (len(weight) * 4))


def _flatten(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {targets.dtype}; token ids must be int64.")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)} for hidden states {tuple(hidden.shape)}; "
            f"the shape must be {tuple(hidden.shape[:-1])}."
        )
    if (
        weight.ndim != 2
        or weight.shape[1] != hidden.shape[-1]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"head: got weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} for hidden "
            f"states of width {hidden.shape[-1]}; expected (V, {hidden.shape[-1]}) and (V,)."
        )
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
