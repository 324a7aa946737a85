"""What a token is: a word, a piece of a byte-level BPE, or a character; each as a vocabulary with the same methods.

A vocabulary has ``words``, ``ids``, ``pad_id``, ``unk_id``, ``len``, ``dtype``, ``encode`` (a text or lines), ``decode`` and
``tokenizer``, the same as a ``tokenizers.Tokenizer``. Pieces and characters are those of lines without white space around
them and without blank lines, joined by line ends: what a corpus's hash counts, and no more.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bklm.data.bpe import Bpe, train_bpe
from bklm.data.checks import require_whole
from bklm.data.tokens import PAD, SMALLEST, UNK, Vocabulary, dtype_of_ids

TOKENIZERS = ("word", "bpe", "char")
SMALLEST_BPE = 258  # 256 bytes, <unk> and one merge
WITHOUT_SPACES = 25  # characters a word on average, from which on a text is written without spaces
FEWEST_WORDS = 20  # to tell by
_CHARACTER = re.compile(f"{UNK}|[\\s\\S]")
_AT_ONCE = 4096  # lines


def tidy(lines: Iterable[str]) -> Iterator[str]:
    """Lines without white space around them; blank ones are left out."""
    return (line for raw in lines if (line := raw.strip()))


def _lines(text: str | Iterable[str]) -> Iterator[str]:
    """Tidy lines of a text or of lines, each with the line end that joins it to the next."""
    before = None
    for line in tidy(text.split("\n") if isinstance(text, str) else text):
        if before is not None:
            yield before + "\n"
        before = line
    if before is not None:
        yield before


class PieceVocabulary:
    """The pieces of a byte-level BPE: every text can be written, so that nothing is unknown but a literal ``<unk>``."""

    def __init__(self, bpe: Bpe):
        self.bpe = bpe
        self.unk_id = self.pad_id = bpe.unk_id  # a padded place is never a target

    @cached_property
    def ids(self) -> dict[str, int]:
        return self.bpe.tokenizer.get_vocab()

    @cached_property
    def words(self) -> list[str]:
        return sorted(self.ids, key=self.ids.__getitem__)

    @property
    def dtype(self) -> np.dtype:
        return self.bpe.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        return self.bpe.tokenizer

    def __len__(self) -> int:
        return len(self.bpe)

    def __repr__(self) -> str:
        return f"PieceVocabulary({len(self):,} pieces)"

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines, (tokens,)."""
        lines, parts = _lines(text), []
        while batch := list(islice(lines, _AT_ONCE)):
            parts += self.bpe.encode_documents(batch)
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode(ids)


class CharacterVocabulary:
    """``<pad>`` 0, ``<unk>`` 1, then characters from the most to the least frequent, line ends among them."""

    pad_id, unk_id = 0, 1

    def __init__(self, characters: Sequence[str]):
        self.words = [PAD, UNK, *characters]
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("a vocabulary's characters must differ from each other")

    @classmethod
    def train(cls, lines: Iterable[str], limit: int) -> CharacterVocabulary:
        """The most frequent characters of ``lines``, at most ``limit`` entries; ties are broken by code point order."""
        limit = require_whole("limit", limit, 3, SMALLEST)
        counts: Counter[str] = Counter()
        for line in _lines(lines):
            counts.update(_CHARACTER.findall(line))
        del counts[UNK]
        if not counts:
            raise ValueError("the training text holds no character; nothing can be learnt from it")
        return cls(sorted(counts, key=lambda c: (-counts[c], c))[: limit - 2])

    @property
    def dtype(self) -> np.dtype:
        """The smaller of uint16 and int32 that holds every id."""
        return dtype_of_ids(len(self))

    @property
    def tokenizer(self) -> Tokenizer:
        made = Tokenizer(models.WordLevel(self.ids, unk_token=UNK))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(_CHARACTER.pattern), "isolated")
        made.decoder = decoders.Fuse()
        return made

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"CharacterVocabulary({len(self):,} entries)"

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines, (tokens,)."""
        get = self.ids.get
        found = (get(c, self.unk_id) for line in _lines(text) for c in _CHARACTER.findall(line))
        return np.fromiter(found, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.words[index] for index in ids)


def train(
    tokenizer: str, lines: Sequence[str], limit: int
) -> Vocabulary | PieceVocabulary | CharacterVocabulary:
    """A vocabulary of at most ``limit`` entries from training lines.

    Raises:
        ValueError: too small a limit, a text without tokens, or for words a text that is written without spaces.
    """
    if tokenizer == "bpe":
        limit = require_whole("vocab_size", limit, SMALLEST_BPE, ": 256 bytes, <unk> and one merge")
        return PieceVocabulary(train_bpe(list(tidy(lines)), limit))
    if tokenizer == "char":
        return CharacterVocabulary.train(lines, limit)
    refuse_without_spaces(lines)
    return Vocabulary.train(lines, limit)


def refuse_without_spaces(lines: Sequence[str]) -> None:
    """Refuse a text whose "words" are whole sentences, such as Japanese or Chinese.

    Raises:
        ValueError: what to choose instead.
    """
    characters = words = 0
    for line in islice(tidy(lines), 2000):
        characters, words = characters + len(line), words + len(line.split())
    if words >= FEWEST_WORDS and characters / words > WITHOUT_SPACES:
        raise ValueError(
            f"tokenizer: got 'word', but this text has {characters / words:.0f} characters between two spaces, so it is "
            "written without them; choose tokenizer 'char' or 'bpe'."
        )


def with_lower_case(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokeniser for text that it first turns into small letters; the one given is not changed."""
    made = Tokenizer.from_str(tokenizer.to_str())
    before = [made.normalizer] if made.normalizer is not None else []
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return made


def to_text(vocabulary: Vocabulary | PieceVocabulary | CharacterVocabulary) -> str:
    """A vocabulary as text, for the cache."""
    if isinstance(vocabulary, PieceVocabulary):
        return vocabulary.tokenizer.to_str()
    if isinstance(vocabulary, CharacterVocabulary):
        return json.dumps(vocabulary.words[2:])
    return "\n".join(vocabulary.words[2:])


def from_text(tokenizer: str, text: str) -> Vocabulary | PieceVocabulary | CharacterVocabulary:
    """A vocabulary from what ``to_text`` wrote."""
    if tokenizer == "bpe":
        made = Tokenizer.from_str(text)
        return PieceVocabulary(Bpe(made, f"BPE of {made.get_vocab_size():,} tokens trained on the text"))
    return CharacterVocabulary(json.loads(text)) if tokenizer == "char" else Vocabulary(text.split("\n"))
