"""Whatever the text, there is a corpus with loaders or one sentence: never a hang, never another kind of error."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bklm.data import IGNORED, Corpus, KneserNey, get_wikitext2_dataloaders, load_corpus, tokenize_corpus

ANY_CHARACTER = st.characters() | st.sampled_from("\0\n\r\t\x0b\x0c\x1c\x1f\x85\u2028\ufeff\U0001f600= ")
ANY_LINE = st.text(ANY_CHARACTER, max_size=50) | st.sampled_from(
    [" = A = ", " = = B = = ", "<unk>", "<pad>", ""]
)


@settings(deadline=None)
@given(st.lists(ANY_LINE, max_size=8), st.lists(ANY_LINE, max_size=8), st.integers(3, 20))
def test_any_lines_give_tokens_or_one_sentence(train, valid, limit):
    corpus = Corpus("fuzz", "hypothesis", train, valid, valid)
    assert len(corpus.sha256) == 64
    assert " ".join(corpus.documents("valid")).split() == " ".join(valid).split()
    try:
        tokens = tokenize_corpus(corpus, limit)
    except ValueError as error:
        assert "surrogate" in str(error) or "no word besides" in str(error)  # noqa: PT017
        return
    assert tokens.vocab_size <= limit
    assert len(tokens.valid) == len(" ".join(valid).split())
    assert not (tokens.valid == tokens.pad_id).any()
    if len(tokens.valid) > 1 and len(tokens.train) > 1:
        log_probs = KneserNey(2).fit(tokens.train, tokens.vocab_size).log_probs(tokens.valid)
        assert (log_probs < 0).all()
        assert np.isfinite(log_probs).all()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80)
    | st.text(ANY_CHARACTER, max_size=80).map(lambda text: text.encode("utf-8", "replace")),
    st.integers(-1, 40),
    st.integers(-1, 40),
)
def test_any_file_gives_loaders_or_one_sentence(tmp_path, data, batch_size, seq_len):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes(data)
    try:
        loaders = get_wikitext2_dataloaders(batch_size, seq_len, data_dir=tmp_path)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    words = len(data.decode().removeprefix("\ufeff").split())
    assert [sum(int((y != IGNORED).sum()) for _, y in loader) for loader in loaders[:2]] == [words - 1] * 2


@pytest.mark.parametrize("word", ["= ", "word ", "x"])
def test_a_line_of_ten_megabytes_is_only_a_long_line(word, tmp_path):
    line = word * (10_000_000 // len(word))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(line if split == "train" else f"{word} again")
    corpus = load_corpus("wikitext-2", tmp_path)
    assert corpus.documents("train") == [line]
    assert len(tokenize_corpus(corpus).train) == len(line.split())
