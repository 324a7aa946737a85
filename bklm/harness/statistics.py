"""Intervals over seeds, and perplexities with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from bklm.training.evaluation import LARGEST_PERPLEXITY

FEWEST_SEEDS = 3  # for an interval: the t-interval of two is thirteen times their distance


def interval95(values: Sequence[float], any_of: int = 1) -> tuple[float, float | None]:
    """Mean and half-width of its 95% t-interval; below ``FEWEST_SEEDS`` values the half-width is None (unknown, not zero).
    ``any_of`` such intervals hold at once with 95% (Bonferroni): for a claim that any one of them would make hold."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < FEWEST_SEEDS:
        return float(sample.mean()), None
    half = stdtrit(len(sample) - 1, 1 - 0.025 / any_of) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean()), float(half)


def widened(mean: float, end: float, seeds: int, any_of: int) -> float:
    """One end of a 95% interval around a geometric mean over seeds, moved out as far as ``any_of`` intervals at once ask."""
    return mean * (end / mean) ** times_wider(seeds, any_of)


def times_wider(seeds: int, any_of: int) -> float:
    """How many times as wide a 95% interval over seeds is where ``any_of`` of them hold at once."""
    alone, at_once = (stdtrit(seeds - 1, 1 - 0.025 / count) for count in (1, any_of))
    return float(at_once / alone)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over seeds: exp of the mean loss, and the 95% t-interval of that mean, in nats, carried over by exp.

    The loss is what is averaged: in perplexities one diverged seed would outweigh all others, and an interval could
    reach below zero. ``low`` and ``high`` are None for one seed; of two they are these two (``is_range``), by which
    nothing is judged.
    """

    mean: float
    low: float | None
    high: float | None
    is_range: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether ``low`` and ``high`` are an interval, by which a difference can be judged."""
        return self.low is not None and not self.is_range

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """The ends by which a difference can be judged; (None, None) for one seed, and for the range of two."""
        return (self.low, self.high) if self.is_judged else (None, None)

    @classmethod
    def over_seeds(cls, perplexities: Sequence[float], any_of: int = 1) -> Perplexity:
        loss, half = interval95(np.log(perplexities), any_of)
        if len(perplexities) == 2:
            return cls(float(np.exp(loss)), float(min(perplexities)), float(max(perplexities)), is_range=True)
        if half is None:
            return cls(float(np.exp(loss)), None, None)
        # A few diverged seeds can give an interval beyond any number; JSON has no infinity.
        low, high = np.exp(loss - half), np.exp(min(loss + half, 700.0))
        return cls(float(np.exp(loss)), float(low), float(high))

    @classmethod
    def ratio_over_seeds(cls, others: Sequence[float], bests: Sequence[float], any_of: int = 1) -> Perplexity:
        """One model's perplexities over another's of the same seeds. Without an interval where one of them is off the scale:
        of two that are, nobody recorded which is the larger, and their ratio of 1 would look like a result."""
        ratio = cls.over_seeds([other / best for other, best in zip(others, bests, strict=True)], any_of)
        return cls(ratio.mean, None, None) if any(map(is_off_the_scale, (*others, *bests))) else ratio

    def __str__(self) -> str:
        if self.low is None:
            return _short(self.mean)
        kind = "range " if self.is_range else ""
        wide = "" if self.is_range or self.high <= 100 * self.low else ", seeds far apart"
        return f"{_short(self.mean)} ({kind}{_short(self.low)} to {_short(self.high)}{wide})"


def is_off_the_scale(perplexity: float) -> bool:
    """Whether a recorded perplexity is the largest that is ever recorded, which stands for anything above it, too."""
    return perplexity >= LARGEST_PERPLEXITY * (1 - 1e-9)


def _short(value: float) -> str:
    """A perplexity or a ratio of perplexities for people: "268.4", "2,180", "1e+09"."""
    if value < 10:
        return f"{value:.3f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def with_interval(mean: float, half: float | None, digits: int = 1) -> str:
    """ "303.1 ± 2.4", or "303.1" when one seed gives no interval."""
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
