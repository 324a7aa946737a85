"""Byte-level BPE: a trained one, and GPT-2's layout of files."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.data.bpe import Bpe, gpt2_bpe, train_bpe

TEXTS = [
    "the cat sat on the mat and the rat sat on the cat",
    "a <unk> cat sees the <unk> mat",
    "that hat is flat",
]


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    return train_bpe(TEXTS, 280)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_whole(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert ids.size == 0 or ids.max() < len(bpe)


def test_merges_make_common_words_shorter_than_their_bytes(bpe):
    assert len(bpe.encode("the cat")) < len("the cat") / 1.5


def test_a_literal_unk_is_one_token_and_never_merged_with_its_neighbours(bpe):
    ids = bpe.encode("a <unk> cat<unk>").tolist()
    assert ids.count(bpe.unk_id) == 2
    assert bpe.unk_id == 0
    assert bpe.decode(ids) == "a <unk> cat<unk>"


def test_documents_are_cut_at_the_number_of_tokens_asked_for_and_keep_their_order(bpe):
    whole = bpe.encode_documents(TEXTS * 200)
    assert len(whole) == 600
    assert np.array_equal(whole[599], bpe.encode(TEXTS[2]))
    assert [len(d) for d in bpe.encode_documents(TEXTS, 4)] == [4, 4, 4]
    assert np.array_equal(bpe.encode_documents(TEXTS, 4)[1], whole[1][:4])


def test_a_vocabulary_of_up_to_65536_takes_two_bytes_a_token(bpe):
    assert bpe.encode("cat").dtype == np.uint16


def test_the_same_text_gives_the_same_bpe_in_another_process(bpe):
    code = (
        f"from bklm.data.bpe import train_bpe; print(train_bpe({TEXTS!r}, 280).sha256)"  # its hash seed differs
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.sha256


@pytest.mark.parametrize("size", [257, 0, -1, 3.5, True])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=r"vocab_size is .* whole number from 258"):
        train_bpe(TEXTS, size)


def test_texts_without_a_repeated_pair_are_refused():
    with pytest.raises(ValueError, match="no pair of characters twice"):
        train_bpe(["", "<unk>"], 300)


def write_gpt2_layout(folder, bpe: Bpe):
    bpe.tokenizer.model.save(str(folder))
    return folder


def test_a_folder_with_another_bpe_than_gpt2s_is_refused_with_both_sizes(bpe, tmp_path):
    write_gpt2_layout(tmp_path, bpe)
    with pytest.raises(ValueError, match=rf"hold {len(bpe)} tokens, but GPT-2 has 50,257"):
        gpt2_bpe(tmp_path)


def test_gpt2s_layout_is_read_as_gpt2_reads_it(tmp_path, monkeypatch):
    """Ids are those of vocab.json; a space belongs to the word after it; merges apply in order."""
    import bklm.data.bpe as module

    alphabet = sorted(module.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "Ġa", "ab", "Ġab"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\na b\nĠa b\n")
    monkeypatch.setattr(module, "GPT2_SIZE", len(words))
    bpe = gpt2_bpe(tmp_path)
    assert [words[i] for i in bpe.encode("ab ab a!")] == ["ab", "Ġab", "Ġa", "!"]
    assert bpe.unk_id is None
    assert bpe.decode(bpe.encode("<unk>")) == "<unk>"


def test_missing_and_damaged_files_are_one_sentence_each(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks vocab.json and merges.txt; give a folder"):
        gpt2_bpe(tmp_path)
    write_gpt2_layout(tmp_path, bpe)
    (tmp_path / "vocab.json").write_text('{"a": 0, ')
    with pytest.raises(ValueError, match="are no BPE that can be read"):
        gpt2_bpe(tmp_path)
