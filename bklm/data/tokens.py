"""From lines to token ids: a word vocabulary, and every split as one array of ids, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .cache import load_or_build
from .corpora import SPLITS, Corpus

__all__ = ["PAD", "UNK", "TokenizedCorpus", "Vocabulary", "tokenize_corpus"]

PAD, UNK = "<pad>", "<unk>"
FORMAT = 1  # raise it when what the cache holds changes meaning
LINES_AT_ONCE = 4096  # bounds the memory that the tokenizer's own records take


class Vocabulary:
    """Words and their ids: `<pad>` 0, `<unk>` 1, then the training words from the most to the least frequent.

    Words are what white space separates, cased; ties in frequency are broken by code point order. A literal
    `<unk>` in the text is the unknown token itself, and a literal `<pad>` counts as unknown, so that padding
    never occurs as text. `tokenizer` is the Hugging Face `tokenizers.Tokenizer` behind it.
    """

    pad_id, unk_id = 0, 1

    def __init__(self, words: Sequence[str]):
        self.words = [PAD, UNK, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError(f"a vocabulary's words must differ from each other and from {PAD} and {UNK}")
        self.tokenizer = _word_level(self.ids)

    @classmethod
    def train(cls, lines: Iterable[str], limit: int) -> Vocabulary:
        """The vocabulary of at most `limit` entries (`<pad>` and `<unk>` included) of the most frequent words of `lines`."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 3:
            raise ValueError(
                f"a vocabulary of {limit!r} is not possible; give 3 or more: {PAD}, {UNK} and one word"
            )
        # Counted without special tokens: the trainer would give a literal <unk> of the text a second place.
        tokenizer = _word_level({UNK: 0})
        trainer = trainers.WordLevelTrainer(vocab_size=limit, special_tokens=[], show_progress=False)
        try:
            tokenizer.train_from_iterator(lines, trainer)
        except UnicodeEncodeError as error:
            raise ValueError(_not_text(error)) from None
        ids = tokenizer.get_vocab(with_added_tokens=False)
        words = [word for word in sorted(ids, key=ids.get) if word not in (PAD, UNK)]
        if not words:
            raise ValueError(f"the training text holds no word besides {UNK}; nothing can be learnt from it")
        return cls(words[: limit - 2])

    def __len__(self) -> int:
        return len(self.words)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and int32 that holds every id."""
        return np.dtype(np.uint16 if len(self) <= 1 << 16 else np.int32)

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines as one array (tokens,), uint16 or int32; line ends are only white space."""
        lines = iter([text] if isinstance(text, str) else text)
        parts = [np.empty(0, self.dtype)]
        while chunk := list(islice(lines, LINES_AT_ONCE)):
            try:
                encodings = self.tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            except UnicodeEncodeError as error:
                raise ValueError(_not_text(error)) from None
            parts += [np.array(encoding.ids, self.dtype) for encoding in encodings]
        ids = np.concatenate(parts)
        ids[ids == self.pad_id] = self.unk_id
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids`, joined by a space."""
        return " ".join(self.words[index] for index in ids)


def _word_level(ids: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _not_text(error: UnicodeEncodeError) -> str:
    return (
        f"the text holds a lone surrogate ({error.object[error.start]!r}), which no UTF-8 file can; "
        f"it was decoded wrongly: read it as UTF-8"
    )


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as token ids: `train`, `valid`, `test` are arrays (tokens,) of uint16 or int32, memory-mapped where cached."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocab: Vocabulary
    name: str
    sha256: str

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def unk_id(self) -> int:
        return self.vocab.unk_id

    @property
    def pad_id(self) -> int:
        return self.vocab.pad_id

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        return self.vocab.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.vocab.decode(ids)


def tokenize_corpus(
    corpus: Corpus, vocab_size_limit: int = 30_000, max_train_tokens: int | None = None
) -> TokenizedCorpus:
    """Every split of `corpus` as one stream of ids, with a vocabulary from the whole training split.

    Ids are cached on disk under the text's hash and the settings (see `bklm.data.cache`) and memory-mapped.
    No end-of-sentence token is added. `max_train_tokens` keeps the first so many training tokens; vocabulary
    and cache stay the same.

    Raises:
        ValueError: vocab_size_limit < 3, max_train_tokens < 2, no words in the training text.
    """
    if isinstance(vocab_size_limit, bool) or not isinstance(vocab_size_limit, int) or vocab_size_limit < 3:
        raise ValueError(
            f"vocab_size_limit is {vocab_size_limit!r}; give a whole number from 3: {PAD}, {UNK} and one word"
        )
    if max_train_tokens is not None and (not isinstance(max_train_tokens, int) or max_train_tokens < 2):
        raise ValueError(
            f"max_train_tokens is {max_train_tokens!r}; give a whole number from 2 (an input and its target), or None for all"
        )
    settings = {
        "format": FORMAT,
        "corpus": corpus.sha256,
        "words": "whitespace",
        "vocab_size_limit": vocab_size_limit,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def build() -> dict[str, np.ndarray]:
        vocab = Vocabulary.train(corpus.train, vocab_size_limit)
        words = "\n".join(vocab.words[2:]).encode()
        return {"words": np.frombuffer(words, np.uint8)} | {
            split: vocab.encode(corpus.split(split)) for split in SPLITS
        }

    arrays = load_or_build("tokens", key, build)
    vocab = Vocabulary(arrays.pop("words").tobytes().decode().split("\n"))
    tokens = TokenizedCorpus(**arrays, vocab=vocab, name=corpus.name, sha256=corpus.sha256)
    return tokens if max_train_tokens is None else replace(tokens, train=tokens.train[:max_train_tokens])
