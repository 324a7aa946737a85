"""Counting n-grams: against dictionaries at every order, and how memory and time grow with the text."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from comparing import assert_exceeds
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.data import KneserNey
from bklm.data.ngrams import count_ngrams


def by_dictionary(text, order):
    """{n-gram: count} for each length: the longest as they occur, shorter ones by their different left contexts."""
    grams = [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for n in range(1, order + 1)]
    found = [grams[-1]]
    for n in range(order, 1, -1):
        left = defaultdict(set)
        for gram in grams[n - 1]:
            left[gram[1:]].add(gram[0])
        found.append({gram: len(left[gram]) for gram in grams[n - 2]})
    return found[::-1]


def read(levels):
    found, above = [], [()]
    for level in levels:
        histories = np.repeat(np.arange(len(above)), np.diff(level.begin))
        above = [(*above[h], int(w)) for h, w in zip(histories, level.words, strict=True)]
        assert above == sorted(above)
        found.append(dict(zip(above, level.counts.tolist(), strict=True)))
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=60), st.integers(1, 6))
def test_the_counts_of_every_level_are_those_of_dictionaries(text, order):
    assert read(count_ngrams(np.array(text, np.uint16), 4, order)) == by_dictionary(text, order)


@pytest.mark.parametrize("vocab_size", [255, 256, 65535, 65536, 2**31 - 1])
def test_words_at_the_edges_of_their_types_are_kept_apart_from_the_texts_end(vocab_size):
    draw = np.random.default_rng(0)
    text = draw.choice([0, 1, vocab_size - 2, vocab_size - 1], 200)
    assert read(count_ngrams(text, vocab_size, 7)) == by_dictionary(text.tolist(), 7)


def mostly_new(tokens):
    """A text most of whose n-grams occur once."""
    return (np.random.default_rng(0).zipf(1.3, tokens) % 70_000).astype(np.int32)


def fit(ids):
    return KneserNey(5, 0.75).fit(ids, 70_000)


def ngrams_of(model):
    return sum(len(level.words) for level in model.levels)


def fitted(tokens):
    """A model of such a text, its n-grams, the peak of memory."""
    ids = mostly_new(tokens)
    tracemalloc.start()
    model = fit(ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return model, ngrams_of(model), peak


def test_an_ngram_takes_at_most_24_bytes_while_training_and_after_and_both_grow_with_the_text_alone():
    # What numba compiles is not counted.
    fit(mostly_new(300))
    (small, few, small_peak), (large, many, large_peak) = map(fitted, (300_000, 1_200_000))
    for model, ngrams, peak in ((small, few, small_peak), (large, many, large_peak)):
        assert sum(level.nbytes for level in model.levels) <= 20 * ngrams
        # Of a small text, the blocks that are worked on at once count, too.
        assert peak <= 24 * ngrams + 8_000_000
    assert large_peak / many <= 1.1 * small_peak / few


@pytest.mark.speed
def test_the_time_of_training_grows_with_the_text_alone():
    short, long = mostly_new(75_000), mostly_new(1_200_000)
    growth = ngrams_of(fit(long)) / ngrams_of(fit(short))

    def seconds(ids):
        times = []
        for _ in range(3):
            started = time.process_time()
            fit(ids)
            times.append(time.process_time() - started)
        return min(times)

    # 1.6 times as much an n-gram when it was measured, by the caches; with the square of the text it would be 13 times.
    assert growth > 12
    assert_exceeds(lambda: growth * seconds(short) / seconds(long), 1 / 5)
