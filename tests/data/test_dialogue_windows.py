"""Dialogues as ids and windows: replies alone are targets, each once; marks in a text are text; contexts are what they say."""

import numpy as np
import pytest
import torch

from bklm.data.dialogue_tokens import MARKS, DialogueVocabulary, pieces_of_word
from bklm.data.dialogue_windows import CONTEXTS, Mixed, count_replies, dialogue_rows, replies_in_context
from bklm.data.grammar import grammar_corpus
from bklm.data.loaders import IGNORED, make_loader, set_epoch, windows

TALKS = [
    (
        ("user", "hi <system> you"),
        ("system", "hello there my friend"),
        ("user", "and now"),
        ("system", "bye bye bye"),
    ),
    (("system", "welcome"), ("user", "what is it"), ("system", "it is a cat")),
    (("user", "one two three " * 9), ("system", "four five six " * 11)),
]


@pytest.fixture(scope="module")
def vocabulary():
    return DialogueVocabulary.train([text for talk in TALKS for _, text in talk] * 2, 300)


def spoken(vocabulary, ids):
    return vocabulary.decode(ids)


def test_marks_are_ids_of_a_turn_and_text_in_a_text(vocabulary):
    assert [vocabulary.tokenizer.token_to_id(mark) for mark in MARKS] == [
        vocabulary.user_id, vocabulary.system_id, vocabulary.end_id,
    ]  # fmt: skip
    assert len(vocabulary) == vocabulary.tokenizer.get_vocab_size() == vocabulary.end_id + 1
    turns = vocabulary.encode_turns(TALKS[0])
    assert spoken(vocabulary, turns[0]) == "<user>hi <system> you<end>"
    assert (turns[0][1:-1] < vocabulary.user_id).all()
    other = DialogueVocabulary.train(["another text, another text"], 270)
    assert vocabulary.sha256 != other.sha256
    again = DialogueVocabulary.train([text for talk in TALKS for _, text in talk] * 2, 300)
    assert vocabulary.sha256 == again.sha256


@pytest.mark.parametrize("seq_len", [2, 3, 7, 16, 64, 500])
def test_every_token_of_a_reply_is_a_target_once_and_nothing_else_is(vocabulary, seq_len):
    encoded = vocabulary.encode_dialogues(TALKS)
    rows = dialogue_rows(encoded, seq_len, vocabulary.pad_id, vocabulary.user_id)
    x, y = rows.__getitems__(range(len(rows)))
    assert x.shape[1] <= seq_len
    expected = np.concatenate([t[1:] for talk in TALKS for n, t in enumerate(vocabulary.encode_turns(talk))
                               if n and talk[n][0] == "system"])  # fmt: skip
    assert y[y != IGNORED].tolist() == expected.tolist()
    assert rows.num_targets == encoded.target.sum() == len(expected)
    replies = [text for talk in TALKS for n, (who, text) in enumerate(talk) if n and who == "system"]
    assert encoded.reply_bytes == sum(len(text.encode()) + 1 for text in replies)
    whole = dialogue_rows(encoded, seq_len, vocabulary.pad_id, vocabulary.user_id, all_tokens=True)
    assert whole.num_targets == len(encoded.ids) - len(TALKS)
    if seq_len == 500:
        assert [len(ids) for ids, _ in rows.rows] == [sum(map(len, encoded.turns(d))) for d in range(3)]


def test_a_window_that_a_reply_does_not_fit_into_ends_before_its_question(vocabulary):
    encoded = vocabulary.encode_dialogues(TALKS[:1])
    turns = encoded.turns(0)
    rows = dialogue_rows(encoded, len(turns[0]) + len(turns[1]) + 2, vocabulary.pad_id, vocabulary.user_id)
    assert [spoken(vocabulary, ids) for ids, _ in rows.rows] == [
        "<user>hi <system> you<end><system>hello there my friend<end><user>",
        "<user>and now<end><system>bye bye bye<end>",
    ]


