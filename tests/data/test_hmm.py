from itertools import pairwise, product

import numpy as np
import pytest

from bklm.data import SPLITS, KneserNey, load_corpus, tokenize_corpus, windows
from bklm.data.hmm import HiddenMarkovModel, Uniform, topic_grammar_model


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("hmm")


def tiny_model(states=3, words=4, seed=0):
    draw = Uniform(seed)

    def law(*shape):
        p = draw(int(np.prod(shape))).reshape(shape)
        return p / p.sum(-1, keepdims=True)

    return HiddenMarkovModel(law(states), law(states, states), law(states, words))


def path_sum(model, words):
    """P(words) as a sum over every path of states."""
    total = 0.0
    for path in product(range(len(model.initial)), repeat=len(words)):
        p = model.initial[path[0]]
        for here, there in pairwise(path):
            p *= model.transition[here, there]
        for state, word in zip(path, words, strict=True):
            p *= model.emission[state, word]
        total += p
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_forward_algorithm_equals_a_sum_over_all_paths(seed):
    model = tiny_model(seed=seed)
    words = (Uniform(seed, 1)(7) * 4).astype(int)
    joint = [path_sum(model, words[: n + 1]) for n in range(len(words))]
    np.testing.assert_allclose(np.cumsum(model.log_probs(words)), np.log(joint), rtol=1e-12)


def test_next_word_probabilities_sum_to_one():
    model = tiny_model()
    histories = np.repeat(np.array([[0, 3, 1, 2, 2]]), 4, axis=0)
    histories[:, -1] = range(4)
    assert np.exp(model.log_probs(histories)[:, -1]).sum() == pytest.approx(1, abs=1e-14)


def test_long_streams_do_not_underflow():
    model = tiny_model()
    log_probs = model.log_probs(model.sample(20_000, Uniform(0, 2)))
    assert np.isfinite(log_probs).all()
    assert log_probs.sum() < -10_000  # exp of it would be 0


def test_samples_follow_the_law_of_the_model():
    model = tiny_model()
    words = model.sample(100_000, Uniform(0, 3))
    stationary = np.linalg.matrix_power(model.transition, 200)[0]
    pairs = np.einsum("i,ia,ij,jb->ab", stationary, model.emission, model.transition, model.emission)
    counted = np.bincount(words[:-1] * 4 + words[1:], minlength=16).reshape(4, 4) / (len(words) - 1)
    np.testing.assert_allclose(counted, pairs, atol=0.006)


def test_rows_of_the_corpus_model_are_probabilities_and_its_start_is_stationary():
    model = topic_grammar_model(0)
    assert model.emission.shape == (64, 1088)
    for rows in (model.initial, model.transition, model.emission):
        assert (rows >= 0).all()
        np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(model.initial @ model.transition, model.initial, atol=1e-14)


def test_the_text_is_the_same_everywhere(corpus):
    assert corpus.sha256 == "367a1f0fe7523cf7d6c8cfab0a6dab447644c8258c2f4dae6f190d9ba6df93a0"
    assert load_corpus("hmm").sha256 == corpus.sha256


def test_tokens_are_the_words_that_were_drawn_and_none_is_unknown(corpus):
    tokens = tokenize_corpus(corpus)
    assert tokens.vocab_size == 1088 + 2
    for split in SPLITS:
        ids = getattr(tokens, split)
        assert len(ids) == len(corpus.ids[split])
        assert not (ids == tokens.unk_id).any()
        # one word of the model, one id
        assert len(set(zip(ids.tolist(), corpus.ids[split].tolist(), strict=True))) == len(set(ids.tolist()))


def test_the_floor_is_the_models_own_loss_over_every_target_once(corpus):
    ids = corpus.ids["test"][:1000]
    short = type(corpus)("hmm", "cut", [], [], [], model=corpus.model, ids={"test": ids})
    assert short.entropy_floor("test") == pytest.approx(-corpus.model.log_probs(ids)[1:].mean(), rel=1e-14)
    losses = []
    for x, y in windows(ids, 64):
        kept = int((y >= 0).sum())
        stream = np.append(x[:kept], y[kept - 1])
        losses.append(-corpus.model.log_probs(stream)[1:])
    assert short.entropy_floor("test", 64) == pytest.approx(np.concatenate(losses).mean(), rel=1e-12)


def test_the_floor_lies_well_below_count_models_and_falls_with_context(corpus):
    tokens = tokenize_corpus(corpus)
    counts = [
        KneserNey(order).fit(tokens.train, tokens.vocab_size).perplexity(tokens.valid) for order in (1, 2, 3)
    ]
    floors = [corpus.perplexity_floor("valid", context) for context in (1, 16, 128, None)]
    assert floors == sorted(floors, reverse=True)
    assert counts[0] > 4 * floors[-1]
    assert min(counts) > 1.5 * floors[-1]
    assert counts[1] > floors[0]  # a bigram model against the true law of bigrams


def test_a_bad_context_is_one_sentence(corpus):
    with pytest.raises(
        ValueError, match="context is 0; give a whole number from 1, or None for the whole stream"
    ):
        corpus.entropy_floor("valid", 0)
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        corpus.entropy_floor("dev")
