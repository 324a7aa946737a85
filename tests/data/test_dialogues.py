"""Dialogues of every form are read as meant, or refused in one sentence; copies of what is scored are not trained on."""

import json

import pytest

from bklm.data import load_corpus
from bklm.data.dialogues import dialogue_of
from bklm.data.hub import DATASETS
from bklm.data.local import corpus_from_splits

ASKED = (("user", "hi"), ("system", "hello"))


def said(*turns, column="messages"):
    return {column: [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]}


READ = {
    "texts in turn": ({"turns": ["hi", "hello"]}, ASKED),
    "DailyDialog's own": ({"dialog": [" hi ", "hello "], "act": [1, 2]}, ASKED),
    "pairs, whoever begins asks": ({"turns": [["Ann", "hi"], ["Bob", "hello"]]}, ASKED),
    "records": ({"turns": [{"speaker": "B", "text": "hi"}, {"from": "A", "value": "hello"}]}, ASKED),
    "usual names win over the order": ({"turns": [["assistant", "yes?"], ["human", "hi"], ["assistant", "hello"]]},
                                       (("system", "yes?"), *ASKED)),
    "messages": (said(("user", "hi"), ("assistant", "hello")), ASKED),
    "an instruction is read with the first turn": (said(("system", "be kind"), ("user", "hi"), ("assistant", "hello")),
                                                   (("user", "be kind\nhi"), ("system", "hello"))),
    "a call of a tool says nothing, its result is read": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]},
                      {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "42"},
                      {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]},
        (("user", "hi\n42"), ("system", "hello"))),
    "empty turns say nothing": (said(("user", "hi"), ("assistant", " "), ("user", ""), ("assistant", "hello")), ASKED),
    "one speaker's turns are one": ({"turns": [["a", "h"], ["a", "i"], ["b", "hello"]]}, (("user", "h\ni"), ASKED[1])),
    "upper and lower case are one name": ({"turns": [["User", "h"], ["user", "i"], ["BOT ", "hello"]]},
                                          (("user", "h\ni"), ASKED[1])),
    "who says nothing is no third speaker": ({"turns": [["c", " "], ["a", "hi"], ["b", "hello"]]}, ASKED),
    "a text where another is null": ({"turns": [{"speaker": "a", "text": None, "value": "hi"}, ["b", "hello"]]}, ASKED),
    "other keys of messages": ({"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, ASKED),
    "a turn left out keeps its place": ({"turns": ["hi", None, "there"]}, ()),
    "nobody replies": (said(("user", "hi"), ("assistant", None)), ()),
    "one speaker": ({"turns": [["a", "hi"], ["a", "there"]]}, ()),
    "no turns": ({"turns": []}, ()),
    "a greeting is no reply": (said(("assistant", "hello"), ("user", "hi")), ()),
    "null texts": ({"turns": ["hi", None, None, "hello"]}, ASKED),
}  # fmt: skip
REFUSED = {
    "another column": ({"words": 1}, r"^row 1 has the keys \['words'\]; a row needs a text"),
    "no list": ({"turns": "hi"}, r"^row 1: turns is text \('hi'\), not a list of turns\.$"),
    "null": ({"messages": None}, r"^row 1: messages is null, not a list of turns\.$"),
    "a number": ({"turns": ["hi", 3]}, r"turn 1 is a number \(3\); a turn is a text, or has a speaker and a text\.$"),
    "no text": ({"messages": [{"role": "user"}]}, r"turn 0 has the keys \['role'\]; a turn needs a speaker"),
    "a picture": (said(("user", [{"type": "image"}])), r"part 0 is of the type 'image'; only parts of the type 'text'"),
    "a text as a message": ({"messages": ["hi"]}, r"turn 0 has the role None; known are user, assistant"),
    "an unknown role": (said(("narrator", "hi")), r"turn 0 has the role 'narrator'; known are user, assistant"),
    "three speakers": ({"turns": [["a", "x"], ["b", "y"], ["c", "z"]]}, r"has 3 speakers \('a', 'b', 'c'\); a dial"),
    "half a surrogate pair": ({"turns": ["hi", "so \ud83d"]}, r"row 1: turns, turn 1 holds half of a surrogate .* 3, wh"),
    "half named": ({"turns": [["a", "x"], "y"]}, r"names the speaker of some turns and not of others"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_dialogue_is_read_as_its_writer_meant_it(case):
    row, dialogue = READ[case]
    assert dialogue_of(row, "row 1") == dialogue


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dialogue_is_one_sentence_with_its_place(case):
    row, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        dialogue_of(row, "row 1")


def talk(n, replies=True):
    return {
        "turns": [f"question number {n} of {n * 7} and {n * 13}", f"answer {n} is {n * 11} plus {n * 17}"][
            : 1 + replies
        ]
    }


def write(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["dailydialog", "ultrachat"])
def test_a_folder_of_dialogues_is_split_by_dialogue_and_near_copies_of_held_out_ones_are_not_trained_on(
    name, tmp_path
):
    long = "we go to the market on a sunny day and then we buy some bread and a lot of cheese for all of us"
    copy = {"turns": [long, "yes we do"]}
    folder = write(tmp_path / "d", train=[talk(1), copy, talk(2), talk(3, replies=False)],
                   validation=[{"turns": [long, "yes we did"]}], test=[{"turns": ["ask", "reply"]}])  # fmt: skip
    corpus = load_corpus(name, folder)
    assert [d[0][1].split()[2] for d in corpus.dialogues("train")] == ["1", "2"]
    assert [(c.index, c.of) for c in corpus.removed] == [(1, 0)]
    assert corpus.left_out == {"train": 1, "valid": 0, "test": 0}
    assert corpus.dialogues("test") == [(("user", "ask"), ("system", "reply"))]
    assert corpus.test == ["ask reply"]
    assert corpus.is_own
    assert corpus.first(1, None).dialogues("train") == [corpus.dialogues("train")[0]]


def test_one_file_is_split_by_dialogue_and_a_row_without_a_reply_does_not_move_the_others(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(f"{json.dumps(talk(n, replies=n != 3))}\n" for n in range(20)))
    corpus = load_corpus("dailydialog", file)
    found = {s: [d[0][1].split()[2] for d in corpus.dialogues(s)] for s in ("train", "valid", "test")}
    assert found["train"] == [str(n) for n in range(len(found["train"]) + 1) if n != 3]
    assert sum(map(len, found.values())) == 19


@pytest.mark.parametrize("case", [name for name, (row, found) in READ.items() if found])
def test_the_text_of_a_file_and_its_dialogues_are_read_from_the_same_turns(case, tmp_path):
    row, dialogue = READ[case]
    # Several columns: what the rest of the row holds is read by neither.
    row = {"messages": [{"role": "user", "content": "another column"}]} | row
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 12)
    corpus = load_corpus("dailydialog", path)
    dialogue_words = " ".join(text for _, text in dialogue).split()
    assert [text.split() for text in corpus.test] == [dialogue_words] * len(corpus.test)
    assert corpus.dialogues("test") == [dialogue] * len(corpus.test)


def test_a_text_beside_a_dialogue_is_read_alone_in_every_container(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"text": "a text", "turns": ["hi", "hello"], "messages": said(("user", "hi"))["messages"]}
    lines, packed = tmp_path / "talks.jsonl", tmp_path / "talks.parquet"
    lines.write_text(f"{json.dumps(row)}\n" * 12)
    rows = datasets.Dataset.from_list([row] * 12)
    rows.to_parquet(packed)
    found = [load_corpus("dailydialog", lines), load_corpus("dailydialog", packed)]
    found.append(corpus_from_splits("d", "here", {"train": rows, "validation": rows, "test": rows}))
    for corpus in found:
        assert set(corpus.train) == {"a text"}
        with pytest.raises(ValueError, match="holds lines of text and no dialogues"):
            corpus.dialogues("train")


def few_of_a_grammar(tmp_path):
    return "grammar", None


def few_of_one_file(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(f"{json.dumps(talk(n))}\n" for n in range(40)))
    return "dailydialog", path


def few_of_three_files(tmp_path):
    rows = [talk(n) for n in range(4)]
    return "dailydialog", write(tmp_path / "d", train=rows, valid=rows, test=rows)


def few_of_a_saved_data_set(tmp_path):
    rows = pytest.importorskip("datasets").Dataset.from_list([talk(n) for n in range(7)])
    (tmp_path / "saved").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "saved" / f"{split}-00000-of-00001.parquet")
    return "ultrachat", tmp_path / "saved"


@pytest.mark.parametrize(
    "made", [few_of_a_grammar, few_of_one_file, few_of_three_files, few_of_a_saved_data_set]
)
def test_a_limit_takes_the_first_dialogues_of_each_split_wherever_they_come_from(made, tmp_path):
    name, place = made(tmp_path)
    whole, few = load_corpus(name, place), load_corpus(name, place, max_documents=2)
    for split in ("train", "valid", "test"):
        assert list(few.split(split)) == whole.split(split)[:2]
        assert len(few.split(split)) == 2
    assert few.rows["test"].placed().__next__() == next(iter(whole.rows["test"].placed()))


def test_a_turn_of_a_hundred_thousand_words_is_read_whole(tmp_path):
    row = {"turns": ["hi", " ".join(["word"] * 100_000)]}
    corpus = load_corpus("dailydialog", write(tmp_path / "d", train=[row], valid=[talk(1)], test=[talk(2)]))
    assert len(corpus.dialogues("train")[0][1][1].split()) == 100_000


def test_text_without_dialogues_and_splits_without_replies_are_one_sentence(tmp_path, small_text):
    with pytest.raises(
        ValueError,
        match=r'holds lines of text and no dialogues; .* take the corpus "grammar"\.$',
    ):
        load_corpus("dailydialog", small_text).dialogues("train")
    silent = write(tmp_path / "d", train=[talk(1)], valid=[talk(2, replies=False)], test=[talk(3)])
    with pytest.raises(
        ValueError, match=r"^the valid split of .* holds no dialogue with a reply; every split needs one"
    ):
        load_corpus("dailydialog", silent).dialogues("valid")
    with pytest.raises(ValueError, match=r"line 1: turns is a number \(1\), not a list of turns\.$"):
        load_corpus("dailydialog", write(tmp_path / "e", train=[{"turns": 1}], valid=[talk(1)], test=[talk(2)]))
    copies = write(tmp_path / "f", train=[talk(1)], valid=[talk(1)], test=[talk(1)])
    with pytest.raises(
        ValueError,
        match=r"^every training dialogue of .* nearly repeats one of its validation",
    ):
        load_corpus("dailydialog", copies).dialogues("train")


def test_a_data_set_of_dialogues_is_read_by_its_column_and_its_licence_is_named():
    hf = pytest.importorskip("datasets")
    splits = {s: hf.Dataset.from_list([{"dialog": talk(n)["turns"]} for n in range(k, k + 3)])
              for s, k in (("train", 0), ("validation", 10), ("test", 20))}  # fmt: skip
    corpus = corpus_from_splits("dailydialog", "here", splits)
    assert [len(corpus.dialogues(s)) for s in ("train", "valid", "test")] == [3, 3, 3]
    assert corpus.train[1] == " ".join(talk(1)["turns"])
    assert "CC BY-NC-SA 4.0" in corpus.licence
    # The classic id is a loading script, which datasets 4 and later refuse.
    assert DATASETS["dailydialog"].repository == "OpenRL/daily_dialog"
