"""Near-duplicates: planted ones are found, others are not, and the signature estimates what it should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.data import Corpus
from bklm.data.documents import split_documents
from bklm.data.near_duplicates import HASHES, jaccard, near_duplicates, shingles, signature


def text_of(seed: int, words: int = 300) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 2000, words))


def edited(text: str, every: int) -> str:
    """The text with each `every`-th word replaced: an exchanged word breaks five shingles."""
    return " ".join("changed" if i % every == 0 else word for i, word in enumerate(text.split(), 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_similarity_is_that_of_the_sets_of_five_word_runs(one, other):
    def runs(words):
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()

    a, b = runs(one), runs(other)
    exact = len(a & b) / len(a | b) if a | b else 0.0
    assert jaccard(shingles(" ".join(one)), shingles(" ".join(other))) == pytest.approx(exact)


def test_case_and_white_space_do_not_count():
    assert np.array_equal(shingles("The  cat\nsat on THE mat"), shingles("the cat sat on the mat"))


def test_equal_entries_of_two_signatures_estimate_the_similarity():
    errors = []
    for seed in range(40):
        one = text_of(seed)
        other = edited(one, every=10 + seed)
        a, b = shingles(one), shingles(other)
        errors.append((signature(a) == signature(b)).mean() - jaccard(a, b))
    # Binomial with HASHES draws: a standard error of at most 0.5 / sqrt(128) = 0.044 each, 0.007 for the mean.
    assert abs(np.mean(errors)) < 0.025
    assert np.std(errors) < 1.5 * 0.5 / HASHES**0.5


def test_planted_copies_are_found_with_their_partner_and_similarity_and_nothing_else_is():
    others = [text_of(seed) for seed in range(20)]
    texts = [text_of(100 + seed) for seed in range(30)]
    texts[3] = others[7]
    texts[11] = edited(others[2], every=40)
    texts[20] = edited(others[5], every=4)  # nothing of its runs is left
    found = near_duplicates(texts, others, threshold=0.5)
    assert [(d.index, d.of) for d in found] == [(3, 7), (11, 2)]
    assert found[0].similarity == 1
    assert 0.6 < found[1].similarity < 0.9


def test_the_threshold_is_the_exact_similarity_and_not_its_estimate():
    one = text_of(1)
    other = edited(one, every=25)
    similarity = jaccard(shingles(one), shingles(other))
    assert len(near_duplicates([one], [other], similarity)) == 1
    assert near_duplicates([one], [other], similarity + 1e-9) == []


def test_empty_and_very_short_texts_are_compared_too():
    assert near_duplicates(["", "two words"], ["", "Two Words", "three small words"]) != []
    assert [d.index for d in near_duplicates(["", "two words"], ["", "Two Words"])] == [1]
    assert near_duplicates(["a"], []) == []


@pytest.mark.parametrize("threshold", [0, 1.1, -1])
def test_a_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold: got"):
        near_duplicates(["a"], ["a"], threshold)


@pytest.fixture
def corpus() -> Corpus:
    """Twenty training documents, of which the third nearly equals a validation document and the fifth is one."""
    valid = [text_of(500 + i) for i in range(4)]
    train = [text_of(i) for i in range(20)]
    train[2], train[4] = edited(valid[1], every=50), valid[3]
    return Corpus("made here", "a test", train, valid, [text_of(900)], line_is_document=True)


def test_near_copies_of_validation_documents_leave_training_and_the_next_documents_take_their_place(corpus):
    split = split_documents(corpus, (2, 6), 4, spare=8)
    assert split.train == [corpus.train[i] for i in (0, 1, 3, 5, 6, 7)]
    assert split.valid == corpus.valid
    assert split.spare == list(corpus.train[8:16])
    assert [r.similarity for r in split.removed] == [pytest.approx(0.81, abs=0.1), 1]
    assert corpus.valid[1].startswith(split.removed[0].resembles[:4])
    assert not set(split.train) & set(split.spare)


@pytest.mark.parametrize("copies", [0, 1, 8, 20])
def test_any_number_of_near_copies_is_passed_over_as_long_as_clean_documents_follow(copies):
    valid = [text_of(500)]
    clean = [text_of(i) for i in range(12)]
    made = Corpus("made here", "a test", valid * copies + clean, valid, [text_of(900)], line_is_document=True)
    split = split_documents(made, (3,), 1, spare=2)
    assert (split.train, split.spare) == (clean[:3], clean[3:5])
    assert (len(split.removed), split.examined) == (copies, copies + 5)


def test_documents_of_a_small_sample_are_the_first_of_a_large_one(corpus):
    assert split_documents(corpus, (6,), 4).train[:3] == split_documents(corpus, (3,), 4).train


def test_fewer_documents_than_samples_is_one_sentence_with_what_can_be_had(corpus):
    message = r"samples: got 19, but .* has 20 documents, 2 of them nearly equal .*; ask for at most 18"
    with pytest.raises(ValueError, match=message):
        split_documents(corpus, (5, 19), 4)
    with pytest.raises(ValueError, match=r"val_documents: got 5, but .* has 4 documents"):
        split_documents(corpus, (5,), 5)
