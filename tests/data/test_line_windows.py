"""The original's windows, computed by hand for a hand-made text, and counted on the real one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bklm.data import load_corpus
from bklm.data.line_windows import BOS_ID, EOS_ID, PAD_ID, STRIDE, UNK_ID, WINDOW, LineVocabulary, line_windows

LINES = ["A b a c A", "too few words here", "b a b a zebra", ""]


def test_ids_are_those_of_the_original_pad_unk_bos_eos_then_words_by_frequency():
    vocabulary = LineVocabulary.train(LINES, limit=6)
    # A 5 times, b 3 times, c and zebra once.
    assert vocabulary.words == [
        "<PAD>",
        "<UNK>",
        "<BOS>",
        "<EOS>",
        "a",
        "b",
    ]
    assert (PAD_ID, UNK_ID, BOS_ID, EOS_ID) == (0, 1, 2, 3)
    assert vocabulary.encode("A zebra b").tolist() == [4, 1, 5]
    assert vocabulary.decode([4, 1, 5]) == "a <UNK> b"


def test_a_literal_unk_is_the_unknown_token_and_takes_no_place_in_the_vocabulary():
    vocabulary = LineVocabulary.train(["<unk> <unk> <unk> a b"], limit=6)
    assert vocabulary.words[4:] == ["a", "b"]
    assert vocabulary.encode("<unk>").tolist() == [UNK_ID]


def test_short_lines_are_skipped_and_the_others_padded_with_bos_eos_and_ignored_targets():
    vocabulary = LineVocabulary.train(LINES, limit=6)
    data = line_windows(LINES, vocabulary, window=10)
    assert data.rows.tolist() == [[2, 4, 5, 4, 1, 4, 3, 0, 0, 0], [2, 5, 4, 5, 4, 1, 3, 0, 0, 0]]
    x, y = data[0]
    assert x.tolist() == [2, 4, 5, 4, 1, 4, 3, 0, 0]
    assert y.tolist() == [4, 5, 4, 1, 4, 3, -100, -100, -100]
    assert data.num_targets == 12


def test_a_window_has_an_index_from_the_end_but_not_in_a_batch():
    data = line_windows(LINES, LineVocabulary.train(LINES, limit=6))
    assert all(np.array_equal(a, b) for a, b in zip(data[-1], data[len(data) - 1], strict=True))
    for beyond in (-1, len(data)):
        with pytest.raises(IndexError, match=r"window indices must lie in \[0, 2\)"):
            data[[beyond]]


def test_long_lines_are_cut_every_32_tokens_as_long_as_a_window_of_64_fits_and_the_tail_is_dropped():
    # BOS, 98 words, EOS: 100 tokens. Windows begin at 0 and 32; one at 64 would end at 128.
    line = " ".join(f"w{i}" for i in range(98))
    vocabulary = LineVocabulary.train([line], limit=200)
    ids = [BOS_ID, *vocabulary.encode(line).tolist(), EOS_ID]
    data = line_windows([line], vocabulary)
    assert data.rows.tolist() == [ids[:64], ids[32:96]]
    assert data.num_targets == 126  # 63 each: the overlap counts twice, the last four tokens never


@given(words=st.integers(0, 400))
def test_the_number_of_windows_of_a_line_is_what_the_rule_says(words):
    vocabulary = LineVocabulary(["w"])
    lines = [" ".join(["w"] * words), "w w w w w"]
    length = words + 2
    expected = 0 if words < 5 else 1 if length <= WINDOW else (length - WINDOW) // STRIDE + 1
    data = line_windows(lines, vocabulary)
    assert len(data) == expected + 1
    assert data.num_targets == int((data.rows[:, 1:] != PAD_ID).sum())
    assert set(np.unique(data.rows)) <= {PAD_ID, BOS_ID, EOS_ID, 4}


@pytest.mark.parametrize("limit", [4, 0, 2.5, True])
def test_a_vocabulary_without_room_for_a_word_is_refused(limit):
    with pytest.raises(ValueError, match="give a whole number from 5"):
        LineVocabulary.train(LINES, limit)


def test_a_text_of_short_lines_only_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="no line of the training text has 5 words"):
        LineVocabulary.train(["a b", "c"])
    with pytest.raises(ValueError, match="no line of the text has 5 words"):
        line_windows(["a b"], LineVocabulary(["a"]))


@pytest.mark.skipif(
    "BKLM_WIKITEXT_SAMPLE" not in os.environ,
    reason="BKLM_WIKITEXT_SAMPLE names no folder whose valid.txt and test.txt make WikiText-2's validation split",
)
def test_the_validation_split_of_wikitext_2_gives_the_originals_5272_windows():
    corpus = load_corpus("wikitext-2", Path(os.environ["BKLM_WIKITEXT_SAMPLE"]))
    vocabulary = LineVocabulary.train(corpus.train)
    assert len(vocabulary) == 1000
    assert len(line_windows([*corpus.valid, *corpus.test], vocabulary)) == 5272
