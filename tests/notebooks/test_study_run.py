"""A study in a process of its own: what is understood of its output, and what a stop leaves."""

from __future__ import annotations

import os
import signal
import time

import pytest

from bklm.harness.cli import parse
from bklm.notebook import process as notebook_run
from bklm.notebook.form import FORMS
from bklm.notebook.process import BAR, StudyRun
from bklm.studies import GradBlendConfig
from bklm.studies.grad_blend.run import run_grad_blend


def test_every_form_of_tqdms_bar_is_read():
    bar = BAR.match("alpha 0, seed 1:  35%|###5      | 12/34 [00:05<00:09,  2.31step/s]")
    assert (bar["doing"], bar["percent"]) == ("alpha 0, seed 1", "35")
    assert bar["counts"] == "12/34 [00:05<00:09,  2.31step/s]"
    assert BAR.match("  0%|          | 0/80 [00:00<?, ?step/s]")["doing"] is None
    assert BAR.match("Trial 1 of 4: 50% better | so far") is None


@pytest.fixture
def script(monkeypatch):
    """Lets the study's process be a few lines of Python."""

    def set_script(code: str) -> None:
        monkeypatch.setattr(notebook_run, "command_words", lambda config: ["python", "-c", code])

    return set_script


def test_bars_and_log_lines_are_told_apart_however_they_arrive(script, tiny_config):
    script(
        "import sys, time\n"
        "sys.stdout.write('Settings: a=1\\n\\r  0%|     | 0/4 [00:00<?, ?it/s]'); sys.stdout.flush(); time.sleep(.1)\n"
        "sys.stdout.write('Trial 1 of 2\\n\\rb: 50%|##   | 2/4 [00:01<00:01, 2.0it/s]Trial 2 of 2\\n')\n"
        "sys.stdout.write('\\rb: 75%|###  | 3/4 [00:01<00:01, 2.0it/s]'); sys.stdout.write('ä'); sys.exit(3)\n"
    )
    seen = []
    run = StudyRun(tiny_config, lambda: seen.append(run.percent if seen else 0))
    assert run.wait(20) == 3
    assert list(run.lines) == ["Settings: a=1", "Trial 1 of 2", "Trial 2 of 2", "ä"]
    assert (run.percent, run.doing) == (75, "b")
    assert not run.is_running
    assert not run.was_stopped
    assert seen


def test_a_watcher_that_fails_does_not_block_the_run(script, tiny_config):
    script("print('x' * 3_000_000)")

    def fail():
        raise RuntimeError("the page is closed")

    assert StudyRun(tiny_config, fail).wait(20) == 0


def test_the_first_stop_asks_and_the_second_ends_at_once(script, tiny_config):
    script(
        "import signal, time\nsignal.signal(signal.SIGINT, lambda *a: print('asked', flush=True))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    )
    run = StudyRun(tiny_config)
    _until(lambda: run.lines)
    run.stop()
    _until(lambda: "asked" in run.lines)
    assert run.is_running
    run.stop()
    assert run.wait(10) == -signal.SIGKILL
    assert run.was_stopped
    run.stop()  # of a run that has ended: nothing


def test_a_stop_during_the_imports_ends_it_too(script, tiny_config):
    script("import time\ntime.sleep(60)")
    run = StudyRun(tiny_config)
    run.stop()
    assert run.wait(10) == -signal.SIGTERM
    assert run.was_stopped


def test_the_picture_shown_is_the_one_that_this_run_drew_first_however_often_it_is_drawn(script, tiny_config):
    script("import time\ntime.sleep(60)")
    run = StudyRun(tiny_config)
    run.folder.mkdir(parents=True)
    old, first, other = (run.folder / name for name in ("old.png", "first.png", "a.png"))

    def drawn(path, seconds):
        path.touch()
        os.utime(path, (run.started + seconds,) * 2)

    drawn(old, -100)
    assert run.picture() is None
    drawn(first, 1)
    drawn(other, 2)
    assert run.picture() == first
    drawn(first, 3)
    assert run.picture() == first
    run.kill()
    run.wait(10)


@pytest.mark.parametrize("config_class", FORMS.values(), ids=lambda c: c.study)
def test_the_command_line_says_what_the_config_says(config_class):
    config = config_class()
    words = notebook_run.command_words(config.resolved())
    assert parse(config_class, words[3:]) == config.resolved()


@pytest.mark.slow
def test_stop_ends_the_run_early_and_a_new_run_ends_with_the_numbers_of_an_undisturbed_one(
    tiny_config, tmp_path
):
    longer = {"epochs_per_trial": 40, "final_epochs": 1, "max_train_tokens": 0}
    config = GradBlendConfig(**{**tiny_config.to_dict(), **longer, "alphas": (0.5,), "seeds": (0,)})
    undisturbed = GradBlendConfig(**{**config.to_dict(), "output_dir": str(tmp_path / "undisturbed")})
    run = StudyRun(config)
    _until(lambda: any("epoch 3/" in line for line in run.lines), 60)
    run.stop()
    assert run.wait(60) == 1
    # A busy machine hands the signal and the lines on late; without the stop there would be all the epochs. That it takes
    # hold within the step at hand is tested where steps can be counted, in test_training.
    assert epochs(run) < config.epochs_per_trial
    assert run.was_stopped
    assert run.lines[-1].startswith("Stopped. What was finished is kept")
    again = StudyRun(config)
    assert again.wait(300) == 0
    assert any("goes on after epoch" in line for line in again.lines)
    assert untimed(run_grad_blend(config).table) == untimed(run_grad_blend(undisturbed).table)


def epochs(run: StudyRun) -> int:
    return sum(": epoch " in line for line in run.lines)


def untimed(table: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def _until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
