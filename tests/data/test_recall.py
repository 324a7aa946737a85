"""The recall task: what is asked was said before, at the distance that is claimed."""

from __future__ import annotations

import pytest
import torch

from bklm.data import IGNORED, set_epoch
from bklm.data.recall import Recall

TASK = Recall(sequences=40, batch_size=8, longest=32, pairs=3, keys=6, values=5, queries=4, tested=24)


def answer(row: list[int], place: int) -> tuple[int, int]:
    """The value that the key at a place has among the pairs, by hand, and how far back it stands."""
    for k in range(0, 2 * TASK.pairs, 2):
        if row[k] == row[place]:
            return row[k + 1], place - (k + 1)
    raise AssertionError("a key that was never said")


@pytest.mark.parametrize("loader", [TASK.train_loader(3), TASK.val_loader()])
def test_every_target_is_the_value_of_the_key_that_asks_within_the_longest_distance(loader):
    seen, distances = 0, set()
    for x, y in loader:
        assert x.shape[1] == TASK.seq_len
        assert set(x.flatten().tolist()) <= set(range(TASK.vocab_size))
        for row, targets in zip(x.tolist(), y.tolist(), strict=True):
            for place, target in enumerate(targets):
                if target != IGNORED:
                    value, distance = answer(row, place)
                    assert (value, place >= 2 * TASK.pairs) == (target, True)
                    distances.add(distance)
                    seen += 1
    assert max(distances) <= TASK.longest
    assert max(distances) > 24
    assert min(distances) < 8
    assert seen > 2 * len(loader.dataset)


@pytest.mark.parametrize("distance", [6, 16, 100])
def test_a_test_asks_once_a_sequence_at_exactly_its_distance(distance):
    for x, y in TASK.at_distance(distance):
        rows, places = (y != IGNORED).nonzero(as_tuple=True)
        assert rows.tolist() == list(range(len(x)))
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            assert answer(x[row].tolist(), place) == (int(y[row, place]), distance)


def test_models_of_a_seed_see_the_same_sequences_and_seeds_and_splits_differ():
    def first(loader, epoch=1):
        set_epoch(loader, epoch)
        return next(iter(loader))[0]

    assert torch.equal(first(TASK.train_loader(1)), first(TASK.train_loader(1)))
    assert not torch.equal(first(TASK.train_loader(1)), first(TASK.train_loader(2)))
    assert not torch.equal(first(TASK.train_loader(0)), first(TASK.val_loader()))


def test_bad_sizes_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^keys: got 2 for 4 pairs; give at least as many keys as pairs\.$"):
        Recall(8, 4, keys=2)
    with pytest.raises(ValueError, match=r"^longest: got 7 for 4 pairs, .*; give 8 or more\.$"):
        Recall(8, 4, longest=7, pairs=4)
    with pytest.raises(ValueError, match="distance"):
        TASK.at_distance(5)
