"""The controls without a front end: values, bounds, profiles, folders, the estimate, and the buttons."""

from __future__ import annotations

import dataclasses
import time

import pytest

from bklm.harness.estimate import round_minutes
from bklm.harness.folder import claim, study_folder
from bklm.notebook import process as notebook_run
from bklm.notebook.controls import Controls
from bklm.notebook.form import FORMS, as_typed
from bklm.studies import GradBlendConfig
from bklm.studies.grad_blend.run import estimated_minutes


def test_they_start_from_the_form_and_give_back_what_was_moved(tiny_config):
    controls = Controls(tiny_config, ["batch_size", "alphas"])
    assert controls.widgets["batch_size"].value == 8
    assert controls.widgets["alphas"].value == "0, 0.5"
    controls.widgets["batch_size"].value = 16
    controls.widgets["alphas"].value = "0, 1"
    config = controls.config()
    assert (config.batch_size, config.alphas) == (16, (0.0, 1.0))


@pytest.mark.parametrize("config_class", FORMS.values(), ids=lambda c: c.study)
def test_every_field_of_a_study_can_be_a_control_that_shows_its_resolved_value(
    config_class, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # no results of earlier runs
    controls = Controls(config_class(), config_class.names())
    resolved = config_class().resolved()
    for spec in config_class.specs():
        shown = controls.widgets[spec.name].value
        assert spec.coerce(shown) == getattr(resolved, spec.name), spec.name
    assert controls.config() == config_class()  # nothing was moved


def test_the_slider_has_the_schemas_bounds(tiny_config):
    slider = Controls(tiny_config, ["batch_size"]).widgets["batch_size"]
    spec = next(s for s in GradBlendConfig.specs() if s.name == "batch_size")
    assert (slider.min, slider.max, slider.step) == (spec.low, spec.high, spec.step)


def test_a_bad_entry_is_named_beside_the_controls_while_typing_and_cannot_be_run(tiny_config):
    controls = Controls(tiny_config, ["alphas", "seeds"])
    controls.widgets["alphas"].value = "0, 2"
    assert "alphas: got" in controls._message.value
    assert controls.run_button.disabled
    controls.widgets["alphas"].value = "0, 1"
    assert controls._message.value == ""
    assert not controls.run_button.disabled
    controls.widgets["seeds"].value = "<b>"
    assert "&lt;b&gt;" in controls._message.value


def test_fields_that_nobody_moved_follow_the_profile():
    controls = Controls(GradBlendConfig(profile="quick"), ["profile", "alphas", "seeds"])
    controls.widgets["seeds"].value = "5, 6"
    controls.widgets["profile"].value = "smoke"
    assert controls.widgets["alphas"].value == "0, 0.5"
    assert controls.widgets["seeds"].value == "5, 6"
    config = controls.config()
    assert (config.profile, config.alphas, config.seeds) == ("smoke", None, (5, 6))
    controls.widgets["seeds"].value = ""  # emptied: the profile's again
    assert controls.config().seeds is None


def test_headless_they_give_the_config_unchanged_and_show_nothing(tiny_config, capsys):
    controls = Controls(tiny_config, ["batch_size"], headless=True, estimate=lambda config: 1 / 0)
    controls.show()
    assert controls.config() is tiny_config
    assert capsys.readouterr().out == ""


def test_after_moving_a_control_the_next_run_gets_a_folder_of_its_own(tiny_config, capsys):
    with study_folder(tiny_config.resolved()) as folder:
        claim(folder, tiny_config.resolved(), "0" * 64)
    controls = Controls(tiny_config, ["batch_size"])
    assert controls.config().output_dir == tiny_config.output_dir
    controls.widgets["batch_size"].value = 16
    moved = controls.config()
    assert moved.output_dir.endswith("run_2")
    assert "holds a run with other settings" in capsys.readouterr().out


def test_the_estimate_follows_the_controls_and_says_why_there_is_none(tiny_config):
    seen = []

    def estimate(config):
        seen.append(config.batch_size)
        if config.batch_size > 50:
            raise OSError("no such <text>")
        return config.batch_size / 4

    controls = Controls(tiny_config, ["batch_size"], estimate=estimate)
    controls.show()
    assert "<b>about 2 min</b>" in controls._guess.value
    controls.widgets["batch_size"].value = 16
    assert "<b>about 4 min</b>" in controls._guess.value
    controls.widgets["batch_size"].value = 64
    assert controls._guess.value == "No estimate: no such &lt;text&gt;"
    assert seen == [8, 16, 64]


def test_controls_made_anew_take_over_a_run_that_goes_on_with_its_buttons(tiny_config, monkeypatch):
    class Running:
        percent, doing, counts, lines, returncode, is_running, was_stopped = (
            40,
            "arm a",
            "4/10",
            [],
            None,
            True,
            False,
        )

        def __init__(self, config, on_change):
            self.config, self.seconds, self.folder = config, 1.0, "there"
            self.tell(on_change)

        def tell(self, on_change):
            self.on_change = on_change

        def stop(self):
            self.is_running, self.returncode, self.was_stopped = False, 1, True

        def picture(self):
            return None

    monkeypatch.setattr("bklm.notebook.controls.StudyRun", Running)
    before = Controls(tiny_config, ["batch_size"])
    before.show()
    before._start()
    again = Controls(tiny_config, ["batch_size"])
    again.show()
    again.keep(before)
    assert again.study.percent == again._bar.value == 40
    assert (again.run_button.disabled, again.stop_button.disabled) == (True, False)
    again._stop()
    again.study.on_change()
    assert (again.run_button.disabled, again.stop_button.disabled) == (False, True)
    assert "Stopped" in again._status.value


def test_no_step_on_a_gpu_keeps_the_kernel_from_launching_several_processes(tiny_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    controls = Controls(
        dataclasses.replace(tiny_config, processes=2, device="auto"),
        ["batch_size"],
        estimate=lambda config: pytest.fail("took steps on the GPU"),
    )
    controls.show()
    assert controls._guess.value.startswith("No estimate: steps on a GPU")


def test_the_sweeps_estimate_grows_with_its_trials_and_leaves_the_random_state_alone(tiny_config):
    import torch

    state = torch.get_rng_state()
    one = estimated_minutes(tiny_config.resolved())
    assert torch.equal(torch.get_rng_state(), state)
    doubled = GradBlendConfig(**{**tiny_config.to_dict(), "seeds": (0, 1, 2, 3)}).resolved()
    epochs = [2 * 2 * 2 + 2, 2 * 4 * 2 + 2]
    assert estimated_minutes(doubled) / one == pytest.approx(epochs[1] / epochs[0])
    assert [round_minutes(m) for m in (0.1, 0.9, 12.4)] == ["under 1", "about 1", "12"]


def test_numbers_are_shown_as_one_types_them():
    assert as_typed((0.0, 0.5, 1.0)) == "0, 0.5, 1"
    assert as_typed((1234567, 3)) == "1234567, 3"
    assert as_typed(0.1234567891) == "0.1234567891"
    assert as_typed(None) == ""
    assert as_typed("grid") == "grid"


@pytest.fixture
def script(monkeypatch):
    def set_script(code: str) -> None:
        monkeypatch.setattr(notebook_run, "command_words", lambda config: ["python", "-c", code])

    return set_script


def finished(controls: Controls, seconds: float = 20) -> None:
    controls.study.wait(seconds)
    end = time.monotonic() + 5
    while controls.run_button.disabled:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_run_shows_progress_picture_log_and_end(tiny_config, script):
    folder = f"{tiny_config.output_dir}/grad_blend"
    script(
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({folder!r}); folder.mkdir(parents=True)\n"
        "(folder / 'a.png').write_bytes(b'picture')\n"
        "print('<log>', flush=True); sys.stderr.write('\\rx: 40%|##  | 2/5 [00:01<00:01, 2.0it/s]')\n"
    )
    controls = Controls(tiny_config, ["batch_size"])
    controls.run_button.click()
    finished(controls)
    assert "Done in" in controls._status.value
    assert "&lt;log&gt;" in controls._log.value
    assert controls._bar.value == 40
    assert controls._picture.value == b"picture"
    assert controls.stop_button.disabled


def test_stop_says_that_it_stops_and_run_can_be_pressed_again(tiny_config, script):
    script("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    controls = Controls(tiny_config, ["batch_size"])
    controls.run_button.click()
    first = controls.study
    controls.run_button.click()  # while it runs: nothing
    assert controls.study is first
    assert (controls.run_button.disabled, controls.stop_button.disabled) == (True, False)
    controls.stop_button.click()
    assert controls._status.value.startswith("Stop")
    finished(controls)
    assert "What was finished is kept" in controls._status.value
    controls.run_button.click()
    assert controls.study is not first
    controls.study.kill()
    finished(controls)


def test_a_run_that_fails_says_so_above_its_last_lines(tiny_config, script):
    script("import sys\nprint('ValueError: top_k is too large')\nsys.exit(2)")
    controls = Controls(tiny_config, ["batch_size"])
    controls.run_button.click()
    finished(controls)
    assert "exit code 2" in controls._status.value
    assert "top_k is too large" in controls._log.value
