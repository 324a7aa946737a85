import platform
from pydoc_data.topics import topics

from bklm.data import SPLITS, load_corpus
from bklm.data.corpus import is_title
from bklm.data.embedded import distinct_paragraphs, split_topics

PAGE = """The "with" statement
********************

The "with" statement is used to wrap
the execution of a block (see *Context
Managers*).  **New in 3.1.**

   with_stmt ::= "with" expression

Usage
=====

It isn't hard...
"""


def titles(lines):
    return [line.strip(" =") for line in lines if is_title(line)]


def test_every_topic_is_one_document_in_one_split():
    corpus = load_corpus("embedded")
    found = [title for split in SPLITS for title in titles(corpus.split(split))]
    assert len(found) == len(set(found))
    assert set(found) <= set(topics)
    assert len(found) > 0.9 * len(topics)  # a topic that only repeats others is left out
    for split in SPLITS:
        assert len(corpus.documents(split)) == len(titles(corpus.split(split)))


def test_splits_share_no_paragraph():
    corpus = load_corpus("embedded")
    lines = [line for split in SPLITS for line in corpus.split(split)]
    assert len(lines) == len(set(lines))


def test_words_are_split_80_10_10():
    corpus = load_corpus("embedded")
    words = {split: len(" ".join(corpus.split(split)).split()) for split in SPLITS}
    total = sum(words.values())
    assert total > 40_000
    assert abs(words["train"] / total - 0.8) < 0.03
    assert abs(words["valid"] / total - 0.1) < 0.03
    assert abs(words["test"] / total - 0.1) < 0.03


def test_the_source_names_the_python_that_the_text_came_with():
    assert load_corpus("embedded").source == f"pydoc_data.topics of Python {platform.python_version()}"


def test_a_page_becomes_one_tokenised_line_a_paragraph():
    assert distinct_paragraphs({"with": PAGE}) == {
        "with": [
            ' = = The " with " statement = = ',
            ' The " with " statement is used to wrap the execution of a block ( see Context Managers ) . New in 3 . 1 . ',
            ' with_stmt : : = " with " expression ',
            " = = Usage = = ",
            " It isn't hard ... ",
        ]
    }


def test_a_paragraph_stays_in_the_shortest_topic_that_has_it():
    long, short = "Only here.\n\nShared words.\n\nAlso only here.", "Shared words."
    assert distinct_paragraphs({"a": long, "b": short}) == {
        "a": [" Only here . ", " Also only here . "],
        "b": [" Shared words . "],
    }
    assert list(distinct_paragraphs({"whole": "Shared words.  ", "part": short})) == ["part"]


def test_topics_go_longest_first_to_the_split_furthest_below_its_share():
    bodies = {f"t{size}": ["w " * size] for size in (50, 20, 10, 8, 5, 4, 2, 1)}
    split = split_topics(bodies)
    assert {name: list(chosen) for name, chosen in split.items()} == {
        "train": ["t50", "t8", "t5", "t4", "t2", "t1"],
        "valid": ["t20"],
        "test": ["t10"],
    }
