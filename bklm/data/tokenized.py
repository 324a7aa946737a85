"""From lines to token ids: every split of a corpus as one array, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from bklm.data import units
from bklm.data.cache import load_or_build
from bklm.data.checks import require_whole
from bklm.data.corpus import SPLITS, Corpus
from bklm.data.tokens import SMALLEST, Vocabulary

FORMAT = 1  # raise it when what the cache holds changes meaning


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as token ids: ``train``, ``valid``, ``test`` are arrays (tokens,), uint16 or int32, mapped from the cache."""

    train: np.ndarray = field(repr=False)
    valid: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
    vocab: Vocabulary | units.PieceVocabulary | units.CharacterVocabulary
    name: str
    sha256: str

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self.vocab)

    @property
    def kind(self) -> str:
        """What a token is: "word", "piece" or "character"."""
        names = {units.PieceVocabulary: "piece", units.CharacterVocabulary: "character"}
        return next((name for kind, name in names.items() if isinstance(self.vocab, kind)), "word")

    @property
    def unk_id(self) -> int:
        """Id of what the vocabulary does not hold."""
        return self.vocab.unk_id

    @property
    def pad_id(self) -> int:
        """Id that fills up a row; a filled-up place is never a target."""
        return self.vocab.pad_id

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines, (tokens,), uint16 or int32."""
        return self.vocab.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self.vocab.decode(ids)


def tokenize_corpus(
    corpus: Corpus,
    vocab_size_limit: int = 30_000,
    max_train_tokens: int | None = None,
    tokenizer: str = "word",
) -> TokenizedCorpus:
    """Every split of ``corpus`` as one stream of ids, with a vocabulary from the whole training split.

    ``tokenizer`` says what a token is: "word" (what white space separates), "bpe" (a byte-level BPE trained on the text) or
    "char" (a character); the last two read lines without white space around them, and no blank ones.

    Ids are cached on disk under the text's hash and the settings (see ``bklm.data.cache``) and memory-mapped.
    No end-of-sentence token is added. ``max_train_tokens`` keeps the first so many training tokens; vocabulary
    and cache stay the same.

    Raises:
        ValueError: vocab_size_limit < 3 (258 for a BPE), max_train_tokens < 2, no words in the training text, or an unknown
            tokenizer.
    """
    if tokenizer not in units.TOKENIZERS:
        raise ValueError(
            f"tokenizer: got {tokenizer!r}; choose one of {', '.join(map(repr, units.TOKENIZERS))}."
        )
    vocab_size_limit = require_whole("vocab_size_limit", vocab_size_limit, 3, SMALLEST)
    if max_train_tokens is not None:
        require_whole("max_train_tokens", max_train_tokens, 2, ", or None for all")
    settings = {
        "format": FORMAT,
        "corpus": corpus.sha256,
        "words": "whitespace" if tokenizer == "word" else tokenizer,
        "vocab_size_limit": vocab_size_limit,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def build() -> dict[str, np.ndarray]:
        vocab = units.train(tokenizer, corpus.train, vocab_size_limit)
        words = np.frombuffer(units.to_text(vocab).encode(), np.uint8)
        return {"words": words} | {split: vocab.encode(corpus.split(split)) for split in SPLITS}

    arrays = load_or_build("tokens", key, ("words", *SPLITS), build)
    vocab = units.from_text(tokenizer, arrays.pop("words").tobytes().decode())
    tokens = TokenizedCorpus(**arrays, vocab=vocab, name=corpus.name, sha256=corpus.sha256)
    return tokens if max_train_tokens is None else replace(tokens, train=tokens.train[:max_train_tokens])
