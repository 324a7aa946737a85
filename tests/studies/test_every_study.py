"""What every study must do, asked of each of them: read back, refuse, go on after a kill, leave a whole zip."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from meanwhile import kill_within_a_training
from small import SMALL, require_that_figures_say_what_the_model_sees, run_of, small

from bklm.harness import folder as folder_module
from bklm.harness import session
from bklm.harness.cli import parse
from bklm.harness.folder import study_folder
from bklm.harness.page import meaning
from bklm.harness.report import command_words
from bklm.studies import STUDIES

TRAINED = [study for study in STUDIES if study != "precision"]
CHANGED = {
    "grad_blend": ("clip", 0.5, 1.0),
    "precision": ("repeats", 3, 4),
    "baseline": ("dropout", 0.1, 0.2),
    "embedding_freeze": ("noise", 0.1, 0.2),
    "koopman": ("clip", 0.5, 1.0),
    "physics": ("clip", 0.5, 1.0),
    "compression": ("clip", 1.0, 2.0),
    "dialogue": ("clip", 1.0, 2.0),
    "integration": ("clip", 0.5, 1.0),
}


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """The precision study's parts of fixed size, smaller; and no process that weighs memory, which takes long to start."""
    from bklm.studies.baseline import costs
    from bklm.studies.physics import run as physics
    from bklm.studies.precision import cells, run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "MOE_TOKENS", 32)
        patch.setattr(cells, "ARCHITECTURE_N", 64)
        patch.setattr(cells, "ARCHITECTURE_BATCH", 1)
        for module in (run, costs, physics):
            patch.setattr(module, "MemoryMeter", NoMeter)
        yield


class NoMeter(contextlib.nullcontext):
    """A machine on which memory cannot be measured."""

    def __init__(self, device: str) -> None:
        super().__init__(self)

    def measure(self, part, settings, arm):
        return None, "not here"

    def processor_seconds(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_text):
    """runs(study): its result, computed once for all tests of this file; do not write into its folder."""
    made = {}

    def get(study: str):
        if study not in made:
            made[study] = run_of(study)(small(study, tmp_path_factory.mktemp(study), small_text))
        return made[study]

    return get


@pytest.fixture
def copied(runs, tmp_path):
    """copied(study): a config whose folder holds a finished run of it, to be spoilt."""

    def get(study: str):
        result = runs(study)
        shutil.copytree(Path(result.config.output_dir), tmp_path / "copy")
        return dataclasses.replace(result.config, output_dir=str(tmp_path / "copy"))

    return get


def without_timings(value):
    """A summary without what differs from run to run."""
    times = (
        "seconds",
        "seconds_95",
        "seconds_per_epoch",
        "training_bytes",
        "tokens_per_second",
        "measured",
        "claims",
    )
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in times and not k.startswith("generate_seconds")}
        return {k: without_timings(v) for k, v in kept.items()}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def summary(config) -> dict:
    """What the study found: its tables and sentences."""
    found = json.loads((Path(config.output_dir) / config.study / "summary.json").read_text())
    return {k: without_timings(v) for k, v in found.items() if k in ("table", "effects", "finding", "findings")}


def command(config) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command_words(config)[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_every_study_has_a_small_config_here():
    assert SMALL.keys() == CHANGED.keys() == STUDIES.keys()


@pytest.mark.parametrize("study", STUDIES)
def test_the_zip_holds_what_the_result_names_the_log_and_a_manifest_with_the_command_that_repeats_it(
    runs, study
):
    result = runs(study)
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {name.removeprefix(f"{study}/") for name in archive.namelist()}
        manifest = json.loads(archive.read(f"{study}/manifest.json"))
    assert {str(p.relative_to(result.folder)) for p in result.paths.values()} | {
        "run.log",
        "config.json",
    } <= names
    assert not any(Path(name).name.startswith(".") for name in names)
    words = manifest["command"].split()
    assert words[:3] == ["python", "-m", f"bklm.studies.{study}"]
    assert parse(type(result.config), words[3:]).resolved() == result.config
    assert manifest["config"] == json.loads(json.dumps(result.config.to_dict()))


@pytest.mark.parametrize("study", STUDIES)
def test_its_tables_have_rows_and_every_column_a_name(runs, study):
    tables = runs(study).tables()
    assert tables
    for name, make in tables.items():
        for row in make():
            assert all(isinstance(column, str) and column for column in row), name


# Of the others one trains nothing; dialogue asks for the gain from turns, and two judge what is done to one trained model.
@pytest.mark.parametrize("study", ["grad_blend", "baseline", "koopman", "physics", "integration"])
def test_its_main_table_says_what_each_model_gains_from_context(runs, study):
    rows = next(
        rows for make in runs(study).tables().values() if (rows := make()) and "val PPL (95%)" in rows[0]
    )
    told = [row.get("context gain", row.get("gain from context")) for row in rows]
    # Of counting, and of an arm that diverged, there is none.
    asked = [words for words in told if words != "-"]
    assert asked
    assert all("%" in words for words in asked)


# Koopman's and physics' are asked in their own files, of runs that these have.
def test_every_figure_of_what_was_published_says_that_it_sees_the_future(tmp_path, small_text):
    require_that_figures_say_what_the_model_sees(
        run_of("grad_blend")(small("grad_blend", tmp_path, small_text, protocol="original"))
    )


@pytest.mark.parametrize("study", STUDIES)
def test_every_column_of_its_csv_files_is_explained_in_the_report(runs, study):
    files = list(runs(study).folder.glob("*.csv"))
    assert files
    assert [c for file in files for c in pd.read_csv(file, nrows=0).columns if not meaning(c)] == []


@pytest.mark.parametrize("study", TRAINED)
def test_its_best_model_comes_back_from_the_folder(runs, study):
    model = runs(study).load()
    assert not model.training
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, model.vocab_size)


