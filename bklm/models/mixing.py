"""Where a model mixes positions, as a point that can be read and switched off: what is a model without its mixer?

A block passes what its mixer made of other positions through a ``MixingPoint``. It changes nothing, until it is told to
add up what passes, or to put one vector in place of it at every position: then no position hears of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class MixingPoint(nn.Module):
    """The identity on features (B, N, ...); ``total`` and ``count`` while it records, ``replacement`` while it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.records = False
        self.total: Tensor | None = None  # (...) float64, summed over batch and positions
        self.count = 0
        self.replacement: Tensor | None = None  # (...)

    @property
    def idle(self) -> bool:
        """Whether features pass unseen and unchanged, as in training."""
        return not self.records and self.replacement is None

    def forward(self, features: Tensor) -> Tensor:
        if self.records:
            seen = features.detach().flatten(0, 1)
            total = seen.sum(0, dtype=torch.float64)
            self.total = total if self.total is None else self.total + total
            self.count += len(seen)
        if self.replacement is not None:
            return self.replacement.to(features).expand_as(features)
        return features

    def __getstate__(self) -> dict:
        # What one measurement left behind is no part of a copy of the model.
        return {**self.__dict__, "records": False, "total": None, "count": 0, "replacement": None}


class MixingMeans:
    """What passed a model's mixing points: ``totals`` and ``counts``, one entry per point."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.counts: list[int] = []

    def means(self) -> list[Tensor]:
        """The mean features of every point.

        Raises:
            ValueError: nothing passed.
        """
        if not self.totals or not all(self.counts):
            raise ValueError("mixing: no position passed while the mixers were recorded; run the model first.")
        return [total / count for total, count in zip(self.totals, self.counts, strict=True)]


@contextlib.contextmanager
def recording(points: Sequence[MixingPoint]) -> Iterator[MixingMeans]:
    """Add up what passes; the sums are in the value given after the block ends."""
    found = MixingMeans()
    for point in points:
        point.records, point.total, point.count = True, None, 0
    try:
        yield found
    finally:
        for point in points:
            point.records = False
            if point.total is not None:
                found.totals.append(point.total)
                found.counts.append(point.count)
            point.total = None


@contextlib.contextmanager
def replacing(points: Sequence[MixingPoint], means: Sequence[Tensor]) -> Iterator[None]:
    """Put ``means`` in place of what passes, one per point.

    Raises:
        ValueError: another number of means than points.
    """
    if len(means) != len(points):
        raise ValueError(f"means: got {len(means)}; this model mixes positions at {len(points)} places.")
    for point, mean in zip(points, means, strict=True):
        point.replacement = mean
    try:
        yield
    finally:
        for point in points:
            point.replacement = None
