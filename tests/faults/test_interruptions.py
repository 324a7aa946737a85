"""Whatever stops a study half-way, the same command then gives the numbers of an undisturbed run."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from bklm.files import atomic
from bklm.files.atomic import WriteError, replacing, write_json
from bklm.harness.folder import study_folder
from bklm.models import ResNetBK
from bklm.studies.grad_blend import figures as grad_blend_figures
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.run import load_final_model, run_grad_blend
from bklm.training import checkpoints
from bklm.training.checkpoints import CheckpointFolder


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_blend_figures, "save_figure", lambda path, *a, **k: path.write_bytes(b"") and path)


@pytest.fixture
def config(tiny_config: GradBlendConfig) -> GradBlendConfig:
    return dataclasses.replace(tiny_config, final_epochs=1)


def numbers(folder: Path) -> list[dict]:
    table = json.loads((folder / "summary.json").read_text())["table"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, small_text: Path
) -> Callable[[GradBlendConfig], list]:
    """undisturbed(config): the numbers of such a run that nothing stopped; run once."""
    found: dict[str, list] = {}

    def give(config: GradBlendConfig) -> list:
        if not found:
            folder = str(tmp_path_factory.mktemp("undisturbed"))
            found["numbers"] = numbers(run_grad_blend(dataclasses.replace(config, output_dir=folder)).folder)
        return found["numbers"]

    return give


def on_call(number: int, function: Callable, fault: Callable[[], None]) -> Callable:
    """``function``, but for its ``number``-th call, which meets the fault instead."""
    calls = 0

    def disturbed(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            fault()
        return function(*arguments, **options)

    return disturbed


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_on_a_full_disk() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 11200 vs 11092")


def safetensors_on_a_full_disk() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name", "number", "fault", "sentence"),
    [
        (checkpoints, "save_weights", 4, safetensors_on_a_full_disk, "cannot write .*epoch_000.*No space left"),
        (torch, "save", 3, torch_on_a_full_disk, "cannot write .*epoch_000.*free some space"),
        (atomic, "sync", 20, full_disk, "cannot write .*No space left on device.*free some space"),
    ],
    ids=["weights", "optimiser state", "any file"],
)
def test_a_disk_that_fills_up_is_one_sentence_and_costs_nothing_that_was_finished(
    config, monkeypatch, undisturbed, place, name, number, fault, sentence
):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, on_call(number, getattr(place, name), fault))
        with pytest.raises(OSError, match=sentence) as caught:
            run_grad_blend(config)
    assert "\n" not in str(caught.value)
    finished = {
        p: p.stat().st_mtime_ns
        for p in Path(config.output_dir).glob("grad_blend/internals/trials/*/result.json")
    }
    again = run_grad_blend(config)
    assert numbers(again.folder) == undisturbed(config)
    assert finished == {p: p.stat().st_mtime_ns for p in finished}


@pytest.mark.slow
def test_a_loss_that_becomes_nan_once_is_trained_again_from_the_last_good_checkpoint(
    config, monkeypatch, undisturbed
):
    real, calls = ResNetBK.loss, []

    def poisoned(self, *arguments, **options):
        calls.append(1)
        value = real(self, *arguments, **options)
        return value * math.nan if len(calls) == 30 else value

    monkeypatch.setattr(ResNetBK, "loss", poisoned)
    result = run_grad_blend(config)
    assert result.diverged == []
    assert "the loss was nan" in (result.folder / "run.log").read_text()
    assert numbers(result.folder) == undisturbed(config)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_no_number_and_no_order(config, monkeypatch, undisturbed):
    now = [4e8]

    def backwards() -> float:
        now[0] -= 3600.0  # and soon before 1980, where zip files begin
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", backwards)
        patch.setattr(torch, "save", on_call(4, torch.save, full_disk))
        with pytest.raises(OSError, match="No space left"):
            run_grad_blend(config)
    for file in Path(config.output_dir).rglob("*"):  # what is older looks newer
        os.utime(file, (now[0], now[0]))
        now[0] -= 1e6
    monkeypatch.setattr(time, "time", backwards)
    assert numbers(run_grad_blend(config).folder) == undisturbed(config)


LIMITED = """
import resource, sys
from bklm.harness import cli
from bklm.studies.grad_blend import run as grad_blend
sys.argv[1:2], limit = [], int(sys.argv[1])
real = grad_blend.prepare_text
def limited(config):
    text = real(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return text
grad_blend.prepare_text = limited
cli.main(grad_blend.GradBlendConfig)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4000, 12000])
def test_files_that_may_not_grow_any_further_end_the_command_with_one_sentence(config, undisturbed, limit):
    words = []
    for name, value in config.to_dict().items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot write" in last or "File too large" in last
    assert numbers(run_grad_blend(config).folder) == undisturbed(config)


