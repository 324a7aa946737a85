"""Data sets that one version of ``datasets`` wrote and another reads, and dialogues in which tools are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bklm.data import load_corpus
from bklm.data.arrow_rows import ArrowRows, read_parquet, read_saved
from bklm.data.rows import text_of_row

ROOT = Path(__file__).resolve().parent.parent.parent
USER = {"role": "user", "content": "weather"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"city": "Bern"}}}],
}
OTHER_CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "2", "function": {"name": "g", "arguments": {"n": [3]}}}],
}
TOOL = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
IN_PARTS = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "all"}, {"text": "day"}]}
# Content that is now text and now parts takes the type Json; 4.0 cannot write it.
MIXED = [[USER, CALL, TOOL], [USER, OTHER_CALL, IN_PARTS], [USER, CALL, IN_PARTS, USER]]
PLAIN = [[USER, CALL, TOOL], [USER, OTHER_CALL, TOOL], [USER, CALL, TOOL, USER]]
TEXTS = {
    True: ["weather sunny", "weather all day", "weather all day weather"],
    False: ["weather sunny", "weather sunny", "weather sunny weather"],
}

# Runs in either environment: from a file of JSON, which is where the type Json comes from, to a saved data set.
WRITE = """
import sys, datasets
datasets.disable_progress_bars()
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2] + "/cache")
datasets.DatasetDict(train_sft=rows, test_sft=rows).save_to_disk(sys.argv[2] + "/saved")
for split in ("train_sft", "test_sft"):
    rows.to_parquet(f"{sys.argv[2]}/{split}-00000-of-00001.parquet")
print(datasets.__version__)
"""
KNOWS_JSON = "import datasets; print(hasattr(datasets, 'Json'))"
READ = """
import json, sys
from bklm.data import load_corpus
print(json.dumps([list(load_corpus("ultrachat", folder).train) for folder in sys.argv[1:]]))
"""


def other_python():
    """The environment of the suite or that of Colab's versions, whichever does not run this; BKLM_OTHER_PYTHON names one."""
    if named := os.environ.get("BKLM_OTHER_PYTHON"):
        return named
    found = [ROOT / folder / "bin" / "python" for folder in (".venv", ".venv-colab")]
    others = [python for python in found if python.exists() and python.parent.parent != Path(sys.prefix)]
    return str(others[0]) if len(others) == 1 else None


def run(python, code, *words):
    outcome = subprocess.run(
        [python, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    return outcome.stdout.splitlines()[-1]


def write(folder, python):
    """Write dialogues with that Python's ``datasets``; returns its version and the texts that they are."""
    knows = run(python, KNOWS_JSON) == "True"
    source = folder / "rows.jsonl"
    rows = MIXED if knows else PLAIN
    source.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    return run(python, WRITE, source, folder), TEXTS[knows]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with ``saved`` and Parquet files, written by this environment's ``datasets``; its version; the texts."""
    folder = tmp_path_factory.mktemp("written")
    return folder, *write(folder, sys.executable)


def test_dialogues_that_call_tools_are_read_from_saved_and_parquet_and_json_lines(written):
    folder, _, texts = written
    assert list(load_corpus("ultrachat", folder / "saved").train) == texts
    assert list(load_corpus("ultrachat", folder).train) == texts
    many = folder / "many.jsonl"
    many.write_text("\n".join(json.dumps({"messages": row}) for row in 4 * MIXED), encoding="utf-8")
    own = load_corpus("ultrachat", many)
    assert sorted({*own.train, *own.valid, *own.test}) == sorted(TEXTS[True])


def test_the_files_alone_give_what_datasets_gives(written):
    folder, _, texts = written
    files = {"train_sft": [str(folder / "train_sft-00000-of-00001.parquet")]}
    for rows in (read_saved(folder / "saved")["train_sft"], read_parquet(files)["train_sft"]):
        assert isinstance(rows, ArrowRows)
        assert rows.column_names == ["messages"]
        found = rows[:]["messages"]
        assert [text_of_row({"messages": row}, "a row") for row in found] == texts
        assert [rows[i]["messages"] for i in range(len(rows))] == found
        assert rows[-1]["messages"] == found[-1]
        assert rows[2:0:-1]["messages"] == found[2:0:-1]
        assert rows[5:]["messages"] == []
        assert rows.select(range(0, 3, 2))[:]["messages"] == found[::2]
        with pytest.raises(IndexError):
            rows[3]


def test_a_type_that_this_version_does_not_know_is_read_around_or_named(written, monkeypatch, tmp_path):
    import datasets

    folder, _, texts = written

    def refuse(*_, **__):
        raise ValueError("Feature type 'Json' not found. Available feature types: ['Value']")

    monkeypatch.setattr(datasets, "load_from_disk", refuse)
    corpus = load_corpus("ultrachat", folder / "saved")
    assert list(corpus.train) == texts
    assert (list(corpus.valid), list(corpus.test)) == (texts[::2], texts[1::2])
    assert len(load_corpus("ultrachat", folder / "saved", max_documents=2).train) == 2
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train_sft"]}')
    with pytest.raises(
        OSError,
        match=r"newer version of datasets than .* \(Feature type 'Json' is .* -U datasets', or .* to_json",
    ):
        load_corpus("ultrachat", tmp_path)


def test_a_message_without_content_is_refused_unless_it_calls_a_tool(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = {"role": "assistant", "name": "hi"}
    path.write_text("\n".join(json.dumps({"messages": [USER, bad]}) for _ in range(12)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"turn 1 has the keys \['name', 'role'\]; a turn needs a speaker"):
        load_corpus("ultrachat", path)


@pytest.mark.slow
def test_each_version_of_datasets_reads_what_the_other_wrote(written, tmp_path):
    other = other_python()
    if other is None:
        pytest.skip("only one environment: 'bash colab_setup.sh test' makes .venv, '... colab' .venv-colab")
    mine, version_here, texts_here = written
    version_there, texts_there = write(tmp_path, other)
    assert version_here != version_there
    assert json.loads(run(other, READ, mine / "saved", mine)) == [texts_here] * 2
    for folder in (tmp_path / "saved", tmp_path):
        assert list(load_corpus("ultrachat", folder).train) == texts_there
