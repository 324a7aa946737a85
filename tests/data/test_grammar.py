"""The grammar of dialogues: its law by enumeration, the same draws everywhere, the fact where it says."""

import math
from collections import Counter

import numpy as np
import pytest

from bklm.data import load_corpus
from bklm.data.dialogue_tokens import DialogueVocabulary, pieces_of_word
from bklm.data.dialogues import SYSTEM, USER
from bklm.data.grammar import Fact, Grammar, grammar_corpus

SMALL = Grammar({t: (f"{t}x", f"{t}y") for t in "abcde"}, exchanges=2)
LONGER = Grammar({t: (f"{t}x",) for t in "abcdef"}, exchanges=3)


def every_dialogue(law: Grammar):
    """Every dialogue of a law with its probability and facts, written down from the words of the grammar alone."""

    def go(turns, told, facts, p):
        t = len(turns)
        if t == 2 * law.exchanges:
            yield tuple(turns), tuple(facts), p
            return
        free = [a for a in law.topics if a not in [topic for topic, _ in told]]
        for a, v in ((topic, value) for topic in free for value in law.topics[topic]):
            now, q = [*told, (a, v)], p / (len(free) * law.values)
            if t % 2 == 0:
                open_ones = [n for n in range(len(now)) if n not in [t - k for t, k, _ in facts]]
                for n in open_ones:
                    said = f"take {v} . which {now[n][0]}"
                    known = [*facts, (t + 1, t + 1 - n, " ".join(now[n]))]
                    yield from go([*turns, (USER, said)], now, known, q / len(open_ones))
            else:
                yield from go([*turns, (SYSTEM, f"the {facts[-1][2]} . take {v}")], now, facts, q)

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
            costs.append((seen, dialogue, Fact(turn, 2, k)))
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
    assert [len(one.dialogues(s)) for s in ("train", "valid", "test")] == [24_000, 500, 500]
    assert one.removed == []
    kinds = Counter(fact.distance for facts in one.facts["train"] for fact in facts)
    assert sorted(kinds) == list(one.grammar.distances) == list(range(1, 9))
    # Of every question's facts that of its own turn is one; the reply's of turn 1 must wait for the last question.
    for k, share in ((1, 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5), (8, (1 / 2) * (2 / 3) * (3 / 4) / 5)):
        assert abs(kinds[k] - 24_000 * share) < 5 * math.sqrt(24_000 * share)
    assert one.nats("valid") == pytest.approx(sum(map(one.grammar.turn_nats, range(10))))
    assert (one.reply_nats("valid", 0) >= one.reply_nats("valid", 2)).all()
    assert (one.reply_nats("valid", 3) >= one.reply_nats("valid")).all()
    assert np.unique(one.reply_nats("valid").round(9)).size == 5


def test_the_fact_stands_where_it_says_and_was_stated_so_many_turns_back():
    corpus = load_corpus("grammar", max_documents=200)
    assert corpus.dialogues("train") == grammar_corpus(most=300).dialogues("train")[:200]
    assert corpus.facts["train"] == grammar_corpus(most=300).facts["train"][:200]
    for dialogue, facts in zip(corpus.dialogues("valid"), corpus.facts["valid"], strict=True):
        for fact in facts:
            name = dialogue[fact.turn][1].split()[fact.word]
            asked = dialogue[fact.turn - 1][1].split()[-1]
            assert name in corpus.grammar.topics[asked]
            assert f"take {name}" in dialogue[fact.turn - fact.distance][1]


def test_facts_are_asked_for_as_often_at_every_distance_in_dialogues_that_are_in_no_split():
    corpus = grammar_corpus(sizes={"train": 50, "valid": 50, "test": 50})
    found = corpus.asked_at(30)
    assert Counter(fact.distance for _, facts in found for fact in facts) == dict.fromkeys(range(1, 9), 30)
    assert found == corpus.asked_at(30)
    read = {d for split in ("train", "valid", "test") for d in corpus.dialogues(split)}
    for dialogue, facts in found:
        assert dialogue not in read
        for fact in facts:
            value = dialogue[fact.turn][1].split()[fact.word]
            assert f"take {value}" in dialogue[fact.turn - fact.distance][1]


@pytest.mark.parametrize(
    ("topics", "words"),
    [
        ({t: (t + t,) for t in "abc"}, r"topics: got 3 for 4 turns, .*; give at least as many\.$"),
        (dict.fromkeys("abcd", ("x",)), "no word twice"),
        ({t: tuple(f"{t}{n}" for n in range(1 + (t == "a"))) for t in "abcd"}, "as many values as another"),
    ],
)
def test_topics_that_are_too_few_or_cannot_be_told_apart_are_refused(topics, words):
    with pytest.raises(ValueError, match=words):
        Grammar(topics, exchanges=2)


def test_a_value_is_the_same_piece_of_a_bpe_wherever_it_stands():
    corpus = load_corpus("grammar", max_documents=200)
    dialogues = corpus.dialogues("train")[:200]
    vocabulary = DialogueVocabulary.train([text for d in dialogues for _, text in d], 700)
    words = [word for topic, values in corpus.grammar.topics.items() for word in (topic, *values)]
    found = {word: set() for word in words}
    for dialogue in dialogues:
        for ids, (_, text) in zip(vocabulary.encode_turns(dialogue), dialogue, strict=True):
            for place, word in enumerate(text.split()):
                if word in found:
                    found[word].add(tuple(ids[pieces_of_word(vocabulary, text, place)]))
    assert {len(pieces) for pieces in found.values()} == {1}
