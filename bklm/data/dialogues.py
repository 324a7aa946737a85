"""Dialogues: turns of a user and of the system that replies, in three splits, read as their writers meant them.

A dialogue is a tuple of turns (speaker, text), the speakers "user" and "system" taking turns. One row is one dialogue:

- {"turns": [...]}, or DailyDialog's own {"dialog": [...]}: texts of two speakers in turn, or pairs [speaker, text], or records
  with a speaker (also "role", "from") and a text (also "content", "value"). Names of which one says who is whom ("assistant",
  "bot", "system" reply; "user", "human" ask) say it for both; else who speaks first is the user. Upper and lower case are one.
- {"messages": [...]}: records with role and content. "assistant" is who replies. What the roles "system" and "developer" say
  is an instruction, and what "tool" and "function" say a result: both are read with the user's turn and never foretold.

Turns without text (empty ones, null contents, calls of a tool) say nothing and are left out; what one speaker says in
several turns is one. A dialogue in which nothing is replied teaches nothing and is left out, too. Which column of a row is
read, and what a turn is made of, says ``bklm.data.rows``, for a text's rows and for these.
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
from bklm.data.rows import column_of, turns_of

log = logging.getLogger(__name__)

USER, SYSTEM = "user", "system"
Turn = tuple[str, str]
Dialogue = tuple[Turn, ...]
THRESHOLD = (
    0.5  # Jaccard similarity of 5-word shingles from which on a training dialogue repeats a held-out one
)
_REPLIES = ("assistant", "gpt", "bot", "model", "chatbot", "ai")
_ASKS = ("user", "human", "prompter", "customer")
_READ = ("system", "developer", "tool", "function", "observation")  # of messages: read, never foretold


class PlacedRows(Protocol):
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
    """A corpus whose documents are dialogues. ``rows`` holds what was read of each split: an object whose ``placed()`` gives
    pairs of the words that name a row and the row.

    Raises:
        ValueError: by ``dialogues``: a row that is no dialogue, or a split in which nobody replies.
    """

    rows: Mapping[str, PlacedRows] = field(kw_only=True, repr=False)
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
    turns = turns_of(row, where)
    where = f"{where}: {column_of(row)}"
    if column_of(row) == "messages":
        return _of_said([(_of_role(name, f"{where}, turn {n}"), text) for n, (name, text) in enumerate(turns)])
    said = [(name and name.strip(), text) for name, text in turns if text.strip()]
    # Of a name that is spelt in several ways the first is told.
    names = {name.casefold(): name for name, _ in reversed(said) if name is not None}
    order = list(dict.fromkeys(name.casefold() for name, _ in said if name is not None))
    if names and any(name is None for name, _ in said):
        raise ValueError(f"{where} names the speaker of some turns and not of others; name all or none.")
    if len(names) > 2:
        told = ", ".join(repr(names[name]) for name in order[:4])
        raise ValueError(
            f"{where} has {len(names)} speakers ({told}); a dialogue here has two: join or leave out the others."
        )
    if not names:
        return _of_said([((USER, SYSTEM)[n % 2], text) for n, (_, text) in enumerate(turns)])
    who = _speakers(order)
    return _of_said([(who[name.casefold()], text) for name, text in said])


def _of_role(role: str | None, where: str) -> str:
    name = (role or "").strip().casefold()
    if name in _REPLIES:
        return SYSTEM
    if name in _ASKS or name in _READ:
        return USER
    raise ValueError(f"{where} has the role {role!r}; known are user, assistant, system and tool.")


def _speakers(names: Sequence[str]) -> dict[str, str]:
    """Who is whom of one or two names, their case folded: by the usual names, else who speaks first is the user."""
    replies = [n for n, name in enumerate(names) if name in (*_REPLIES, SYSTEM)]
    asks = [n for n, name in enumerate(names) if name in _ASKS]
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
