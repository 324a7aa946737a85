"""What a token is besides a word, and texts of one's own."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from bklm.data import Corpus, load_corpus, tokenize_corpus, units
from bklm.data.units import TOKENIZERS, tidy, with_lower_case
from bklm.harness import config

LINES = [
    "the cat sees the dog .",
    "",
    "  a dog <unk> the cat ,  ",
    "Über den Wolken, süß",
    "x<unk>y <pad> 雪国",
]


def corpus(lines=LINES) -> Corpus:
    return Corpus("own", "here", lines * 5, [*lines, "new Ünknown 猫"], lines)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_come_back_from_the_cache_and_are_those_of_the_tokenizers_library(tokenizer):
    tokens, again = (tokenize_corpus(corpus(), 400, tokenizer=tokenizer) for _ in range(2))
    assert tokens.kind == {"word": "word", "bpe": "piece", "char": "character"}[tokenizer]
    assert again.vocab.words == tokens.vocab.words
    np.testing.assert_array_equal(again.train, tokens.train)
    text = "\n".join(tidy(corpus().valid))
    np.testing.assert_array_equal(tokens.encode(text), tokens.valid)
    np.testing.assert_array_equal(tokens.vocab.tokenizer.encode(text).ids, tokens.valid)
    assert tokens.vocab.ids == {word: i for i, word in enumerate(tokens.vocab.words)}
    assert int(tokens.train.max()) < tokens.vocab_size <= 400


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_pieces_and_characters_give_the_text_back(tokenizer):
    tokens = tokenize_corpus(corpus(), 400, tokenizer=tokenizer)
    text = "\n".join(tidy(LINES))
    assert tokens.decode(tokens.encode(text).tolist()) == text
    if tokenizer == "bpe":
        assert tokens.decode(tokens.encode("猫 never seen").tolist()) == "猫 never seen"
    else:
        assert tokens.encode("猫").tolist() == [tokens.unk_id]
        assert tokens.encode("the").tolist() == [tokens.vocab.ids[c] for c in "the"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_tokenizer_for_small_letters_reads_capitals_as_small_ones(tokenizer):
    small = tokenize_corpus(corpus([line.lower() for line in LINES]), 400, tokenizer=tokenizer).vocab.tokenizer
    before = small.to_str()
    assert with_lower_case(small).encode("The Cat").ids == small.encode("the cat").ids
    assert small.to_str() == before


def test_bad_tokenizers_and_sizes_are_one_sentence():
    with pytest.raises(ValueError, match=r"^tokenizer: got 'words'; choose one of 'word', 'bpe', 'char'\.$"):
        tokenize_corpus(corpus(), tokenizer="words")
    with pytest.raises(ValueError, match=r"vocab_size"):
        tokenize_corpus(corpus(), 200, tokenizer="bpe")


JAPANESE = ["国境の長いトンネルを抜けると雪国であった。夜の底が白くなった。信号所に汽車が止まった。"] * 30


def test_a_text_without_spaces_is_refused_as_words_and_read_as_characters_and_pieces():
    own = Corpus("yukiguni", "here", JAPANESE, JAPANESE, JAPANESE)
    with pytest.raises(
        ValueError, match=r"^tokenizer: got 'word', but this text has \d+ characters between two spaces"
    ):
        tokenize_corpus(own)
    for tokenizer in ("char", "bpe"):
        assert len(tokenize_corpus(own, 400, tokenizer=tokenizer).train) > 100


PARAGRAPHS = [f"Paragraph {i} says\nthat {i} is a number {'and more ' * (i % 7)}." for i in range(200)]


def _write(folder, name):
    rows = [{"text": p} for p in PARAGRAPHS]
    packed = gzip.open if name.endswith(".gz") else open
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(folder / name)
        return folder / name
    words = "\n\n".join(PARAGRAPHS) if kind == "txt" else "\n".join(map(json.dumps, rows))
    with packed(folder / name, "wt", encoding="utf-8") as file:
        file.write(words)
    return folder / name


@pytest.mark.parametrize(
    "name", ["notes.txt", "notes.txt.gz", "notes.jsonl", "notes.jsonl.gz", "notes.parquet"]
)
def test_one_file_is_split_80_10_10_by_paragraphs_in_their_order(tmp_path, name):
    own = load_corpus("wikitext-2", _write(tmp_path, name))
    assert [*own.train, *own.valid, *own.test] == [p.replace(" \n", "\n") for p in PARAGRAPHS]
    sizes = [
        sum(map(len, own.split(split))) / sum(map(len, PARAGRAPHS)) for split in ("train", "valid", "test")
    ]
    assert sizes == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert (own.name, own.is_own, own.is_wikitext2) == ("notes", True, False)
    assert "split 80/10/10 by paragraphs in their order: 1" in own.source
    assert own.documents("valid") == own.valid


def test_a_folder_is_read_whole_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b.txt").write_text("\n".join(f"b {i}" for i in range(20)))
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": f"a {i}"}]}) for i in range(20))
    )
    (tmp_path / "picture.png").write_bytes(b"\0")
    own = load_corpus("wikitext-2", tmp_path)
    assert [*own.train, *own.valid, *own.test] == [f"{x} {i}" for x in "ab" for i in range(20)]
    assert own.source.startswith("2 files in ")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt.gz"])
def test_files_named_after_splits_are_those_splits_and_never_mixed(tmp_path, ending):
    packed = gzip.open if ending.endswith(".gz") else open

    def write(split):
        words = [f"{split} {i}" for i in range(12)]
        lines = [json.dumps({"text": w}) for w in words] if ".jsonl" in ending else words
        with packed(tmp_path / f"{split}{ending}", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))

    for split in ("train", "test"):
        write(split)
    with pytest.raises(ValueError, match=r"named after a split; give all three of train, valid and test"):
        load_corpus("wikitext-2", tmp_path)
    write("validation")
    own = load_corpus("wikitext-2", tmp_path)
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        assert own.split(split) == [f"{name} {i}" for i in range(12)]
    assert (own.is_own, own.name) == (True, tmp_path.name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"one\n\ntwo", r"holds 2 paragraphs; a split into training, validation and test text needs 10"),
        ("a.txt", b"\n \n", r"holds 0 paragraphs"),
        ("a.txt", b"\xff\xfe", r"is not UTF-8 \(byte 0xff at offset 0\)"),
        ("a.jsonl", b'{"text": 1}', r"line 1: text is a number"),
        ("a.jsonl", b'{"words": "x"}', r"line 1 has the keys \['words'\]; a row needs a text, .* or a dialogue"),
        ("a.jsonl", b"{", r"line 1 is no JSON"),
        ("a.parquet", b"x", r"is no Parquet file, or a damaged one"),
        ("a.txt.gz", b"x", r"cannot be read"),
        ("a.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:12] + b"\xff" * 20, r"cannot be read"),
        ("a.pdf", b"x", r"^data_dir .* is no text that can be read; give one .txt"),
    ],
)  # fmt: skip
def test_what_is_no_text_of_ones_own_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        load_corpus("wikitext-2", tmp_path / name)


@pytest.mark.parametrize("name", ["wikitext-2", "WikiText2", "wikitext-2-mini", "wikitext-27", "notes"])
def test_only_a_folder_of_that_name_is_taken_for_wikitext_2(tmp_path, name):
    place = tmp_path / name
    place.mkdir()
    for split in ("train", "valid", "test"):
        (place / f"{split}.txt").write_text("a b c\n")
    assert load_corpus("wikitext-2", place).is_wikitext2 == (name not in ("wikitext-27", "notes"))


def test_the_settings_refuse_the_bpe_that_the_data_refuse():
    """Settings know the number themselves: they are read before torch, which ``bklm.data`` imports."""
    assert config.SMALLEST_BPE == units.SMALLEST_BPE