@pytest.mark.parametrize("study", TRAINED)
def test_a_finished_study_is_read_back_and_trains_nothing(copied, runs, study, monkeypatch):
    config = copied(study)
    monkeypatch.setattr(session, "repeated_once", lambda attempt: pytest.fail("trained again"), raising=False)
    monkeypatch.setattr(session, "twice", lambda attempt: pytest.fail("trained again"), raising=False)
    log = Path(config.output_dir) / study / "run.log"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    again = run_of(study)(config)
    assert without_timings(again.table) == without_timings(runs(study).table)
    assert again.finding == runs(study).finding
    # Of what lies there nobody says how long it will take.
    told = [line for line in log.read_text().splitlines()[before:] if "Trial 1 of " in line]
    assert told
    assert all(line.endswith("; found") for line in told)


@pytest.mark.parametrize("study", STUDIES)
def test_other_settings_are_refused_naming_field_and_values_and_nothing_changes(copied, study):
    config = copied(study)
    folder = Path(config.output_dir) / study
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.log"}
    field, there, now = CHANGED[study]
    with pytest.raises(ValueError, match=rf"made with other settings: {field} \({there} there, {now} now\)"):
        run_of(study)(dataclasses.replace(config, **{field: now}))
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("study", STUDIES)
def test_a_folder_begun_with_an_earlier_version_is_refused_in_one_sentence(copied, study):
    config = copied(study)
    path = Path(config.output_dir) / study / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bklm": "0.1.0"}))
    with pytest.raises(
        ValueError, match=r"begun with bklm 0\.1\.0, and this is bklm .*; nothing was changed\.$"
    ):
        run_of(study)(config)


@pytest.mark.parametrize("study", STUDIES)
def test_two_runs_in_one_folder_at_once_are_refused(study, tmp_path, small_text):
    config = small(study, tmp_path, small_text).resolved()
    with study_folder(config), pytest.raises(RuntimeError, match="another run is working in"):
        run_of(study)(config)


@pytest.mark.parametrize("study", STUDIES)
def test_a_nearly_full_disk_is_refused_before_anything_is_computed(study, tmp_path, small_text, monkeypatch):
    monkeypatch.setattr(
        folder_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    with pytest.raises(OSError, match=r"output_dir: .* has 1 MB left; the study needs up to"):
        run_of(study)(small(study, tmp_path, small_text))


@pytest.mark.parametrize("study", STUDIES)
def test_the_study_says_how_long_it_will_take(study, tmp_path, small_text):
    run = importlib.import_module(f"bklm.studies.{study}.run")
    assert run.estimated_minutes(small(study, tmp_path, small_text).resolved()) > 0


# Parts whose numbers depend on no clock, and trainings of two epochs, so that one can be killed between them.
KILLED = {
    "koopman": {"parts": "auxiliary"},
    "physics": {"parts": "loss"},
    "compression": {"epochs": 2},
    "dialogue": {"pretraining_epochs": 2},
    "integration": {"scores": 2, "budgets": "steps"},
}


@pytest.mark.slow
@pytest.mark.parametrize("study", TRAINED)
def test_killed_with_signal_9_it_goes_on_and_ends_with_the_numbers_of_an_undisturbed_one(
    study, tmp_path, small_text, monkeypatch
):
    figures = importlib.import_module(f"bklm.studies.{study}.figures")
    monkeypatch.setattr(figures, "save_figure", lambda path, *a, **k: path.write_bytes(b"") or path)
    config = small(study, tmp_path / "killed", small_text, **KILLED.get(study, {})).resolved()
    kill_within_a_training(command(config), Path(config.output_dir))
    assert not (Path(config.output_dir) / study / "summary.json").exists()
    run_of(study)(config)
    assert "goes on after epoch 1" in (Path(config.output_dir) / study / "run.log").read_text()
    alone = dataclasses.replace(config, output_dir=str(tmp_path / "alone"))
    run_of(study)(alone)
    resumed, undisturbed = (json.dumps(summary(c)).replace(c.output_dir, "") for c in (config, alone))
    assert resumed == undisturbed
