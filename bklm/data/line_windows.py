"""The windows of the original baseline training, line by line, so that its perplexities can be compared.

Words are lowercase, what white space separates. The vocabulary is ``<PAD>`` 0, ``<UNK>`` 1, ``<BOS>`` 2, ``<EOS>`` 3 and the
most frequent training words. Lines with fewer than 5 words are skipped; every other becomes BOS, words, EOS. What is longer
than 64 is cut into windows of 64 that begin every 32 tokens, as long as they fit: the tail is dropped and an overlap's targets
count twice. What is shorter is padded. One departure: a literal ``<unk>`` of the text is the unknown token, not a second one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from bklm.data.checks import require_whole
from bklm.data.loaders import IGNORED, GatheredRows

SPECIAL = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
FEWEST_WORDS = 5
WINDOW, STRIDE = 64, 32


class LineVocabulary:
    """Lowercase words and their ids: the four special tokens, then the most frequent words, the first seen on a tie."""

    pad_id, unk_id = PAD_ID, UNK_ID

    def __init__(self, words: Sequence[str]):
        self.words = [*SPECIAL, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError(f"a vocabulary's words must differ from each other and from {', '.join(SPECIAL)}")

    @classmethod
    def train(cls, lines: Iterable[str], limit: int = 1_000) -> LineVocabulary:
        """The most frequent words of the lines that are long enough, ``limit`` entries at most; ValueError below 5."""
        limit = require_whole("limit", limit, 5, f": {', '.join(SPECIAL)} and one word")
        counts = Counter(word for words in _long_enough(lines) for word in words)
        del counts["<unk>"]
        if not counts:
            raise ValueError(
                f"no line of the training text has {FEWEST_WORDS} words; the original's windows need such lines"
            )
        return cls([word for word, _ in counts.most_common(limit - len(SPECIAL))])

    def __len__(self) -> int:
        return len(self.words)

    @property
    def tokenizer(self) -> Tokenizer:
        """The same vocabulary as a ``tokenizers.Tokenizer``, for words in small letters."""
        made = Tokenizer(models.WordLevel(self.ids, unk_token="<UNK>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return made

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """The ids of a text's words, int64 (tokens,), without BOS and EOS."""
        lines = [text] if isinstance(text, str) else text
        return np.array([self._id(word) for line in lines for word in line.lower().split()], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ``ids``, joined by a space."""
        return " ".join(self.words[index] for index in ids)

    def _id(self, word: str) -> int:
        return self.ids.get(word, UNK_ID)


class LineWindows(GatheredRows):
    """Windows (x, y) over rows of ids (windows, S + 1) that end in padding: int64 (S,), y the token after each of x.

    A padded target is -100. Indexed with a list it gathers a batch, (len(list), S) each, at once.
    """

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    @property
    def num_targets(self) -> int:
        """How many targets there are over all windows; those of an overlap count twice."""
        return int((self.rows[:, 1:] != PAD_ID).sum())

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.rows[indices].astype(np.int64)
        x, y = both[:, :-1].copy(), both[:, 1:].copy()
        y[y == PAD_ID] = IGNORED
        return torch.from_numpy(x), torch.from_numpy(y)


def line_windows(
    lines: Iterable[str], vocabulary: LineVocabulary, window: int = WINDOW, stride: int = STRIDE
) -> LineWindows:
    """Every window of ``lines``.

    Raises:
        ValueError: no line is long enough, or window or stride is below 2 or 1.
    """
    require_whole("window", window, 2)
    require_whole("stride", stride, 1)
    rows = []
    for words in _long_enough(lines):
        ids = [BOS_ID, *map(vocabulary._id, words), EOS_ID]
        if len(ids) <= window:
            rows.append(ids + [PAD_ID] * (window - len(ids)))
        else:
            rows += [ids[start : start + window] for start in range(0, len(ids) - window + 1, stride)]
    if not rows:
        raise ValueError(
            f"no line of the text has {FEWEST_WORDS} words, so there is no window to train on or to score"
        )
    return LineWindows(np.array(rows, np.int32))


def _long_enough(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        words = line.lower().split()
        if len(words) >= FEWEST_WORDS:
            yield words
