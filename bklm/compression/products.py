"""Int8 products whose activations are rounded per token or per tensor, with float columns for outliers.

With X a row of activations and W the weights, both rounded to int8, and their scales s_x (one a row, or one for all rows) and
s_w (one an output):

    y = s_x s_w (round(X / s_x) . round(W / s_w)) + b

summed as integers are, so that the result is the same on every processor. Columns that are named as outliers are left out of X
and of its scale, and multiplied in float (LLM.int8, Dettmers et al. 2022).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.compression.coding import Integers
from bklm.compression.rounding_kernels import rounded, scaled
from bklm.compression.scored_only import ScoredOnly
from bklm.data.loaders import IGNORED
from bklm.models import LanguageModel, TokenLosses

HEAD = "int8_product_head"
# While losses are computed. Sums and logits of so many stay in a core's cache: with 30,000 words of 64 inputs 2,048 rows take
# 0.58 of the time that 512 rows at once do (benchmarked in turns, one core).
LOGITS_AT_ONCE = 2**19
EXACT_IN_FLOAT = 1024  # products of two int8 numbers whose sum, at most 2**24, float32 holds exactly


@functools.cache
def multiplies_exactly() -> bool:
    """Whether torch's int8 product is right here.

    Without VNNI, or kept from it by ONEDNN_MAX_CPU_ISA, oneDNN adds pairs of products in 16 bits, and large ones saturate.
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(largest[:rows], largest.t()) == 64 * 127**2).all()) for rows in (1, 32))


def _product(whole: Tensor, values: Tensor) -> Tensor:
    """whole (T, K) int8 times values (K, V) int8, exact: int32 (T, V)."""
    if multiplies_exactly():
        return torch._int_mm(whole, values)
    sums = torch.zeros(len(whole), values.shape[1], dtype=torch.int32)
    for x, w in zip(whole.split(EXACT_IN_FLOAT, 1), values.split(EXACT_IN_FLOAT), strict=True):
        sums += (x.float() @ w.float()).int()
    return sums


def _is_likeliest(logits: Tensor, wanted: Tensor) -> Tensor:
    """``logits.argmax(1) == wanted``, (T,), by the maximum, which is vectorised: argmax takes longer than the products."""
    own = logits.gather(1, wanted.clamp_min(0).unsqueeze(1)).squeeze(1)
    found = (own == logits.amax(1)) & (wanted != IGNORED)
    rows = found.nonzero().squeeze(1)
    # Of equal logits the first is the likeliest.
    found[rows] = logits[rows].argmax(1) == wanted[rows]
    return found


class Int8Product(nn.Module):
    """(..., K) -> (..., V) by int8 products on the CPU; ``per`` is "token" or "tensor".

    A row with NaN or infinity has no int8 form: all that comes of it is NaN, and with one scale for all of every row.
    """

    def __init__(self, weight: Integers, bias: Tensor | None, per: str, outliers: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.per = per
        factors = torch.ones(self.in_features) if weight.columns is None else weight.columns
        kept, plain = factors, None
        if outliers is not None:
            kept = factors.index_fill(0, outliers, 0.0)
            plain = (weight.values[:, outliers].float() * weight.scales * factors[outliers]).t().contiguous()
        buffers = {
            "values": weight.values.t(), "scales": weight.scales[:, 0].clone(), "factors": kept, "outliers": outliers,
            "outlier_weight": plain, "none": torch.zeros(self.out_features),
        }  # fmt: skip
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return next(self.parts(rows, len(rows))).view(*x.shape[:-1], self.out_features)

    def parts(self, rows: Tensor, count: int) -> Iterator[Tensor]:
        """The outputs (., V) of rows (T, K), so many rows at a time, their scales as of one call."""
        whole, steps = rounded(rows, self.factors, self.per)
        bias = self.none if self.bias is None else self.bias
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            y = scaled(_product(whole[part], self.values), steps[part], self.scales, bias)
            if self.outliers is not None:
                y.addmm_(rows[part, self.outliers], self.outlier_weight)
            yield y


class Int8Products(ScoredOnly):
    """What a model with int8 products does differently from its class: its head, where that is int8; and it is not trained."""

    plain_class: type[LanguageModel]
    NOT_TRAINED = "a model with int8 products is not trained: train the float one, and round it again."

    def head(self) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, HEAD):
            raise TypeError(
                "a model whose head multiplies in int8 has no float head; use its logits() or token_losses()."
            )
        return super().head()

    def logits(self, hidden: Tensor) -> Tensor:
        return getattr(self, HEAD)(hidden) if hasattr(self, HEAD) else super().logits(hidden)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        if not hasattr(self, HEAD):
            return super().token_losses(input_ids, targets)
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        # Rows that are not scored would make a scale for all rows coarser.
        rows = self.hidden(input_ids).masked_fill((targets == IGNORED).unsqueeze(2), 0.0).flatten(0, 1)
        count = max(1, LOGITS_AT_ONCE // self.vocab_size)
        losses, right = [], []
        for logits, wanted in zip(
            getattr(self, HEAD).parts(rows, count), targets.flatten().split(count), strict=True
        ):
            losses.append(F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED))
            right.append(_is_likeliest(logits, wanted))
        return TokenLosses(torch.cat(losses).view(targets.shape), torch.cat(right).view(targets.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class is made on the spot, so pickle cannot find it by name.
        return _empty, (self.plain_class,), self.__dict__


@functools.cache
def class_with_int8_products(plain: type[LanguageModel]) -> type[LanguageModel]:
    """The class of models of a class whose products are int8."""
    return type(f"Int8{plain.__name__}", (Int8Products, plain), {"plain_class": plain})


def _empty(plain: type[LanguageModel]) -> LanguageModel:
    kind = class_with_int8_products(plain)
    return kind.__new__(kind)
