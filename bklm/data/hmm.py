"""The hmm corpus: text drawn from a hidden Markov model, so that the best possible perplexity is known exactly.

A hidden state is a pair (topic, word class). The topic is sticky and stays for 50 tokens on average; the
classes follow one another by a sparse grammar. Three classes hold function words, the same in every topic.
Five hold content words: each topic gives all words of the class Zipf weights, in an order of its own. So the
next word depends on the class before it (a bigram helps), on the grammar (a longer history helps) and on the
topic, which only many words together betray (a long memory helps).

What ``entropy_floor`` says is the per-token cross-entropy of the true model on the very tokens drawn, by the
forward algorithm (Rabiner 1989, scaled as in his section V.A): no model that does not know the tokens
beforehand does better, up to the chance of a finite sample. The tokens of a split are one continuous stream,
begun from the stationary law; line ends carry no meaning. A model that reads windows of n tokens forgets what
came before each window: its floor is ``entropy_floor(split, context=n)``, a little higher, computed on the
windows that ``bklm.data.windows`` cuts ("every-target-once").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from bklm.data.checks import require_whole
from bklm.data.corpus import LICENCES, SPLITS, Corpus

TOPICS = 8
FUNCTION_CLASSES, CONTENT_CLASSES = 3, 5
FUNCTION_WORDS, CONTENT_WORDS = 16, 208  # a class; 3 * 16 + 5 * 208 = 1,088 words
STAY_IN_TOPIC = 0.98
# Odds of the next word class (columns) after each (rows); 0, 1, 2 are function classes, 3 ... 7 content classes.
GRAMMAR = (
    (0, 0, 0, 6, 3, 1, 0, 0),
    (1, 0, 0, 0, 0, 6, 3, 0),
    (4, 0, 0, 0, 0, 0, 1, 5),
    (0, 6, 0, 0, 3, 0, 1, 0),
    (0, 3, 6, 0, 0, 0, 0, 1),
    (6, 0, 2, 0, 0, 0, 2, 0),
    (2, 0, 6, 1, 0, 0, 0, 1),
    (7, 2, 0, 1, 0, 0, 0, 0),
)
TOKENS = {"train": 400_000, "valid": 50_000, "test": 50_000}
WORDS_A_LINE = 25


class Uniform:
    """Uniform numbers in [0, 1) from raw Philox words: the same on every platform and numpy, unlike ``Generator``'s."""

    def __init__(self, *seed: int):
        self.bits = np.random.Philox(np.random.SeedSequence(seed))

    def __call__(self, n: int) -> np.ndarray:
        return (self.bits.random_raw(n) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, eq=False)
class HiddenMarkovModel:
    """A hidden Markov model over words 0 ... V - 1 with K states, float64 throughout.

    initial (K,), transition (K, K) and emission (K, V) hold probabilities; the rows of the last two sum to 1.
    """

    initial: np.ndarray
    transition: np.ndarray
    emission: np.ndarray

    def sample(self, n: int, uniform: Uniform) -> np.ndarray:
        """``n`` words, int64 (n,), by inversion: two uniform numbers a word, the first for its state."""
        states = np.empty(n, np.int64)
        rows = np.cumsum(self.transition, axis=1)
        rows[:, -1] = 1.0  # a sum of rounded numbers may end just below
        row = np.cumsum(self.initial)
        row[-1] = 1.0
        for position, u in enumerate(uniform(n)):
            states[position] = state = row.searchsorted(u, "right")
            row = rows[state]
        words = np.empty(n, np.int64)
        u = uniform(n)
        for state, emission in enumerate(self.emission):
            here = states == state
            cumulative = np.cumsum(emission)
            cumulative[-1] = 1.0
            words[here] = cumulative.searchsorted(u[here], "right")
        return words

    def log_probs(self, words: np.ndarray) -> np.ndarray:
        """log P(word | the words before it in its row), in nats: words (..., n) -> float64 (..., n).

        The forward algorithm, all rows at once, the state law scaled to sum 1 at each word so that nothing
        underflows.
        """
        words = np.asarray(words)
        log_probs = np.empty(words.shape)
        law = np.broadcast_to(self.initial, (*words.shape[:-1], len(self.initial)))
        emission = np.ascontiguousarray(self.emission.T)
        for position in range(words.shape[-1]):
            joint = law * emission[words[..., position]]
            probability = joint.sum(-1, keepdims=True)
            log_probs[..., position] = np.log(probability[..., 0])
            law = (joint / probability) @ self.transition
        return log_probs


