"""Dialogues: turns of a user and of the system that replies, in three splits, read as their writers meant them.

A dialogue is a tuple of turns (speaker, text), the speakers "user" and "system" taking turns. One row is one dialogue:

- {"turns": [...]}, or DailyDialog's own {"dialog": [...]}: texts of two speakers in turn, or pairs [speaker, text], or records
  with a speaker (also "role", "from") and a text (also "content", "value"). Who speaks first is the user, whatever the name.
- {"messages": [...]}: records with role and content. "assistant" is who replies. What the roles "system" and "developer" say
  is an instruction, and what "tool" and "function" say a result: both are read with the user's turn and never foretold.

Turns without text (empty ones, null contents, calls of a tool) say nothing and are left out; what one speaker says in
several turns is one. A dialogue in which nothing is replied teaches nothing and is left out, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from bklm.data.corpus import SPLITS, Corpus
from bklm.data.near_duplicates import NearDuplicate, near_duplicates
from bklm.data.rows import content_of, kind_of_value, text_of

log = logging.getLogger(__name__)

USER, SYSTEM = "user", "system"
Turn = tuple[str, str]
Dialogue = tuple[Turn, ...]
DIALOGUE_COLUMNS = ("turns", "dialog", "messages")
LICENCES = {
    "dailydialog": "CC BY-NC-SA 4.0: not for commercial use",
    "ultrachat": "MIT",
    "grammar": "drawn on the spot; free of any licence",
}
THRESHOLD = (
    0.5  # Jaccard similarity of 5-word shingles from which on a training dialogue repeats a held-out one
)
_REPLIES = ("assistant", "gpt", "bot", "model", "chatbot", "ai")
_ASKS = ("user", "human", "prompter", "customer")
_READ = ("system", "developer", "tool", "function", "observation")  # of messages: read, never foretold
_SPEAKER, _TEXT = ("speaker", "role", "from"), ("text", "content", "value")


class Rows(Protocol):
    """Rows that say where they stand."""

    def placed(self) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True)
class Placed:
    """Pairs of the words that name a row and the row."""

    pairs: Sequence[tuple[str, Any]]

    def placed(self) -> Iterator[tuple[str, Any]]:
        return iter(self.pairs)


@dataclass(frozen=True, eq=False)
class DialogueCorpus(Corpus):
    """A corpus whose documents are dialogues; ``licence`` is the data's. ``rows`` holds what was read of each split: an
    object whose ``placed()`` gives pairs of the words that name a row and the row.

    Raises:
        ValueError: by ``dialogues``: a row that is no dialogue, or a split in which nobody replies.
    """

    rows: Mapping[str, Rows] = field(kw_only=True, repr=False)
    licence: str = field(kw_only=True, default="unknown; see where the data come from")
    threshold: float | None = field(kw_only=True, default=THRESHOLD)

    def dialogues(self, split: str) -> list[Dialogue]:
        """A split's dialogues. Of the training split those are left out that nearly repeat one of the other two splits.

        Each is compared with all of those: seconds for DailyDialog, but minutes for the whole of UltraChat; ``first``, or
        ``load_corpus``'s ``max_documents``, takes fewer.
        """
        self.split(split)
        return self._clean if split == "train" else self._read[split]

    @property
    def removed(self) -> list[NearDuplicate]:
        """Training dialogues that nearly repeat a held-out one; ``of`` counts on from validation to test."""
        return self._copies

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows of each split hold no reply, or nothing at all."""
        return {split: len(self.split(split)) - len(self._read[split]) for split in SPLITS}

    @cached_property
    def _read(self) -> dict[str, list[Dialogue]]:
        found = {
            split: [d for place, row in rows.placed() if (d := dialogue_of(row, place))]
            for split, rows in self.rows.items()
        }
        for split, dialogues in found.items():
            if not dialogues:
                raise ValueError(
                    f"the {split} split of {self.source} holds no dialogue with a reply; every split needs one in which both "
                    "speakers say something."
                )
        return found

    @cached_property
    def _copies(self) -> list[NearDuplicate]:
        if self.threshold is None:
            return []
        own, held_out = self._read["train"], [*self._read["valid"], *self._read["test"]]
        found = near_duplicates([as_text(d) for d in own], [as_text(d) for d in held_out], self.threshold)
        if len(found) == len(own):
            raise ValueError(
                f"every training dialogue of {self.source} nearly repeats one of its validation or test dialogues; give "
                "splits that differ."
            )
        if found:
            log.info("%d of %d training dialogues nearly repeat a held-out one; left out", len(found), len(own))
        return found

    @cached_property
    def _clean(self) -> list[Dialogue]:
        dropped = {copy.index for copy in self._copies}
        return [d for n, d in enumerate(self._read["train"]) if n not in dropped]

    def first(self, train: int | None, held_out: int | None) -> DialogueCorpus:
        """The same with the first rows of each split alone; None: all."""
        most = {"train": train, "valid": held_out, "test": held_out}
        rows = {split: Placed(list(islice(self.rows[split].placed(), most[split]))) for split in SPLITS}
        return replace(self, **{s: self.split(s)[: most[s]] for s in SPLITS}, rows=rows)


