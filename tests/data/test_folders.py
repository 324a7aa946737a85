import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bklm.data import SPLITS, load_corpus, tokenize_corpus

TEXT = {"train": "= A =\nsome words here\n", "valid": "other words\n", "test": "last words\n"}


def write(folder, layout, text=TEXT):
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / layout.format(split)).write_text(text[split], encoding="utf-8")
    return folder


@pytest.mark.parametrize("layout", ["{}.txt", "wiki.{}.raw", "wiki.{}.tokens"])
def test_each_text_layout_is_read(layout, tmp_path):
    corpus = load_corpus("wikitext-2", write(tmp_path / "mine", layout))
    assert (corpus.train, corpus.valid, corpus.test) == (
        ["= A =", "some words here"],
        ["other words"],
        ["last words"],
    )
    assert corpus.name == "mine"
    assert corpus.source == ", ".join(layout.format(split) for split in SPLITS) + f" in {tmp_path / 'mine'}"


def test_hash_does_not_depend_on_place_layout_line_ends_or_byte_order_mark(tmp_path):
    plain = load_corpus("wikitext-2", write(tmp_path / "a", "{}.txt")).sha256
    windows = {split: "\ufeff" + text.replace("\n", " \r\n") for split, text in TEXT.items()}
    assert load_corpus("wikitext-2", write(tmp_path / "b", "wiki.{}.raw", windows)).sha256 == plain


def test_the_environment_variable_stands_in_and_the_argument_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("BKLM_DATA_DIR", str(write(tmp_path / "env", "{}.txt")))
    given = write(tmp_path / "given", "{}.txt")
    assert load_corpus("wikitext-2").name == "env"
    assert load_corpus("wikitext-2", "").name == "env"
    assert load_corpus("wikitext-2", given).name == "given"
    monkeypatch.setenv("BKLM_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"^BKLM_DATA_DIR '.*nowhere' does not exist; give a folder with train.txt"
    ):
        load_corpus("wikitext-2")


def test_lines_end_where_editors_end_them(tmp_path):
    odd = "one\x0cline\u2028still\x85the same\n\nthree\n"
    corpus = load_corpus("wikitext-2", write(tmp_path, "{}.txt", TEXT | {"train": odd}))
    assert corpus.train == ["one\x0cline\u2028still\x85the same", "", "three"]


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data_dir '.*none' does not exist; give a folder with train.txt"
    ):
        load_corpus("wikitext-2", tmp_path / "none")


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "train.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"^data_dir .*train.pdf' is no text that can be read; give one .txt"):
        load_corpus("wikitext-2", tmp_path / "train.pdf")


@pytest.mark.parametrize("name", ["\0", "x" * 5000])
def test_an_impossible_folder_name_is_one_sentence(name):
    with pytest.raises(OSError, match=r"cannot be read"):
        load_corpus("wikitext-2", name)


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is empty; it should hold train.txt"):
        load_corpus("wikitext-2", tmp_path)


def test_a_folder_without_a_corpus_is_one_sentence(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"holds no corpus; it should hold train.txt"):
        load_corpus("wikitext-2", tmp_path)