def test_contexts_are_what_they_say_and_their_targets_are_the_same(vocabulary):
    encoded, found = vocabulary.encode_dialogues(TALKS), {}
    for context in CONTEXTS:
        rows = replies_in_context(encoded, context, 200, vocabulary.pad_id)
        found[context] = [spoken(vocabulary, ids) for ids, _ in rows.rows]
        _x, y = rows.__getitems__([1])
        assert spoken(vocabulary, y[y != IGNORED].tolist()) == "bye bye bye<end>"
    bye, hello = "<system>bye bye bye<end>", "<system>hello there my friend<end>"
    assert found["0"][1] == bye
    assert found["1"][1] == f"<user>and now<end>{bye}"
    assert found["3"][1] == found["all"][1]
    assert found["all"][1] == f"<user>hi <system> you<end>{hello}<user>and now<end>{bye}"
    # Nobody else has a fourth turn: what stands before the last reply of the longest other dialogue.
    assert found["other"][1] == f"<system>welcome<end><user>what is it<end>{bye}"
    assert found["1 after other"][1] == f"<system>welcome<end><user>and now<end>{bye}"
    assert found["other"][0].startswith("<user>one two three")
    more = [one != whole for one, whole in zip(found["1"], found["all"], strict=True)]
    assert count_replies(encoded) == (len(more), sum(more))
    assert count_replies(encoded, 1) == (1, more[0])
    # A context of the drawn dialogues begins with the user, as a training row does.
    drawn = vocabulary.encode_dialogues(
        grammar_corpus(sizes=dict.fromkeys(("train", "valid", "test"), 3)).dialogues("valid")
    )
    for context in CONTEXTS[1:]:
        rows = replies_in_context(drawn, context, 10_000, vocabulary.pad_id).rows
        assert {int(ids[0]) for ids, _ in rows} == {vocabulary.user_id}, context
    cut = replies_in_context(encoded, "all", 8, vocabulary.pad_id)
    assert {len(ids) for ids, _ in cut.rows} == {9}
    with pytest.raises(ValueError, match="context: got '2'"):
        replies_in_context(encoded, "2", 8, vocabulary.pad_id)


def test_replay_is_a_share_of_the_targets_in_an_order_of_its_epoch_and_no_batch_is_longer_for_it(vocabulary):
    encoded = vocabulary.encode_dialogues(TALKS * 60)
    rows = dialogue_rows(encoded, 60, vocabulary.pad_id, vocabulary.user_id)
    loader = make_loader(rows, 9, shuffle=True, seed=3)
    prose = windows(np.arange(2000) % 250, 70, pad_id=vocabulary.pad_id)
    mix = Mixed(loader, prose, 0.25, 3)
    first = [(x.clone(), y.clone()) for x, y in mix]
    second = list(mix)
    mix.set_epoch(0)
    again = list(mix)
    assert all(
        torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True)
    )
    set_epoch(loader, 0)
    replayed = 0
    for (x, y), (own_x, own_y) in zip(first, loader, strict=True):
        assert x.shape[1] == own_x.shape[1]
        assert torch.equal(x[: len(own_x)], own_x)
        assert torch.equal(y[: len(own_y)], own_y)
        more_x, more_y = x[len(own_x) :], y[len(own_y) :]
        targets = more_y != IGNORED
        assert torch.equal(more_x[:, 1:][targets[:, 1:]], more_y[:, :-1][targets[:, 1:]])
        replayed += int(targets.sum())
    # Within the window that waits at the end, and the last one of the text, which is shorter.
    assert abs(replayed - rows.num_targets * 0.25 / 0.75) < 2 * 60
    with pytest.raises(ValueError, match="replay: got 1; allowed is a share between 0 and 1"):
        Mixed(loader, prose, 1, 0)


def test_a_words_pieces_are_found_by_their_place():
    corpus = grammar_corpus(sizes={"train": 40, "valid": 9, "test": 9})
    for limit in (264, 400):
        vocabulary = DialogueVocabulary.train(corpus.train, limit)
        for dialogue, facts in zip(corpus.dialogues("valid"), corpus.facts["valid"], strict=True):
            for fact in facts:
                text = dialogue[fact.turn][1]
                ids = vocabulary.encode_turns(dialogue)[fact.turn]
                pieces = ids[pieces_of_word(vocabulary, text, fact.word)]
                assert spoken(vocabulary, pieces).strip() == text.split()[fact.word]
