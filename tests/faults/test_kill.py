"""Killed with signal 9 at any line of a write: what was there before is there, or what was written, whole."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
from killing import every_kill

from bklm.files import atomic
from bklm.files.atomic import remove_leftovers, write_json
from bklm.harness import report as reporting
from bklm.training import checkpoints
from bklm.training.checkpoints import CheckpointFolder


def weights(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_a_json_file_holds_its_old_content_or_the_new_whenever_its_writer_is_killed(tmp_path):
    path, seen = tmp_path / "result.json", set()
    write_json(path, {"run": "old"})
    for _ in every_kill(lambda: write_json(path, {"run": "new", "more": [0.1] * 99}), atomic, step=2):
        seen.add(json.loads(path.read_text())["run"])
        write_json(path, {"run": "old"})
    assert seen == {"old", "new"}
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_checkpoint_is_the_old_or_the_new_one_whole_whenever_its_writer_is_killed(tmp_path):
    seen = set()

    def write_the_second():
        CheckpointFolder(tmp_path / "c").save(2, weights(2.0), {"epoch": 2})

    CheckpointFolder(tmp_path / "c").save(1, weights(1.0), {"epoch": 1})
    for _ in every_kill(write_the_second, checkpoints, step=4):
        model = weights(0.0)
        folder, state = CheckpointFolder(tmp_path / "c").restore(model)
        assert folder.name == f"epoch_{state['epoch']:04d}"
        assert torch.equal(model.weight, weights(state["epoch"]).weight)
        assert not list((tmp_path / "c").glob("*damaged*"))
        assert not list((tmp_path / "c").glob(".*"))
        seen.add(state["epoch"])
        shutil.rmtree(tmp_path / "c")
        CheckpointFolder(tmp_path / "c").save(1, weights(1.0), {"epoch": 1})
    assert seen == {1, 2}


@pytest.mark.slow
def test_a_checkpoint_written_again_for_the_same_epoch_is_never_lost_with_the_one_before(tmp_path):
    def write_again():
        CheckpointFolder(tmp_path / "c", keep=2).save(2, weights(3.0), {"epoch": 2})

    for epoch in (1, 2):
        CheckpointFolder(tmp_path / "c", keep=2).save(epoch, weights(epoch), {"epoch": epoch})
    for _ in every_kill(write_again, checkpoints, step=3):
        model = weights(0.0)
        _, state = CheckpointFolder(tmp_path / "c", keep=2).restore(model)
        assert torch.equal(model.weight, weights(state["epoch"]).weight) or state["epoch"] == 2
        for epoch in (1, 2):
            CheckpointFolder(tmp_path / "c", keep=2).save(epoch, weights(epoch), {"epoch": epoch})


@pytest.mark.slow
def test_the_zip_is_the_old_one_or_the_new_whenever_its_writer_is_killed(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "a.csv").write_text("old")
    reporting.zip_study(folder)
    old = (tmp_path / "study.zip").read_bytes()
    (folder / "a.csv").write_text("new " * 1000)
    seen = set()
    for _ in every_kill(lambda: reporting.zip_study(folder), checkpoints, reporting, zipfile, step=5):
        with zipfile.ZipFile(tmp_path / "study.zip") as archive:
            assert archive.testzip() is None
            seen.add(archive.read("study/a.csv")[:3])
        (tmp_path / "study.zip").write_bytes(old)
    assert seen == {b"old", b"new"}
    remove_leftovers(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study", "study.zip"]
    assert (folder / "a.csv").read_text().startswith("new")


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "study"
    (folder / "trials").mkdir(parents=True)
    keep = [folder / ".lock", folder / "a.half", folder / "trials" / "result.json", tmp_path / ".other.zip.x"]
    for path in keep:
        path.touch()
    for name in (".result.json.abc.half.json", "trials/.result.json.abc.half.json"):
        (folder / name).touch()
    (tmp_path / ".study.zip.abc.half.zip").touch()
    remove_leftovers(folder)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(keep)
