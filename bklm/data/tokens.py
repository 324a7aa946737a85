"""From lines to token ids: a word vocabulary, and every split as one array of ids, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from bklm.data.cache import load_or_build
from bklm.data.checks import require_whole
from bklm.data.corpus import SPLITS, Corpus

PAD, UNK = "<pad>", "<unk>"
FORMAT = 1  # raise it when what the cache holds changes meaning
WORDS_AT_ONCE = 10_000
SMALLEST = f": {PAD}, {UNK} and one word"  # why a vocabulary has at least 3 entries


class Vocabulary:
    """Words and their ids: ``<pad>`` 0, ``<unk>`` 1, then the training words from the most to the least frequent.

    Words are what white space separates (as ``str.split`` has it), cased; ties in frequency are broken by code point
    order. A literal ``<unk>`` in the text is the unknown token itself, and a literal ``<pad>`` counts as unknown, so that
    padding never occurs as text.
    """

    pad_id, unk_id = 0, 1

    def __init__(self, words: Sequence[str]):
        self.words = [PAD, UNK, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError(f"a vocabulary's words must differ from each other and from {PAD} and {UNK}")

    @classmethod
    def train(cls, lines: Iterable[str], limit: int) -> Vocabulary:
        """The most frequent words of ``lines``, at most ``limit`` entries with ``<pad>`` and ``<unk>``; ValueError below 3."""
        limit = require_whole("limit", limit, 3, SMALLEST)
        # Counted without special tokens: the trainer would give a literal <unk> of the text a second place.
        trainer = trainers.WordLevelTrainer(vocab_size=limit, special_tokens=[], show_progress=False)
        tokenizer = _word_level({UNK: 0})
        try:
            tokenizer.train_from_iterator(_pieces(lines), trainer)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the training text holds the lone surrogate {error.object[error.start]!a}, which no UTF-8 file can; "
                f"it was decoded wrongly: read it as UTF-8"
            ) from None
        ids = tokenizer.get_vocab(with_added_tokens=False)
        words = [word for word in sorted(ids, key=ids.__getitem__) if word not in (PAD, UNK)]
        if not words:
            raise ValueError(f"the training text holds no word besides {UNK}; nothing can be learnt from it")
        return cls(words[: limit - 2])

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} entries)"

    @property
    def dtype(self) -> np.dtype:
        """The smaller of uint16 and int32 that holds every id."""
        return np.dtype(np.uint16 if len(self) <= 1 << 16 else np.int32)

    @property
    def tokenizer(self) -> Tokenizer:
        """The same vocabulary as a Hugging Face ``tokenizers.Tokenizer``, to save and to use elsewhere."""
        return _word_level(self.ids)

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines as one array (tokens,), uint16 or int32; line ends are only white space.

        Looked up word by word: three times as fast as ``tokenizer.encode_batch_fast``, which keeps a record of each token.
        """
        ids = self.ids.copy()
        del ids[PAD]
        words = chain.from_iterable(map(str.split, [text] if isinstance(text, str) else text))
        return np.fromiter(map(ids.get, words, repeat(self.unk_id)), self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ``ids``, joined by a space."""
        return " ".join(self.words[index] for index in ids)


def _word_level(ids: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    # str.split also separates at these four control characters, WhitespaceSplit does not.
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\x1c-\x1f]"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """``lines`` cut into pieces of bounded length: the trainer takes 70 times a line's length in memory."""
    for line in lines:
        words = line.split()
        for begin in range(0, len(words), WORDS_AT_ONCE):
            yield " ".join(words[begin : begin + WORDS_AT_ONCE])


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as token ids: ``train``, ``valid``, ``test`` are arrays (tokens,), uint16 or int32, mapped from the cache."""

    train: np.ndarray = field(repr=False)
    valid: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
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
    """Every split of ``corpus`` as one stream of ids, with a vocabulary from the whole training split.

    Ids are cached on disk under the text's hash and the settings (see ``bklm.data.cache``) and memory-mapped.
    No end-of-sentence token is added. ``max_train_tokens`` keeps the first so many training tokens; vocabulary
    and cache stay the same.

    Raises:
        ValueError: vocab_size_limit < 3, max_train_tokens < 2, no words in the training text.
    """
    vocab_size_limit = require_whole("vocab_size_limit", vocab_size_limit, 3, SMALLEST)
    if max_train_tokens is not None:
        require_whole("max_train_tokens", max_train_tokens, 2, ", or None for all")
    settings = {
        "format": FORMAT,
        "corpus": corpus.sha256,
        "words": "whitespace",
        "vocab_size_limit": vocab_size_limit,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def build() -> dict[str, np.ndarray]:
        vocab = Vocabulary.train(corpus.train, vocab_size_limit)
        words = np.frombuffer("\n".join(vocab.words[2:]).encode(), np.uint8)
        return {"words": words} | {split: vocab.encode(corpus.split(split)) for split in SPLITS}

    arrays = load_or_build("tokens", key, ("words", *SPLITS), build)
    vocab = Vocabulary(arrays.pop("words").tobytes().decode().split("\n"))
    tokens = TokenizedCorpus(**arrays, vocab=vocab, name=corpus.name, sha256=corpus.sha256)
    return tokens if max_train_tokens is None else replace(tokens, train=tokens.train[:max_train_tokens])
