"""WikiText-2 and UltraChat through the real datasets.load_dataset, against a stand-in of the hub.

Hugging Face's libraries read HF_ENDPOINT when they are imported, so each test loads in a process of its own.
"""

import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys

import pytest
from hub_standin import COMMIT, serve_hub

pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
import pyarrow.parquet as pq  # noqa: E402

from bklm.data import Corpus, beginnings, load_corpus  # noqa: E402
from bklm.data.hub import DATASETS  # noqa: E402

LOAD = """
import json, sys, time
waited, sleep = [], time.sleep
time.sleep = lambda seconds: waited.append(seconds) or sleep(seconds)
from bklm.data import load_corpus
name, limit, words = json.loads(sys.argv[1])
try:
    corpus = load_corpus(name, max_documents=limit, max_tokens=words)
    answer = {key: list(getattr(corpus, key)) for key in ("train", "valid", "test")}
    answer |= {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256}
    answer["documents"] = list(corpus.documents("train"))
except OSError as error:
    answer = {"error": type(error).__name__, "says": str(error)}
print(json.dumps(answer | {"waited": sum(waited)}))
"""
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}
WIKITEXT = {
    split: ["", f" = {split} article = \n", "", f" the {split} text <unk> . \n"] for split in SPLIT_NAMES
}


