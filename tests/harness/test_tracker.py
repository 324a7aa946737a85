"""The setting ``tracker``: the curves of every trial go where Accelerate's trackers take them."""

from __future__ import annotations

import pytest
from accelerate import tracking

from bklm.harness import tracker
from bklm.studies import run_grad_blend


class Heard(tracking.GeneralTracker):
    """A tracker that keeps what it hears."""

    name, requires_logging_directory = "heard", False
    said: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.said.append(values)

    def log(self, values, step=None, **more):
        self.said.append((step, values))

    def finish(self):
        self.said.append("finished")


def test_settings_and_the_epochs_of_every_trial_reach_the_tracker_and_a_run_read_back_tells_them_again(
    tiny_config, monkeypatch
):
    import dataclasses

    monkeypatch.setattr(tracker, "check_tracker", lambda name: None)
    monkeypatch.setattr("bklm.harness.config.check_tracker", lambda name: None)
    monkeypatch.setattr(
        tracking, "filter_trackers", lambda names, folder: [Heard()] if names == ["wandb"] else []
    )
    monkeypatch.setattr(Heard, "said", [])
    config = dataclasses.replace(tiny_config, tracker="wandb")
    result = run_grad_blend(config)
    settings, *logged, end = Heard.said
    assert (settings["profile"], end) == ("smoke", "finished")
    found = {name: value for step, values in logged if step == 2 for name, value in values.items()}
    for row in result.table:
        curves = [
            found[f"trials/alpha_{row['alpha']:g}_seed_{seed}/val_perplexity"] for seed in result.config.seeds
        ]
        assert min(curves) <= row["val_ppl"] <= max(curves)
    first = list(Heard.said)
    Heard.said.clear()
    run_grad_blend(config)
    assert [x for x in Heard.said if isinstance(x, tuple)] == [x for x in first if isinstance(x, tuple)]


def test_a_tracker_that_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^tracker: got 'mlflow', which is not installed here; pip install mlflow, or choose"
    ):
        tracker.check_tracker("mlflow")
    tracker.check_tracker("none")
