import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bklm.data import SPLITS, Corpus, load_corpus
from bklm.data.corpus import MADE_HERE, is_title
from bklm.harness.config import WITHOUT_FOLDER

LINE = st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize(
    "line", [" = Title = ", "= Title =", " = a = b = ", " = <unk> = ", " = É 1 = \t".rstrip() + " "]
)
def test_level_1_headings_are_titles(line):
    assert is_title(line)


@pytest.mark.parametrize(
    "line",
    [
        " = = Part = = ",
        " = = = Deep = = = ",
        "",
        " ",
        "=",
        "= =",
        "== a ==",
        "x = y",
        " = open",
        "a = b =",
        "=a=",
    ],
)
def test_sections_and_text_are_not_titles(line):
    assert not is_title(line)


def test_documents_are_cut_at_titles_only():
    lines = ["", " = A = ", " text ", " = = Part = = ", " more ", " = B = ", " end "]
    corpus = Corpus("c", "made", lines, ["no heading", "at all"], [" before ", " = C = "])
    assert corpus.documents("train") == [" = A = \n text \n = = Part = = \n more ", " = B = \n end "]
    assert corpus.documents("valid") == ["no heading\nat all"]
    assert corpus.documents("test") == [" before ", " = C = "]


@given(st.lists(st.one_of(LINE, st.sampled_from([" = T = ", " = = S = = ", " "])), max_size=20))
def test_documents_lose_no_words(lines):
    corpus = Corpus("c", "made", lines, lines, lines)
    assert " ".join(corpus.documents("train")).split() == " ".join(lines).split()


def test_hash_is_that_of_the_stripped_lines_and_tells_splits_apart():
    expected = hashlib.sha256(b"\0train\0a b\nc\n\0valid\0d\n\0test\0e\n").hexdigest()
    assert Corpus("x", "here", [" a b ", "", "c"], ["d"], ["e"]).sha256 == expected
    assert Corpus("y", "there", ["a b", "c\n"], ["d "], ["e", " "]).sha256 == expected
    assert Corpus("x", "here", ["a b", "c", "d"], [], ["e"]).sha256 != expected
    assert Corpus("x", "here", ["a b", "d"], ["c"], ["e"]).sha256 != expected


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(
        ValueError,
        match="'wikitext-3' is unknown; choose one of 'wikitext-2', 'wikitext-103', 'c4', 'dailydialog', 'ultrachat', "
        "'embedded', 'hmm', 'grammar'",
    ):
        load_corpus("wikitext-3")
    with pytest.raises(ValueError, match="split 'dev' is unknown; a corpus has train, valid, test"):
        Corpus("c", "made", ["a"], ["b"], ["c"]).documents("dev")


@pytest.mark.parametrize("name", MADE_HERE)
def test_made_corpora_refuse_a_folder_but_ignore_the_environment(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="reads no folder"):
        load_corpus(name, tmp_path)
    monkeypatch.setenv("BKLM_DATA_DIR", str(tmp_path / "missing"))
    assert load_corpus(name).name == name


def test_the_settings_know_the_same_corpora_without_a_folder():
    """Settings hold them themselves: they are read before torch, which ``bklm.data`` imports."""
    assert WITHOUT_FOLDER == MADE_HERE


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "many"])
def test_document_limits_must_be_whole_and_positive(limit):
    with pytest.raises(ValueError, match=r"max_documents is .*; give a whole number from 1, or None for all"):
        load_corpus("ultrachat", max_documents=limit)


def test_only_a_corpus_of_known_law_has_an_entropy_floor(text_folder):
    corpus = load_corpus("wikitext-2", text_folder)
    assert [corpus.entropy_floor(split) for split in SPLITS] == [None] * 3
