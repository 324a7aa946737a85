"""The batch runner: what it refuses, what it keeps, and that one notebook's end is not another's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

from bklm.batch import job
from bklm.batch.__main__ import main
from bklm.batch.plan import Outcome, read_runs
from bklm.batch.run import run_batch
from bklm.batch.summary import write_summary

ROOT = Path(__file__).resolve().parents[1]
SWEEP = str(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb")
PICTURE = "from pathlib import Path\nPath(output_dir, 'a picture.png').write_bytes(b'png')"


@pytest.fixture
def notebook(tmp_path):
    """notebook(name, *cells): a notebook with parameters x, text and output_dir, and these code cells."""

    def make(name: str, *cells: str) -> str:
        form = nbformat.v4.new_code_cell(
            'x = 1\ntext = "a"\noutput_dir = "."', metadata={"tags": ["parameters"]}
        )
        content = nbformat.v4.new_notebook(
            cells=[form, *map(nbformat.v4.new_code_cell, cells)],
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3"},
                "language_info": {"name": "python"},
            },
        )
        nbformat.write(content, tmp_path / f"{name}.ipynb")
        return str(tmp_path / f"{name}.ipynb")

    return make


@pytest.fixture
def sets(tmp_path):
    """sets(content): the YAML file that holds it (JSON is YAML)."""

    def write(content) -> Path:
        path = tmp_path / "sets.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_grid_is_every_combination_under_names_that_do_not_change(sets, notebook):
    path = notebook("n")
    runs = read_runs(
        sets({
            "parameters": {"text": "b"},
            "runs": [
                {"notebook": path, "grid": {"x": [1, 2]}},
                {"notebook": path, "name": "mine", "parameters": {"text": "c"}},
            ],
        })
    )  # fmt: skip
    assert [(r.name, r.parameters) for r in runs] == [
        ("n-x=1", {"text": "b", "x": 1}),
        ("n-x=2", {"text": "b", "x": 2}),
        ("mine", {"text": "c"}),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("runs: [", "not a YAML file"),
        ("[1, 2]", "allowed is a mapping with parameters, runs"),
        ({"runs": []}, r"runs: got \[\]; allowed is a list"),
        ({"run": [{}]}, "got the key 'run'; allowed are parameters, runs"),
        ({"runs": [{"name": "a"}]}, "run 1: the key 'notebook' is missing"),
        ({"runs": [{"notebook": "nowhere.ipynb"}]}, "'nowhere.ipynb', which is no file here"),
        ({"runs": [{"notebook": SWEEP, "parameters": {"profil": 1}}]}, "no parameter 'profil'.*mean 'profile'"),
        (
            {"runs": [{"notebook": SWEEP, "parameters": {"output_dir": "x"}}]},
            "a folder of its own; leave it out",
        ),
        (
            {"runs": [{"notebook": SWEEP, "parameters": {"alphas": [0, 2]}}]},
            r"alphas: got \[0, 2\]; allowed is",
        ),
        (
            {"runs": [{"notebook": SWEEP, "parameters": {"profile": "smoke", "top_k": 9}}]},
            "top_k: got 9 with num_exp",
        ),
        (
            {"runs": [{"notebook": SWEEP, "grid": {"seeds": 3}}]},
            "grid: seeds: got 3; allowed is a list of values",
        ),
        ({"runs": [{"notebook": SWEEP, "name": "../up"}]}, "name: got '../up'; allowed are"),
        ({"runs": [{"notebook": SWEEP}, {"notebook": SWEEP}]}, "is the name of more than one run"),
        (
            {"runs": [{"notebook": SWEEP, "parameters": {"clip": 1}, "grid": {"clip": [1]}}]},
            "in parameters and in grid",
        ),
        ({"runs": [{"notebook": SWEEP, "name": "summary.html"}]}, "'summary.html' is no name for a run"),
        ({"runs": [{"notebook": SWEEP, "name": "Checkpoints"}]}, "'Checkpoints' is no name for a run"),
        ("parameters: {clip: 1}\nruns: []\nparameters: {}\n", "line 3: the key 'parameters' stands twice"),
        (
            f"runs:\n- notebook: '{SWEEP}'\n  grid: {{clip: [1], clip: [2]}}",
            "line 3: the key 'clip' stands twice",
        ),
        (
            f"runs:\n- notebook: '{SWEEP}'\n  parameters: {{storage: 2020-01-01}}",
            r"storage: got datetime\.date\(2020, 1, 1\); allowed are text",
        ),
        (f"runs:\n- notebook: '{SWEEP}'\n  grid: {{clip: [.nan]}}", "clip: got nan; allowed are text"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence_before_anything_runs(sets, content, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_runs(sets(content))
    assert "\n" not in str(caught.value)
    assert main([str(sets(content)), "--output_dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workers", "0"], "workers: got 0; allowed is an integer of at least 1"),
        (["--minutes", "-1"], "minutes: got -1.0; allowed is a number above 0"),
        (["--minutes", "nan"], "minutes: got nan; allowed is a number above 0"),
        (["--minutes", "inf"], "minutes: got inf; allowed is a number above 0"),
    ],
)
@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "run"])
def test_limits_that_cannot_be_kept_are_refused_before_anything_runs(
    sets, notebook, tmp_path, capsys, words, sentence, check
):
    path = sets({"runs": [{"notebook": notebook("n")}]})
    assert main([str(path), "--output_dir", str(tmp_path / "out"), *words, *check]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "out").exists()


def test_a_merge_key_and_an_alias_are_no_key_that_stands_twice(sets, notebook):
    path = notebook("n")
    content = (
        f"parameters: &base {{x: 2}}\nruns:\n- notebook: {path}\n  parameters: {{<<: *base, text: b, x: 3}}\n"
    )
    assert read_runs(sets(content))[0].parameters == {"x": 3, "text": "b"}


def test_a_value_with_any_characters_gives_a_folder_name_of_harmless_ones(sets, notebook):
    values = ["../../etc", "a b", "a/b", "ü" * 300, "", "; rm -rf ."]
    runs = read_runs(sets({"runs": [{"notebook": notebook("n"), "grid": {"text": values}}]}))
    assert len({r.name for r in runs}) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", r.name) and len(r.name) <= 100 for r in runs)


def test_the_example_in_the_documentation_is_one_that_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [r.notebook.name for r in read_runs(Path("docs/batch.yaml"))] == [
        "01_grad_blend_sweep.ipynb", "01_grad_blend_sweep.ipynb", "02_precision_benchmark.ipynb",
    ]  # fmt: skip


def test_the_batch_of_everything_names_every_notebook(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [r.notebook.name for r in read_runs(Path("docs/batch_all.yaml"))]
    assert sorted(runs) == sorted(p.name for p in Path("notebooks").glob("*.ipynb"))


def test_paths_among_the_parameters_are_relative_to_the_folder_the_batch_is_started_in(
    sets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    table = {"embedding_file": "table.npy", "gpt2_dir": "~/gpt2", "data_dir": "/texts"}
    path = sets({
        "runs": [
            {"notebook": str(ROOT / "notebooks" / "03_baseline_training.ipynb"), "parameters": {"checkpoint_dir": "c"}},
            {"notebook": str(ROOT / "notebooks" / "04_embedding_freeze_study.ipynb"), "parameters": table},
        ]
    })  # fmt: skip
    trained, frozen = (run.all_parameters(Path("out")) for run in read_runs(path))
    assert trained["checkpoint_dir"] == str(tmp_path / "c")
    assert trained["output_dir"] == str(tmp_path / "out")
    assert "data_dir" not in trained  # empty: the network
    expected = {
        "embedding_file": str(tmp_path / "table.npy"), "gpt2_dir": str(Path.home() / "gpt2"), "data_dir": "/texts",
    }  # fmt: skip
    assert {name: frozen[name] for name in table} == expected


@pytest.mark.parametrize("name", ["Copy of 01_grad_blend_sweep", "01_grad_blend_sweep-Copy1", "mine (2)"])
def test_a_renamed_notebook_of_the_suite_is_known_by_what_it_holds(sets, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SWEEP, f"{name}.ipynb")
    values = {"profile": "smoke", "data_dir": "text"}
    (run,) = read_runs(sets({"runs": [{"notebook": f"{name}.ipynb", "parameters": values}]}))
    assert run.all_parameters(tmp_path / "out")["data_dir"] == str(tmp_path / "text")
    with pytest.raises(ValueError, match="batch_size: got 3; allowed is"):
        read_runs(sets({"runs": [{"notebook": f"{name}.ipynb", "parameters": {"batch_size": 3}}]}))


def test_the_home_folder_is_written_as_a_tilde_in_a_batch_too(sets, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = sets({"runs": [{"notebook": notebook("n")}]})
    assert main([str(path), "--output_dir", "~/out"]) == 0
    assert (tmp_path / "out.zip").exists()
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_a_failed_notebook_leaves_the_others_alone_and_only_it_runs_again(sets, notebook, tmp_path):
    good = notebook("good", PICTURE, "print('x is', x)")
    bad = notebook("bad", "print('so far')", "raise ValueError('no such text')")
    path = sets({"runs": [{"notebook": good, "name": "good", "parameters": {"x": 5}}, {"notebook": bad}]})
    out, lines = tmp_path / "out", []
    result = run_batch(read_runs(path), out, workers=2, tell=lines.append)
    assert [(o.name, o.status) for o in result.outcomes] == [
        ("good", "done"),
        ("bad", "failed"),
    ]
    assert result.outcomes[1].error == "cell 3: ValueError: no such text"
    assert len(lines) == 2
    assert "x is 5" in (out / "good" / "printed.txt").read_text()
    page = result.summary.read_text()
    for part in (
        "1 of 2 runs done, 1 failed",
        "ValueError: no such text",
        'src="good/a%20picture.png"',
        "good/good.ipynb",
    ):
        assert part in page
    with zipfile.ZipFile(result.bundle) as archive:
        names = set(archive.namelist())
    assert {
        "out/summary.html",
        "out/good/good.ipynb",
        "out/good/a picture.png",
        "out/bad/bad.failed.ipynb",
    } <= names
    for address in re.findall(r'(?:href|src)="([^"#][^"]*)"', page):
        assert "out/" + address.replace("%20", " ") in names

    notebook("bad", "print('mended')")
    before = (out / "good" / "good.ipynb").stat().st_mtime_ns
    lines.clear()
    again = run_batch(read_runs(path), out, tell=lines.append)
    assert [(o.name, o.status) for o in again.outcomes] == [("good", "kept"), ("bad", "done")]
    assert (out / "good" / "good.ipynb").stat().st_mtime_ns == before
    assert not (out / "bad" / "bad.failed.ipynb").exists()
    with pytest.raises(ValueError, match=r"good: .* holds a run with other settings: x \(5 there, 6 now\)"):
        run_batch(read_runs(sets({"runs": [{"notebook": good, "name": "good", "parameters": {"x": 6}}]})), out)


def test_the_overview_compares_the_runs_of_a_grid_by_what_differs_and_what_was_found(tmp_path):
    outcomes = []
    for size, ppl in ((16, 51.25), (32, None), (64, 1234.5)):
        name = f"size-{size}"
        (tmp_path / name / "baseline").mkdir(parents=True)
        words = json.dumps({"best_perplexity": ppl, "finding": "GPT is best; the rest is not."}) if ppl else "{"
        (tmp_path / name / "baseline" / "summary.json").write_text(words)
        same = {"profile": "smoke", "batch_size": size}
        outcomes.append(Outcome(name, "done", "03.ipynb", same, 1.0, None, ""))
    page = write_summary(tmp_path, outcomes).read_text()
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert rows[0] == ["run", "end", "batch_size", "time", "best val PPL", "result"]
    assert [row[2] for row in rows[1:]] == ["16", "32", "64"]
    assert [row[4:] for row in rows[1:]] == [["51.2", "GPT is best"], ["", ""], ["1,234.5", "GPT is best"]]
    # A summary that cannot be read stays where it is.
    assert (tmp_path / "size-32" / "baseline" / "summary.json").read_text() == "{"


@pytest.mark.slow
def test_a_process_killed_while_its_notebook_is_half_written_is_one_failed_run(sets, notebook, tmp_path):
    half = "from pathlib import Path\nPath(output_dir, 'dead.running.ipynb').write_text('{\"cells\": [')"
    dead = notebook("dead", half + "\nimport os\nos.kill(os.getppid(), 9)")
    path = sets({"runs": [{"notebook": dead}, {"notebook": notebook("good")}]})
    result = run_batch(read_runs(path), tmp_path / "out", tell=lambda line: None)
    assert [(o.name, o.status) for o in result.outcomes] == [("dead", "failed"), ("good", "done")]
    assert (tmp_path / "out" / "dead" / "dead.failed.ipynb").read_text() == '{"cells": ['
    assert "1 of 2 runs done, 1 failed" in result.summary.read_text()


def test_a_process_that_is_killed_is_reported_with_its_signal_and_what_to_do(sets, notebook, tmp_path):
    words = "import os, signal\nos.kill(os.getppid(), signal."
    killed = [{"notebook": notebook(name, f"{words}{name})")} for name in ("SIGKILL", "SIGSEGV")]
    result = run_batch(read_runs(sets({"runs": killed})), tmp_path / "out", workers=2, tell=lambda line: None)
    by_memory, by_crash = (outcome.error for outcome in result.outcomes)
    assert by_memory.startswith(
        "the notebook's process was killed by SIGKILL, most often because memory was short; "
    )
    assert "fewer workers" in by_memory
    assert by_crash == "the notebook's process was killed by SIGSEGV; run the batch again"


@pytest.mark.parametrize(("deaths", "done"), [(0, True), (2, True), (3, False)])
def test_a_kernel_that_died_before_it_began_is_started_again(deaths, done):
    """No cell has run then."""
    left = iter([job.NEVER_BEGAN] * deaths)
    ran = []

    def work() -> None:
        if died := next(left, None):
            raise RuntimeError(died)
        ran.append(True)

    with contextlib.nullcontext() if done else pytest.raises(RuntimeError, match="before replying"):
        job._with_a_kernel_that_began(work)
    assert ran == [True] * done


def test_what_else_ends_a_notebook_ends_it_once():
    calls = []

    def work() -> None:
        calls.append(True)
        raise RuntimeError("Kernel died")

    with pytest.raises(RuntimeError, match="Kernel died"):
        job._with_a_kernel_that_began(work)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_notebook_that_is_gone_by_its_turn_is_one_failed_run(sets, notebook, tmp_path):
    gone = notebook("gone")
    remover = notebook(
        "remover", f"from pathlib import Path\nfor name in ({gone!r}, 'remover.ipynb'): Path(name).unlink()"
    )
    path = sets({"runs": [{"notebook": remover}, {"notebook": gone}]})
    result = run_batch(read_runs(path), tmp_path / "out", tell=lambda line: None)
    assert [(o.name, o.status) for o in result.outcomes] == [("remover", "done"), ("gone", "failed")]
    assert "FileNotFoundError" in result.outcomes[1].error


def test_a_notebook_that_ends_well_but_cannot_be_kept_is_one_failed_run(sets, notebook, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no template")

    monkeypatch.setattr("bklm.batch.run.read_notebook", fail)
    result = run_batch(read_runs(sets({"runs": [{"notebook": notebook("n")}]})), tmp_path / "out")
    assert result.outcomes[0].error == "its notebook could not be kept (RuntimeError: no template)"
    assert [p.name for p in (tmp_path / "out" / "n").glob("*.ipynb")] == ["n.failed.ipynb"]


def test_a_page_that_cannot_be_rendered_costs_the_page_and_not_the_run(sets, notebook, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no template")

    monkeypatch.setattr("nbconvert.HTMLExporter.from_notebook_node", fail)
    result = run_batch(read_runs(sets({"runs": [{"notebook": notebook("n")}]})), tmp_path / "out")
    assert [o.status for o in result.outcomes] == ["done"]
    assert [p.name for p in (tmp_path / "out" / "n").glob("n.*")] == ["n.ipynb"]


@pytest.mark.slow
def test_a_kernel_killed_with_signal_9_is_one_failed_run(sets, notebook, tmp_path):
    dead = notebook("dead", "import os\nos.kill(os.getpid(), 9)")
    result = run_batch(
        read_runs(sets({"runs": [{"notebook": dead}]})), tmp_path / "out", tell=lambda line: None
    )
    assert "DeadKernelError" in result.outcomes[0].error


@pytest.mark.slow
def test_a_notebook_that_never_ends_is_stopped_with_its_kernel(sets, notebook, tmp_path):
    pid = tmp_path / "pid"
    endless = notebook(
        "n", f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    # Until its kernel has begun, for which a busy machine takes long.
    for minutes in (0.1, 0.5, 2):
        result = run_batch(
            read_runs(sets({"runs": [{"notebook": endless}]})),
            tmp_path / f"out {minutes}",
            minutes=minutes,
            tell=lambda line: None,
        )
        assert result.outcomes[0].error == f"stopped after {minutes:g} minutes"
        if pid.exists():
            break
    deadline = time.monotonic() + 20
    while is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(pid.read_text()))


def is_running(pid: int) -> bool:
    """A container's first process may never fetch what has ended, which then stays in the list as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_batches_in_one_folder_at_once_are_refused(tmp_path):
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".batch.lock"),
        pytest.raises(RuntimeError, match="another batch is working in"),
    ):
        run_batch([], tmp_path)


