"""Embedding tables: files that fit and files that do not, the factorised table, and GPT-2's from a stand-in hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_standin import serve_hub
from safetensors.torch import save_file

from bklm.data import embeddings, hub_models
from bklm.data.embeddings import GPT2_STD, embedding_file_shape, load_embedding, random_embedding, svd_embedding

TABLE = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


@pytest.mark.parametrize("name", ["wte.weight", "transformer.wte.weight", "model.embed_tokens.weight"])
def test_the_table_is_found_among_a_models_other_tensors(tmp_path, name):
    path = tmp_path / "model.safetensors"
    save_file({"wpe.weight": torch.zeros(3, 4), name: torch.from_numpy(TABLE)}, path, {"format": "pt"})
    assert embedding_file_shape(path) == (7, 4)
    assert np.array_equal(load_embedding(path, 7, 4), TABLE)


def test_a_half_precision_table_a_lone_tensor_of_any_name_and_a_npy_file_are_read(tmp_path):
    save_file({"anything": torch.from_numpy(TABLE).bfloat16()}, tmp_path / "lone.safetensors")
    assert np.allclose(load_embedding(tmp_path / "lone.safetensors", 7, 4), TABLE, rtol=1e-2)
    np.save(tmp_path / "table.npy", TABLE.astype(np.float64))
    loaded = load_embedding(tmp_path / "table.npy", 7, 4)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, TABLE)


def test_a_table_of_another_vocabulary_or_width_is_refused_saying_which(tmp_path):
    np.save(tmp_path / "t.npy", TABLE)
    with pytest.raises(ValueError, match="has rows for 7 tokens, but the tokeniser has 8"):
        load_embedding(tmp_path / "t.npy", 8, 4)
    with pytest.raises(ValueError, match="has 4 columns, but embed_dim is 5; set embed_dim to 4"):
        load_embedding(tmp_path / "t.npy", 7, 5)


def write(path, content):
    if path.suffix == ".npy":
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is no .safetensors and no .npy file"),
        ("a.safetensors", b"", "cannot be read"),
        ("a.safetensors", b"\xff" * 8, "cannot be read"),
        ("a.safetensors", b'\x10\0\0\0\0\0\0\0{"a": ', "cannot be read"),
        (
            "a.safetensors",
            {"x": torch.zeros(2, 2), "y": torch.zeros(2, 2)},
            "no floating-point tensor 'wte.weight'",
        ),
        ("a.safetensors", {"wte.weight": torch.zeros(7, 4, dtype=torch.int64)}, "it holds wte.weight"),
        ("a.safetensors", {"wte.weight": torch.zeros(28)}, r"an array of shape \(28,\)"),
        ("a.npy", np.full((7, 4), np.nan), "not finite"),
        ("a.npy", np.array([[{}]]), "cannot be read"),  # would need unpickling
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(tmp_path, name, content, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_embedding(write(tmp_path / name, content), 7, 4)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npy.* does not exist"):
        load_embedding(tmp_path / "nowhere.npy", 7, 4)


def two_topics(texts: int = 60) -> list[np.ndarray]:
    """Texts of tokens 0 to 9 or of tokens 10 to 19, never both; token 20 does not occur."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 10, 50) + 10 * (i % 2) for i in range(texts)]


def test_tokens_that_occur_together_get_similar_rows():
    table, absent = svd_embedding(two_topics(), vocab_size=21, dim=4)
    assert absent == 1
    assert table.shape == (21, 4)
    rows = table / np.linalg.norm(table, axis=1, keepdims=True)
    similarity = rows @ rows.T
    same = np.concatenate(
        [similarity[:10, :10][~np.eye(10, dtype=bool)], similarity[10:20, 10:20][~np.eye(10, dtype=bool)]]
    )
    assert same.mean() > similarity[:10, 10:20].mean() + 0.5
    assert table[:20].std() == pytest.approx(GPT2_STD, rel=1e-3)


def test_no_pair_is_counted_across_two_texts():
    """Each text is one token: only a count across texts could give a pair."""
    with pytest.raises(ValueError, match="no two tokens in a row"):
        svd_embedding([np.array([i]) for i in range(9)], 9, 2)


def test_the_factorised_table_is_the_same_each_time_and_its_width_is_bounded_by_the_text():
    first, second = (svd_embedding(two_topics(), 21, 4)[0] for _ in range(2))
    assert np.array_equal(first, second)
    with pytest.raises(ValueError, match=r"embed_dim: got 20, but .* only 20 distinct tokens"):
        svd_embedding(two_topics(), 21, 20)


def test_a_random_table_has_the_scale_asked_for_and_depends_on_the_seed():
    table = random_embedding(500, 40, 0.2, seed=3)
    assert table.std() == pytest.approx(0.2, rel=0.02)
    assert np.array_equal(table, random_embedding(500, 40, 0.2, seed=3))
    assert not np.array_equal(table, random_embedding(500, 40, 0.2, seed=4))


