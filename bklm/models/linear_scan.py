"""A linear recurrence over positions as a parallel scan in chunks, of torch operations alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16  # positions that are walked one by one


def linear_scan(decay: Tensor, x: Tensor, before: Tensor | None = None) -> Tensor:
    """h_i = decay_i h_{i-1} + x_i for x (B, N, D), real or complex; h_{-1} is ``before`` (B, D), or 0.

    ``decay`` is (B, N, D), or (D,) where it is the same at every position. Chunks are walked side by side, each from 0; what
    they pass on to one another is the same recurrence, a sixteenth as long. Each number is read a few times: by doubling
    (Hillis and Steele 1986) it would be log2 N times. Differentiable to any order. Position i depends on 0 ... i alone, bit
    for bit.
    """
    length, is_constant = x.shape[1], decay.ndim == 1
    if length <= CHUNK:
        return torch.stack(_walk([decay] * length if is_constant else decay.unbind(1), x.unbind(1), before), 1)
    x = _in_chunks(x)
    decays = [decay] * CHUNK if is_constant else _in_chunks(decay).unbind(2)
    found = _walk(decays, x.unbind(2))
    products = [decays[0]]
    for factor in decays[1:]:
        products.append(products[-1] * factor)
    first = torch.zeros_like(x[:, 0, 0]) if before is None else before
    ends = linear_scan(products[-1], found[-1], before)[:, :-1]
    begins = torch.cat((first.unsqueeze(1), ends), 1).unsqueeze(2)
    whole = torch.addcmul(torch.stack(found, 2), torch.stack(products, -2), begins)
    return whole.flatten(1, 2)[:, :length]


def _walk(decays: Sequence[Tensor], xs: Sequence[Tensor], before: Tensor | None = None) -> list[Tensor]:
    found = [xs[0] if before is None else torch.addcmul(xs[0], decays[0], before)]
    for decay, x in zip(decays[1:], xs[1:], strict=True):
        found.append(torch.addcmul(x, decay, found[-1]))
    return found


def _in_chunks(x: Tensor) -> Tensor:
    """(B, N, D) -> (B, chunks, CHUNK, D), the last one filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
