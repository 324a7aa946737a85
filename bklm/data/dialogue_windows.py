"""Windows over dialogues: the model reads a whole dialogue and is asked for its replies; and replies after contexts of choice.

A row is one dialogue, or of a dialogue that is longer than a window as much as fits: a window then ends before the turn of
the user whose reply does not fit, and the next one begins there; one exchange that is longer than a window is cut, and goes
on in the next one. So every token of a reply is a target exactly once, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bklm.data.checks import require_whole
from bklm.data.dialogue_tokens import EncodedDialogues
from bklm.data.loaders import IGNORED, EpochOrder, GatheredRows, Windows, set_epoch

CONTEXTS = ("0", "1", "3", "all", "other", "1 after other")
"""What stands before a reply: so many turns of its dialogue; as many of another one's as it has; its last turn after those.

All but the first begin with a turn of the user, as a training row does: behind a reply at its beginning every model is worse,
whatever it remembers. No turn at all is outside of what a model was trained on, and so says least."""


class Rows(GatheredRows):
    """Rows of ids, each with the targets that it is asked for, filled up to the longest of a batch: x and y int64 (B, N)."""

    def __init__(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> None:
        """``rows`` are pairs (ids, is a target), both (tokens,); the first id is never a target."""
        self.rows, self.pad_id = rows, pad_id

    @property
    def num_targets(self) -> int:
        return int(sum(target[1:].sum() for _, target in self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = [self.rows[i] for i in indices]
        longest = max(len(ids) for ids, _ in rows) - 1
        x = np.full((len(rows), longest), self.pad_id, np.int64)
        y = np.full((len(rows), longest), IGNORED, np.int64)
        for place, (ids, target) in enumerate(rows):
            x[place, : len(ids) - 1] = ids[:-1]
            y[place, : len(ids) - 1] = np.where(target[1:], ids[1:].astype(np.int64), IGNORED)
        return torch.from_numpy(x), torch.from_numpy(y)


def dialogue_rows(
    encoded: EncodedDialogues, seq_len: int, pad_id: int, user_id: int, all_tokens: bool = False
) -> Rows:
    """Windows of at most ``seq_len`` inputs; their targets are the replies, or with ``all_tokens`` all but each first token.

    Raises:
        ValueError: seq_len below 2.
    """
    require_whole("seq_len", seq_len, 2)
    rows = []
    for d in range(len(encoded)):
        begin, end = encoded.starts[encoded.first_turns[d]], encoded.starts[encoded.first_turns[d + 1]]
        ids, target = encoded.ids[begin:end], encoded.target[begin:end]
        if all_tokens:
            target = np.arange(len(ids)) > 0
        users = np.flatnonzero(ids == user_id)
        for first, last in _cuts(len(ids), users, seq_len):
            own = target[first : last + 1].copy()
            own[0] = False
            if own.any():
                rows.append((ids[first : last + 1], own))
    return Rows(rows, pad_id)


def _cuts(length: int, users: np.ndarray, seq_len: int) -> Iterator[tuple[int, int]]:
    """First and last token of each window; the last is the first of the next one."""
    first = 0
    while first < length - 1:
        last = min(first + seq_len, length - 1)
        if last < length - 1 and len(within := users[(users > first) & (users <= last)]):
            last = int(within[-1])
        yield first, last
        first = last


def replies_in_context(
    encoded: EncodedDialogues, context: str, seq_len: int, pad_id: int, most: int = 0
) -> Rows:
    """Every reply (the first ``most``; 0: all) behind one of ``CONTEXTS``, with the same targets in each.

    Of what does not fit into ``seq_len`` inputs the beginning of the context is left out; of a reply the first half window is
    scored.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context: got {context!r}; allowed is one of {', '.join(map(repr, CONTEXTS))}.")
    rows = []
    for d in range(len(encoded)):
        turns = encoded.turns(d)
        for place in np.flatnonzero(
            encoded.replies[encoded.first_turns[d] : encoded.first_turns[d + 1]]
        ).tolist():
            reply = turns[place][: 1 + seq_len // 2]
            before = _before(encoded, d, turns, place, context)
            ids = np.concatenate([*before, reply])[-(seq_len + 1) :]
            target = np.zeros(len(ids), bool)
            target[len(ids) - len(reply) + 1 :] = True
            rows.append((ids, target))
            if len(rows) == most:
                return Rows(rows, pad_id)
    return Rows(rows, pad_id)


def _before(
    encoded: EncodedDialogues, dialogue: int, turns: list[np.ndarray], place: int, context: str
) -> list[np.ndarray]:
    if context == "all":
        return turns[:place]
    if context.isdecimal():
        return turns[max(0, place - int(context)) : place]
    others = _turns_of_another(encoded, dialogue, place)
    return others if context == "other" else [*others[:-1], turns[place - 1]]


def _turns_of_another(encoded: EncodedDialogues, dialogue: int, place: int) -> list[np.ndarray]:
    """The turns before a reply at this place of the next dialogue that has one; of the longest where none does."""
    count = len(encoded)
    lengths = np.diff(encoded.first_turns)
    for step in range(1, count):
        other = (dialogue + step) % count
        if lengths[other] > place and encoded.replies[encoded.first_turns[other] + place]:
            return encoded.turns(other)[:place]
    others = np.delete(np.arange(count), dialogue)
    if not len(others):
        raise ValueError("context: got 'other' with one dialogue; give two or more to compare.")
    longest = int(others[lengths[others].argmax()])
    last = int(np.flatnonzero(encoded.replies[slice(*encoded.first_turns[longest : longest + 2])])[-1])
    return encoded.turns(longest)[max(0, last - place) : last]


class Mixed:
    """Batches of dialogues with windows of another text behind them, drawn by (seed, epoch) alone: a share of the targets,
    which is what a loss is a mean over. A window is cut to the length of its batch."""

    def __init__(self, loader: DataLoader, windows: Windows, share: float, seed: int) -> None:
        """Raises ValueError where ``share`` lies outside (0, 1)."""
        if not 0 < share < 1:
            raise ValueError(f"replay: got {share}; allowed is a share between 0 and 1.")
        self.loader, self.windows, self.share, self.seed, self.epoch = loader, windows, share, seed, 0

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        set_epoch(self.loader, epoch)
        order = list(EpochOrder(len(self.windows), seed=self.seed, epoch=epoch))
        taken, due = 0, 0.0
        for x, y in self.loader:
            # What is less than a window waits for the next batch: the share is that of all batches together.
            due += int((y != IGNORED).sum()) * self.share / (1 - self.share)
            length, rows = min(x.shape[1], self.windows.seq_len), []
            while due >= length:
                rows.append(order[taken % len(order)])
                taken, due = taken + 1, due - length
            yield (x, y) if not rows else self._joined(x, y, rows, length)

    def _joined(self, x: Tensor, y: Tensor, rows: list[int], length: int) -> tuple[Tensor, Tensor]:
        more = [t[:, :length] for t in self.windows.__getitems__(rows)]
        filled = [
            torch.nn.functional.pad(t, (0, x.shape[1] - length), value=value)
            for t, value in zip(more, (self.windows.pad_id, IGNORED), strict=True)
        ]
        return torch.cat([x, filled[0]]), torch.cat([y, filled[1]])


def count_replies(encoded: EncodedDialogues, most: int = 0) -> tuple[int, int]:
    """How many replies ``replies_in_context`` gives, and how many of them have turns before the one that they answer."""
    places = [
        place
        for d in range(len(encoded))
        for place in np.flatnonzero(encoded.replies[encoded.first_turns[d] : encoded.first_turns[d + 1]])
    ][: most or None]
    return len(places), sum(place > 1 for place in places)
