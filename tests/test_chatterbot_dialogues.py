"""The folder of real dialogues: each once, split by dialogue, and read by the study as it is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from bklm.data import load_corpus

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("chatterbot_dialogues")


def package(folder: Path) -> Path:
    """A package with 40 dialogues, some of them in both files, a number for a turn, and one that nobody answers."""
    place = folder / "package" / "chatterbot_corpus" / "data" / "english"
    place.mkdir(parents=True)
    many = "".join(f"- - what comes after {i}\n  - {i + 1}\n" for i in range(40))
    (place / "a.yml").write_text(f"categories:\n- a\nconversations:\n{many}")
    (place / "b.yml").write_text("conversations:\n- - what comes after 3\n  - 4\n- - nobody answers\n")
    return folder / "package"


def test_each_dialogue_is_in_one_split_once_and_is_read_as_two_speakers(script, tmp_path):
    dialogues = script.read_dialogues(package(tmp_path))
    assert len(dialogues) == 40
    script.write_splits(dialogues, tmp_path / "real")
    splits = {
        name: [
            json.loads(line)["turns"] for line in (tmp_path / "real" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "valid", "test")
    }
    assert {name: len(own) for name, own in splits.items()} == {"train": 30, "valid": 5, "test": 5}
    assert sorted(turns for own in splits.values() for turns in own) == sorted(dialogues)
    corpus = load_corpus("dailydialog", tmp_path / "real")
    assert corpus.dialogues("valid")[0] == (("user", splits["valid"][0][0]), ("system", splits["valid"][0][1]))


def test_a_folder_without_the_package_is_refused_in_one_sentence(script, tmp_path):
    with pytest.raises(SystemExit, match=r"which holds no chatterbot_corpus/data/english; install it there"):
        script.read_dialogues(tmp_path)
