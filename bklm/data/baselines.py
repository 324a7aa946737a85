"""Count models of the same tokens as a yardstick: unigram and interpolated Kneser-Ney, with exact probabilities.

Source: Kneser and Ney 1995; the interpolated form and the modified discounts are those of Chen and Goodman
1999, "An empirical study of smoothing techniques for language modeling", sections 2.7 and 3. With h a
history, h' the same without its oldest word and c the counts of one level,

    P(w | h) = max(c(h w) - D, 0) / c(h .) + backoff(h) P(w | h'),    backoff(h) = (mass that the discounts
    took) / c(h .)

and P(w | h) = P(w | h') for a history that was never seen. The top level counts tokens; a level below counts
in how many different left contexts an n-gram occurs. Below the lowest level lies the uniform distribution
over the vocabulary, so that every id has a probability and each distribution sums to 1.

The counts form a trie (``bklm.data.ngrams``): training sorts the places of the text once, scoring is one binary search a
level, over many targets at once. A model takes 8 to 24 bytes an n-gram, and so does the memory that training needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bklm.data.checks import index_or_none, require_ids, require_whole
from bklm.data.ngrams import Level, blocks, count_ngrams

LARGEST_VOCABULARY = 2**31  # ids of tokenised text are int32


ORDERS = (2, 3, 4, 5)
FIXED_DISCOUNT = 0.75


def perplexity(log_probs: np.ndarray) -> float:
    """exp of the mean negative log-probability; log_probs in nats, one a target."""
    if len(log_probs) == 0:
        raise ValueError("a perplexity needs at least one target, but none is left")
    return float(np.exp(-np.mean(log_probs)))


class _CountModel:
    """Scoring shared by the models here: ids (tokens,) -> log-probabilities in nats (tokens - 1,), float64.

    The targets are those of the language models: every token after the first, each given all that precede it.
    """

    vocab_size: int = 0

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """Natural logarithms of P(token | those before it), float64 (tokens - 1,): of every token but the first.

        Raises:
            ValueError: not fitted, fewer than two tokens, or an id outside the vocabulary. TypeError: no integers.
        """
        raise NotImplementedError

    def perplexity(self, ids: np.ndarray, exclude: int | Iterable[int] | None = None) -> float:
        """Token-weighted perplexity of ``ids`` after the first; targets in ``exclude`` (one id or any set of them, say
        unk) are left out. TypeError for what is no id."""
        log_probs = self.log_probs(ids)
        if exclude is not None:
            log_probs = log_probs[~np.isin(np.asarray(ids)[1:], _as_excluded(exclude))]
        return perplexity(log_probs)

    def _checked(self, ids: np.ndarray, least: int) -> np.ndarray:
        if not self.vocab_size:
            raise ValueError(
                f"this {type(self).__name__} has not been fitted; call fit(train_ids, vocab_size) first"
            )
        return _as_ids(ids, self.vocab_size, least)


def _as_excluded(exclude: int | Iterable[int]) -> np.ndarray:
    one = index_or_none(exclude)
    if one is not None:
        return np.array([one])
    try:
        given = [index_or_none(i) for i in exclude]
    except TypeError:
        given = [None]
    if None in given or isinstance(exclude, (str, bytes)):
        raise TypeError(
            f"exclude is {exclude!r}; give one token id, or several as a list, a set or an array of integers"
        )
    return np.array(given, np.int64)


def _as_vocab_size(vocab_size: int, tokens: int = 1) -> int:
    """Refuse what is no number of words, or one for which an n-gram's key would not fit in 64 bits."""
    vocab_size = require_whole("vocab_size", vocab_size, 1)
    if vocab_size > LARGEST_VOCABULARY or vocab_size * (tokens + 1) >= 2**63:
        raise ValueError(
            f"vocab_size is {vocab_size}; with {tokens} tokens give at most "
            f"{min(LARGEST_VOCABULARY, 2**63 // (tokens + 1) - 1)}, the number of words that ids stand for"
        )
    return vocab_size


