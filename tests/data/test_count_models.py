from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.data import KneserNey, Unigram, count_models
from bklm.data.baselines import perplexity

V = 5
TEXTS = st.lists(st.integers(0, V - 2), min_size=4, max_size=40)  # id V - 1 is never seen


class PlainKneserNey:
    """The formulas of Chen and Goodman, one word at a time, with dictionaries."""

    def __init__(self, order, discount, text):
        self.order, self.discount = order, discount
        self.counts = [
            Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for n in range(1, order + 1)
        ]
        for n in range(1, order):
            contexts = defaultdict(set)
            for longer in self.counts[n]:
                contexts[longer[1:]].add(longer[0])
            self.counts[n - 1] = Counter({gram: len(left) for gram, left in contexts.items()})

    def probability(self, history, word):
        history = tuple(history)[len(history) - min(len(history), self.order - 1) :]
        lower = self.probability(history[1:], word) if history else 1 / V
        following = {gram[-1]: c for gram, c in self.counts[len(history)].items() if gram[:-1] == history}
        total = sum(following.values())
        if not total:
            return lower
        own = max(following.get(word, 0) - self.discount, 0) / total
        return own + self.discount * len(following) / total * lower


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4), st.sampled_from([0.1, 0.75, 1.0]))
def test_kneser_ney_equals_the_formulas_word_by_word(train, text, order, discount):
    plain = PlainKneserNey(order, discount, train)
    model = KneserNey(order, discount).fit(np.array(train, np.uint16), V)
    expected = [np.log(plain.probability(text[:i], text[i])) for i in range(1, len(text))]
    np.testing.assert_allclose(model.log_probs(np.array(text, np.uint16)), expected, rtol=1e-12)


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, V - 1), max_size=6), st.integers(1, 4))
def test_every_distribution_sums_to_one_and_is_what_scoring_uses(train, history, order):
    for model in (KneserNey(order).fit(train, V), Unigram().fit(train, V)):
        law = model.distribution(history)
        assert law.sum() == pytest.approx(1, abs=1e-12)
        assert (law > 0).all()
        if history:
            scored = [model.log_probs([*history, word])[-1] for word in range(V)]
            np.testing.assert_allclose(np.exp(scored), law, rtol=1e-12)


SIZE = 5000


def zipf_text():
    """Training and validation text over SIZE words in which every second word is mostly decided by the one before."""
    draw = np.random.default_rng(0)
    text = draw.zipf(1.3, 40_000) % SIZE
    decided = draw.random(20_000) < 0.8
    text[1::2] = np.where(decided, draw.permutation(SIZE)[text[::2]], text[1::2])
    return text[:30_000], text[30_000:]


def test_modified_discounts_are_probabilities_and_beat_the_fixed_one():
    train, valid = zipf_text()
    fixed, modified = (KneserNey(3, discount).fit(train, SIZE) for discount in (0.75, "modified"))
    for history in ([], [3], [0, 7], train[500:502], [4999, 4998]):
        assert modified.distribution(history).sum() == pytest.approx(1, abs=1e-12)
    assert modified.perplexity(valid) < fixed.perplexity(valid)


def test_the_models_of_a_table_have_modified_discounts_where_the_text_allows_and_say_which():
    train, valid = zipf_text()
    models = count_models(train, SIZE)
    assert list(models) == ["unigram", *(f"Kneser-Ney {n}-gram, modified" for n in (2, 3, 4, 5))]
    assert models["Kneser-Ney 3-gram, modified"].perplexity(valid) == KneserNey(3, "modified").fit(
        train, SIZE
    ).perplexity(valid)
    few = count_models([0, 1, 0, 1], V)
    assert list(few) == ["unigram", "Kneser-Ney 2-gram, discount 0.75", "Kneser-Ney 3-gram, discount 0.75"]
    assert few["Kneser-Ney 2-gram, discount 0.75"].perplexity([0, 1]) == KneserNey(2).fit(
        [0, 1, 0, 1], V
    ).perplexity([0, 1])


def test_a_history_makes_the_next_word_more_likely_where_words_depend_on_it():
    train, valid = zipf_text()
    unigram, one, two = (model.fit(train, SIZE) for model in (Unigram(0.1), KneserNey(1), KneserNey(2)))
    assert one.perplexity(valid) == pytest.approx(unigram.perplexity(valid), rel=0.1)
    assert two.perplexity(valid) < 0.6 * one.perplexity(valid)


