"""Steps are timed as they will be trained."""

from types import SimpleNamespace

import pytest
import torch

from bklm.harness import step_times, workers
from bklm.harness.arms import Arm
from bklm.models import GPT, GPTConfig
from bklm.training.processes import make_accelerator


@pytest.mark.parametrize(
    ("at_once", "seeds", "threads"), [(0, (0, 1, 2), 2), (1, (0,), 4), (0, (0,), 4), (4, (0, 1, 2, 3), 1)]
)
def test_a_step_is_timed_with_the_threads_that_each_of_the_trainings_has(
    tmp_path, monkeypatch, at_once, seeds, threads
):
    ids = torch.arange(8).reshape(2, 4)
    text = SimpleNamespace(vocab_size=9, batch_size=2, first_batch=lambda rows: (ids, ids))
    study = SimpleNamespace(
        config=SimpleNamespace(seeds=seeds, clip=1.0, workers=at_once, profile="quick", device="cpu"),
        text=text, accelerator=make_accelerator("cpu", "fp32"), folder=tmp_path, is_main=True,
        grid=lambda factors, measure, **more: [measure("times", "steps")],
    )  # fmt: skip
    monkeypatch.setattr(workers, "cores", lambda: 4)
    monkeypatch.setattr(workers, "free_bytes", lambda device: 2 * workers.HELPER_BYTES)
    seen, losses, before = [], [], torch.get_num_threads()

    def timed(calls, *settings):
        seen.append(torch.get_num_threads())
        losses.extend(float(call()) for call in (calls["one"], calls["one"]))
        return {name: {"total": [0.5]} for name in calls}

    monkeypatch.setattr(step_times, "time_arms", timed)
    torch.set_num_threads(4)
    try:
        arm = Arm(lambda vocabulary: GPT(GPTConfig(vocabulary, 8, 1, 1, 4, 0.0)))
        assert step_times.step_times(study, {"one": arm}, repeats=3) == {"one": [500.0]}
        assert (seen, torch.get_num_threads()) == ([threads], 4)
        assert losses[0] != losses[1], "a step moves the weights"
    finally:
        torch.set_num_threads(before)
