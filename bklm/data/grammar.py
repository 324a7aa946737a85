"""The grammar corpus: dialogues drawn from seeds in which the right reply needs a fact from k turns back.

Every turn states a fact: an attribute that nobody has spoken of yet, and its value. The user then asks for an attribute whose
fact was stated k turns before the reply, k uniform over 1 ... min(DISTANCES, turns so far); the reply says its value:

    user    my cat is red . what is the hat ?
    system  well , it is blue . my lamp is green

With A attributes, V values and O openings, turn t (from 0) of a dialogue, t facts stated before, has the cross-entropy, in
nats, of the law that drew it

    user    log(A - t) + log V + log min(DISTANCES, t + 1)
    system  log O + log(A - t) + log V

All that is drawn is uniform, so these are not only means: each turn drawn has exactly this probability, and no model has a
lower loss on replies but by chance. Of a reply of which the reader sees the last n turns alone, the value asked for costs
log V more where k > n, and the attribute is one of A - s, s the number of attributes seen or asked for (by symmetry: which
ones were used out of sight is unknown). ``reply_nats`` gives both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from bklm.data.checks import require_whole
from bklm.data.corpus import SPLITS
from bklm.data.dialogues import LICENCES, SYSTEM, USER, Dialogue, DialogueCorpus, Placed, as_text
from bklm.data.hmm import Uniform

ATTRIBUTES = ("cat", "dog", "car", "hat", "boat", "book", "cup", "door", "bike", "coat", "lamp", "room", "desk", "kite",
              "sofa", "tent")  # fmt: skip
VALUES = ("red", "blue", "green", "black", "white", "old", "new", "big")
OPENINGS = ("well", "sure", "yes", "oh")
DISTANCES = 8
EXCHANGES = 5  # a dialogue: a turn of the user and a reply each
DIALOGUES = {"train": 6000, "valid": 400, "test": 400}


@dataclass(frozen=True)
class Fact:
    """What a reply has to know: the value's place among the words of its text, and how many turns back it was stated."""

    turn: int
    word: int
    distance: int


@dataclass(frozen=True)
class Grammar:
    """The law. ``attributes`` are at least as many as turns.

    Raises:
        ValueError: fewer attributes than turns.
    """

    attributes: Sequence[str] = ATTRIBUTES
    values: Sequence[str] = VALUES
    openings: Sequence[str] = OPENINGS
    exchanges: int = EXCHANGES
    distances: int = DISTANCES

    def __post_init__(self) -> None:
        require_whole("exchanges", self.exchanges, 1)
        if len(self.attributes) < 2 * self.exchanges:
            raise ValueError(
                f"attributes: got {len(self.attributes)} for {2 * self.exchanges} turns, each of which states a new one; give "
                "at least as many."
            )

    def draw(self, uniform: Uniform) -> tuple[Dialogue, tuple[Fact, ...]]:
        """A dialogue, and of each reply the fact that it says."""
        numbers = iter(uniform(8 * self.exchanges))

        def one(choices: Sequence[str] | range) -> str | int:
            return choices[int(next(numbers) * len(choices))]

        left, stated, turns, facts = list(self.attributes), [], [], []
        for exchange in range(self.exchanges):
            stated.append((one(left), one(self.values)))
            left.remove(stated[-1][0])
            # The reply is turn 2 * exchange + 1; before it stand as many facts.
            distance = one(range(1, min(self.distances, len(stated)) + 1))
            asked, value = stated[-distance]
            turns.append((USER, f"my {stated[-1][0]} is {stated[-1][1]} . what is the {asked} ?"))
            opening = one(self.openings)
            stated.append((one(left), one(self.values)))
            left.remove(stated[-1][0])
            turns.append((SYSTEM, f"{opening} , it is {value} . my {stated[-1][0]} is {stated[-1][1]}"))
            facts.append(Fact(2 * exchange + 1, 4, distance))
        return tuple(turns), tuple(facts)

    def turn_nats(self, turn: int) -> float:
        """-log probability of a turn (from 0) given all before it, in nats."""
        stated = math.log(len(self.attributes) - turn) + math.log(len(self.values))
        return stated + math.log(len(self.openings) if turn % 2 else min(self.distances, turn + 1))

    def reply_nats(self, dialogue: Dialogue, fact: Fact, turns: int | None = None) -> float:
        """-log probability of a reply given the last ``turns`` turns before it (None: all), in nats."""
        seen = min(fact.turn, fact.turn if turns is None else turns)
        known = {
            text.split()[-3 if speaker == SYSTEM else 1]
            for speaker, text in dialogue[fact.turn - seen : fact.turn]
        }
        if seen:
            known.add(dialogue[fact.turn - 1][1].split()[-2])
        free = (
            math.log(len(self.attributes) - len(known))
            + math.log(len(self.values))
            + math.log(len(self.openings))
        )
        return free + (math.log(len(self.values)) if fact.distance > seen else 0.0)


@dataclass(frozen=True, eq=False)
class GrammarCorpus(DialogueCorpus):
    """A corpus drawn from ``grammar``; ``facts`` holds of each split's dialogues what their replies have to know."""

    grammar: Grammar = field(kw_only=True, repr=False)
    facts: dict[str, list[tuple[Fact, ...]]] = field(kw_only=True, repr=False)

    @cached_property
    def chance(self) -> float:
        """Share of right values of who guesses."""
        return 1 / len(self.grammar.values)

    def reply_nats(self, split: str, turns: int | None = None) -> np.ndarray:
        """-log probability of every reply of a split given the last ``turns`` turns (None: all), nats, float64 (replies,)."""
        found = zip(self.dialogues(split), self.facts[split], strict=True)
        return np.array([self.grammar.reply_nats(d, fact, turns) for d, facts in found for fact in facts])

    def nats(self, split: str) -> float:
        """-log probability of a whole dialogue in nats, the same for each."""
        return sum(map(self.grammar.turn_nats, range(2 * self.grammar.exchanges)))

    def first(self, train: int | None, held_out: int | None) -> GrammarCorpus:
        made = super().first(train, held_out)
        return replace(made, facts={s: self.facts[s][: len(made.split(s))] for s in SPLITS})


def grammar_corpus(
    seed: int = 0, grammar: Grammar | None = None, sizes: dict[str, int] | None = None
) -> GrammarCorpus:
    """The corpus "grammar": 6,000 / 400 / 400 dialogues of ten turns, the same for a seed everywhere."""
    law, sizes = grammar or Grammar(), sizes or DIALOGUES
    drawn: dict[str, list[tuple[Dialogue, tuple[Fact, ...]]]] = {}
    for number, split in enumerate(SPLITS):
        uniform = Uniform(seed, 11 + number)
        drawn[split] = [law.draw(uniform) for _ in range(sizes[split])]
    dialogues = {split: [dialogue for dialogue, _ in found] for split, found in drawn.items()}
    texts = {split: [as_text(d) for d in found] for split, found in dialogues.items()}
    source = (
        f"drawn from a grammar of {len(law.attributes)} attributes and {len(law.values)} values, seed {seed}"
    )
    return GrammarCorpus(
        "grammar", source, **texts, line_is_document=True, licence=LICENCES["grammar"], threshold=None, grammar=law,
        rows={split: Placed([("", d) for d in found]) for split, found in dialogues.items()},
        facts={split: [facts for _, facts in found] for split, found in drawn.items()},
    )  # fmt: skip
