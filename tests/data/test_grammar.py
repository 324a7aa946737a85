"""The grammar of dialogues: its law by enumeration, the same draws everywhere, the fact where it says."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from bklm.data import load_corpus
from bklm.data.dialogues import SYSTEM, USER
from bklm.data.grammar import Fact, Grammar, grammar_corpus

SMALL = Grammar(
    attributes=("a", "b", "c", "d", "e"), values=("x", "y"), openings=("o", "u"), exchanges=2, distances=2
)


def every_dialogue(law: Grammar):
    """Every dialogue of a law with its probability and facts, written down from the words of the grammar alone."""

    def go(turns, stated, facts, p):
        t = len(turns)
        if t == 2 * law.exchanges:
            yield tuple(turns), tuple(facts), p
            return
        free = [a for a in law.attributes if a not in dict(stated)]
        for a, v in itertools.product(free, law.values):
            now, q = [*stated, (a, v)], p / (len(free) * len(law.values))
            if t % 2 == 0:
                most = min(law.distances, len(now))
                for k in range(1, most + 1):
                    said = f"my {a} is {v} . what is the {now[-k][0]} ?"
                    yield from go([*turns, (USER, said)], now, [*facts, (t + 1, k, now[-k][1])], q / most)
            else:
                for o in law.openings:
                    said = f"{o} , it is {facts[-1][2]} . my {a} is {v}"
                    yield from go([*turns, (SYSTEM, said)], now, facts, q / len(law.openings))

    yield from go([], [], [], 1.0)


@pytest.fixture(scope="module")
def table():
    return list(every_dialogue(SMALL))


@pytest.mark.parametrize("turns", [0, 1, 2, 3, None])
def test_what_a_reply_costs_given_its_last_turns_is_what_enumeration_finds(table, turns):
    # The reader knows what it sees and not how many turns came before that: joint law of (visible turns, reply).
    together, visible, costs = Counter(), Counter(), []
    for dialogue, facts, p in table:
        for turn, k, _ in facts:
            seen = dialogue[max(0, turn - (turn if turns is None else turns)) : turn]
            together[seen, dialogue[turn][1]] += p
            visible[seen] += p
            costs.append((seen, dialogue, Fact(turn, 4, k)))
    for seen, dialogue, fact in costs[:: max(1, len(costs) // 500)]:
        exact = -math.log(together[seen, dialogue[fact.turn][1]] / visible[seen])
        # A window that begins with the dialogue shows that it does: longer ones never look like it.
        assert SMALL.reply_nats(dialogue, fact, turns) == pytest.approx(exact, abs=1e-9)


def test_a_dialogue_costs_the_sum_of_its_turns(table):
    assert sum(p for _, _, p in table) == pytest.approx(1)
    whole = sum(map(SMALL.turn_nats, range(4)))
    assert all(-math.log(p) == pytest.approx(whole) for _, _, p in table)


def test_the_corpus_is_the_same_for_a_seed_and_drawn_by_its_law():
    one = load_corpus("grammar")
    assert one.sha256 == grammar_corpus().sha256 != grammar_corpus(1).sha256
    assert [len(one.dialogues(s)) for s in ("train", "valid", "test")] == [6000, 400, 400]
    assert one.removed == []
    assert one.chance == 1 / 8
    kinds = Counter(fact.distance for facts in one.facts["train"] for fact in facts)
    expected = {k: 6000 * sum(1 / min(8, t) for t in (1, 3, 5, 7, 9) if t >= k) for k in range(1, 9)}
    assert all(abs(kinds[k] - n) < 5 * math.sqrt(n) for k, n in expected.items())
    assert one.nats("valid") == pytest.approx(sum(map(one.grammar.turn_nats, range(10))))
    assert (one.reply_nats("valid", 0) >= one.reply_nats("valid", 2)).all()
    assert (one.reply_nats("valid", 3) >= one.reply_nats("valid")).all()
    assert np.unique(one.reply_nats("valid").round(9)).size == 5


def test_the_fact_stands_where_it_says_and_was_stated_so_many_turns_back():
    corpus = load_corpus("grammar")
    for dialogue, facts in zip(corpus.dialogues("valid"), corpus.facts["valid"], strict=True):
        for fact in facts:
            value = dialogue[fact.turn][1].split()[fact.word]
            asked = dialogue[fact.turn - 1][1].split()[-2]
            assert f"my {asked} is {value}" in dialogue[fact.turn - fact.distance][1]


def test_fewer_attributes_than_turns_are_refused():
    with pytest.raises(ValueError, match=r"attributes: got 3 for 4 turns, .*; give at least as many\.$"):
        Grammar(attributes=("a", "b", "c"), exchanges=2)
