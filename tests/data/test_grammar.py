"""The grammar of dialogues: its law by enumeration, the same draws everywhere, the fact where it says."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from bklm.data import load_corpus
from bklm.data.dialogue_tokens import DialogueVocabulary, pieces_of_word
from bklm.data.dialogues import SYSTEM, USER
from bklm.data.grammar import Fact, Grammar, grammar_corpus

SMALL = Grammar(animals=("a", "b", "c", "d", "e"), names=("x", "y"), exchanges=2)
LONGER = Grammar(animals=("a", "b", "c", "d", "e", "f"), names=("x",), exchanges=3)


def every_dialogue(law: Grammar):
    """Every dialogue of a law with its probability and facts, written down from the words of the grammar alone."""

    def go(turns, told, facts, p):
        t = len(turns)
        if t == 2 * law.exchanges:
            yield tuple(turns), tuple(facts), p
            return
        free = [a for a in law.animals if a not in [animal for animal, _ in told]]
        for a, v in itertools.product(free, law.names):
            now, q = [*told, (a, v)], p / (len(free) * len(law.names))
            if t % 2 == 0:
                open_ones = [n for n in range(len(now)) if n not in [t - k for t, k, _ in facts]]
                if t >= 4:
                    open_ones.remove(t)
                for n in open_ones:
                    said = f"the {a} {v} . which {now[n][0]}"
                    known = [*facts, (t + 1, t + 1 - n, " ".join(now[n]))]
                    yield from go([*turns, (USER, said)], now, known, q / len(open_ones))
            else:
                yield from go([*turns, (SYSTEM, f"the {facts[-1][2]} . the {a} {v}")], now, facts, q)

    yield from go([], [], [], 1.0)


@pytest.fixture(scope="module", params=[SMALL, LONGER], ids=["2 exchanges", "3 exchanges"])
def law(request):
    return request.param


@pytest.fixture(scope="module")
def table(law):
    return list(every_dialogue(law))


@pytest.mark.parametrize("turns", [0, 1, 2, 3, None])
def test_what_a_reply_costs_given_its_last_turns_is_what_enumeration_finds(law, table, turns):
    # The reader knows what it sees and not how many turns came before that: joint law of (visible turns, reply).
    together, visible, costs = Counter(), Counter(), []
    for dialogue, facts, p in table:
        for turn, k, _ in facts:
            seen = dialogue[max(0, turn - (turn if turns is None else turns)) : turn]
            together[seen, dialogue[turn][1]] += p
            visible[seen] += p
            costs.append((seen, dialogue, Fact(turn, 2, k, 0.0)))
    for seen, dialogue, fact in costs[:: max(1, len(costs) // 500)]:
        exact = -math.log(together[seen, dialogue[fact.turn][1]] / visible[seen])
        # A window that begins with the dialogue shows that it does: longer ones never look like it.
        assert law.reply_nats(dialogue, fact, turns) == pytest.approx(exact, abs=1e-9)


def test_a_dialogue_costs_the_sum_of_its_turns(law, table):
    assert sum(p for _, _, p in table) == pytest.approx(1)
    whole = sum(map(law.turn_nats, range(2 * law.exchanges)))
    assert all(-math.log(p) == pytest.approx(whole) for _, _, p in table)


def test_the_corpus_is_the_same_for_a_seed_and_drawn_by_its_law():
    one = load_corpus("grammar")
    assert one.sha256 == grammar_corpus().sha256 != grammar_corpus(1).sha256
    assert [len(one.dialogues(s)) for s in ("train", "valid", "test")] == [6000, 500, 500]
    assert one.removed == []
    kinds = Counter(fact.distance for facts in one.facts["train"] for fact in facts)
    assert sorted(kinds) == list(range(1, 9))
    # The same turn's fact is asked for first, and then for every second time; the reply's of turn 1 must wait for the last
    # question.
    for k, n in ((1, 6000 * (1 + 1 / 2)), (8, 6000 * (1 / 2) * (1 / 2) * (2 / 3) / 4)):
        assert abs(kinds[k] - n) < 5 * math.sqrt(n)
    assert one.nats("valid") == pytest.approx(sum(map(one.grammar.turn_nats, range(10))))
    assert (one.reply_nats("valid", 0) >= one.reply_nats("valid", 2)).all()
    assert (one.reply_nats("valid", 3) >= one.reply_nats("valid")).all()
    assert np.unique(one.reply_nats("valid").round(9)).size == 5


def test_the_fact_stands_where_it_says_and_was_stated_so_many_turns_back():
    corpus = load_corpus("grammar")
    for dialogue, facts in zip(corpus.dialogues("valid"), corpus.facts["valid"], strict=True):
        for fact in facts:
            name = dialogue[fact.turn][1].split()[fact.word]
            asked = dialogue[fact.turn - 1][1].split()[-1]
            assert f"{asked} {name}" in dialogue[fact.turn - fact.distance][1]


def test_who_guesses_among_the_names_told_is_as_often_right_as_it_says():
    corpus = load_corpus("grammar").first(1, None)
    shares = {}
    for dialogue, facts in zip(corpus.dialogues("valid"), corpus.facts["valid"], strict=True):
        told = {}  # animal -> (turn, name), those asked for taken out
        for turn, (speaker, text) in enumerate(dialogue):
            animal, name = re.findall(r"the (\w+) (\w+)", text)[-1]
            told[animal] = turn, name
            if speaker == USER:
                fact, asked = facts[turn // 2], text.split()[-1]
                names = [n for t, n in told.values() if turn < 4 or t < turn]
                assert fact.guess == max(Counter(names).values()) / len(names)
                shares.setdefault(str(fact.distance), []).append(fact.guess)
                assert told.pop(asked)[1] in names
    found = corpus.guessed("valid")
    assert found == pytest.approx({k: sum(v) / len(v) for k, v in shares.items()})
    assert list(found) == [str(k) for k in range(1, 9)]
    # The first question leaves no choice, and the second one of two: no lookup is needed for most of k = 1.
    assert found["1"] > 0.8 > 0.6 > found["8"] > 1 / 8


def test_fewer_animals_than_turns_are_refused():
    with pytest.raises(ValueError, match=r"animals: got 3 for 4 turns, .*; give at least as many\.$"):
        Grammar(animals=("a", "b", "c"), exchanges=2)


def test_an_animal_is_the_same_piece_of_a_bpe_wherever_it_stands():
    corpus = load_corpus("grammar")
    dialogues = corpus.dialogues("train")[:60]
    vocabulary = DialogueVocabulary.train([text for d in dialogues for _, text in d], 400)
    found = {word: set() for word in (*corpus.grammar.animals, *corpus.grammar.names)}
    for dialogue in dialogues:
        for ids, (_, text) in zip(vocabulary.encode_turns(dialogue), dialogue, strict=True):
            for place, word in enumerate(text.split()):
                if word in found:
                    found[word].add(tuple(ids[pieces_of_word(vocabulary, text, place)]))
    assert {len(pieces) for pieces in found.values()} == {1}
