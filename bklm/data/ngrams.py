"""The n-grams of a text and how often each occurs, as a trie whose levels are plain arrays: 8 to 24 bytes an n-gram.

A node is an n-gram that occurs, its parent the n-gram without its last word, its history. The nodes of a level stand in the
order of their words, so that those of one history stand together and in the order of their last word.

All levels come from one order of the places in the text, that of the words which follow: a new n-gram begins where a
place agrees with the one before it in fewer than n words (a suffix array, cut off at the longest n-gram). Words are
packed into keys of 64 bits, as many as fit, so that two sorts do for five words of a vocabulary of 80,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# numpy casts whatever it indexes by to 8 bytes: so many places at once, and that stays small.
AT_ONCE = 1 << 18


class Counted(NamedTuple):
    """One level: the last word and the count of each node, (nodes,); where each history's nodes begin, (histories + 1,)."""

    words: np.ndarray
    counts: np.ndarray
    begin: np.ndarray


def count_ngrams(ids: np.ndarray, vocab_size: int, order: int) -> list[Counted]:
    """The n-grams of ``ids`` (tokens,), integers in [0, vocab_size), for n from 1 to ``order``, at most ``tokens``.

    The longest are counted as they occur; a shorter one counts in how many different left contexts it occurs, which
    is 0 for one that only begins the text.
    """
    length = len(ids)
    kind = np.dtype(np.int32 if length < 2**31 else np.int64)
    # After the text stands a word that is none of its own.
    text = np.full(length + order, vocab_size, np.min_scalar_type(vocab_size))
    text[:length] = ids
    places = _sorted_places(text, length, order, vocab_size, kind)
    agree = _agreement(text, places, order)
    counts = _repeats(places, agree, length, order, kind)
    found = []
    is_first = _is_first(places, agree, length, order)
    at = places[is_first]
    number = np.cumsum(is_first, dtype=kind)
    for n in range(order, 0, -1):
        words = _taken(text[n - 1 :], at)
        if n == 1:
            found.append(Counted(words, counts, np.array([0, len(words)], kind)))
            break
        is_parent = _is_first(places, agree, length, n - 1)
        # A history at the very end of the text is followed by nothing: its place is no node's first.
        begin = np.append(number[is_parent] - is_first[is_parent], kind.type(len(words)))
        found.append(Counted(words, counts, begin))
        is_first = is_parent
        del words, begin, is_parent
        # Each n-gram, whatever its count, is one left context of the n-gram without its first word.
        np.cumsum(is_first, dtype=kind, out=number)
        node = _inverse(places, number)
        counts = np.zeros(number[-1] + 1, kind)
        for block in _blocks(len(at)):
            np.add.at(counts, node[at[block] + 1], 1)
        counts = counts[1:]
        del node
        at = places[is_first]
    return found[::-1]


def _blocks(length: int) -> Iterator[slice]:
    return (slice(begin, begin + AT_ONCE) for begin in range(0, length, AT_ONCE))