@dataclass(frozen=True, eq=False)
class HmmCorpus(Corpus):
    """A corpus drawn from ``model``; ``ids`` holds each split's word indices, int64."""

    model: HiddenMarkovModel = field(kw_only=True, repr=False)
    ids: dict[str, np.ndarray] = field(kw_only=True, repr=False)

    @cached_property
    def _floors(self) -> dict[tuple[str, int | None], float]:
        return {}

    def entropy_floor(self, split: str, context: int | None = None) -> float:
        """The true model's cross-entropy on every token after the first of a split, in nats per token.

        With ``context``, that of the true model restarted at each window of so many inputs, as a language model
        is that is evaluated on windows.
        """
        self.split(split)
        if context is not None:
            context = require_whole("context", context, 1, ", or None for the whole stream")
        if (split, context) not in self._floors:
            self._floors[split, context] = self._floor(self.ids[split], context)
        return self._floors[split, context]

    def perplexity_floor(self, split: str, context: int | None = None) -> float:
        """exp of ``entropy_floor``."""
        return math.exp(self.entropy_floor(split, context))

    def _floor(self, ids: np.ndarray, context: int | None) -> float:
        targets = len(ids) - 1
        if context is None or context >= targets:
            return float(-self.model.log_probs(ids)[1:].mean())
        whole = targets // context
        starts = np.arange(whole)[:, None] * context + np.arange(context + 1)
        total = self.model.log_probs(ids[starts])[:, 1:].sum()
        total += self.model.log_probs(ids[whole * context :])[1:].sum()  # the shorter window at the end
        return float(-total / targets)


def hmm_corpus(seed: int = 0) -> HmmCorpus:
    """The corpus "hmm": 400,000 / 50,000 / 50,000 tokens over 1,088 words, the same for a seed everywhere."""
    model = topic_grammar_model(seed)
    names = _names(model.emission.shape[1])
    ids = {split: model.sample(TOKENS[split], Uniform(seed, 1 + number)) for number, split in enumerate(SPLITS)}
    lines = {split: _lines([names[word] for word in ids[split].tolist()]) for split in SPLITS}
    states, words = model.emission.shape
    source = f"drawn from a hidden Markov model of {states} states and {words:,} words, seed {seed}"
    return HmmCorpus("hmm", source, **lines, model=model, ids=ids, licence=LICENCES["hmm"])


def topic_grammar_model(seed: int) -> HiddenMarkovModel:
    """The model described at the head of this file; the seed decides the words' order in each topic."""
    classes = FUNCTION_CLASSES + CONTENT_CLASSES
    grammar = np.array(GRAMMAR, float)
    grammar /= grammar.sum(1, keepdims=True)
    topics = np.full((TOPICS, TOPICS), (1 - STAY_IN_TOPIC) / (TOPICS - 1))
    np.fill_diagonal(topics, STAY_IN_TOPIC)
    # Every row of topics sums to 1 by columns too, so topics are equally frequent.
    initial = np.tile(_stationary(grammar), TOPICS) / TOPICS
    emission = np.zeros((TOPICS, classes, FUNCTION_CLASSES * FUNCTION_WORDS + CONTENT_CLASSES * CONTENT_WORDS))
    uniform = Uniform(seed, 0)
    end = 0
    for word_class in range(classes):
        size = FUNCTION_WORDS if word_class < FUNCTION_CLASSES else CONTENT_WORDS
        begin, end = end, end + size
        for topic in range(TOPICS):
            if topic == 0 or word_class >= FUNCTION_CLASSES:
                rank = np.argsort(uniform(size), kind="stable")
            emission[topic, word_class, begin:end] = 1 / (1 + rank)
    emission /= emission.sum(-1, keepdims=True)
    return HiddenMarkovModel(initial, np.kron(topics, grammar), emission.reshape(TOPICS * classes, -1))


def _stationary(transition: np.ndarray) -> np.ndarray:
    law = np.full(len(transition), 1 / len(transition))
    for _ in range(10_000):
        law = law @ transition
    return law / law.sum()


def _names(n: int) -> list[str]:
    """``n`` pronounceable words, all different."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    return ["".join(word) for word, _ in zip(product(syllables, repeat=2), range(n), strict=False)]


def _lines(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + WORDS_A_LINE]) for i in range(0, len(words), WORDS_A_LINE)]
