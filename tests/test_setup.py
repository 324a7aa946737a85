"""The set-up script and requirements: what Colab has is kept, words are checked, commands are the README's."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bklm.batch.papermill_words import main as check_words

ROOT = Path(__file__).resolve().parents[1]

COLAB_TORCH = "2.11.0"  # from its published list; constraints/colab.txt holds what can be installed anywhere


def pins(name: str) -> dict[str, str]:
    """Package -> version of one file of constraints/."""
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {r.name: r for r in found}


def test_colabs_own_versions_satisfy_every_requirement_so_that_nothing_is_replaced():
    colab = pins("colab.txt") | {"torch": COLAB_TORCH}
    missing_there = {"optuna", "papermill", "tyro"}
    assert set(requirements()) - set(colab) == missing_there
    for name in set(requirements()) - missing_there:
        assert requirements()[name].specifier.contains(colab[name]), name


def test_the_tested_versions_satisfy_the_ranges_and_pin_torch():
    tested = pins("tested.txt")
    assert tested["torch"] == "2.13.0"
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(tested[name]), name


def test_a_word_that_the_script_does_not_know_is_refused():
    done = subprocess.run(["bash", "colab_setup.sh", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "got 'fly'; allowed are" in done.stderr


@pytest.mark.parametrize("end", ["", "oldest"])
def test_an_end_of_the_ranges_that_there_is_not_is_refused(end):
    done = subprocess.run(["bash", "colab_setup.sh", "compat", end], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"compat: got '{end}'; allowed are lowest, colab and newest" in done.stderr


def test_a_word_behind_colab_that_there_is_not_is_refused_before_anything_is_installed(tmp_path):
    shutil.copy(ROOT / "colab_setup.sh", tmp_path)
    words = ["bash", str(tmp_path / "colab_setup.sh"), "colab", "fly"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "colab: got 'fly'; allowed are no word and install." in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["colab_setup.sh"]


def test_the_lowest_versions_are_the_lower_bounds_of_every_range(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    found = importlib.import_module("install").lowest()
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ranges = [line.replace(">=", "==") for line in lines if line and not line.startswith("#")]
    assert set(ranges) <= set(found)
    assert {"transformers==4.50", "triton==3.2", "pytest==8.3"} <= set(found)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in found)


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_prints_the_head_of_the_script_and_does_nothing(word, tmp_path):
    shutil.copy(ROOT / "colab_setup.sh", tmp_path)
    done = subprocess.run(["bash", str(tmp_path / "colab_setup.sh"), word], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("run", "test", "slow", "generic", "browser", "colab", "compat", "--help"):
        assert f"bash colab_setup.sh {command} " in done.stdout
    assert "set -" not in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["colab_setup.sh"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-p", "profil", "smoke"], "has no parameter 'profil'; .* did you mean 'profile'"),
        (["-r", "profil", "smoke"], "has no parameter 'profil'"),
        (["-p", "alphas", "2"], "alphas: got 2; allowed is"),
        (["-p", "output_dir"], "Option '-p' requires 2 arguments; allowed are -p NAME VALUE"),
        (["--fly"], "No such option.* '?--fly'?; allowed are"),
        (["smoke"], r"unexpected extra argument \(smoke\); allowed are"),
        (["-f", "sets.yaml"], "got --parameters_file; give parameters one by one"),
        (["--prepare-only"], "got --prepare-only, which runs nothing"),
        (
            ["-p", "output_dir", "~nobody-here"],
            "output_dir: got '~nobody-here'; this machine has no home folder",
        ),
        (["--version"], "got --help or --version, which run nothing"),
    ],
)
def test_words_that_run_cannot_use_are_refused_in_one_sentence(words, sentence, capsys):
    assert check_words([str(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb"), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^colab_setup.sh run: .*{sentence}", error)
    assert error.count("\n") == 1


def test_words_that_run_can_use_give_the_folder_of_the_results(capsys):
    notebook = str(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb")
    assert check_words([notebook, "-p", "profile", "smoke", "-p", "output_dir", "a b", "-k", "python3"]) == 0
    assert check_words([notebook, "-p", "data_dir", "output_dir", "-p", "alphas", "0, 0.5"]) == 0
    assert capsys.readouterr().out == "a b\nresults\n"


@pytest.mark.parametrize("empty", ["", " ", "None"])
def test_an_empty_output_dir_means_to_the_script_what_it_means_to_the_notebook(empty, capsys):
    for flag in ("-p", "-r"):
        assert (
            check_words([str(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb"), flag, "output_dir", empty]) == 0
        )
    assert capsys.readouterr().out == "results\nresults\n"


def test_the_script_and_every_text_have_the_same_line_ends_in_every_checkout(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    origin.mkdir()
    for name in (".gitattributes", "colab_setup.sh"):
        shutil.copy(ROOT / name, origin)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=origin, check=True)
    subprocess.run([*git, "clone", "-q", "-c", "core.autocrlf=true", origin, copy], check=True)
    assert (copy / "colab_setup.sh").read_bytes() == (ROOT / "colab_setup.sh").read_bytes()


@pytest.fixture
def checkout(tmp_path):
    """checkout(python): run the script's copy with words, its Python being these lines of shell."""

    def run(python: str, *words: str) -> subprocess.CompletedProcess[str]:
        shutil.copy(ROOT / "colab_setup.sh", tmp_path)
        stub = tmp_path / "stub-python"
        stub.write_text(f"#!/bin/sh\n{python}\n")
        stub.chmod(0o755)
        environment = {**os.environ, "BKLM_PYTHON": str(stub)}
        command = ["bash", "colab_setup.sh", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_run_checks_its_words_before_it_makes_a_folder_or_starts_papermill(checkout, tmp_path):
    done = checkout(
        'case "$*" in *bklm.batch.papermill_words*) echo "no such word" >&2; exit 2;; *papermill*) touch started;; esac',
        *("run", "-p", "profil", "smoke"),
    )
    assert (done.returncode, done.stderr) == (2, "no such word\n")
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "started").exists()


