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
