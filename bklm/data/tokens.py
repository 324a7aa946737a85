"""A vocabulary of words: what white space separates, the most frequent of a training text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, repeat

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from bklm.data.checks import require_whole

PAD, UNK = "<pad>", "<unk>"
SMALLEST = f": {PAD}, {UNK} and one word"  # why a vocabulary has at least 3 entries


def dtype_of_ids(entries: int) -> np.dtype:
    """The smaller of uint16 and int32 that holds the ids of a vocabulary of so many entries."""
    return np.dtype(np.uint16 if entries <= 1 << 16 else np.int32)


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
        # Counted by str.split itself: a fifth of the time of tokenizers' WordLevelTrainer, which is to find the same words.
        counts = Counter(chain.from_iterable(map(str.split, lines)))
        for word in (PAD, UNK):
            counts.pop(word, None)
        words = sorted(sorted(counts), key=counts.__getitem__, reverse=True)
        try:
            "".join(words).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the training text holds the lone surrogate {error.object[error.start]!a}, which no UTF-8 file can; "
                f"it was decoded wrongly: read it as UTF-8"
            ) from None
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
        return dtype_of_ids(len(self))

    @property
    def tokenizer(self) -> Tokenizer:
        """The same vocabulary as a Hugging Face ``tokenizers.Tokenizer``, to save and to use elsewhere."""
        return _word_level(self.ids)

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text or of lines as one array (tokens,), uint16 or int32; line ends are only white space.

        Looked up word by word: faster than ``tokenizer.encode_batch_fast``, which keeps a record of each token
        (docs/benchmarks.md).
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
    # str.split also separates at these four control characters, WhitespaceSplit does not; a literal <pad> is no padding.
    control, padding = Regex(r"[\x1c-\x1f]"), Regex(rf"(?<!\S){PAD}(?!\S)")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(control, " "), normalizers.Replace(padding, UNK)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