def as_another_user(action: Callable[[], str]) -> str:
    """What ``action`` returns in a child process that is not root, for whom permissions do not count."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def test_a_folder_that_may_only_be_read_is_refused_in_one_sentence(tiny_config, tmp_path):
    place = tmp_path / "read only"
    place.mkdir()
    place.chmod(0o555)
    for above in tmp_path.parents:  # pytest's own folders are closed to others
        if above.stat().st_uid != 0 or not str(above).startswith("/tmp/"):
            continue
        above.chmod(above.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    config = dataclasses.replace(tiny_config, output_dir=str(place)).resolved()

    def attempt() -> str:
        try:
            with study_folder(config):
                return "opened"
        except OSError as error:
            return str(error)

    said = as_another_user(attempt)
    assert "output_dir: cannot write to" in said
    assert "Permission denied" in said
    assert "choose a folder you may write to" in said
    assert "\n" not in said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_write_that_fails_names_file_and_reason_and_leaves_the_old_content(tmp_path, monkeypatch, code):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(path):
        raise OSError(code, os.strerror(code))

    for module in (atomic, checkpoints):
        monkeypatch.setattr(module, "sync", fail)
    with pytest.raises(WriteError, match=rf"cannot write .*a\.json \({os.strerror(code)}\); free some space"):
        write_json(tmp_path / "a.json", {"new": 1})
    with pytest.raises(WriteError, match=os.strerror(code)):
        CheckpointFolder(tmp_path / "c").save(1, torch.nn.Linear(1, 1), {})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "c"]


def test_an_error_of_the_writer_itself_is_not_called_a_full_disk(tmp_path):
    def write():
        with replacing(tmp_path / "a"):
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match=r"^a mistake$"):
        write()


@pytest.mark.parametrize("name", ["of/another/file", "a.zip.csv", "b"])
def test_a_file_that_could_not_be_read_for_the_one_being_written_is_not_called_a_failed_write(tmp_path, name):
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / name))
    with pytest.raises(PermissionError) as caught, replacing(tmp_path / "a.zip"):
        raise denied
    assert caught.value is denied


def test_a_copy_that_ran_out_of_space_is_a_failed_write_although_the_error_names_its_source_first(tmp_path):
    with pytest.raises(WriteError, match=r"cannot write .*a\.zip"), replacing(tmp_path / "a.zip") as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source", None, str(temporary))


@pytest.mark.parametrize("named", ["temporary", "target", "folder"])
def test_an_error_that_names_what_is_being_written_is_a_failed_write(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)  # relative and absolute names of a file are the same file's

    def write():
        with replacing(Path("a.zip")) as temporary:
            name = {"temporary": temporary, "target": tmp_path / "a.zip", "folder": "."}[named]
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))

    with pytest.raises(WriteError, match=r"cannot write a\.zip"):
        write()


def test_a_log_on_a_full_disk_ends_with_one_line_and_the_study_goes_on(tiny_config, capsys, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with study_folder(tiny_config.resolved()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            for number in range(50):
                logging.getLogger("bklm").info("line %d", number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    printed = capsys.readouterr()
    assert "line 49" in printed.out
    assert printed.err.count("run.log cannot be written") == 1
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "content", ["[]", "17", "{}", '{"config": [], "text_sha256": null}', '{"config": {}}', "nul"]
)
def test_settings_of_another_shape_in_the_folder_are_set_aside_and_not_trusted(tiny_config, content, caplog):
    config = tiny_config.resolved()
    folder = Path(config.output_dir) / "grad_blend"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    with caplog.at_level(logging.WARNING), study_folder(config):
        pass
    assert "set aside as config.json.damaged-1" in caplog.text


@pytest.mark.slow
def test_a_final_model_that_is_damaged_or_gone_is_trained_again_to_the_same_weights(config):
    folder = run_grad_blend(config).folder
    weights = folder / "final" / "best_model.safetensors"
    whole = weights.read_bytes()
    for found in (b"x", whole[:1000], None):
        weights.unlink()
        if found is not None:
            weights.write_bytes(found)
        with pytest.raises(FileNotFoundError, match=r"run the study \(again\) to its end"):
            load_final_model(folder)
        run_grad_blend(config)
        assert weights.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", [{}]), ("epochs", ["1"]), ("final_perplexity", math.nan), ("directions", None)],
)
def test_a_result_of_another_shape_is_set_aside_and_its_trial_trained_again(config, undisturbed, key, value):
    folder = run_grad_blend(config).folder
    result = folder / "internals" / "trials" / "alpha_0_seed_1" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), key: value}))
    assert numbers(run_grad_blend(config).folder) == undisturbed(config)
    assert result.with_name("result.json.damaged-1").exists()