FETCH = """
import json, sys, time
waited, sleep = [], time.sleep
time.sleep = lambda seconds: waited.append(seconds) or sleep(seconds)
import numpy as np
import bklm.data.embeddings as e, bklm.data.hub_models as h, bklm.data.bpe as b
e.GPT2_SHAPE, h.BYTES_AT_ONCE, b.GPT2_SIZE = (7, 4), 50, 259
try:
    answer = {"table": e.gpt2_embedding().tolist(), "ids": b.gpt2_bpe().encode("ab").tolist()}
except OSError as error:
    answer = {"error": type(error).__name__, "says": str(error)}
print(json.dumps(answer | {"waited": sum(waited)}))
"""


@pytest.fixture
def fetch(tmp_path):
    """fetch(endpoint) -> GPT-2's table and BPE or the error, in a process of its own: the hub's library reads
    HF_ENDPOINT when it is imported."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    keep |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    keep |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(endpoint):
        done = subprocess.run(
            [sys.executable, "-c", FETCH],
            env=keep | {"HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def hub_root(tmp_path):
    from tokenizers import pre_tokenizers

    repository = tmp_path / "hub" / "openai-community" / "gpt2"
    repository.mkdir(parents=True)
    tensors = {"wte.weight": torch.from_numpy(TABLE), "h.0.attn.weight": torch.zeros(300, 300)}
    save_file(tensors, repository / "model.safetensors")
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc", "abcd"]
    (repository / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (repository / "merges.txt").write_text("#version: 0.2\na b\nab c\nabc d\n")
    return tmp_path / "hub"


def bytes_served(requests: list[str], file: str) -> int:
    ranges = [r.split("bytes=")[1].split("-") for r in requests if file in r and "bytes=" in r]
    return sum(int(end) - int(begin) + 1 for begin, end in ranges)


def test_only_the_tables_own_bytes_are_asked_for_in_pieces_and_put_together(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(90), "wte.weight": torch.from_numpy(TABLE).bfloat16(), "z": torch.ones(90)}
    save_file(tensors, tmp_path / "model.safetensors")
    content, asked = (tmp_path / "model.safetensors").read_bytes(), []

    def read(url, begin, end, retry=True):
        asked.append((begin, end))
        return content[begin:end]

    monkeypatch.setattr(hub_models, "_range", read)
    monkeypatch.setattr(hub_models, "BYTES_AT_ONCE", 10)
    table = hub_models.fetch_tensor("nobody/nothing", "model.safetensors", "wte.weight", "")
    assert np.array_equal(table, torch.from_numpy(TABLE).bfloat16().float().numpy())
    assert sum(end - begin for begin, end in asked[2:]) == 2 * TABLE.size
    assert len(asked) == 2 + 6  # length, header, 56 bytes in tens
    with pytest.raises(ValueError, match="no floating-point tensor 'b'; it holds a"):
        hub_models.fetch_tensor("nobody/nothing", "model.safetensors", "b", "")


@pytest.mark.slow
def test_gpt2s_table_comes_by_ranged_requests_for_it_alone_and_later_from_the_cache(hub_root, fetch):
    with serve_hub(hub_root) as hub:
        first = fetch(hub.url)
    assert np.array_equal(np.array(first["table"], np.float32), TABLE)
    assert first["ids"] == [256]
    size = (hub_root / "openai-community" / "gpt2" / "model.safetensors").stat().st_size
    assert bytes_served(hub.requests, "model.safetensors") < TABLE.nbytes + 400 < size / 100
    later = fetch(hub.url)  # nobody answers there any more
    assert (later["table"], later["ids"]) == (first["table"], first["ids"])


@pytest.mark.slow
def test_a_hub_that_knows_no_ranges_serves_the_table_too(hub_root, fetch):
    with serve_hub(hub_root, knows_ranges=False) as hub:
        assert np.array_equal(np.array(fetch(hub.url)["table"], np.float32), TABLE)


@pytest.mark.slow
def test_an_unreachable_hub_is_one_quick_sentence_with_the_ways_on(fetch):
    answer = fetch("http://127.0.0.1:9")
    assert answer["error"] == "ConnectionError"
    assert "embedding_file a local copy, or choose embedding 'svd'" in answer["says"]
    assert "\n" not in answer["says"]
    assert answer["waited"] < 5  # seconds between attempts


@pytest.mark.slow
def test_a_repository_without_the_file_and_a_broken_download_are_one_sentence(hub_root, fetch, tmp_path):
    (tmp_path / "empty").mkdir()
    with serve_hub(tmp_path / "empty") as hub:
        assert fetch(hub.url)["error"] == "ConnectionError"
    with serve_hub(hub_root, cut_downloads_at=3) as hub:
        answer = fetch(hub.url)
    assert answer["error"] == "ConnectionError"
    assert "could not be fetched" in answer["says"]


def test_a_factorised_table_is_kept_between_runs_and_another_text_gets_its_own(monkeypatch):
    first = svd_embedding(two_topics(), 21, 4)
    other = svd_embedding(two_topics(40), 21, 4)
    assert not np.array_equal(first[0], other[0])
    monkeypatch.setattr(embeddings, "_factorised", lambda *a: pytest.fail("factorised again"))
    again = svd_embedding(two_topics(), 21, 4)
    assert np.array_equal(again[0], first[0])
    assert again[1] == first[1]
