"""The grammar corpus: dialogues drawn from seeds in which the right reply needs a fact from k turns back.

Every turn tells a value of a topic that nobody has spoken of yet. The user then asks for a topic that was told and not yet
asked for, each of c(t) as likely as another; the reply says its value:

    user    take red . which colour
    system  the colour red . take rice
    user    take oak . which food

The reply says the topic again, which is in the turn that it answers, and then the value, which need not be. A value tells its
topic, so that to look it up is one step: what follows "colour" is the one colour that was said. Where a name stood beside
its owner, which takes two steps, models of this size learned to copy the nearest name and nothing else. A word stands before
every value and topic, so that each is the same piece of a BPE wherever it stands: one that begins a text is another piece.

With A topics of V values each, turn t (from 0) of a dialogue has the cross-entropy, in nats, of the law that drew it

    user    log(A - t) + log V + log c(t),  c(t) = t / 2 + 1
    system  log(A - t) + log V

All that is drawn is uniform, so these are not only means: each turn drawn has exactly this probability, and no model has a
lower loss on replies but by chance. Of a reply of which the reader sees the last n turns alone, the value asked for costs
log V more where it was told k > n turns back, its topic log A where n = 0, and the new topic is one of A - s, s the number of
topics that are seen (by symmetry: which ones were spoken of out of sight is unknown). ``reply_nats`` gives all of it. Who
remembers nothing is right about a value once in V times, at any distance. A dialogue of five exchanges asks from 1 to 8 turns
back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bklm.data.checks import require_whole
from bklm.data.corpus import LICENCES, SPLITS
from bklm.data.dialogues import SYSTEM, USER, Dialogue, DialogueCorpus, Placed, as_text
from bklm.data.hmm import Uniform

TOPICS = {
    "colour": ("red", "blue", "pink"),
    "food": ("rice", "soup", "cake"),
    "pet": ("cat", "dog", "hen"),
    "name": ("tom", "lou", "ben"),
    "town": ("rome", "oslo", "bonn"),
    "tree": ("oak", "elm", "fir"),
    "tool": ("saw", "axe", "drill"),
    "month": ("may", "june", "july"),
    "sport": ("golf", "judo", "polo"),
    "metal": ("iron", "zinc", "lead"),
    "drink": ("tea", "milk", "wine"),
    "cloth": ("hat", "coat", "sock"),
}
EXCHANGES = 5  # a dialogue: a turn of the user and a reply each
DIALOGUES = {"train": 24_000, "valid": 500, "test": 500}
_ASKED = 20  # number of the stream of draws that ``asked_at`` takes


@dataclass(frozen=True)
class Fact:
    """What a reply has to know: its turn, the value's place among the words of its text, how many turns back it was told."""

    turn: int
    word: int
    distance: int


