"""Count models of the same tokens as a yardstick: unigram and interpolated Kneser-Ney, with exact probabilities.

Source: Kneser and Ney 1995; the interpolated form and the modified discounts are those of Chen and Goodman
1999, "An empirical study of smoothing techniques for language modeling", sections 2.7 and 3. With h a
history, h' the same without its oldest word and c the counts of one level,

    P(w | h) = max(c(h w) - D, 0) / c(h .) + backoff(h) P(w | h'),    backoff(h) = (mass that the discounts
    took) / c(h .)

and P(w | h) = P(w | h') for a history that was never seen. The top level counts tokens; a level below counts
in how many different left contexts an n-gram occurs. Below the lowest level lies the uniform distribution
over the vocabulary, so that every id has a probability and each distribution sums to 1.

The counts form a trie that is stored level by level: a node is an n-gram that occurs in training, its key is
``parent * V + word`` with the parent among the nodes of the level above, and the keys of a level are sorted.
Training is one sort a level, scoring one binary search a level; both run over the whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bklm.data.checks import index_or_none, require_ids, require_whole

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
    return ids.astype(np.int64)


class Unigram(_CountModel):
    """Relative word frequency, smoothed so that unseen ids count too: P(w) = (c(w) + alpha) / (N + alpha V)."""

    def __init__(self, alpha: float = 1.0):
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha!r}; give a number above 0, or unseen words have no probability")
        self.alpha = alpha

    def fit(self, ids: np.ndarray, vocab_size: int) -> Unigram:
        vocab_size = _as_vocab_size(vocab_size)
        ids = _as_ids(ids, vocab_size, 1)
        self.vocab_size = vocab_size
        self.probabilities = (np.bincount(ids, minlength=vocab_size) + self.alpha) / (
            len(ids) + self.alpha * vocab_size
        )
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
        """Count the n-grams of ``ids`` (tokens,), integers in [0, vocab_size)."""
        vocab_size = _as_vocab_size(vocab_size, np.size(ids))
        ids = _as_ids(ids, vocab_size, self.order)
        self.vocab_size = vocab_size
        # Per level: sorted keys of its nodes; (c - D) / c(h .) of its nodes; backoff(h) of the nodes above.
        self.levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # For each start, the node of the n-gram one word shorter; the root at first.
        above = np.zeros(len(ids), np.int64)
        parents = 1
        pending: tuple[np.ndarray, np.ndarray, int] | None = None
        for level in range(self.order):
            keys, first, node, counts = np.unique(
                above * vocab_size + ids[level:], return_index=True, return_inverse=True, return_counts=True
            )
            if pending:
                # An n-gram one word longer, seen once here whatever its count, is one left context of its own
                # suffix.
                shorter_keys, shorter_node, shorter_parents = pending
                contexts = np.bincount(shorter_node[first + 1], minlength=len(shorter_keys))
                self._add_level(shorter_keys, contexts, shorter_parents)
            pending = (keys, node, parents)
            above, parents = node[:-1], len(keys)
        self._add_level(keys, counts, pending[2])
        return self

    def _add_level(self, keys: np.ndarray, counts: np.ndarray, parents: int) -> None:
        parent = keys // self.vocab_size
        taken = _discounts(counts, self.discount)
        total = np.bincount(parent, counts, parents)
        # A history seen only at the very end of the text, or only without left context, passes everything on.
        backoff = np.divide(np.bincount(parent, taken, parents), total, out=np.ones(parents), where=total > 0)
        gain = (counts - taken) / np.maximum(total, 1)[parent]
        self.levels.append((keys, gain, backoff))

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        ids = self._checked(ids, 2)
        probability = np.full(len(ids), 1 / self.vocab_size)
        above = np.zeros(len(ids), np.int64)  # as in fit; -1 where the n-gram was never seen
        for level, (keys, gain, backoff) in enumerate(self.levels[: len(ids)]):
            key = above * self.vocab_size + ids[level:]
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            node = np.where((above >= 0) & (keys[place] == key), place, -1)
            known = above >= 0
            target = probability[level:]
            target[known] *= backoff[above[known]]
            target[node >= 0] += gain[node[node >= 0]]
            above = node[:-1]
        return np.log(probability[1:])

    def distribution(self, history: Sequence[int] = ()) -> np.ndarray:
        """P(. | history), float64 (V,), for any history of ids; only its last order - 1 words matter."""
        history = self._checked(np.asarray(history, np.int64), 0).tolist()
        probability = np.full(self.vocab_size, 1 / self.vocab_size)
        for level, (keys, gain, backoff) in enumerate(self.levels[: len(history) + 1]):
            node = self._find(history[len(history) - level :])
            if node is None:
                break
            begin, end = np.searchsorted(keys, [node * self.vocab_size, (node + 1) * self.vocab_size])
            probability *= backoff[node]
            probability[keys[begin:end] - node * self.vocab_size] += gain[begin:end]
        return probability

    def _find(self, words: list[int]) -> int | None:
        node = 0
        for word, (keys, _, _) in zip(words, self.levels, strict=False):
            key = node * self.vocab_size + word
            node = int(np.searchsorted(keys, key))
            if node == len(keys) or keys[node] != key:
                return None
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


class CannotEstimateError(ValueError):
    """Counts of counts from which no modified discounts can be estimated."""


def _discounts(counts: np.ndarray, discount: float | str) -> np.ndarray:
    """The discount of each count, float64; counts of 0 have none."""
    if discount != "modified":
        return np.minimum(counts, discount)
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
    return by_count[np.minimum(counts, 3)]
