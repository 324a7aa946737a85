"""The beginnings of texts too large to fetch whole: streamed from the hub by exact revision, a number of words at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bklm.data.corpus import LICENCES, Corpus

HELD_OUT = (
    200_000  # words of each held-out split that is cut from a larger one: about as many as WikiText-2 has
)
# A row of WikiText is a line, which may be empty; one of C4 a whole document of many.
HOLDS_DOCUMENTS = {"c4": True, "wikitext-103": False}


def corpus_of_beginnings(name: str, dataset: Any, words: int) -> Corpus:
    """The first ``words`` of the training split, whole rows, and what there is of held-out text; of C4, whose validation split
    stands for two of ours, the first ``HELD_OUT`` words are for validation and the next as many for the test.

    Args:
        dataset: a ``bklm.data.hub.HubDataset`` with its revision; ``splits`` are those of training and held-out text.

    Raises:
        What ``datasets`` raises where the network fails; ``bklm.data.hub`` turns it into a sentence.
    """
    import datasets

    def rows(split: str) -> Iterator[str]:
        stream = datasets.load_dataset(
            dataset.repository, dataset.configuration, split=split, streaming=True, revision=dataset.revision
        )
        return _lines(stream, HOLDS_DOCUMENTS[name])

    train, *held_out = dataset.splits
    first = _first(rows(train), words)
    if len(held_out) == 1:
        once = rows(held_out[0])
        others = [_first(once, HELD_OUT), _first(once, HELD_OUT)]
    else:
        others = [list(rows(split)) for split in held_out]
    source = f"Hugging Face {dataset}, revision {dataset.revision[:12]}, the first {words:,} words"
    return Corpus(name, source, first, *others, line_is_document=HOLDS_DOCUMENTS[name], licence=LICENCES[name])


def _lines(rows: Iterable[dict[str, str]], are_documents: bool) -> Iterator[str]:
    for row in rows:
        yield " ".join(row["text"].split()) if are_documents else row["text"].removesuffix("\n")


def _first(lines: Iterator[str], words: int) -> list[str]:
    """Lines up to the one with the last of so many words; the iterator goes on after it."""
    found, left = [], words
    while left > 0 and (line := next(lines, None)) is not None:
        found.append(line)
        left -= len(line.split())
    return found
