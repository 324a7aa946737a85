import time
from collections import Counter

import numpy as np
import pytest
from comparing import assert_exceeds
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import trainers

from bklm.data import Corpus, Vocabulary, tokenize_corpus

ANY_LINES = st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40), max_size=10)
WORDY_LINES = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "B", "<unk>", "<pad>", "é"])).map(" ".join), max_size=8
)


def corpus(train, valid="a", test="b"):
    return Corpus("made", "a test", [train], [valid], [test])


def test_words_are_ranked_by_frequency_and_ties_by_code_point():
    vocab = Vocabulary.train(["b b b", "z a a z Z"], 100)
    assert vocab.words == ["<pad>", "<unk>", "b", "a", "z", "Z"]


def test_the_limit_counts_the_special_tokens():
    vocab = Vocabulary.train(["a a a b b c"], 4)
    assert vocab.words == ["<pad>", "<unk>", "a", "b"]
    assert vocab.encode("c b a").tolist() == [1, 3, 2]


@pytest.mark.parametrize("limit", [3, 4, 5, 100])
def test_literal_special_tokens_take_no_second_place(limit):
    tokens = tokenize_corpus(corpus("<unk> <unk> <unk> <pad> <pad> a a b x<unk>y", "<unk> a <pad>"), limit)
    assert tokens.vocab.words == ["<pad>", "<unk>", "a", "b", "x<unk>y"][:limit]
    assert tokens.valid.tolist() == [tokens.unk_id, 2, tokens.unk_id]
    assert not any((split == tokens.pad_id).any() for split in (tokens.train, tokens.valid, tokens.test))


@given(WORDY_LINES, st.integers(3, 8))
def test_vocabulary_is_that_of_a_plain_count(lines, limit):
    counts = Counter(word for line in lines for word in line.split() if word not in ("<pad>", "<unk>"))
    if not counts:
        with pytest.raises(ValueError, match="no word besides <unk>"):
            Vocabulary.train(lines, limit)
        return
    expected = sorted(counts, key=lambda word: (-counts[word], word))[: limit - 2]
    assert Vocabulary.train(lines, limit).words[2:] == expected


@given(ANY_LINES, ANY_LINES)
def test_encoding_equals_the_tokenizers_library_for_any_text(train, lines):
    vocab = Vocabulary.train([*train, "word"], 12)
    encodings = vocab.tokenizer.encode_batch(lines)
    theirs = [1 if index == 0 else index for encoding in encodings for index in encoding.ids]
    assert vocab.encode(lines).tolist() == theirs


def test_decoding_gives_the_words_back():
    vocab = Vocabulary.train(["the cat <unk> sat"], 10)
    assert vocab.decode(vocab.encode("the dog sat")) == "the <unk> sat"


def test_long_lines_count_like_short_ones():
    words = ["a"] * 12_345 + ["b"] * 12_344
    assert (
        Vocabulary.train([" ".join(words)], 5).words
        == Vocabulary.train(words, 5).words
        == ["<pad>", "<unk>", "a", "b"]
    )


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_ids_take_the_smallest_type_that_holds_them(size, dtype):
    vocab = Vocabulary([str(number) for number in range(size - 2)])
    assert vocab.dtype == dtype
    assert vocab.encode(vocab.words[-1]).tolist() == [size - 1]


@pytest.mark.parametrize("limit", [2, 0, -5, 3.5, True, None])
def test_a_vocabulary_below_three_is_refused(limit):
    with pytest.raises(
        ValueError, match=r"vocab_size_limit is .*; give a whole number from 3: <pad>, <unk> and one word"
    ):
        tokenize_corpus(corpus("a b"), limit)


def test_text_of_unknown_words_only_is_refused():
    with pytest.raises(ValueError, match="holds no word besides <unk>"):
        tokenize_corpus(corpus("<unk> <unk>"))


def test_a_lone_surrogate_in_the_text_is_one_sentence():
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800'"):
        tokenize_corpus(corpus("a \ud800"))


def test_a_training_limit_keeps_the_vocabulary_and_the_other_splits():
    text = corpus("a b c d e f", "a b c", "d e f")
    whole, part = tokenize_corpus(text), tokenize_corpus(text, max_train_tokens=4)
    assert part.train.tolist() == whole.train.tolist()[:4]
    assert (part.vocab.words, part.valid.tolist()) == (whole.vocab.words, whole.valid.tolist())
    with pytest.raises(ValueError, match="max_train_tokens is 1; give a whole number from 2, or None for all"):
        tokenize_corpus(text, max_train_tokens=1)


@pytest.mark.speed
def test_words_and_ids_are_found_faster_than_by_the_tokenizers_library():
    """A third and a fifth of its processor time when it was measured (docs/benchmarks.md)."""
    draw = np.random.default_rng(0).zipf(1.3, 200_000) % 50_000
    lines = [" ".join(map(str, part)) for part in np.array_split(draw, 2000)]
    vocab = Vocabulary.train(lines, 100_000)
    trainer = trainers.WordLevelTrainer(special_tokens=[], show_progress=False)

    def seconds(call):
        times = []
        for _ in range(3):
            started = time.process_time()
            call()
            times.append(time.process_time() - started)
        return min(times)

    library = vocab.tokenizer
    for theirs, ours in (
        (lambda: library.train_from_iterator(lines, trainer), lambda: Vocabulary.train(lines, 100_000)),
        (lambda: library.encode_batch_fast(lines), lambda: vocab.encode(lines)),
    ):
        assert_exceeds(lambda theirs=theirs, ours=ours: seconds(theirs) / seconds(ours), 1)