def card(**configurations):
    """A repository's README.md with its configurations: name -> {split: pattern}."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configurations.items()
    ]
    return f"---\nconfigs: {json.dumps(listed)}\n---\n"  # JSON is YAML


@pytest.fixture
def hub_root(tmp_path):
    """The two repositories as they are laid out on the hub, with the configurations and splits we do not read."""
    wikitext = tmp_path / "hub" / "Salesforce" / "wikitext"
    configurations = {}
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (wikitext / name).mkdir(parents=True)
        configurations[name] = {hub: f"{name}/{hub}-*" for hub in SPLIT_NAMES.values()}
        for split, hub in SPLIT_NAMES.items():
            rows = (
                WIKITEXT[split] if name == "wikitext-2-raw-v1" else [f" {split} line {i} \n" for i in range(9)]
            )
            pq.write_table(pa.table({"text": rows}), wikitext / name / f"{hub}-00000-of-00001.parquet")
    (wikitext / "README.md").write_text(card(**configurations))

    ultrachat = tmp_path / "hub" / "HuggingFaceH4" / "ultrachat_200k"
    (ultrachat / "data").mkdir(parents=True)
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    for split in splits:
        messages = [
            [{"content": f"{split} {i}\nask", "role": "user"}, {"content": "answer", "role": "assistant"}]
            for i in range(6)
        ]
        table = pa.table({"prompt": ["p"] * 6, "messages": messages})
        pq.write_table(table, ultrachat / "data" / f"{split}-00000-of-00001-a3ecf92756993583.parquet")
    daily = tmp_path / "hub" / "OpenRL" / "daily_dialog" / "data"
    daily.mkdir(parents=True)
    for hub in SPLIT_NAMES.values():
        turns = [[f" {hub} question {i} ", f" answer {i} "] for i in range(4)]
        table = pa.table({"dialog": turns, "act": [[1, 2]] * 4})
        pq.write_table(table, daily / f"{hub}-00000-of-00001.parquet")
    described = card(default={hub: f"data/{hub}-*" for hub in SPLIT_NAMES.values()})
    (daily.parent / "README.md").write_text(described)
    (ultrachat / "README.md").write_text(card(default={split: f"data/{split}-*" for split in splits}))
    c4 = tmp_path / "hub" / "allenai" / "c4"
    (c4 / "en").mkdir(parents=True)
    for hub in ("train", "validation"):
        with gzip.open(c4 / "en" / f"c4-{hub}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{hub} page {i}\nof two lines"}) + "\n" for i in range(50))
    (c4 / "README.md").write_text(card(en={hub: f"en/c4-{hub}.*.json.gz" for hub in ("train", "validation")}))
    return tmp_path / "hub"


@pytest.fixture
def load(tmp_path):
    """load(endpoint, name, limit, words) -> what the corpus holds or the error, in a fresh process away from our caches."""
    (tmp_path / "work").mkdir()
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    keep |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    keep |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(endpoint, name="wikitext-2", limit=None, words=None, cwd=tmp_path / "work", **environment):
        command = [sys.executable, "-c", LOAD, json.dumps([name, limit, words])]
        done = subprocess.run(
            command,
            env=keep | {"HF_ENDPOINT": endpoint} | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_wikitext_2_comes_from_the_hub_and_later_from_its_cache(hub_root, load):
    with serve_hub(hub_root) as hub:
        first = load(hub.url)
    assert first["train"] == ["", " = train article = ", "", " the train text <unk> . "]
    assert (first["name"], first["documents"]) == (
        "wikitext-2",
        [" = train article = \n\n the train text <unk> . "],
    )
    assert first["source"] == "Hugging Face Salesforce/wikitext, wikitext-2-raw-v1, revision 0123456789ab"
    assert first["sha256"] == Corpus("text", "made here", **WIKITEXT).sha256
    assert any("resolve" in request and "wikitext-2-raw-v1/train-" in request for request in hub.requests)
    assert not any("wikitext-103-raw-v1/" in request for request in hub.requests)

    second = load(hub.url)  # nobody answers there any more
    assert second["source"] == "Hugging Face Salesforce/wikitext, wikitext-2-raw-v1, from the local cache"
    assert second["sha256"] == first["sha256"]


@pytest.mark.slow
def test_an_unreachable_hub_is_one_quick_sentence_with_the_three_ways_on(load):
    answer = load("http://127.0.0.1:9")
    assert answer["error"] == "ConnectionError"
    assert answer["says"].startswith(
        'corpus "wikitext-2" (Salesforce/wikitext, wikitext-2-raw-v1) could not be fetched'
    )
    for way in ("the network", "data_dir (or BKLM_DATA_DIR)", 'dataset "embedded"'):
        assert way in answer["says"]
    assert "\n" not in answer["says"]
    assert answer["waited"] < 5  # seconds between attempts; datasets by itself waits for 23


@pytest.mark.slow
def test_ultrachat_is_streamed_when_limited_and_fetched_without_its_other_splits(hub_root, load):
    with serve_hub(hub_root) as hub:
        few = load(hub.url, "ultrachat", 2)
        whole = load(hub.url, "ultrachat")
    assert few["train"] == whole["train"][:2] == [f"train_sft {i}\nask answer" for i in range(2)]
    assert whole["documents"] == whole["train"]
    assert len(whole["train"]) == 6
    for split, limited, kept in (("valid", [0, 2], [0, 2, 4]), ("test", [1, 3], [1, 3, 5])):
        assert few[split] == [f"test_sft {i}\nask answer" for i in limited]
        assert whole[split] == [f"test_sft {i}\nask answer" for i in kept]
    assert not any("_gen-" in request for request in hub.requests)


@pytest.mark.slow
def test_of_wikitext_103_and_c4_the_first_words_are_streamed_by_their_exact_revision(hub_root, load):
    with serve_hub(hub_root) as hub:
        few, whole = load(hub.url, "wikitext-103", words=7), load(hub.url, "wikitext-103")
        pages = load(hub.url, "c4", words=13)
    assert few["train"] == [f" train line {i} " for i in range(3)] == whole["train"][:3]
    assert few["valid"] == whole["valid"] == [f" valid line {i} " for i in range(9)]
    assert "revision b08601e04326, the first 7 words" in few["source"]
    assert pages["train"] == pages["documents"] == [f"train page {i} of two lines" for i in range(3)]
    assert pages["valid"][0] == "validation page 0 of two lines"
    for revision in ("b08601e04326c79dfdd32d625aee71d232d685c3", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"):
        assert any(f"/revision/{revision}" in request for request in hub.requests)
    answer = load("http://127.0.0.1:9", "wikitext-103", words=7)
    assert answer["says"].startswith(
        'corpus "wikitext-103" (Salesforce/wikitext, wikitext-103-raw-v1) could not be fetched'
    )


def test_a_stream_is_read_to_the_words_that_are_asked_for_and_held_out_parts_follow_each_other(monkeypatch):
    opened = []

    def stream(repository, configuration, *, split, streaming, revision):
        opened.append((repository, configuration, split, revision))
        assert streaming
        return ({"text": f"{split} {i}\nx"} for i in itertools.count())

    monkeypatch.setattr("datasets.load_dataset", stream)
    monkeypatch.setattr(beginnings, "HELD_OUT", 6)
    corpus = beginnings.corpus_of_beginnings("c4", DATASETS["c4"], 4)
    assert corpus.train == ["train 0 x", "train 1 x"]
    assert corpus.valid == ["validation 0 x", "validation 1 x"]
    assert corpus.test == ["validation 2 x", "validation 3 x"]
    assert [split for _, _, split, _ in opened] == ["train", "validation"]
    assert corpus.line_is_document


def test_c4_without_a_number_of_words_is_refused_before_anything_is_fetched():
    with pytest.raises(ValueError, match="156 thousand million words: say how many to read"):
        load_corpus("c4")


@pytest.mark.slow
def test_dailydialog_comes_as_parquet_with_its_revision(hub_root, load):
    with serve_hub(hub_root) as hub:
        whole = load(hub.url, "dailydialog")
        few = load(hub.url, "dailydialog", 2)
    assert whole["source"] == "Hugging Face OpenRL/daily_dialog, revision 0123456789ab"
    # What the hub named once is what is read, whatever comes meanwhile.
    fetched = [request for request in hub.requests if "/resolve/" in request and ".parquet" in request]
    assert fetched
    assert all(f"/resolve/{COMMIT}/" in request for request in fetched)
    assert [text.split() for text in whole["valid"]] == [
        ["validation", "question", str(i), "answer", str(i)] for i in range(4)
    ]
    assert few["train"] == whole["train"][:2]


@pytest.mark.slow
def test_a_hub_that_does_not_have_the_data_set_is_one_sentence(tmp_path, load):
    (tmp_path / "empty").mkdir()
    with serve_hub(tmp_path / "empty") as hub:
        answer = load(hub.url)
    assert answer["error"] == "ConnectionError"
    assert "three ways on" in answer["says"]


@pytest.mark.slow
def test_a_hub_that_takes_the_call_and_never_answers_is_given_up(load):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = load(f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.setblocking(False)
        calls = 0
        with contextlib.suppress(BlockingIOError):
            while silent.accept():
                calls += 1
    assert answer["error"] == "ConnectionError"
    assert "three ways on" in answer["says"]
    assert calls == 1  # the one with a deadline; none of the libraries' own, which would be repeated


@pytest.mark.slow
def test_a_download_that_breaks_off_is_one_sentence_and_never_half_a_corpus(hub_root, load):
    with serve_hub(hub_root, cut_downloads_at=400) as hub:
        answer = load(hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert answer["error"] == "ConnectionError"
    assert "three ways on" in answer["says"]
    with serve_hub(hub_root) as hub:  # the network is back: the half that was fetched does no harm
        assert load(hub.url)["sha256"] == Corpus("text", "made here", **WIKITEXT).sha256


@pytest.mark.slow
def test_a_hub_that_is_busy_for_a_moment_is_waited_for(hub_root, load):
    with serve_hub(hub_root, busy=1) as hub:
        answer = load(hub.url)
    assert answer["sha256"] == Corpus("text", "made here", **WIKITEXT).sha256
    assert answer["source"] == "Hugging Face Salesforce/wikitext, wikitext-2-raw-v1, revision unknown"


@pytest.mark.slow
def test_offline_mode_is_heeded(load):
    answer = load("https://huggingface.co", HF_HUB_OFFLINE="1")
    assert (answer["error"], "three ways on" in answer["says"]) == ("ConnectionError", True)


@pytest.mark.slow
def test_a_local_folder_with_the_repository_s_name_is_not_taken_for_it(hub_root, load):
    with serve_hub(hub_root) as hub:
        answer = load(hub.url, cwd=hub_root)
    assert answer["error"] == "OSError"
    assert answer["says"].startswith("the folder 'Salesforce/wikitext' in the current directory")
