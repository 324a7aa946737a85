"""The command ``bklm``: it answers at once, says what is allowed, and does what Python does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bklm
from bklm.command import actions
from bklm.command.completion import completion
from bklm.command.main import main, parser, study_of
from bklm.harness.cli import parse
from bklm.studies import STUDIES, GradBlendConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "1", "--help"], ["run", "1", "--clip", "-1"], ["generate", "--help"]]
)
def test_help_and_refusals_import_no_torch(words):
    call = f"from bklm.command.main import main\ntry:\n    main({words!r})"
    code = f"import sys\n{call}\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "AssertionError" not in done.stderr
    assert done.stdout or "clip: got -1" in done.stderr


def test_the_self_test_says_what_it_waits_for(monkeypatch, capsys):
    monkeypatch.setattr(actions, "selftest", lambda given: None)
    assert main(["selftest"]) == 0
    assert "Loading PyTorch and the package: some ten seconds" in capsys.readouterr().err


def test_help_says_what_each_profile_takes(capsys):
    with pytest.raises(SystemExit):
        parse(GradBlendConfig, ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "smoke 2, quick 2, full 2",
        "smoke 0 0.5, quick 0 0.3 0.5 0.7 1",
        "corrected exact, original original",
    ):
        assert words in shown
    assert "default: None" not in shown


@pytest.mark.parametrize("number", range(1, len(STUDIES) + 1))
def test_a_study_has_the_number_of_its_notebook(number):
    name = study_of(str(number))
    assert name == study_of(f"{number:02}") == study_of(name)
    config = getattr(bklm.studies, f"{STUDIES[name]}Config")
    assert int(config.notebook[:2]) == number


@pytest.mark.parametrize(("profile", "said"), [("quick", "Takes about 12 min on this machine"), ("smoke", "")])
def test_a_run_says_how_long_it_takes_before_it_starts(profile, said, monkeypatch, capsys):
    from bklm.studies.grad_blend import run

    def started(config):
        assert said in (told := capsys.readouterr().err)
        assert bool(told) == bool(said)

    monkeypatch.setattr(run, "estimated_minutes", lambda config: 12.0)
    monkeypatch.setattr(run, "run_grad_blend", started)
    assert main(["run", "1", "--profile", profile, "--dataset", "embedded"]) == 0


def test_a_launch_on_gpus_is_not_estimated_in_the_process_that_is_to_fork(monkeypatch, capsys):
    from bklm.studies.grad_blend import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "estimated_minutes", lambda config: pytest.fail("took steps on the GPU"))
    monkeypatch.setattr(run, "run_grad_blend", lambda config: None)
    assert main(["run", "1", "--profile", "quick", "--dataset", "embedded", "--processes", "2"]) == 0
    assert "2 processes on GPUs take is not estimated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "10"], "ValueError: run: got '10'; allowed is one of 1 grad_blend"),
        (["score", "nowhere.zip", "x"], "FileNotFoundError: nowhere.zip does not exist"),
        (["batch", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(words, said, capsys):
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_no_command_prints_the_help_and_run_alone_names_the_studies(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out
    assert main(["run"]) == 2
    assert "4 embedding_freeze" in capsys.readouterr().out


def test_the_console_script_starts_the_command():
    module, name = re.search(
        r'^bklm = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).groups()
    code = f"import sys\nfrom {module} import {name}\nsys.argv = ['bklm', '--help']\nsys.exit({name}())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "generate" in done.stdout


def test_every_command_of_the_help_does_something():
    (commands,) = (a.choices for a in parser()._actions if a.dest == "command")
    for name in commands:
        assert name in ("run", "batch") or callable(getattr(actions, name)), name


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["ge"], "generate"),
        (["run", "ba"], "baseline"),
        (["run", "1", "--alp"], "--alphas"),
        (["run", "3", "--protocol", "orig"], "original"),
        (["export", "x.zip", "--form"], "--format"),
    ],
)
def test_bash_completes_commands_studies_settings_and_choices(typed, found):
    words = " ".join(["bklm", *typed])
    script = f"{completion('bash', parser())}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}\n"
    script += 'bklm_complete; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


def test_the_package_hands_out_its_names_lazily():
    assert set(dir(bklm)) >= {"load", "models", "resolvent_diagonal", "studies", "__version__"}
    assert bklm.resolvent_diagonal is bklm.bk_core.resolvent_diagonal
    assert bklm.models.GPT.__name__ == "GPT"
    with pytest.raises(AttributeError, match=r"module 'bklm' has no attribute 'loads'"):
        _ = bklm.loads
    code = "import sys, bklm; assert 'torch' not in sys.modules and bklm.__doc__.count('    # ') >= 3"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
