"""The set-up script and requirements: what Colab has is kept, words are checked, commands are the README's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

# Colab's own versions (its published list of August 2026) of what requirements.txt names.
COLAB = {
    "torch": "2.11.0", "numpy": "2.1.3", "pandas": "2.2.3", "filelock": "3.32.3", "numba": "0.61.2", "scipy": "1.16.3",
    "mpmath": "1.3.0", "datasets": "4.0.0", "tokenizers": "0.22.2", "safetensors": "0.8.0", "accelerate": "1.14.0",
    "matplotlib": "3.10.0", "ipywidgets": "7.7.1", "ipykernel": "6.17.1", "tqdm": "4.67.3", "psutil": "5.9.5",
    "nbformat": "5.11.1", "nbconvert": "7.17.1", "nbclient": "0.10.4",
}  # fmt: skip


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {r.name: r for r in found}


def test_colabs_own_versions_satisfy_every_requirement_so_that_nothing_is_replaced():
    missing_there = {"optuna", "papermill", "tyro"}
    assert set(requirements()) - missing_there == set(COLAB)
    for name, version in COLAB.items():
        assert requirements()[name].specifier.contains(version), name


def test_the_tested_versions_satisfy_the_ranges_and_pin_torch():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints" / "tested.txt").read_text().splitlines()
        if "==" in line
    )
    assert pins["torch"] == "2.13.0"
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(pins[name]), name


def test_a_word_that_the_script_does_not_know_is_refused():
    done = subprocess.run(["bash", "colab_setup.sh", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "got 'fly'; allowed are" in done.stderr


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
    assert "bash colab_setup.sh test" in (ROOT / ".ci" / "run").read_text()