def as_text(dialogue: Dialogue) -> str:
    """What was said, without who said it."""
    return " ".join(text for _, text in dialogue)


def dialogue_of(row: Any, where: str) -> Dialogue:
    """The dialogue of a row; () where nobody replies.

    Raises:
        ValueError: what is no dialogue; the sentence begins with ``where``: split and row.
    """
    if isinstance(row, tuple) and all(isinstance(turn, tuple) and len(turn) == 2 for turn in row):
        return _of_said(list(row))
    column, named = _read_turns(row, where)
    where = f"{where}: {column}"
    if column == "messages":
        return _of_said([(_of_role(name, f"{where}, turn {n}"), text) for n, (name, text) in enumerate(named)])
    names = list(dict.fromkeys(name for name, _ in named if name is not None))
    if names and any(name is None for name, _ in named):
        raise ValueError(f"{where} names the speaker of some turns and not of others; name all or none.")
    if len(names) > 2:
        raise ValueError(
            f"{where} has {len(names)} speakers ({', '.join(map(repr, names[:4]))}); a dialogue here has two: join or "
            "leave out the others."
        )
    if not names:
        return _of_said([((USER, SYSTEM)[n % 2], text) for n, (_, text) in enumerate(named)])
    return _of_said([(_speakers(names)[name], text) for name, text in named])


def text_of_turns(row: Any, where: str) -> str:
    """All that is said in a row, joined by spaces; errors as ``dialogue_of``."""
    return " ".join(text for _, text in _read_turns(row, where)[1] if text)


def holds_turns(row: Any) -> bool:
    """Whether a row has a dialogue's column."""
    return isinstance(row, dict) and "text" not in row and any(c in row for c in DIALOGUE_COLUMNS)


def _read_turns(row: Any, where: str) -> tuple[str, list[tuple[str | None, str]]]:
    """The name of the column, and who says what."""
    column = next((c for c in DIALOGUE_COLUMNS if isinstance(row, dict) and c in row), None)
    if column is None:
        held = f"has the keys {sorted(row)}" if isinstance(row, dict) else f"is {kind_of_value(row)}"
        raise ValueError(f'{where} {held}; a dialogue is {{"turns": [...]}} or {{"messages": [...]}}.')
    if not isinstance(row[column], list | tuple):
        raise ValueError(f"{where}: {column} is {kind_of_value(row[column])}, not a list of turns.")
    found = [_named(turn, f"{where}: {column}, turn {n}") for n, turn in enumerate(row[column])]
    for n, (_, text) in enumerate(found):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {column}, turn {n} holds half of a surrogate pair at character {error.start}, which no file can "
                "hold as text; write the character whole, or leave it out."
            ) from error
    return column, found


def _named(turn: Any, where: str) -> tuple[str | None, str]:
    """Who speaks, None where that is not said, and what."""
    if turn is None or isinstance(turn, str | bytes):
        return None, text_of(turn, where)
    if isinstance(turn, list | tuple) and len(turn) == 2 and isinstance(turn[0], str):
        return turn[0], content_of(turn[1], where)
    if isinstance(turn, dict):
        speaker = next((turn[k] for k in _SPEAKER if isinstance(turn.get(k), str)), None)
        if speaker is not None and (
            any(k in turn for k in _TEXT) or "tool_calls" in turn or "function_call" in turn
        ):
            return speaker, content_of(next((turn[k] for k in _TEXT if k in turn), None), f"{where}, text")
        raise ValueError(
            f"{where} has the keys {sorted(turn)}; a turn needs a speaker (or role) and a text (or content)."
        )
    raise ValueError(f"{where} is {kind_of_value(turn)}; a turn is a text, or has a speaker and a text.")


def _of_role(role: str, where: str) -> str:
    name = role.lower()
    if name in _REPLIES:
        return SYSTEM
    if name in _ASKS or name in _READ:
        return USER
    raise ValueError(f"{where} has the role {role!r}; known are user, assistant, system and tool.")


def _speakers(names: Sequence[str]) -> dict[str, str]:
    """Who is whom: by the usual names where they say it, else the first one is the user."""
    lower = [name.lower() for name in names]
    replies = [n for n, name in enumerate(lower) if name in (*_REPLIES, SYSTEM)]
    asks = [n for n, name in enumerate(lower) if name in _ASKS]
    second = replies[0] if len(replies) == 1 else 1 - asks[0] if len(asks) == 1 else 1
    return {name: SYSTEM if n == second else USER for n, name in enumerate(names)}


def _of_said(turns: Sequence[Turn]) -> Dialogue:
    """Turns with text alone, those of one speaker behind each other joined; () where nobody replies to anybody."""
    made: list[Turn] = []
    for speaker, raw in turns:
        if not (text := raw.strip()):
            continue
        if made and made[-1][0] == speaker:
            made[-1] = (speaker, f"{made[-1][1]}\n{text}")
        else:
            made.append((speaker, text))
    return tuple(made) if any(speaker == SYSTEM for speaker, _ in made[1:]) else ()
