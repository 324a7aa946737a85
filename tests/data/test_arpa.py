"""ARPA files, read by the format's own rule: the longest n-gram that is there, times the backoffs of those that are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.data import KneserNey
from bklm.data.arpa import write_arpa

WORDS = ["<unk>", "a", "ü", "b", "never"]
TEXTS = st.lists(st.integers(0, len(WORDS) - 2), min_size=5, max_size=40)


def read(path):
    """{n-gram: (log10 P, log10 backoff)} of an ARPA file, with its counts checked."""
    sections = path.read_text(encoding="utf-8").split("\n\n")
    assert sections[0].startswith("\\data\\\n")
    assert sections[-1] == "\\end\\\n"
    found = {}
    for order, (count, section) in enumerate(zip(sections[0].splitlines()[1:], sections[1:-1], strict=True), 1):
        head, *lines = section.splitlines()
        assert head == f"\\{order}-grams:"
        assert count == f"ngram {order}={len(lines)}"
        for line in lines:
            log_p, gram, *backoff = line.split("\t")
            words = tuple(gram.split(" "))
            assert len(words) == order
            assert words[:-1] == () or words[:-1] in found
            found[words] = float(log_p), float(backoff[0]) if backoff else 0.0
    return found


def log_p(entries, history, word):
    if (gram := (*history, word)) in entries:
        return entries[gram][0]
    return entries.get(history, (0.0, 0.0))[1] + log_p(entries, history[1:], word)


@settings(deadline=None, max_examples=40)
@given(TEXTS, TEXTS, st.integers(1, 4), st.sampled_from([0.1, 0.75, 1.0]))
def test_a_reader_of_the_file_gives_the_models_probabilities(tmp_path_factory, train, text, order, discount):
    model = KneserNey(order, discount).fit(np.array(train), len(WORDS))
    entries = read(write_arpa(model, WORDS, tmp_path_factory.mktemp("arpa") / "model.arpa"))
    spoken = [WORDS[i] for i in text]
    got = [log_p(entries, tuple(spoken[max(0, i - order + 1) : i]), spoken[i]) for i in range(1, len(text))]
    np.testing.assert_allclose(np.array(got) * np.log(10), model.log_probs(np.array(text)), atol=1e-5)


def test_modified_discounts_are_written_too(tmp_path):
    words = [f"w{i}" for i in range(200)]
    text = np.random.default_rng(0).zipf(1.3, 3000) % len(words)
    model = KneserNey(3, "modified").fit(text, len(words))
    entries = read(write_arpa(model, words, tmp_path / "model.arpa"))
    for history in (text[5:7], text[7:9], [150, 199]):
        given = tuple(words[i] for i in history)
        law = [10 ** log_p(entries, given, word) for word in words]
        np.testing.assert_allclose(law, model.distribution(history), rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (WORDS[:-1], "got 4 words; this model has 5 ids"),
        ([*WORDS[:-1], "a"], "two of the words are the same"),
        ([*WORDS[:-1], "a b"], "'a b' has white space"),
        ([*WORDS[:-1], "</s>"], "'</s>' has white space, is empty, or is one of <s> </s>"),
        ([*WORDS[:-1], ""], "'' has white space, is empty"),
    ],
)
def test_words_that_the_format_cannot_hold_are_one_sentence(words, sentence, tmp_path):
    model = KneserNey(2, 0.75).fit(np.array([0, 1, 2, 1, 3]), len(WORDS))
    with pytest.raises(ValueError, match=sentence):
        write_arpa(model, words, tmp_path / "model.arpa")
    with pytest.raises(ValueError, match="has not been fitted"):
        write_arpa(KneserNey(2), WORDS, tmp_path / "model.arpa")


def test_a_write_that_breaks_off_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "model.arpa"
    model = KneserNey(2, 0.75).fit(np.array([0, 1, 2, 1, 3]), len(WORDS))
    before = write_arpa(model, WORDS, path).read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_arpa(model, [*WORDS[:-1], "\ud800"], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
