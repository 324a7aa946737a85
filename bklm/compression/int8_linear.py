"""A linear map with int8 products that is as exact for small numbers as for large ones.

torch's kernels bound the scale of activations (6.1e-5) and of weights (1.2e-7) from below, so that a small tensor, or a
small row of a weight, keeps few of its 8 bits or none; and they turn NaN into a number. Powers of two around the product
change neither bits nor rounding: activations and rows outside the range that the kernels serve well are multiplied into it,
and results divided again. Within that range, where almost all maps are, the kernel is called as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of the largest activation of a call: below it the kernel's bound is near, above it the kernel's range would overflow.
_LEAST, _MOST = 2.0**-5, 2.0**60
# Of a row's scale. The first is the kernel's bound.
_LEAST_SCALE, _MOST_SCALE = torch.finfo(torch.float32).eps, 2.0**53


def row_exponents(scales: Tensor) -> Tensor:
    """The powers of two (V,) int32 by which rows of these int8 scales (V,) are to be multiplied; 0 where they serve."""
    scales = scales.double()
    outside = (scales > 0) & ((scales < _LEAST_SCALE) | (scales > _MOST_SCALE))
    return torch.where(outside, -7 - torch.frexp(scales).exponent, 0)


class Int8Linear(nn.Module):
    """x (..., K) -> x W^T + b by ``product``, a dynamically quantised linear map of W with its rows multiplied by
    2^``exponents``, integers (V,). A row of x with NaN or infinity gives NaN, and takes no part in the scale of the others.
    """

    def __init__(self, product: nn.Module, exponents: Tensor) -> None:
        super().__init__()
        self.product = product
        self.in_features, self.out_features = product.in_features, product.out_features
        factors = torch.pow(2.0, -exponents.double())
        self.register_buffer("factors", factors if bool(exponents.any()) else None, persistent=False)
        self._rows: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return self.product(x)
        low, high = x.aminmax()
        largest = max(-float(low), float(high))
        if not largest < float("inf"):
            bad = ~x.isfinite().all(-1, keepdim=True)
            return self(x.masked_fill(bad, 0.0)).masked_fill(bad, torch.nan)
        if _LEAST <= largest <= _MOST or largest == 0.0:
            return self.product(x) if self.factors is None else self._rescaled(self.product(x), 1.0)
        power = 2.0 ** float(torch.frexp(torch.tensor(largest, device="cpu")).exponent)
        return self._rescaled(self.product((x.double() / power).to(x.dtype)), power)

    def weight_and_bias(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers (V, K) int8, the scale of each row (V,) float32, and the bias."""
        weight, bias = self.product._weight_bias()
        scales = weight.q_per_channel_scales()
        scales = scales if self.factors is None else scales.double() * self.factors
        return weight.int_repr(), scales.float(), None if bias is None else bias.detach()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Integers (V, K) and scales (V,) to look rows up in. The kernel's layout has no rows: this is a second copy in
        memory, made when it is first asked for, and in no file."""
        if self._rows is None:
            self._rows = self.weight_and_bias()[:2]
        return self._rows

    def set_weight_and_bias(self, integers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Take these in place of its own; shapes and dtypes as in ``weight_and_bias``."""
        exponents = row_exponents(scales)
        self.factors = torch.pow(2.0, -exponents.double()) if bool(exponents.any()) else None
        within = (scales.double() * torch.pow(2.0, exponents.double())).float()
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(integers, within, zeros, 0)
        self.product.set_weight_bias(weight, bias)
        self._rows = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def _rescaled(self, y: Tensor, power: float) -> Tensor:
        """The result for the activations and rows as they are; the kernel adds the bias last, which no factor is for."""
        bias = self.product._weight_bias()[1]
        bias = 0.0 if bias is None else bias.detach().double()
        factors = power if self.factors is None else self.factors * power
        return ((y.double() - bias) * factors + bias).to(y.dtype)


class Int8Embedding(nn.Module):
    """The embedding of a tied model: ids (...) -> rows (..., K) float32 of its head's int8 matrix, integers times scale.

    It has no matrix of its own: what the head is given, it gives.
    """

    def __init__(self, head: Int8Linear) -> None:
        super().__init__()
        # Not a second submodule: the head is saved, counted and replaced under one name.
        self._head = (head,)

    def forward(self, ids: Tensor) -> Tensor:
        integers, scales = self._head[0].rows()
        return integers[ids].float() * scales[ids].unsqueeze(-1)

    @property
    def weight(self) -> Tensor:
        """The whole matrix (V, K) in float32, computed at each call."""
        integers, scales = self._head[0].rows()
        return integers.float() * scales.unsqueeze(1)
