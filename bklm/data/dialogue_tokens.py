"""Dialogues as token ids: one byte-level BPE for a text and for the dialogues that follow it, with marks for who speaks.

A turn becomes ``<user>`` or ``<system>``, its pieces, ``<end>``. What a model is to foretell of a reply is its pieces and its
``<end>``; the mark before it says whose turn it is, and is given. Marks in a text are text: only a turn's own are these ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from tokenizers import AddedToken, Tokenizer

from bklm.data.bpe import SMALLEST, Bpe, train_bpe
from bklm.data.checks import require_whole
from bklm.data.dialogues import SYSTEM, USER, Dialogue
from bklm.data.tokens import dtype_of_ids
from bklm.data.units import PieceVocabulary, tidy

MARKS = ("<user>", "<system>", "<end>")
SMALLEST_DIALOGUE_BPE = SMALLEST + len(MARKS)


class DialogueVocabulary(PieceVocabulary):
    """A byte-level BPE and three marks behind its pieces: ``user_id``, ``system_id`` and ``end_id``."""

    def __init__(self, bpe: Bpe) -> None:
        super().__init__(bpe)
        self.user_id, self.system_id, self.end_id = range(len(bpe), len(bpe) + len(MARKS))

    @classmethod
    def train(cls, texts: Sequence[str], limit: int) -> DialogueVocabulary:
        """At most ``limit`` tokens, marks counted, from all texts together.

        Raises:
            ValueError: ``limit`` below 261, or texts without a pair of characters that occurs twice.
        """
        what = f": 256 bytes, <unk>, one merge and {len(MARKS)} marks"
        limit = require_whole("vocab_size", limit, SMALLEST_DIALOGUE_BPE, what)
        return cls(train_bpe(list(tidy(texts)), limit - len(MARKS)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The same as the tokenizers library has it: there a mark in a text is the mark."""
        made = Tokenizer.from_str(self.bpe.tokenizer.to_str())
        made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
        return made

    @cached_property
    def ids(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over pieces, merges and marks (hex): weights of another one mean other pieces."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        return dtype_of_ids(len(self))

    def __len__(self) -> int:
        return len(self.bpe) + len(MARKS)

    def __repr__(self) -> str:
        return f"DialogueVocabulary({len(self):,} pieces and marks)"

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        return super().encode(text).astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def mark_of(self, speaker: str) -> int:
        """The id that begins a turn of this speaker."""
        return {USER: self.user_id, SYSTEM: self.system_id}[speaker]

    def encode_turns(self, dialogue: Dialogue) -> list[np.ndarray]:
        """The ids of each turn, (tokens,), mark and end among them."""
        return _turns(self, [dialogue])[0]

    def encode_dialogues(self, dialogues: Sequence[Dialogue]) -> EncodedDialogues:
        """All dialogues as one stream."""
        turns = _turns(self, dialogues)
        flat = [turn for one in turns for turn in one]
        speakers = [speaker for dialogue in dialogues for speaker, _ in dialogue]
        first_turns = np.concatenate([[0], np.cumsum([len(one) for one in turns])])
        first = set(first_turns.tolist())
        # A turn of the system that begins a dialogue replies to nothing.
        replies = np.array([s == SYSTEM and n not in first for n, s in enumerate(speakers)], bool)
        lengths = np.array([len(turn) for turn in flat], np.int64)
        target = np.repeat(replies, lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        target[starts[:-1]] = False
        nbytes = sum(
            len(text.encode("utf-8", "surrogatepass")) + 1
            for (_, text), is_reply in zip((t for d in dialogues for t in d), replies, strict=True)
            if is_reply
        )
        return EncodedDialogues(
            np.concatenate(flat).astype(self.dtype), target, starts, first_turns, replies, nbytes
        )


@dataclass(frozen=True, eq=False)
class EncodedDialogues:
    """Dialogues as one stream: ``ids`` (tokens,) and ``target`` (tokens,), whether a token is to be foretold.

    Turn t is ``ids[starts[t] : starts[t + 1]]`` and ``replies[t]`` says whether it is a reply; dialogue d has the turns
    ``first_turns[d]`` to ``first_turns[d + 1] - 1``. ``reply_bytes`` counts the UTF-8 bytes of all replies, an end
    as one.
    """

    ids: np.ndarray
    target: np.ndarray
    starts: np.ndarray
    first_turns: np.ndarray
    replies: np.ndarray
    reply_bytes: int

    def __len__(self) -> int:
        return len(self.first_turns) - 1

    def turns(self, dialogue: int) -> list[np.ndarray]:
        """The ids of each of its turns."""
        bounds = self.starts[self.first_turns[dialogue] : self.first_turns[dialogue + 1] + 1]
        return [self.ids[begin:end] for begin, end in pairwise(bounds.tolist())]


def _turns(vocabulary: DialogueVocabulary, dialogues: Sequence[Dialogue]) -> list[list[np.ndarray]]:
    texts = [text for dialogue in dialogues for _, text in dialogue]
    pieces = iter(vocabulary.bpe.encode_documents(texts))
    return [
        [
            np.concatenate([[vocabulary.mark_of(speaker)], next(pieces), [vocabulary.end_id]]).astype(
                vocabulary.dtype
            )
            for speaker, _ in dialogue
        ]
        for dialogue in dialogues
    ]


def pieces_of_word(vocabulary: DialogueVocabulary, text: str, word: int) -> list[int]:
    """Places among a turn's ids of the pieces of a word of its text (words as one space separates them)."""
    words = text.split(" ")
    begin = sum(len(w) + 1 for w in words[:word])
    end = begin + len(words[word])
    spans = vocabulary.bpe.tokenizer.encode(text).offsets
    return [1 + n for n, (first, last) in enumerate(spans) if first < end and last > begin]
