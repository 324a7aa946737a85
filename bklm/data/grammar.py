"""The grammar corpus: dialogues drawn from seeds in which the right reply needs a fact from k turns back.

Every turn tells of an animal that nobody has spoken of yet, and its name. The user then asks for an animal that was told of
and not yet asked for, each of c(t) as likely as another; the reply says its name:

    user    the cat tom . which cat
    system  the cat tom . the hen lou
    user    the dog max . which hen

From the third question on it is not for the animal of the same turn, c(t) = max(t / 2, min(t / 2 + 1, 2)): where half of all
questions were for that one, models learned to copy it and nothing else. "the" stands before every animal but the one asked
for, so that each is the same piece of a BPE wherever it stands: a word that begins a text is another piece.

With A animals and V names, turn t (from 0) of a dialogue has the cross-entropy, in nats, of the law that drew it

    user    log(A - t) + log V + log c(t)
    system  log(A - t) + log V

All that is drawn is uniform, so these are not only means: each turn drawn has exactly this probability, and no model has a
lower loss on replies but by chance. Of a reply of which the reader sees the last n turns alone, the name asked for costs
log V more where it was told k > n turns back, the animal asked for log A where n = 0, and the new animal is one of A - s, s
the number of animals that are seen (by symmetry: which ones were spoken of out of sight is unknown). ``reply_nats`` gives
both. A dialogue of five exchanges asks from 1 to 8 turns back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bklm.data.checks import require_whole
from bklm.data.corpus import LICENCES, SPLITS
from bklm.data.dialogues import SYSTEM, USER, Dialogue, DialogueCorpus, Placed, as_text
from bklm.data.hmm import Uniform

ANIMALS = ("cat", "dog", "hen", "cow", "pig", "fox", "owl", "bat", "rat", "bee", "ant", "elk")
NAMES = ("tom", "max", "lou", "ben", "sue", "kim", "joe", "ann")
EXCHANGES = 5  # a dialogue: a turn of the user and a reply each
DIALOGUES = {"train": 6000, "valid": 500, "test": 500}


@dataclass(frozen=True)
class Fact:
    """What a reply has to know: the name's place among the words of its text, and how many turns back it was told.

    ``guess`` is the probability that the commonest name of the animals that may be asked for is the right one: what a reader
    reaches who knows what was told and not of whom.
    """

    turn: int
    word: int
    distance: int
    guess: float


@dataclass(frozen=True)
class Grammar:
    """The law. ``animals`` are at least as many as turns.

    Raises:
        ValueError: fewer animals than turns.
    """

    animals: Sequence[str] = ANIMALS
    names: Sequence[str] = NAMES
    exchanges: int = EXCHANGES

    def __post_init__(self) -> None:
        require_whole("exchanges", self.exchanges, 1)
        if len(self.animals) < 2 * self.exchanges:
            raise ValueError(
                f"animals: got {len(self.animals)} for {2 * self.exchanges} turns, each of which states a new one; give "
                "at least as many."
            )

    def draw(self, uniform: Uniform) -> tuple[Dialogue, tuple[Fact, ...]]:
        """A dialogue, and of each reply the fact that it says."""
        numbers = iter(uniform(5 * self.exchanges))

        def one(choices: Sequence[str] | range) -> str | int:
            return choices[int(next(numbers) * len(choices))]

        left, told, turns, facts = list(self.animals), [], [], []

        def tell() -> str:
            told.append((len(turns), one(left), one(self.names)))
            left.remove(told[-1][1])
            return f"the {told[-1][1]} {told[-1][2]}"

        for _ in range(self.exchanges):
            said = tell()
            open_names = [name for _, _, name in told[: self.choices(len(turns))]]
            guess = max(map(open_names.count, open_names)) / len(open_names)
            place, animal, name = told.pop(one(range(len(open_names))))
            turns.append((USER, f"{said} . which {animal}"))
            facts.append(Fact(len(turns), 2, len(turns) - place, guess))
            turns.append((SYSTEM, f"the {animal} {name} . {tell()}"))
        return tuple(turns), tuple(facts)

    @staticmethod
    def choices(turn: int) -> int:
        """Of how many animals the user may ask for one in a turn (even, from 0)."""
        return max(turn // 2, min(turn // 2 + 1, 2))

    def turn_nats(self, turn: int) -> float:
        """-log probability of a turn (from 0) given all before it, in nats."""
        told = math.log(len(self.animals) - turn) + math.log(len(self.names))
        return told + (0.0 if turn % 2 else math.log(self.choices(turn)))

    def reply_nats(self, dialogue: Dialogue, fact: Fact, turns: int | None = None) -> float:
        """-log probability of a reply given the last ``turns`` turns before it (None: all), in nats."""
        seen = min(fact.turn, fact.turn if turns is None else turns)
        # Every turn speaks of two animals: told and asked for, or answered and told.
        seen_words = [text.split() for _, text in dialogue[fact.turn - seen : fact.turn]]
        known = {word for words in seen_words for word in words if word in self.animals}
        known.add(dialogue[fact.turn][1].split()[1])
        animals, names = len(self.animals), math.log(len(self.names))
        free = math.log(animals - len(known)) + names
        return free + (0.0 if seen else math.log(animals)) + (names if fact.distance > seen else 0.0)


@dataclass(frozen=True, eq=False)
class GrammarCorpus(DialogueCorpus):
    """A corpus drawn from ``grammar``; ``facts`` holds of each split's dialogues what their replies have to know."""

    grammar: Grammar = field(kw_only=True, repr=False)
    facts: dict[str, list[tuple[Fact, ...]]] = field(kw_only=True, repr=False)

    def guessed(self, split: str) -> dict[str, float]:
        """By turns back, as text: the expected share of right names of who guesses among those of the animals asked about."""
        found: dict[int, list[float]] = {}
        for fact in (fact for facts in self.facts[split] for fact in facts):
            found.setdefault(fact.distance, []).append(fact.guess)
        return {str(k): float(np.mean(found[k])) for k in sorted(found)}

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
    """The corpus "grammar": 6,000 / 500 / 500 dialogues of ten turns, the same for a seed everywhere."""
    law, sizes = grammar or Grammar(), sizes or DIALOGUES
    drawn: dict[str, list[tuple[Dialogue, tuple[Fact, ...]]]] = {}
    for number, split in enumerate(SPLITS):
        uniform = Uniform(seed, 11 + number)
        drawn[split] = [law.draw(uniform) for _ in range(sizes[split])]
    dialogues = {split: [dialogue for dialogue, _ in found] for split, found in drawn.items()}
    texts = {split: [as_text(d) for d in found] for split, found in dialogues.items()}
    source = f"drawn from a grammar of {len(law.animals)} animals and {len(law.names)} names, seed {seed}"
    return GrammarCorpus(
        "grammar", source, **texts, line_is_document=True, licence=LICENCES["grammar"], threshold=None, grammar=law,
        rows={split: Placed([("", d) for d in found]) for split, found in dialogues.items()},
        facts={split: [facts for _, facts in found] for split, found in drawn.items()},
    )  # fmt: skip
