"""Texts that are nearly the same: MinHash over 5-word shingles finds candidates, their exact overlap decides.

Two texts are near-duplicates when the Jaccard similarity of their sets of shingles (runs of five words, lower case)
reaches a threshold. A MinHash signature keeps, for each of ``HASHES`` random orders of all shingles, the first one of a
text; the share of equal entries of two signatures estimates the similarity with a standard error below 0.045.
Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WORDS = 5
HASHES = 128
MARGIN = 0.15  # more than three standard errors: candidates whose estimate is this far below the threshold are checked too


@dataclass(frozen=True)
class NearDuplicate:
    """Text ``index`` of the one list and text ``of`` of the other, and the exact similarity of their shingles."""

    index: int
    of: int
    similarity: float


def shingles(text: str) -> np.ndarray:
    """The set of a text's shingles as sorted 64-bit hashes, uint64 (shingles,); a shorter text is one shingle."""
    words = np.fromiter(map(_word_hash, text.lower().split()), np.uint64)
    length = min(WORDS, len(words))
    hashes = np.zeros(len(words) - length + 1 if length else 0, np.uint64)
    for place in range(length):
        hashes = hashes * _MIX + words[place : place + len(hashes)]
    return np.unique(hashes)


@lru_cache(1 << 18)
def _word_hash(word: str) -> int:
    # Not Python's hash(): it differs from run to run.
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def signature(shingle_set: np.ndarray) -> np.ndarray:
    """MinHash signature, uint64 (HASHES,), of a set of shingles; all ones for an empty set."""
    if len(shingle_set) == 0:
        return np.full(HASHES, np.iinfo(np.uint64).max)
    smallest = np.full(HASHES, np.iinfo(np.uint64).max)
    for begin in range(0, len(shingle_set), 4096):  # 4 MB of hashes at a time
        block = shingle_set[begin : begin + 4096, None] * _FACTORS + _OFFSETS
        # The product's high bits are the well-mixed ones; folding them down orders the shingles afresh.
        block ^= block >> np.uint64(32)
        block *= _MIX
        smallest = np.minimum(smallest, block.min(axis=0))
    return smallest


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shingles in both over shingles in either, in [0, 1]; 0 where both are empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - common
    return common / either if either else 0.0


def near_duplicates(texts: Sequence[str], others: Sequence[str], threshold: float = 0.5) -> list[NearDuplicate]:
    """Every text of ``texts`` that nearly equals one of ``others``, with the most similar of them, in order of ``texts``.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold!r}; allowed is a number in (0, 1]")
    other_sets = [shingles(text) for text in others]
    other_signatures = (
        np.stack([signature(s) for s in other_sets]) if other_sets else np.empty((0, HASHES), np.uint64)
    )
    found = []
    for index, text in enumerate(texts):
        own = shingles(text)
        estimate = (other_signatures == signature(own)).mean(axis=1)
        candidates = np.flatnonzero(estimate >= threshold - MARGIN)
        best = max(((jaccard(own, other_sets[i]), -int(i)) for i in candidates), default=(0.0, 0))
        if best[0] >= threshold:
            found.append(NearDuplicate(index, -best[1], best[0]))
    return found


_RNG = np.random.default_rng(5)
_FACTORS = _RNG.integers(1, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # odd: a bijection
_OFFSETS = _RNG.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2)
_MIX = np.uint64(0x9E3779B97F4A7C15)
