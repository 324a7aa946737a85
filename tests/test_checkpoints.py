"""Checkpoints and files that survive a kill."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch
from safetensors.torch import save_model

from bklm.files.atomic import ReadError, replacing, write_json
from bklm.training import checkpoints
from bklm.training.checkpoints import CheckpointFolder, is_checkpoint, perplexity_of, read_weights
from bklm.training.weights import OtherModelError


def test_an_error_while_writing_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_json_without_a_word_for_nan_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'


def test_a_checkpoint_comes_back_as_it_was_and_only_the_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    model = torch.nn.Linear(3, 2)
    for epoch in (1, 2, 3):
        torch.nn.init.constant_(model.weight, epoch)
        folder.save(epoch, model, {"epoch": epoch, "moment": torch.ones(2)})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["epoch_0002", "epoch_0003"]
    fresh = torch.nn.Linear(3, 2)
    _, state = folder.restore(fresh)
    assert state["epoch"] == 3
    assert torch.equal(fresh.weight, torch.full((2, 3), 3.0))
    assert torch.equal(state["moment"], torch.ones(2))


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_set_aside_reported_and_the_one_before_is_used(tmp_path, caplog, file, damage):
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    model = torch.nn.Linear(3, 2)
    folder.save(1, model, {"epoch": 1})
    newest = folder.save(2, model, {"epoch": 2})
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"\x00" * 500, "empty": b""}[damage]
    )
    _, state = folder.restore(model)
    assert state["epoch"] == 1
    assert (tmp_path / "c" / "epoch_0002.damaged-1").exists()
    assert "set aside as epoch_0002.damaged-1" in caplog.text


def short_of_memory(*arguments, **options):
    raise MemoryError


def torch_short_of_memory(*arguments, **options):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    )


def failing_disk(*arguments, **options):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def locked(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("place", "name", "fault", "reason"),
    [
        (torch, "load", short_of_memory, "out of memory"),
        (torch, "load", torch_short_of_memory, "can't allocate memory"),
        (checkpoints, "_crc32", failing_disk, "Input/output error"),
        (checkpoints, "_crc32", locked, "Permission denied"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_a_damaged_one(
    tmp_path, monkeypatch, place, name, fault, reason
):
    folder = CheckpointFolder(tmp_path / "c")
    folder.save(1, torch.nn.Linear(3, 2), {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fault)
        with pytest.raises(ReadError, match=rf"^cannot read .*epoch_0001 \(.*{reason}") as caught:
            folder.newest()
    assert "\n" not in str(caught.value)
    assert folder.newest().name == "epoch_0001"


@pytest.mark.parametrize("fault", [short_of_memory, failing_disk, locked])
def test_weights_that_cannot_be_read_just_now_are_not_set_aside(tmp_path, monkeypatch, fault):
    weights = tmp_path / "w.safetensors"
    with replacing(weights) as temporary:
        save_model(torch.nn.Linear(3, 2), str(temporary))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "load_file", fault)
        with pytest.raises(ReadError, match=r"^cannot read .*w\.safetensors"):
            read_weights(weights)
    assert read_weights(weights).keys() == {"weight", "bias"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_what_is_written_is_as_open_to_others_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        CheckpointFolder(tmp_path / "c").save(1, torch.nn.Linear(3, 2), {"epoch": 1})
        with replacing(tmp_path / "w.safetensors") as temporary:
            save_model(torch.nn.Linear(3, 2), str(temporary))
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    plain = {True: (tmp_path / "folder").stat().st_mode, False: (tmp_path / "file").stat().st_mode}
    found = list(tmp_path.rglob("*"))
    assert len(found) == 9
    assert [p.name for p in found if p.stat().st_mode != plain[p.is_dir()]] == []


def test_a_pickle_in_the_place_of_a_state_is_never_executed(tmp_path):
    import pickle

    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = CheckpointFolder(tmp_path / "c")
    model = torch.nn.Linear(1, 1)
    place = folder.save(1, model, {"epoch": 1})
    (place / "state.pt").write_bytes(pickle.dumps(Evil()))
    assert folder.restore(model) is None
    assert not marker.exists()


def test_the_weights_of_another_model_are_an_error_and_not_called_damage(tmp_path):
    folder = CheckpointFolder(tmp_path / "c")
    folder.save(1, torch.nn.Linear(3, 2), {"epoch": 1})
    with pytest.raises(OtherModelError, match=r"weight is \(2, 3\) there and \(2, 4\) in this Linear"):
        folder.restore(torch.nn.Linear(4, 2))
    assert (tmp_path / "c" / "epoch_0001").exists()


def test_leftovers_of_a_killed_write_are_removed_and_not_mistaken_for_a_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "c")
    folder.save(1, torch.nn.Linear(1, 1), {"epoch": 1})
    (tmp_path / "c" / ".epoch_0002.half").mkdir()
    assert folder.restore(torch.nn.Linear(1, 1))[1]["epoch"] == 1
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["epoch_0001"]


def scored(tmp_path, perplexities: dict[int, float], **options) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "c", **options)
    for epoch, perplexity in perplexities.items():
        folder.save(epoch, torch.nn.Linear(1, 1), {"epoch": epoch}, perplexity)
    return folder


def test_best_newest_and_the_newest_milestones_are_kept_with_the_perplexity_in_their_names(tmp_path):
    perplexities = {epoch: 100.0 + abs(epoch - 3) for epoch in range(1, 18)}
    folder = scored(tmp_path, perplexities, milestone_every=5, keep_milestones=2)
    assert [p.name for p in folder.all()] == [
        "epoch_0003_ppl_100.000", "epoch_0010_ppl_107.000", "epoch_0015_ppl_112.000", "epoch_0017_ppl_114.000",
    ]  # fmt: skip
    assert folder.best().name == "epoch_0003_ppl_100.000"
    assert folder.newest().name == "epoch_0017_ppl_114.000"


def test_the_newest_epoch_is_the_one_of_the_largest_number_also_when_it_has_five_digits(tmp_path):
    folder = scored(tmp_path, {9999: None, 10000: None})
    assert [p.name for p in folder.all()] == ["epoch_10000"]


def test_an_epoch_that_is_trained_again_replaces_its_checkpoint_whatever_its_perplexity_was(tmp_path):
    folder = scored(tmp_path, {1: 50.0}, keep=3)
    folder.save(1, torch.nn.Linear(1, 1), {"epoch": 1}, 40.0)
    assert [p.name for p in folder.all()] == ["epoch_0001_ppl_40.000"]


def test_the_best_of_equal_perplexities_is_the_earliest(tmp_path):
    assert scored(tmp_path, {1: 9.0, 2: 7.0, 3: 7.0}, keep=9).best().name == "epoch_0002_ppl_7.000"


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    folder = scored(tmp_path, {1: 9.0})
    for name in ("epoch_0002.damaged-1", "epoch_two", "epoch_0003_ppl_nan"):
        (tmp_path / "c" / name).mkdir()
    assert [p.name for p in folder.all()] == ["epoch_0001_ppl_9.000"]
    assert is_checkpoint(folder.newest())
    assert not is_checkpoint(tmp_path / "c" / "epoch_two")
    assert not is_checkpoint(tmp_path / "c" / "epoch_0009_ppl_1.000")


@pytest.mark.parametrize(
    ("perplexity", "name"), [(1234567.0, "1.235e06"), (1e304, "1e304"), (999999.0, "999999.000")]
)
def test_the_huge_perplexity_of_a_diverged_model_still_makes_a_name_that_is_found(tmp_path, perplexity, name):
    folder = scored(tmp_path, {1: perplexity, 2: 2 * perplexity}, keep=3)
    assert folder.best().name == f"epoch_0001_ppl_{name}"
    assert len(folder.all()) == 2
    assert perplexity_of(folder.best()) == pytest.approx(perplexity, rel=1e-3)


@pytest.mark.parametrize("perplexity", [float("nan"), float("inf"), -1.0])
def test_a_perplexity_that_is_no_number_is_refused_before_anything_is_written(tmp_path, perplexity):
    with pytest.raises(ValueError, match=r"perplexity: got .*; a checkpoint's name holds a finite number"):
        scored(tmp_path, {1: perplexity})
    assert not (tmp_path / "c").exists()