def test_missing_splits_are_named(text_folder):
    (text_folder / "valid.txt").unlink()
    (text_folder / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks valid.txt and test.txt; all three splits are needed"):
        load_corpus("wikitext-2", text_folder)


def test_text_that_is_not_utf_8_is_one_sentence(text_folder):
    (text_folder / "valid.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"valid.txt' is not UTF-8 \(byte 0xe9 at offset 3\); save it as UTF-8"
    ):
        load_corpus("wikitext-2", text_folder)


def test_a_split_without_text_is_refused(text_folder):
    (text_folder / "test.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"test.txt' holds no text; every split needs some"):
        load_corpus("wikitext-2", text_folder)


def test_a_folder_in_place_of_a_file_is_one_sentence(text_folder):
    (text_folder / "test.txt").unlink()
    (text_folder / "test.txt").mkdir()
    with pytest.raises(OSError, match=r"test.txt' cannot be read"):
        load_corpus("wikitext-2", text_folder)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser reads everything")
def test_unreadable_files_and_folders_are_one_sentence(text_folder):
    (text_folder / "valid.txt").chmod(0)
    with pytest.raises(PermissionError, match=r"valid.txt' cannot be read; check its permissions"):
        load_corpus("wikitext-2", text_folder)
    text_folder.chmod(0)
    try:
        with pytest.raises(PermissionError, match=r"cannot be read; check its permissions"):
            load_corpus("wikitext-2", text_folder)
    finally:
        text_folder.chmod(0o700)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({split: st.binary(max_size=60) | st.text(max_size=60) for split in SPLITS}))
def test_any_bytes_give_a_corpus_or_one_sentence(tmp_path, content):
    for split, data in content.items():
        data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
        (tmp_path / f"{split}.txt").write_bytes(data)
    try:
        corpus = load_corpus("wikitext-2", tmp_path)
        tokens = tokenize_corpus(corpus)
    except ValueError as error:
        assert any(words in str(error) for words in ("UTF-8", "no text", "no word"))  # noqa: PT017
    else:
        assert all(len(getattr(tokens, s)) == len(" ".join(corpus.split(s)).split()) for s in SPLITS)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """`datasets`, with its own cache in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("hf")
    datasets.disable_progress_bars()
    yield datasets
    datasets.config.HF_DATASETS_CACHE = before


def rows(split):
    """Text as the hub has it: a row a line, with its line end, blank lines empty."""
    return {"text": ["" if not line.strip() else f" {line} \n" for line in TEXT[split].splitlines()]}


def chat(n, word):
    roles = ("user", "assistant")
    return {"messages": [[{"role": role, "content": f"{word} {i} {role}"} for role in roles] for i in range(n)]}


def test_a_data_set_saved_to_disk_has_the_hash_of_its_text_files(hf, tmp_path):
    names = {"train": "train", "valid": "validation", "test": "test"}
    saved = hf.DatasetDict({names[split]: hf.Dataset.from_dict(rows(split)) for split in SPLITS})
    saved.save_to_disk(tmp_path / "saved")
    corpus = load_corpus("wikitext-2", tmp_path / "saved")
    assert corpus.train == [" = A = ", " some words here "]
    assert corpus.sha256 == load_corpus("wikitext-2", write(tmp_path / "text", "{}.txt")).sha256
    assert corpus.source == f"saved Hugging Face data set in {tmp_path / 'saved'}"


@pytest.mark.parametrize("place", ["", "data", "wikitext-2-raw-v1"])
def test_a_data_set_laid_out_as_on_the_hub_is_read(hf, place, tmp_path):
    folder = tmp_path / "repository"
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        hf.Dataset.from_dict(rows(split)).to_parquet(folder / place / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text("a card")
    corpus = load_corpus("wikitext-2", folder)
    assert corpus.sha256 == load_corpus("wikitext-2", write(tmp_path / "text", "{}.txt")).sha256


def test_dialogues_are_documents_read_as_they_are_indexed(hf, tmp_path):
    saved = hf.DatasetDict(
        {"train_sft": hf.Dataset.from_dict(chat(7, "ask")), "test_sft": hf.Dataset.from_dict(chat(5, "held"))}
    )
    saved.save_to_disk(tmp_path / "chat")
    corpus = load_corpus("ultrachat", tmp_path / "chat")
    documents = corpus.documents("train")
    assert len(documents) == 7
    assert documents[-1] == "ask 6 user ask 6 assistant"
    assert documents[1:3] == [documents[1], documents[2]] == list(documents)[1:3]
    assert [text.split()[1] for text in corpus.valid] == ["0", "2", "4"]
    assert [text.split()[1] for text in corpus.test] == ["1", "3"]
    with pytest.raises(IndexError):
        documents[7]
    few = load_corpus("ultrachat", tmp_path / "chat", max_documents=3)
    assert [list(few.split(split)) for split in SPLITS] == [corpus.split(split)[:3] for split in SPLITS]
    assert [len(few.split(split)) for split in SPLITS] == [3, 3, 2]
    assert len(tokenize_corpus(few).train) == 3 * 6


def test_a_saved_data_set_without_the_splits_or_columns_is_refused(hf, tmp_path):
    two = hf.Dataset.from_dict({"text": ["a", "b"]})
    two.save_to_disk(tmp_path / "single")
    with pytest.raises(ValueError, match="is one split of a data set; save a DatasetDict"):
        load_corpus("wikitext-2", tmp_path / "single")
    hf.DatasetDict(train=two, test=two).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="it needs train, validation and test with a column text"):
        load_corpus("wikitext-2", tmp_path / "two")
    other = hf.Dataset.from_dict({"words": ["a"]})
    hf.DatasetDict(train=other, validation=other, test=other).save_to_disk(tmp_path / "column")
    with pytest.raises(ValueError, match=r"'words'.*it needs train, validation and test with a column text"):
        load_corpus("wikitext-2", tmp_path / "column")


def test_a_damaged_saved_data_set_is_one_sentence(hf, tmp_path):
    data = hf.Dataset.from_dict({"text": ["a"] * 100})
    hf.DatasetDict(train=data, validation=data, test=data).save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved" / "train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(OSError, match=r"^the data set saved in data_dir .* cannot be read"):
        load_corpus("wikitext-2", tmp_path / "saved")
    for name in ("train", "validation", "test"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / f"{name}-0.parquet").write_bytes(b"PAR1 nothing like it")
    with pytest.raises(OSError, match=r"^the data set saved in data_dir .* cannot be read"):
        load_corpus("wikitext-2", tmp_path / "hub")


WRITTEN = {
    "a missing text is blank": ([{"text": "the cat"}, {"text": None}], ["the cat", ""]),
    "bytes are UTF-8": ([{"text": "über".encode()}], ["über"]),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_text_column_is_read_as_its_writer_meant_it(hf, case, tmp_path):
    written, read = WRITTEN[case]
    rows = hf.Dataset.from_list(written)
    hf.DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "saved")
    assert load_corpus("wikitext-2", tmp_path / "saved").valid == read


NO_TEXT = [
    ([{"text": 1}], r"^train split of .*, row 0: text is a number \(1\), not text"),
    ([{"text": ["a", "b"]}], r"row 0: text is a list \(\['a', 'b'\]\), not text"),
    ([{"text": b"ok"}, {"text": b"\xff"}], r"row 1: text holds bytes that are not UTF-8"),
    ([{"text": {"a": 1}}], r"row 0: text is of the type dict"),
    ([{"text": None}], r"train split of .* holds no text"),
]


@pytest.mark.parametrize(("written", "sentence"), NO_TEXT)
def test_a_text_column_that_holds_no_text_is_one_sentence_with_split_row_and_type(
    hf, written, sentence, tmp_path
):
    rows = hf.Dataset.from_list(written)
    hf.DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=sentence):
        load_corpus("wikitext-2", tmp_path / "saved")


def dialogues(hf, folder, messages):
    saved = hf.DatasetDict(
        {n: hf.Dataset.from_list([{"messages": m} for m in messages]) for n in ("train_sft", "test_sft")}
    )
    saved.save_to_disk(folder)
    return load_corpus("ultrachat", folder)


def test_messages_without_content_or_in_parts_are_read_as_their_writer_meant_them(hf, tmp_path):
    none = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    assert list(dialogues(hf, tmp_path / "none", [none] * 3).train) == ["hi"] * 3
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]}]
    assert list(dialogues(hf, tmp_path / "parts", [parts] * 3).valid) == ["hi there"] * 2


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (None, r"row 3: messages is null, not a list of turns"),
        (
            [{"role": "user", "content": [{"type": "image", "text": None}]}],
            r"row 3: .* part 0 is of the type 'image'",
        ),
    ],
)
def test_a_dialogue_that_cannot_be_read_is_one_sentence_with_the_row_of_the_file(hf, bad, sentence, tmp_path):
    good = bad and [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    good = good or [{"role": "user", "content": "hi"}]
    corpus = dialogues(hf, tmp_path / "saved", [good, good, good, bad])
    with pytest.raises(ValueError, match=rf"^train_sft split of .*{sentence}"):
        list(corpus.train)
    # The odd rows of the held-out split are the test split; the number is still the row's in the file.
    with pytest.raises(ValueError, match=rf"^test_sft split of .*{sentence}"):
        corpus.test[1]
    assert list(corpus.valid) == ["hi", "hi"]


PARTS = [
    (["train-00000-of-00002"], r"holds 1 of 2 parts and lacks train-00001-of-00002; download"),
    (["train-00001-of-00002", "train-00000-of-00001"], "more than one copy"),
    (["train-00000-of-00001-0a1b", "train-00000-of-00001-2c3d"], "more than one copy"),
    (["train-00000-of-00001", "train"], "more than one copy"),
    (
        ["train-00000-of-00001", "train-00000-of-00001 (1)"],
        r"'train-00000-of-00001 \(1\).parquet', as a second download",
    ),
    (["train", "train (1)"], r"second download"),
    (["train", "train(1)"], r"second download"),
    (["train copy"], r"second download"),
]


@pytest.mark.parametrize(("names", "sentence"), PARTS)
def test_a_part_that_is_missing_or_there_twice_is_one_sentence(hf, names, sentence, tmp_path):
    data = hf.Dataset.from_dict({"text": ["a"]})
    for name in (*names, "validation-00000-of-00001", "test-00000-of-00001"):
        data.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(OSError, match=rf"^the split train of data_dir .*{sentence}"):
        load_corpus("wikitext-2", tmp_path)


def test_all_parts_of_a_text_are_read_in_order(hf, tmp_path):
    for number in range(3):
        hf.Dataset.from_dict({"text": [str(number)]}).to_parquet(
            tmp_path / f"train-{number:05d}-of-00003-0a1b.parquet"
        )
    for name in ("validation", "test"):
        hf.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / f"{name}.parquet")
    assert load_corpus("wikitext-2", tmp_path).train == ["0", "1", "2"]