def _as_ids(ids: np.ndarray, vocab_size: int, least: int) -> np.ndarray:
    ids = require_ids(ids)
    if len(ids) < least:
        raise ValueError(f"{len(ids)} tokens are too few; give at least {least}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"token ids run from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}"
        )
    return ids


class Unigram(_CountModel):
    """Relative word frequency, smoothed so that unseen ids count too: P(w) = (c(w) + alpha) / (N + alpha V)."""

    def __init__(self, alpha: float = 1.0):
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha!r}; give a number above 0, or unseen words have no probability")
        self.alpha = alpha

    def fit(self, ids: np.ndarray, vocab_size: int) -> Unigram:
        """Count the words of ``ids`` (tokens,), integers in [0, vocab_size); returns itself.

        Raises:
            ValueError: no tokens, or an id outside the vocabulary. TypeError: no integers.
        """
        vocab_size = _as_vocab_size(vocab_size)
        ids = _as_ids(ids, vocab_size, 1)
        self.vocab_size = vocab_size
        counts = np.bincount(ids.astype(np.int64), minlength=vocab_size)
        self.probabilities = (counts + self.alpha) / (len(ids) + self.alpha * vocab_size)
        return self

    def distribution(self, history: Sequence[int] = ()) -> np.ndarray:
        """P(. | history), float64 (V,); the history does not matter here."""
        self._checked(np.asarray(history, np.int64), 0)
        return self.probabilities.copy()

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        ids = self._checked(ids, 2)
        return np.log(self.probabilities[ids[1:]])


class KneserNey(_CountModel):
    """Interpolated Kneser-Ney of order n: at most n - 1 words of history.

    Args:
        order: 1 or more; with 1 it is the unigram with absolute discounting towards the uniform distribution.
        discount: D in (0, 1] for every level, or "modified": three discounts a level, for counts 1, 2 and more, estimated
            from the counts of counts.
    """

    def __init__(self, order: int = 3, discount: float | str = FIXED_DISCOUNT):
        if discount != "modified" and (isinstance(discount, str) or not 0 < discount <= 1):
            raise ValueError(f'discount is {discount!r}; give a number in (0, 1], or "modified"')
        self.order, self.discount = require_whole("order", order, 1), discount

    def fit(self, ids: np.ndarray, vocab_size: int) -> KneserNey:
        """Count the n-grams of ``ids`` (tokens,), integers in [0, vocab_size); returns itself.

        Raises:
            ValueError: fewer tokens than the order, an id outside the vocabulary, or no modified discounts for these counts.
            TypeError: no integers.
        """
        vocab_size = _as_vocab_size(vocab_size, np.size(ids))
        ids = _as_ids(ids, vocab_size, self.order)
        self.vocab_size = vocab_size
        counted = count_ngrams(ids, vocab_size, self.order)
        self.levels = [Level.discounted(c, _discounts(c.counts, self.discount)) for c in counted]
        return self

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        ids = self._checked(ids, 2)
        found = np.empty(len(ids))
        for begin, new, end in blocks(len(ids), self.order - 1):
            found[new:end] = self._probabilities(ids[begin:end].astype(np.int64))[new - begin :]
        return np.log(found[1:])

    def _probabilities(self, ids: np.ndarray) -> np.ndarray:
        """P of each id after those before it, (tokens,)."""
        probability = np.full(len(ids), 1 / self.vocab_size)
        # Places from which the words up to the target occurred in training, and the node of those before the target.
        places, above = np.arange(len(ids)), np.zeros(len(ids), np.int64)
        for level, nodes in enumerate(self.levels):
            fits = len(places) - np.count_nonzero(places + level >= len(ids))
            places, above = places[:fits], above[:fits]
            target = places + level
            probability[target] *= nodes.backoff[above]
            node = nodes.find(above, ids[target])
            is_seen = node >= 0
            node, places = node[is_seen], places[is_seen]
            probability[places + level] += nodes.gain(node, above[is_seen])
            above = node
        return probability

    def distribution(self, history: Sequence[int] = ()) -> np.ndarray:
        """P(. | history), float64 (V,), for any history of ids; only its last order - 1 words matter."""
        history = self._checked(np.asarray(history, np.int64), 0).tolist()
        probability = np.full(self.vocab_size, 1 / self.vocab_size)
        for level, nodes in enumerate(self.levels[: len(history) + 1]):
            node = self._find(history[len(history) - level :])
            if node < 0:
                break
            following = slice(*nodes.begin[node : node + 2])
            probability *= nodes.backoff[node]
            probability[nodes.words[following]] += nodes.gain(following, node)
        return probability

    def _find(self, words: list[int]) -> int:
        node = 0
        for word, nodes in zip(words, self.levels, strict=False):
            node = int(nodes.find(np.array([node]), np.array([word]))[0])
            if node < 0:
                break
        return node


