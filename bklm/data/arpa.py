"""A Kneser-Ney model as an ARPA file, which KenLM, SRILM and other tools of n-gram models read.

The format (Doug Paul's, described in SRILM's ngram-format(5)): for each n-gram of training log10 P(w | h), its words, and
log10 of what its history passes on to shorter ones. Interpolated Kneser-Ney has exactly this form, so nothing is lost but
digits: a reader gives the probabilities of ``KneserNey.log_probs``, without sentence starts and ends, which ours has not.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bklm.data.baselines import KneserNey

# Readers ask for these words. No text here holds them, so they have no probability worth the name.
SENTENCE = ("<s>", "</s>")
NEVER = -99.0
_Level = tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray | None]


def write_arpa(model: KneserNey, words: Sequence[str], path: str | os.PathLike[str]) -> Path:
    """Write a fitted model; ``words`` are those of the ids, V strings without white space. Returns the path.

    The file is whole or not there: what stood at ``path`` before stays until the new one is written.

    Raises:
        ValueError: a model that was not fitted, another number of words, words that the format cannot hold apart.
        OSError: the disk is full, or the folder may not be written.
    """
    if not model.vocab_size:
        raise ValueError("this KneserNey has not been fitted; call fit(train_ids, vocab_size) first")
    if len(words) != model.vocab_size:
        raise ValueError(f"got {len(words)} words; this model has {model.vocab_size} ids, a word for each")
    if len(set(words)) < len(words):
        raise ValueError("two of the words are the same; each id needs a word of its own")
    if bad := [w for w in words if w in SENTENCE or len(w.split()) != 1 or w != w.strip()]:
        raise ValueError(
            f"the word {bad[0]!r} has white space, is empty, or is one of {' '.join(SENTENCE)}; an ARPA file cannot hold it"
        )
    path, levels = Path(path), _levels(model)
    half = path.with_name(f".{path.name}.{secrets.token_hex(4)}.half")
    try:
        with half.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_lines(levels, words))
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return path


def _lines(levels: Sequence[_Level], words: Sequence[str]) -> Iterator[str]:
    yield "\\data\\\n"
    for order, (_, log_p, _) in enumerate(levels, 1):
        yield f"ngram {order}={len(log_p) + (len(SENTENCE) if order == 1 else 0)}\n"
    grams: list[str] = [""]
    for order, (parents_and_words, log_p, backoff) in enumerate(levels, 1):
        yield f"\n\\{order}-grams:\n"
        if order == 1:
            yield from (f"{NEVER}\t{word}\t0\n" for word in SENTENCE)
        parents, own = parents_and_words
        grams = [f"{grams[p]} {words[w]}".strip() for p, w in zip(parents, own, strict=True)]
        ends = [""] * len(grams) if backoff is None else [f"\t{b:.7g}" for b in backoff.tolist()]
        rows = zip(log_p.tolist(), grams, ends, strict=True)
        yield from (f"{p:.7g}\t{gram}{end}\n" for p, gram, end in rows)
    yield "\n\\end\\\n"


def _levels(model: KneserNey) -> list[_Level]:
    """Per order: (number of the n-gram without its last word, last word), log10 P, log10 of the backoff (None at the top).

    The first level holds all V words, the unseen ones too, and numbers them by their ids.
    """
    size, root = model.vocab_size, model.levels[0]
    p = np.full(size, float(root.backoff[0]) / size)
    p[root.words] += root.gain(slice(None), 0)
    found = []
    parents, own = np.zeros(size, np.int64), np.arange(size)
    # Of each node: its number in the file, and the node of its n-gram without the first word.
    number, suffix = root.words, np.zeros(len(root.words), np.int64)
    above = p[number]
    for shorter, level in zip(model.levels, [*model.levels[1:], None], strict=True):
        passed = None if level is None else np.zeros(len(p))
        if level is not None:
            passed[number] = np.log10(level.backoff)
        found.append(((parents, own), np.log10(p), passed))
        if level is None:
            break
        parent = level.histories()
        suffix = shorter.find(suffix[parent], level.words)
        p = level.gain(slice(None), parent) + level.backoff[parent] * above[suffix]
        parents, own = number[parent], level.words
        number, above = np.arange(len(p)), p
    return found