def test_a_batch_that_raised_leaves_its_folder_free_for_the_next_one_of_the_process(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no page")

    with monkeypatch.context() as patch:
        patch.setattr("bklm.batch.run.write_summary", fail)
        with pytest.raises(RuntimeError, match="no page") as kept:  # with its frames, as Jupyter keeps it
            run_batch([], tmp_path / "out")
    assert run_batch([], tmp_path / "out").outcomes == []
    assert kept.tb is not None


@pytest.mark.slow
def test_an_interrupted_batch_goes_on_with_the_same_command_and_a_study_in_it_with_its_trials(
    sets, small_text, tmp_path
):
    small = {
        "profile": "smoke", "device": "cpu", "data_dir": str(small_text), "batch_size": 8, "seq_len": 8, "d_model": 8,
        "n_layers": 1, "epochs_per_trial": 3,
    }  # fmt: skip
    path = sets({"runs": [{"notebook": SWEEP, "name": "a", "parameters": small}]})
    command = [sys.executable, "-m", "bklm.batch", str(path), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    study = tmp_path / "out" / "a" / "grad_blend"
    deadline = time.monotonic() + 120
    while not list(study.glob("internals/trials/*/result.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    first = {p: p.stat().st_mtime_ns for p in study.glob("internals/trials/*/result.json")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert first == {p: p.stat().st_mtime_ns for p in first}
    with zipfile.ZipFile(tmp_path / "out" / "a" / "grad_blend.zip") as archive:
        assert "grad_blend/01_grad_blend_sweep.html" in archive.namelist()