def count_models(ids: np.ndarray, vocab_size: int) -> dict[str, Unigram | KneserNey]:
    """The count models that a table shows, fitted on ``ids``, under names that hold what they are.

    The unigram, and interpolated Kneser-Ney of orders 2 to 5 with modified discounts, the better ones (Chen and Goodman
    1999); where a text has too few n-grams to estimate them, with the discount 0.75.
    """
    models: dict[str, Unigram | KneserNey] = {"unigram": Unigram().fit(ids, vocab_size)}
    for order in ORDERS:
        if len(ids) <= order:
            break
        discount: float | str = "modified"
        try:
            model = KneserNey(order, discount).fit(ids, vocab_size)
        except CannotEstimateError:
            discount = FIXED_DISCOUNT
            model = KneserNey(order, discount).fit(ids, vocab_size)
        words = discount if discount == "modified" else f"discount {discount:g}"
        models[f"Kneser-Ney {order}-gram, {words}"] = model
    return models


def score_count_models(
    train: np.ndarray,
    ids: np.ndarray,
    vocab_size: int,
    unk_id: int,
    is_target: np.ndarray | None = None,
    test: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> list[dict[str, Any]]:
    """A row per count model of ``train``: name, and perplexity of ``ids`` (tokens,) with and without <unk>.

    Args:
        is_target: (tokens - 1,) bool, which tokens after the first are scored, all by default. Each is given whatever
            precedes it in ``ids``, also where a language model begins anew.
        test: ids of another split and which of them are scored; the rows then have its perplexity, too, "test_ppl".
    """
    scored = np.ones(len(ids) - 1, bool) if is_target is None else is_target
    known = scored & (ids[1:] != unk_id)
    rows = []
    for name, model in count_models(train, vocab_size).items():
        log_probs = model.log_probs(ids)
        without = perplexity(log_probs[known])
        row = {"name": name, "val_ppl": perplexity(log_probs[scored]), "val_ppl_without_unk": without}
        if test is not None:
            on_test = model.log_probs(test[0])
            row["test_ppl"] = perplexity(on_test if test[1] is None else on_test[test[1]])
        rows.append(row)
    return rows


class CannotEstimateError(ValueError):
    """Counts of counts from which no modified discounts can be estimated."""


def _discounts(counts: np.ndarray, discount: float | str) -> np.ndarray:
    """The discounts of counts of 0, 1, 2 and more, float64 (4,); counts of 0 have none."""
    if discount != "modified":
        return np.array([0, discount, discount, discount], np.float64)
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    by_count = np.zeros(4)
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        by_count[1:] = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    if not (by_count[1:] > 0).all():
        raise CannotEstimateError(
            f"modified discounts cannot be estimated where {n1}, {n2}, {n3} and {n4} n-grams occur 1, 2, 3 and 4 "
            f"times: one would not be above 0; give a number as discount, or more text"
        )
    return by_count
