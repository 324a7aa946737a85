"""Adding a study: a folder of two hundred lines gets everything else from the harness. The example is copied, not imported."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from meanwhile import kill_within_a_training, when_a_helper_trains

from bklm.harness.cli import parse
from bklm.harness.report import command_words
from bklm.notebook.controls import Controls
from bklm.notebook.form import config_from, form_cells
from bklm.notebook.handle import Study

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path(__file__).parent / "example"
MOST_LINES = 250


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> str:
    """The example in a package that no file of bklm names; its parent is importable here and in processes started here."""
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(EXAMPLE, place / "my_example", ignore=shutil.ignore_patterns("__pycache__"))
    sys.path.insert(0, str(place))
    yield "my_example"
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def study(package):
    return importlib.import_module(package)


@pytest.fixture(scope="module")
def finished(study, small_text, tmp_path_factory):
    """A finished run, for all tests that leave it as it is."""
    config = study.ExampleConfig(
        profile="smoke", data_dir=str(small_text), output_dir=str(tmp_path_factory.mktemp("results")), device="cpu",
        batch_size=8, seq_len=8, max_train_tokens=400, width=8,
    )  # fmt: skip
    return study.run_example(config)


@pytest.fixture
def config(finished, tmp_path):
    """The same settings, with results of the test's own."""
    return dataclasses.replace(finished.config, output_dir=str(tmp_path / "results"))


def numbers(folder: Path) -> list:
    table = json.loads((folder / "summary.json").read_text())["table"]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in table]


def command(config) -> subprocess.Popen:
    """The study's command line, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *command_words(config)[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
    )


def test_a_whole_study_takes_few_lines():
    files = [*EXAMPLE.glob("*.py"), EXAMPLE / "page.md"]
    assert sum(len(p.read_text().splitlines()) for p in files) <= MOST_LINES


def test_it_has_form_cells_widgets_and_papermills_parameters(study):
    fields: dict = {}
    for cell in form_cells(study.ExampleConfig):
        exec(cell, fields)
    assert config_from(study.ExampleConfig, fields) == study.ExampleConfig()
    assert fields["headless"] is False
    controls = Controls(study.ExampleConfig(), study.ExampleConfig.names())
    assert controls.widgets["batch_size"].max == 512


def test_it_has_a_notebooks_handle_from_the_text_to_the_zip(study, config, capsys):
    handle = Study(study.ExampleConfig, {**vars(config), "headless": True})
    for part in (handle.text, handle.run, handle.table, handle.finding, handle.zip):
        part()
    printed = capsys.readouterr().out
    for words in ("Kneser-Ney 3-gram", "Lowest validation PPL at dropout", "SHA-256: "):
        assert words in printed


def test_it_has_a_command_line_that_refuses_before_torch_is_imported(study, config):
    assert parse(study.ExampleConfig, command_words(config.resolved())[3:]) == config.resolved()
    refused = command(dataclasses.replace(config.resolved(), output_dir="x"))
    assert refused.poll() is None
    refused.kill()
    refused.wait()
    words = [sys.executable, "-X", "importtime", "-m", study.__name__, "--dropouts", "2"]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(words, capture_output=True, text=True, env=place, check=False)
    assert done.returncode == 2
    assert "dropouts: got (2.0,); allowed is" in done.stderr
    assert "| torch" not in done.stderr


def test_it_leaves_table_curves_figure_manifest_and_zip_and_is_read_back(study, finished, monkeypatch):
    result = finished
    assert {r["dropout"]: r["seeds"] for r in result.table} == {0.0: 2, 0.3: 2}
    assert result.finding.startswith("Lowest validation PPL at dropout")
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {name.removeprefix("example/") for name in archive.namelist()}
    assert {
        "table.csv",
        "epochs.csv",
        "summary.json",
        "manifest.json",
        "dropouts.png",
        "run.log",
        "config.json",
    } <= names
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["command"].split()[:3] == ["python", "-m", study.__name__]
    run = importlib.import_module(f"{study.__name__}.run")
    monkeypatch.setattr(run, "train", lambda *a, **k: pytest.fail("trained again"))
    assert study.run_example(result.config).table == result.table


def test_its_page_becomes_a_section_of_the_readme(study, finished, monkeypatch, tmp_path):
    result = finished
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "DOCS", tmp_path)
    page = readme.Study("example", study.__name__)
    with pytest.raises(FileNotFoundError, match="example_summary"):
        page.sections()
    page.keep("", result.config.output_dir)
    section = page.sections()["docs/findings.md"]
    assert result.finding in section
    assert len(re.findall(r"(?m)^\| 0\.?\d* \|", section)) == len(result.table)
    assert "](results/example_dropouts.png)" in section
    assert (tmp_path / "example_dropouts.png").exists()
    assert result.config.output_dir not in (tmp_path / "example_manifest.json").read_text()


def test_it_says_how_long_it_will_take(study, config):
    run = importlib.import_module(f"{study.__name__}.run")
    few, many = config.resolved(), dataclasses.replace(config, epochs=20).resolved()
    assert 0 < run.estimated_minutes(few) < run.estimated_minutes(many)


def test_other_settings_are_refused_in_the_same_folder_naming_the_field(study, finished):
    with pytest.raises(ValueError, match=r"made with other settings: learning_rate \(0.003 there, 0.001 now\)"):
        study.run_example(dataclasses.replace(finished.config, learning_rate=1e-3))


@pytest.mark.slow
def test_killed_with_signal_9_it_goes_on_and_ends_with_the_numbers_of_an_undisturbed_run(
    study, config, finished
):
    folder = Path(config.output_dir) / "example"
    kill_within_a_training(command(config), folder)
    assert not (folder / "summary.json").exists()
    resumed = study.run_example(config)
    assert "goes on after epoch 1" in (folder / "run.log").read_text()
    assert numbers(resumed.folder) == numbers(finished.folder)


@pytest.mark.slow
def test_two_machines_share_its_grid_through_a_database(study, config, database, tmp_path):
    configs = [
        dataclasses.replace(config, storage=database, epochs=8, output_dir=str(tmp_path / name)).resolved()
        for name in "ab"
    ]
    processes = [command(c) for c in configs]
    for process in processes:
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed
    tables = [numbers(Path(c.output_dir) / "example") for c in configs]
    assert tables[0] == tables[1]
    logs = [(Path(c.output_dir) / "example" / "run.log").read_text() for c in configs]
    assert sum(log.count("epoch 1/8") for log in logs) == 4, "each trial is trained once, by one of them"


@pytest.mark.slow
def test_several_processes_train_its_models_together(study, config, finished):
    together = study.run_example(dataclasses.replace(config, dropouts=(0.0,), processes=2))
    assert together.table[0]["val_ppl"] == pytest.approx(finished.table[0]["val_ppl"], rel=1e-4)


@pytest.mark.slow
def test_two_workers_give_the_numbers_of_one(study, config, finished, monkeypatch):
    run = importlib.import_module(f"{study.__name__}.run")
    trials = Path(config.output_dir) / "example" / "internals" / "trials"
    here = when_a_helper_trains(run, trials, monkeypatch)
    together = study.run_example(dataclasses.replace(config, workers=2))
    assert 0 < len(here) < 4, "the helper trained none, or all"
    assert numbers(together.folder) == numbers(finished.folder)