def _taken(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``values[index]``."""
    found = np.empty(len(index), values.dtype)
    for block in _blocks(len(index)):
        found[block] = values[index[block]]
    return found


def _inverse(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values``, which stand in the order of ``places``, in the order of the text."""
    found = np.empty_like(values)
    for block in _blocks(len(places)):
        found[places[block]] = values[block]
    return found


def _sorted_places(text: np.ndarray, length: int, order: int, vocab_size: int, kind: np.dtype) -> np.ndarray:
    """Places of the text in the order of the ``order`` words from each on."""
    bits, done = vocab_size.bit_length(), 0
    key, room = np.zeros(length, np.uint64), 64
    while True:
        take = min(order - done, room // bits)
        for offset in range(done, done + take):
            key <<= np.uint64(bits)
            key |= text[offset : offset + length]
        done += take
        if done == order:
            places = np.argsort(key)
            del key
            return places.astype(kind)
        places = np.argsort(key)
        key = _taken(key, places)
        is_new = np.ones(length, bool)
        np.not_equal(key[1:], key[:-1], out=is_new[1:])
        del key
        ranks = np.cumsum(is_new, dtype=kind)
        key = _inverse(places, ranks).astype(np.uint64)
        room = 64 - length.bit_length()
        del places, ranks


def _agreement(text: np.ndarray, places: np.ndarray, order: int) -> np.ndarray:
    """In how many words from the first on each place agrees with the one sorted before it, up to ``order``; uint8."""
    agree = np.zeros(len(places), np.min_scalar_type(order))
    same = np.ones(len(places) - 1, bool)
    for offset in range(order):
        word = _taken(text[offset:], places)
        same &= word[1:] == word[:-1]
        agree[1:] += same
    return agree


def _is_first(places: np.ndarray, agree: np.ndarray, length: int, n: int) -> np.ndarray:
    """Whether an n-gram comes first at a sorted place, a whole one; bool."""
    is_first = agree < n
    is_first &= places <= length - n
    return is_first


def _repeats(places: np.ndarray, agree: np.ndarray, length: int, order: int, kind: np.dtype) -> np.ndarray:
    """How often each n-gram of length ``order`` occurs."""
    starts = np.flatnonzero(agree < order)
    is_whole = _taken(places, starts) <= length - order
    return np.diff(starts, append=length).astype(kind)[is_whole]


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one level with what Kneser-Ney makes of their counts.

    ``words``, ``counts``, ``begin`` as in ``Counted``; of each history ``total``, the sum of its counts, and ``backoff``, the
    share of it that the discounts took, float64; ``discounts`` (4,) for counts of 0, 1, 2 and more.
    """

    words: np.ndarray
    counts: np.ndarray
    begin: np.ndarray
    total: np.ndarray
    backoff: np.ndarray
    discounts: np.ndarray

    @classmethod
    def discounted(cls, counted: Counted, discounts: np.ndarray) -> Level:
        """The level of these counts."""
        total = _sums(counted.counts, counted.begin)
        taken = np.zeros(len(total))
        for count, discount in enumerate(discounts[1:], 1):
            has_it = counted.counts == count if count < 3 else counted.counts >= count
            taken += discount * _sums(has_it, counted.begin)
        # A history seen only at the very end of the text, or only without left context, passes everything on.
        backoff = np.divide(taken, total, out=np.ones(len(total)), where=total > 0)
        return cls(*counted, total, backoff, discounts)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, bytes."""
        return sum(a.nbytes for a in (self.words, self.counts, self.begin, self.total, self.backoff))

    def find(self, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """The nodes of histories (numbers of nodes one level above) and last words, both (n,); -1 where there is none."""
        begin = self.begin[histories].astype(np.int64)
        left = self.begin[histories + 1] - begin
        is_some = left > 0
        begin[~is_some] = 0
        # Bisection in all ranges at once; one that is down to a single node stays there.
        for _ in range(int(left.max(initial=0)).bit_length()):
            half = left >> 1
            begin += half * (self.words[begin + half] <= words)
            left = left - half
        return np.where(is_some & (self.words[begin] == words), begin, -1)

    def gain(self, nodes: np.ndarray | slice, histories: np.ndarray | int) -> np.ndarray:
        """(c - D(c)) / c(h .) of nodes and their histories, float64."""
        counts = self.counts[nodes]
        return (counts - self.discounts[np.minimum(counts, 3)]) / np.maximum(self.total[histories], 1)

    def histories(self) -> np.ndarray:
        """The history of each node, (nodes,)."""
        return np.repeat(np.arange(len(self.total)), np.diff(self.begin))


def _sums(values: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The sum over each range of whole numbers, none of which exceeds the type of ``begin``."""
    running = np.zeros(len(values) + 1, begin.dtype)
    np.cumsum(values, dtype=begin.dtype, out=running[1:])
    return np.diff(running[begin])


def blocks(length: int, overlap: int, size: int = 1 << 16) -> Iterator[tuple[int, int, int]]:
    """(begin, first new, end) of pieces of a text that repeat the ``overlap`` places before them."""
    for new in range(0, length, size):
        yield max(0, new - overlap), new, min(length, new + size)