def test_unigram_is_add_alpha():
    model = Unigram(alpha=0.5).fit([0, 0, 2], 3)
    np.testing.assert_allclose(model.distribution(), np.array([2.5, 0.5, 1.5]) / 4.5)


def test_perplexity_is_token_weighted_and_leaves_excluded_targets_out():
    train, text = [1, 2, 3, 1, 2, 1, 0, 2], [1, 1, 2, 3, 0, 2]
    model = KneserNey(2).fit(train, V)
    log_probs = model.log_probs(text)
    assert len(log_probs) == 5
    assert model.perplexity(text) == pytest.approx(np.exp(-log_probs.mean()))
    kept = [i for i, target in enumerate(text[1:]) if target != 1]
    assert model.perplexity(text, exclude=1) == pytest.approx(np.exp(-log_probs[kept].mean()))
    kept = [i for i, target in enumerate(text[1:]) if target not in (0, 1)]
    assert model.perplexity(text, exclude=[0, 1]) == pytest.approx(np.exp(-log_probs[kept].mean()))
    for several in (
        {0, 1},
        (0, 1),
        range(2),
        np.array([0, 1]),
        frozenset([1, 0]),
        iter([0, 1]),
        {0: "a", 1: "b"}.keys(),
    ):
        assert model.perplexity(text, exclude=several) == model.perplexity(text, exclude=[0, 1])
    for one in (np.int64(1), np.array(1), [1], {1}):
        assert model.perplexity(text, exclude=one) == model.perplexity(text, exclude=1)
    assert model.perplexity(text, exclude=[]) == model.perplexity(text)
    with pytest.raises(ValueError, match="needs at least one target"):
        model.perplexity([0, 1, 1], exclude=1)
    assert perplexity(np.log([0.5, 0.5])) == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: KneserNey(0), ValueError, "order is 0; give a whole number from 1"),
        (lambda: KneserNey(2, 0), ValueError, "discount is 0; give a number in"),
        (lambda: KneserNey(2, 1.5), ValueError, "discount is 1.5; give a number in"),
        (lambda: KneserNey(2, float("nan")), ValueError, "discount is nan; give a number in"),
        (lambda: KneserNey(2, "good"), ValueError, "discount is 'good'; give a number in"),
        (lambda: Unigram(0), ValueError, "alpha is 0; give a number above 0"),
        (lambda: KneserNey(3).fit([0, 1], V), ValueError, "2 tokens are too few; give at least 3"),
        (lambda: KneserNey(1).fit([0, V], V), ValueError, "outside the vocabulary of 5"),
        (lambda: KneserNey(1).fit([0.5, 1.0], V), TypeError, "one-dimensional array of integers"),
        (lambda: KneserNey(1).fit([[0, 1]], V), TypeError, "one-dimensional array of integers"),
        (lambda: KneserNey(1).fit([0, 1], 4.0), ValueError, "vocab_size is 4.0; give a whole number from 1"),
        (
            lambda: KneserNey(1).fit([0, 1], 2**62),
            ValueError,
            "vocab_size is 4611686018427387904; with 2 tokens give at most",
        ),
        (lambda: Unigram().fit([0, 1], 4.0), ValueError, "vocab_size is 4.0; give a whole number from 1"),
        (lambda: Unigram().fit([0, 1], 2**62), ValueError, "give at most 2147483648"),
        (lambda: Unigram().fit([0, 1], True), ValueError, "vocab_size is True; give a whole number"),
        (
            lambda: Unigram().fit([0, 1], V).perplexity([0, 1], exclude="1"),
            TypeError,
            "exclude is '1'; give one token id",
        ),
        (
            lambda: Unigram().fit([0, 1], V).perplexity([0, 1], exclude=0.5),
            TypeError,
            "exclude is 0.5; give one token id",
        ),
        (
            lambda: Unigram().fit([0, 1], V).perplexity([0, 1], exclude=[0.0]),
            TypeError,
            "exclude is [0.0]; give one",
        ),
        (lambda: KneserNey(2).log_probs([0, 1]), ValueError, "has not been fitted; call fit"),
        (lambda: Unigram().perplexity([0, 1]), ValueError, "has not been fitted; call fit"),
        (
            lambda: KneserNey(1).fit([0, 1], V).log_probs([0]),
            ValueError,
            "1 tokens are too few; give at least 2",
        ),
        (lambda: KneserNey(1).fit([0, 1], V).distribution([-1]), ValueError, "outside the vocabulary"),
        (lambda: KneserNey(2, "modified").fit([0, 1, 0, 1], V), ValueError, "cannot be estimated"),
    ],
)
def test_bad_input_is_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
