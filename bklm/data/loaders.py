"""Windows over a stream of token ids, and loaders whose order depends on (seed, epoch) and nothing else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from bklm.data.checks import index_or_none, require_ids, require_whole
from bklm.data.corpora import load_corpus
from bklm.data.tokenized import tokenize_corpus

IGNORED = -100  # the target that torch's losses leave out
LAYOUTS = ("every-target-once", "disjoint")


class GatheredRows(Dataset):
    """Rows (x, y) that come a batch at a time; a subclass has ``__len__`` and ``gather``.

    An index gives one row, (N,) each, and may count from the end; a list of them gives a batch, (len(list), N) each.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def gather(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y int64 (B, N) of some rows; ``indices``: int64 (B,), each from 0 to the length - 1."""
        raise NotImplementedError

    def __getitem__(self, index: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if (place := index_or_none(index)) is not None:
            x, y = self.__getitems__([range(len(self))[place]])
            return x[0], y[0]
        return self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"window indices must lie in [0, {len(self)})")
        return self.gather(indices)


class Windows(GatheredRows):
    """Windows (x, y) over token ids (tokens,): x and y int64 (seq_len,), y the token after each of x.

    "every-target-once": windows start at 0, S, 2S ... and overlap by one token, so that every token after the
    first is a target exactly once; the last, shorter window is filled up with ``pad_id`` in x and -100 in y.
    "disjoint": blocks of S + 1 tokens, as the original cut them; the tail is dropped, and one token in S + 1 is
    never a target.

    Indexed with a list it gathers a whole batch, (len(list), S) each, at once.
    """

    def __init__(self, ids: np.ndarray, seq_len: int, layout: str = "every-target-once", pad_id: int = 0):
        _require_layout(layout)
        require_whole("seq_len", seq_len, 1)
        ids = require_ids(ids)
        if len(ids) < seq_len + 1:
            raise ValueError(
                f"seq_len {seq_len} is longer than the text: it has {len(ids)} tokens and a window takes seq_len + 1; "
                f"give a seq_len of at most {max(len(ids) - 1, 0)}, or more text"
            )
        self.ids, self.seq_len, self.layout, self.pad_id = ids, seq_len, layout, pad_id
        if layout == "disjoint":
            self.stride, self.count = seq_len + 1, len(ids) // (seq_len + 1)
        else:
            self.stride, self.count = seq_len, -(-(len(ids) - 1) // seq_len)

    @property
    def num_targets(self) -> int:
        """How many tokens are targets, over all windows."""
        return len(self.ids) - 1 if self.layout == "every-target-once" else self.count * self.seq_len

    @property
    def is_target(self) -> np.ndarray:
        """Which tokens after the first are targets, (tokens - 1,) bool."""
        places = np.arange(1, len(self.ids))
        return (places < self.count * self.stride + 1) & (
            (places % self.stride > 0) | (self.stride == self.seq_len)
        )

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        places = indices[:, None] * self.stride + np.arange(self.seq_len + 1)
        beyond = places >= len(self.ids)
        both = self.ids[np.where(beyond, 0, places)].astype(np.int64)
        x, y = both[:, :-1].copy(), both[:, 1:].copy()
        if beyond.any():
            # An input whose target lies beyond the end teaches nothing either: padding starts with it.
            x[beyond[:, 1:]] = self.pad_id
            y[beyond[:, 1:]] = IGNORED
        return torch.from_numpy(x), torch.from_numpy(y)


def windows(ids: np.ndarray, seq_len: int, layout: str = "every-target-once", pad_id: int = 0) -> Windows:
    """``Windows`` over ``ids``, the form that reads well in a study: ``make_loader(windows(tokens.train, 128), 32)``."""
    return Windows(ids, seq_len, layout, pad_id)


class EpochOrder(Sampler[int]):
    """Indices 0 ... n - 1, in an order that is a function of (seed, epoch) alone, or in their own where not shuffled.

    The order comes from raw words of a Philox bit generator, which numpy keeps the same across its versions.
    Each pass goes one epoch on by itself; ``set_epoch`` says which one comes next, so that a resumed run sees
    what the undisturbed one saw.
    """

    def __init__(self, n: int, shuffle: bool = True, seed: int = 0, epoch: int = 0):
        self.n, self.shuffle, self.seed, self.epoch = n, shuffle, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if not self.shuffle:
            return iter(range(self.n))
        keys = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.n)
        return iter(np.argsort(keys, kind="stable").tolist())


def make_loader(
    dataset: Windows,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches (x, y), int64 (B, seq_len), of ``dataset``; the last one may be smaller.

    Shuffled, the order is a function of (seed, epoch): see ``EpochOrder`` and ``set_epoch``. It is an ordinary
    DataLoader with a BatchSampler, so that Accelerate's ``prepare`` can share it out.

    Raises:
        ValueError: batch_size < 1 or larger than the data set, num_workers < 0, seed or epoch < 0.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
    ):
        require_whole(name, value, least)
    if batch_size > len(dataset):
        raise ValueError(
            f"batch_size {batch_size} is larger than the data: there are {len(dataset)} windows; "
            f"give a batch_size of at most {len(dataset)}, a smaller seq_len, or more text"
        )
    order = EpochOrder(len(dataset), shuffle, seed, epoch)
    return _Loader(
        dataset,
        batch_sampler=BatchSampler(order, batch_size, drop_last),
        collate_fn=_as_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each pass draws from torch's global generator, which dropout reads
    )


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Each pass draws a number for its workers on the default device, which may not be that of the CPU's generator.
        with torch.device("cpu"):
            return super().__iter__()


class Pieces:
    """A loader whose passes are cut into ``pieces`` of equal length, each an epoch for whoever trains: scored more often.

    Piece k of pass e is epoch (e - 1) pieces + k. Batches of a pass that are too few for another one each are left out.

    Raises:
        ValueError: more pieces than batches.
    """

    def __init__(self, loader: DataLoader, pieces: int) -> None:
        if require_whole("pieces", pieces, 1) > len(loader):
            raise ValueError(
                f"pieces: got {pieces}, but a pass has {len(loader)} batches; cut it into as many pieces or fewer."
            )
        self.loader, self.pieces, self.epoch = loader, pieces, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader) // self.pieces

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        passes, piece = divmod(self.epoch - 1, self.pieces)
        self.epoch += 1
        set_epoch(self.loader, passes + 1)
        return itertools.islice(self.loader, piece * len(self), (piece + 1) * len(self))


class Portions:
    """A loader gone through in epochs of ``steps`` batches, wherever its passes end: for a budget of steps, or of time."""

    def __init__(self, loader: DataLoader, steps: int) -> None:
        self.loader, self.steps, self.epoch = loader, require_whole("steps", steps, 1), 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        passes, first = divmod((self.epoch - 1) * self.steps, len(self.loader))
        self.epoch += 1
        left = self.steps
        while left:
            set_epoch(self.loader, passes + 1)
            for batch in itertools.islice(self.loader, first, first + left):
                left -= 1
                yield batch
            passes, first = passes + 1, 0


def set_epoch(loader: Iterable, epoch: int) -> None:
    """Say which epoch the next pass of a ``make_loader`` loader is, before or after Accelerate's ``prepare``.

    Of other batches (a list, an ordinary DataLoader) nothing depends on the epoch, unless a sampler of theirs asks for it.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, batch_sampler, getattr(batch_sampler, "sampler", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
            return


def get_wikitext2_dataloaders(
    batch_size: int = 32,
    seq_len: int = 128,
    num_workers: int = 0,
    vocab_size_limit: int = 30_000,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    layout: str = "every-target-once",
    seed: int = 0,
    max_train_tokens: int | None = None,
) -> tuple[DataLoader, DataLoader, int]:
    """WikiText-2 as (train_loader, val_loader, vocab_size); batches are (x, y), int64 (B, seq_len), y shifted by one.

    Training windows are shuffled anew each epoch by ``seed``, validation windows come in order. See
    ``load_corpus`` for where the text comes from, ``Windows`` for the two layouts ("disjoint" is the original's),
    ``tokenize_corpus`` for the vocabulary.

    Raises:
        ValueError: a bad number, a batch larger than the training windows, a window longer than the text.
        OSError: the text cannot be read (ConnectionError, FileNotFoundError ...).
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seq_len", seq_len, 1),
        ("num_workers", num_workers, 0),
        ("vocab_size_limit", vocab_size_limit, 3),
        ("seed", seed, 0),
    ):
        require_whole(name, value, least)
    _require_layout(layout)
    tokens = tokenize_corpus(load_corpus("wikitext-2", data_dir), vocab_size_limit, max_train_tokens)
    train = Windows(tokens.train, seq_len, layout, tokens.pad_id)
    valid = Windows(tokens.valid, seq_len, layout, tokens.pad_id)
    return (
        make_loader(train, batch_size, shuffle=True, seed=seed, num_workers=num_workers),
        make_loader(valid, min(batch_size, len(valid)), num_workers=num_workers),
        tokens.vocab_size,
    )


def _as_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch  # Windows.__getitems__ has made the batch already


def _require_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose {' or '.join(map(repr, LAYOUTS))}")
