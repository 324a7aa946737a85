"""Recall: a few key-value pairs, filler, then a key again: what was its value? (Associative recall, Arora et al. 2023.)

A sequence begins with ``pairs`` different keys, each followed by a value of its own. Fillers follow; where a key stands
among them, its value is the target. Nothing else is one. The distance is the number of positions from the value to the
key that asks. Chance is 1 / values. All is drawn from seeds: every model of a seed sees the same sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bklm.data.checks import require_whole
from bklm.data.loaders import IGNORED, make_loader

FILLERS = 16


class Pairs:
    """(x, y) tensors as a data set that gives a list of rows at once."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[rows], self.y[rows]


@dataclass(frozen=True)
class Recall:
    """The task: ``longest`` is the largest distance in training, ``sequences`` the number of training sequences.

    Raises:
        ValueError: fewer keys than pairs, a distance shorter than they are, or a size that is no whole number from 1.
    """

    sequences: int
    batch_size: int
    longest: int = 128
    pairs: int = 4
    keys: int = 16
    values: int = 16
    queries: int = 16
    tested: int = 256  # sequences at each distance

    def __post_init__(self) -> None:
        for name in ("sequences", "batch_size", "longest", "pairs", "keys", "values", "queries", "tested"):
            require_whole(name, getattr(self, name), 1)
        if self.keys < self.pairs:
            raise ValueError(
                f"keys: got {self.keys} for {self.pairs} pairs; give at least as many keys as pairs."
            )
        if self.longest < 2 * self.pairs:
            raise ValueError(
                f"longest: got {self.longest} for {self.pairs} pairs, which take two positions each; give {2 * self.pairs} or "
                "more."
            )

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + FILLERS

    @property
    def unk_id(self) -> None:
        return None

    @property
    def seq_len(self) -> int:
        """Of a training sequence: pairs, then ``longest`` positions."""
        return 2 * self.pairs + self.longest

    @property
    def chance(self) -> float:
        return 1 / self.values

    def train_loader(self, seed: int) -> DataLoader:
        """Sequences with queries at random distances up to ``longest``."""
        return make_loader(self._mixed(self.sequences, seed + 1), self.batch_size, shuffle=True, seed=seed)

    def val_loader(self) -> DataLoader:
        """Others of the same kind, the same for every seed."""
        return make_loader(self._mixed(self.tested, 0), min(self.batch_size, self.tested))

    def at_distance(self, distance: int) -> DataLoader:
        """``tested`` sequences with one query each, at exactly this distance, which is at least that of the pairs' length."""
        require_whole("distance", distance, 2 * self.pairs)
        random = torch.Generator().manual_seed(10_007 + distance)
        x, answers = self._begin(self.tested, 2 * self.pairs + distance, random)
        asked = torch.randint(self.pairs, (self.tested,), generator=random, device="cpu")
        y, rows, places = (
            torch.full_like(x, IGNORED),
            torch.arange(self.tested, device="cpu"),
            2 * asked + 1 + distance,
        )
        x[rows, places] = x[rows, 2 * asked]
        y[rows, places] = answers[rows, asked]
        return make_loader(Pairs(x, y), min(self.batch_size, self.tested))

    def _begin(self, count: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences of pairs and fillers, and the pairs' values (count, pairs)."""
        x = self.keys + self.values + torch.randint(FILLERS, (count, length), generator=random, device="cpu")
        x[:, 0 : 2 * self.pairs : 2] = torch.rand(count, self.keys, generator=random, device="cpu").argsort(1)[
            :, : self.pairs
        ]
        answers = self.keys + torch.randint(self.values, (count, self.pairs), generator=random, device="cpu")
        x[:, 1 : 2 * self.pairs : 2] = answers
        return x, answers

    def _mixed(self, count: int, seed: int) -> Pairs:
        random = torch.Generator().manual_seed(seed)
        x, answers = self._begin(count, self.seq_len, random)
        y, begin = torch.full_like(x, IGNORED), 2 * self.pairs
        asked = torch.randint(self.pairs, (count, self.queries), generator=random, device="cpu")
        # As many in each octave behind the pairs: a model that can be taught by short distances alone learns from those first.
        reach = torch.rand(count, self.queries, generator=random, device="cpu") * math.log(self.longest + 1)
        places = begin - 1 + reach.exp().long().clamp(1, self.longest)
        # A value stands at 2 asked + 1: no distance is longer than ``longest``.
        places = torch.minimum(places, 2 * asked + 1 + self.longest)
        rows = torch.arange(count, device="cpu")[:, None].expand_as(places)
        keys = x.gather(1, 2 * asked)
        for k in range(self.queries):
            # One after the other: of two queries at one place the later stands.
            x[rows[:, k], places[:, k]] = keys[:, k]
            y[rows[:, k], places[:, k]] = answers.gather(1, asked)[:, k]
        return Pairs(x, y)