@dataclass(frozen=True)
class Grammar:
    """The law: ``topics``, at least as many as turns, each with as many values as another, all words different.

    Raises:
        ValueError: fewer topics than turns, values of unequal number, or a word twice.
    """

    topics: Mapping[str, Sequence[str]] = field(default_factory=lambda: TOPICS)
    exchanges: int = EXCHANGES

    def __post_init__(self) -> None:
        require_whole("exchanges", self.exchanges, 1)
        if len(self.topics) < 2 * self.exchanges:
            raise ValueError(
                f"topics: got {len(self.topics)} for {2 * self.exchanges} turns, each of which tells of a new one; give at "
                "least as many."
            )
        words = [*self.topics, *itertools.chain(*self.topics.values())]
        if len(set(words)) < len(words) or len({len(values) for values in self.topics.values()}) > 1:
            raise ValueError("topics: give each as many values as another, and no word twice.")

    @property
    def values(self) -> int:
        """Of how many values a topic has one: who guesses is right once in so many times."""
        return len(next(iter(self.topics.values())))

    @property
    def distances(self) -> range:
        """From how many turns back a fact may be asked for."""
        return range(1, max(2, 2 * self.exchanges - 1))

    def draw(self, uniform: Uniform) -> tuple[Dialogue, tuple[Fact, ...]]:
        """A dialogue, and of each reply the fact that it says."""
        numbers = iter(uniform(5 * self.exchanges))

        def one(choices: Sequence[str] | range) -> str | int:
            return choices[int(next(numbers) * len(choices))]

        left, told, turns, facts = list(self.topics), [], [], []

        def tell() -> str:
            topic = one(left)
            told.append((len(turns), topic, one(self.topics[topic])))
            left.remove(topic)
            return f"take {told[-1][2]}"

        for _ in range(self.exchanges):
            said = tell()
            place, topic, value = told.pop(one(range(len(told))))
            turns.append((USER, f"{said} . which {topic}"))
            facts.append(Fact(len(turns), 2, len(turns) - place))
            turns.append((SYSTEM, f"the {topic} {value} . {tell()}"))
        return tuple(turns), tuple(facts)

    def turn_nats(self, turn: int) -> float:
        """-log probability of a turn (from 0) given all before it, in nats."""
        told = math.log(len(self.topics) - turn) + math.log(self.values)
        return told + (0.0 if turn % 2 else math.log(turn // 2 + 1))

    def reply_nats(self, dialogue: Dialogue, fact: Fact, turns: int | None = None) -> float:
        """-log probability of a reply given the last ``turns`` turns before it (None: all), in nats."""
        seen = min(fact.turn, fact.turn if turns is None else turns)
        topic_of = {word: topic for topic, values in self.topics.items() for word in (topic, *values)}
        # Every turn speaks of two topics: told and asked for, or answered and told.
        words = [word for _, text in dialogue[fact.turn - seen : fact.turn] for word in text.split()]
        known = {topic_of[word] for word in words if word in topic_of}
        known.add(topic_of[dialogue[fact.turn][1].split()[fact.word]])
        topics, value = len(self.topics), math.log(self.values)
        free = math.log(topics - len(known)) + value
        return free + (0.0 if seen else math.log(topics)) + (value if fact.distance > seen else 0.0)


Asked = list[tuple[Dialogue, tuple[Fact, ...]]]
"""Dialogues, each with those of its facts that are asked for."""


@dataclass(frozen=True, eq=False)
class GrammarCorpus(DialogueCorpus):
    """A corpus drawn from ``grammar`` by ``seed``; ``facts`` holds of each split's dialogues what their replies must know."""

    grammar: Grammar = field(kw_only=True, repr=False)
    facts: dict[str, list[tuple[Fact, ...]]] = field(kw_only=True, repr=False)
    seed: int = field(kw_only=True, default=0)

    def asked_at(self, each: int) -> Asked:
        """Further dialogues, drawn by the same law, and of their facts the first ``each`` of every distance."""
        uniform, found = Uniform(self.seed, _ASKED), []
        missing = dict.fromkeys(self.grammar.distances, require_whole("each", each, 1))
        while any(missing.values()):
            dialogue, facts = self.grammar.draw(uniform)
            wanted = []
            for fact in facts:
                if missing[fact.distance]:
                    missing[fact.distance] -= 1
                    wanted.append(fact)
            found += [(dialogue, tuple(wanted))] if wanted else []
        return found

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
    seed: int = 0,
    grammar: Grammar | None = None,
    sizes: dict[str, int] | None = None,
    most: int | None = None,
) -> GrammarCorpus:
    """The corpus "grammar": 24,000 / 500 / 500 dialogues of ten turns, the same for a seed everywhere; of each split no more
    than the first ``most``."""
    law = grammar or Grammar()
    sizes = {
        split: number if most is None else min(most, number) for split, number in (sizes or DIALOGUES).items()
    }
    drawn: dict[str, list[tuple[Dialogue, tuple[Fact, ...]]]] = {}
    for number, split in enumerate(SPLITS):
        uniform = Uniform(seed, 11 + number)
        drawn[split] = [law.draw(uniform) for _ in range(sizes[split])]
    dialogues = {split: [dialogue for dialogue, _ in found] for split, found in drawn.items()}
    texts = {split: [as_text(d) for d in found] for split, found in dialogues.items()}
    source = f"drawn from a grammar of {len(law.topics)} topics with {law.values} values each, seed {seed}"
    return GrammarCorpus(
        "grammar", source, **texts, line_is_document=True, licence=LICENCES["grammar"], threshold=None, grammar=law,
        rows={split: Placed([("", d) for d in found]) for split, found in dialogues.items()}, seed=seed,
        facts={split: [facts for _, facts in found] for split, found in drawn.items()},
    )  # fmt: skip
