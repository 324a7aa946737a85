"""A chat with a trained model of dialogues: it reads what was said so far and replies token by token.

chat = Chat(bklm.load("results/dialogue.zip"))
for piece in chat.say("hello"):
    print(piece, end="", flush=True)
print(chat.saw)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from bklm.data.checks import require_whole
from bklm.data.dialogue_tokens import MARKS
from bklm.trained.model import Trained
from bklm.training.dialogues import positions_read, reply_tokens

HALF_CHARACTER = "\ufffd"  # what bytes are decoded to that do not make a character yet


@dataclass(frozen=True)
class Saw:
    """What a model read before its last reply: ``text`` with its marks, ``tokens`` in number, ``left_out`` before them."""

    text: str
    tokens: int
    left_out: int

    def __str__(self) -> str:
        cut = f", the {self.left_out} before them left out" if self.left_out else ""
        return f"saw {self.tokens} tokens{cut}: {self.text}"


class Chat:
    """A dialogue that goes on. ``saw`` is what the model read last, None before the first turn."""

    def __init__(self, trained: Trained, temperature: float = 0.8, seed: int = 0, most: int = 60) -> None:
        """Args: temperature: 0 takes the likeliest token; most: tokens of a reply.

        Raises:
            ValueError: a model of no dialogues, or a number outside what is allowed.
        """
        ids = [trained.tokenizer.token_to_id(mark) for mark in MARKS]
        if None in ids:
            raise ValueError(
                f"chat: {trained.name!r} was not trained on dialogues and tells no turns apart; give a run of 08_dialogue."
            )
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature: got {temperature}; it must be 0 (the likeliest token) or a positive number."
            )
        self.user_id, self.system_id, self.end_id = ids
        self.trained, self.temperature = trained, temperature
        self.most = require_whole("tokens", most, 1)
        self.saw: Saw | None = None
        self._generator = torch.Generator().manual_seed(require_whole("seed", seed, 0))
        # A mark that somebody types is text.
        self._plain = Tokenizer.from_str(trained.tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._said: list[int] = []

    def say(self, turn: str) -> Iterator[str]:
        """The reply to a turn of the user, in pieces of text as they are written.

        What was written of a reply that is broken off, the chat remembers as the reply.

        Raises:
            ValueError: a turn without text, at the call.
        """
        if not turn.strip():
            raise ValueError("chat: got a turn without text; write something.")
        own = [self.user_id, *self._plain.encode(turn.strip(), add_special_tokens=False).ids, self.end_id]
        return self._reply(np.array([*self._said, *own]))

    def _reply(self, before: np.ndarray) -> Iterator[str]:
        room = self.trained.model.n_seq
        read = len(before) + 1 if room is None else min(len(before) + 1, positions_read(room, self.most))
        shown = [*before.tolist(), self.system_id][-read:]
        self.saw = Saw(self.trained.decode(shown), read, len(before) + 1 - read)
        # Remembered as it grows: whoever breaks off may hold this generator and never end it.
        self._said = [*before.tolist(), self.system_id, self.end_id]
        ids: list[int] = []
        told = ""
        for token in reply_tokens(
            self.trained.model, self, before, self.most, self.temperature, self._generator
        ):
            if token == self.end_id:
                break
            ids.append(token)
            self._said.insert(-1, token)
            # Not tokenizers' DecodeStream: that of 0.21.0, which is allowed, panics at bytes that make no character.
            text = self.trained.decode(ids)
            if not text.endswith(HALF_CHARACTER):
                yield text[len(told) :]
                told = text
        if ids and (rest := self.trained.decode(ids)[len(told) :]):
            yield rest