def test_a_run_that_fails_without_a_word_is_told_of_all_the_same(checkout):
    done = checkout('case "$*" in *bklm.batch.papermill_words*) echo out;; *papermill*) exit 137;; esac', "run")
    assert done.returncode == 137
    assert "stopped (the reason is above)" in done.stderr


@pytest.mark.parametrize("is_written", [False, True])
def test_a_run_that_fails_names_its_notebook_only_where_there_is_one(checkout, tmp_path, is_written):
    write = "echo {} >out/01_grad_blend_sweep.running.ipynb;" if is_written else ""
    done = checkout(
        f'case "$*" in *bklm.batch.papermill_words*) echo out;; *papermill*) {write} echo why >&2; exit 3;; esac',
        "run",
    )
    assert done.returncode == 3
    assert "stopped (the reason is above)" in done.stderr
    assert ("failed.ipynb" in done.stderr) is is_written
    assert (tmp_path / "out" / "01_grad_blend_sweep.failed.ipynb").exists() is is_written


def test_the_generic_lane_gives_every_library_the_code_of_an_old_processor(checkout):
    shown = (
        "import sys, numba, torch; print(torch.backends.cpu.get_cpu_capability(), numba.config.CPU_NAME,"
        " repr(numba.config.CPU_FEATURES), torch.get_num_threads(), *sys.argv[1:])"
    )
    python = f'case "$*" in *pytest*) echo $ONEDNN_MAX_CPU_ISA $MKL_CBWR; {sys.executable} -c \'{shown}\' "$@";; esac'
    done = checkout(python, "generic", "tests/some_test.py")
    assert done.returncode == 0, done.stderr
    libraries, own = done.stdout.splitlines()
    assert libraries == "AVX2 COMPATIBLE"
    assert own.startswith("DEFAULT generic '' 1 -m pytest -n logical ")
    assert own.endswith(" tests/some_test.py")


def test_the_test_lane_compares_times_alone_after_the_others_and_only_if_they_pass(checkout):
    python = 'case "$*" in *pytest*) echo $OMP_NUM_THREADS "$@";; esac'
    others, alone = checkout(python, "test").stdout.splitlines()
    assert (
        others
        == "1 -m pytest -n logical --maxprocesses 4 --dist loadfile -m not slow and not speed --ignore tests/browser"
    )
    assert alone == "1 -m pytest -m speed and not slow --ignore tests/browser"
    for wrong in ("*-n*logical*", "*ruff*check*", "*speed*and*"):
        assert checkout(f'case "$*" in {wrong}) exit 3;; esac', "test").returncode == 3


def test_an_installation_that_fails_is_said_and_not_remembered_as_done(tmp_path):
    shutil.copy(ROOT / "colab_setup.sh", tmp_path)
    for name in ("requirements.txt", "pyproject.toml", "constraints/x.txt", "scripts/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *install.py*) exit 1;; esac\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("BKLM_PYTHON", "COLAB_RELEASE_TAG")}
    command = ["bash", "colab_setup.sh", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not install the packages into .venv" in done.stderr
    assert not list((tmp_path / ".venv").glob("installed-*"))


def test_a_missing_python_is_said_in_one_sentence(tmp_path):
    for tool in ("bash", "dirname", "cat", "cksum", "env"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    copy = tmp_path / "checkout"
    copy.mkdir()
    (copy / "colab_setup.sh").write_text((ROOT / "colab_setup.sh").read_text())
    done = subprocess.run(
        [tmp_path / "bash", "colab_setup.sh"],
        cwd=copy,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr


def test_an_end_of_the_ranges_tells_and_keeps_what_pytest_counted(tmp_path):
    for name in ("colab_setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "x.txt").touch()
    python = tmp_path / "python3.10"
    python.write_text(
        '#!/bin/sh\ncase "$*" in "-m venv"*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python";; *freeze) echo torch==2.6.0;; '
        '--version) echo Python 3.10.1;; *pytest*) echo .F; echo "1 failed, 9 passed in 2.00s"; exit 1;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "install.py").touch()
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "colab_setup.sh", "compat", "lowest", "tests/data"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"20\d\d-\d\d-\d\d, \w+, Python 3\.10\.1, pytest tests/data: 1 failed, 9 passed in 2\.00s", last
    )
    assert (tmp_path / ".venv-lowest" / "outcomes.txt").read_text() == last + "\n"
    assert (tmp_path / ".venv-lowest" / "versions.txt").read_text() == "torch==2.6.0\n"


@pytest.mark.slow
def test_in_a_prepared_runtime_nothing_installed_changes_its_version():
    before = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    command = [sys.executable, str(ROOT / "scripts" / "install.py"), "--keep-installed"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_QUIET": "1"})
    assert done.returncode == 0, done.stderr
    assert "torch and numpy are as they were" in done.stdout
    after = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    assert set(before.splitlines()) == set(after.splitlines())


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^bash colab_setup\.sh \w+", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert "bash colab_setup.sh test" in commands
    assert "bash colab_setup.sh run" in commands
    lanes = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {f"bash colab_setup.sh {lane}" for lane in ("test", "slow", "generic", "browser", "colab")} <= set(
        lanes
    )
