"""Several trials at once: the same numbers, nothing done twice, and a helper that dies costs nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from meanwhile import epochs_below, kill_when, when_a_helper_trains

from bklm.harness import workers
from bklm.harness.progress import Progress
from bklm.harness.session import Session
from bklm.studies.grad_blend import figures
from bklm.studies.grad_blend import train as grad_blend
from bklm.studies.grad_blend.run import run_grad_blend

pytestmark = pytest.mark.slow

EPOCHS = 8  # of a trial: enough for a helper to be killed in one


@pytest.fixture(scope="module", autouse=True)
def no_drawing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda path, *a, **k: path.write_bytes(b"") and path)
        yield


def six_trials(config, workers):
    return dataclasses.replace(
        config, alphas=(0.0, 0.5, 1.0), epochs_per_trial=EPOCHS, final_epochs=1, workers=workers
    )


@pytest.fixture
def config(tiny_config):
    return six_trials(tiny_config, workers=2)


@pytest.fixture(scope="module")
def alone(tiny_in, tmp_path_factory) -> list:
    """The numbers of one worker."""
    return numbers(run_grad_blend(six_trials(tiny_in(tmp_path_factory.mktemp("alone")), workers=1)).folder)


def numbers(folder: Path) -> list:
    return [
        {k: v for k, v in row.items() if k not in ("training_time",)}
        for row in json.loads((folder / "grad_blend_results.json").read_text())["results"]
    ]


def helpers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "bklm.harness.helper" in p.cmdline()]


def trials(config) -> Path:
    return Path(config.output_dir) / "grad_blend" / "internals" / "trials"


def test_two_workers_give_the_numbers_of_one_and_each_trial_is_trained_once(config, monkeypatch, alone):
    here = when_a_helper_trains(grad_blend, trials(config), monkeypatch)
    together = run_grad_blend(config)
    assert 0 < len(here) - 1 < 6, "the helper trained none, or all"
    log = (together.folder / "run.log").read_text()
    for alpha in ("0", "0.5", "1"):
        for seed in (0, 1):
            assert log.count(f"bklm.training.loop: alpha {alpha}, seed {seed}: epoch 1/{EPOCHS}") == 1
            # Told by whoever trained it, and once; the best one's final training is told of, too.
            is_best = (float(alpha), seed) == (together.best_alpha, 0)
            assert log.count(f"alpha {alpha}, seed {seed}: validation PPL") == 1 + is_best
    assert "2 trials run at once" in log
    # How many are done, and the time left, are known here alone.
    assert len(re.findall(r"Trial \d of 6, .* left\n", log)) == len(here) - 1
    assert helpers() == []
    assert numbers(together.folder) == alone


def test_the_point_of_a_helper_that_is_killed_is_done_by_the_others(config, monkeypatch, alone):
    killed = []

    def has_begun_one(folder: Path) -> bool:
        return any(done and f"epoch_{EPOCHS:04}" not in done for done in epochs_below(folder))

    def kill() -> None:
        killed.extend(helpers())
        kill_when(has_begun_one, killed[0], trials(config))

    here = when_a_helper_trains(grad_blend, trials(config), monkeypatch, kill)
    result = run_grad_blend(config)
    assert len(killed) == 1
    assert len(here) - 1 >= 5
    log = (result.folder / "run.log").read_text()
    assert "A worker ended early" in log
    assert "goes on after epoch" in log, "the helper was at work on it"
    assert numbers(result.folder) == alone


def test_an_error_in_the_study_ends_its_helpers(config, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(grad_blend, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run_grad_blend(config)
    assert helpers() == []


def test_how_many_run_at_once_follows_the_settings_the_cores_and_the_memory(tiny_config, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 8)
    quick = dataclasses.replace(tiny_config, profile="quick")
    monkeypatch.setattr(workers, "free_bytes", lambda device: 64e9)
    assert workers.number(dataclasses.replace(tiny_config, workers=3), 10) == 3
    assert workers.number(dataclasses.replace(tiny_config, workers=3), 2) == 2
    assert workers.number(tiny_config, 10) == 1, "a smoke run starts no helper unasked"
    assert workers.number(quick, 100) == 8
    monkeypatch.setattr(workers, "free_bytes", lambda device: 3.5e9)
    assert workers.number(quick, 100) == 2
    monkeypatch.setattr(workers, "free_bytes", lambda device: 0)
    assert workers.number(quick, 100) == 1


def test_a_larger_grid_gets_more_workers_and_a_smaller_one_keeps_them(tiny_config, monkeypatch, tmp_path):
    made = []

    class Pool:
        def __init__(self, config, count, progress):
            self.size = count
            made.append(count)

        def work_off(self, grid, points, run):
            pass

        def steps_of_helpers(self):
            return []

        def close(self):
            made.append("closed")

    monkeypatch.setattr(workers, "Pool", Pool)
    config = dataclasses.replace(tiny_config, workers=8).resolved()
    with Session(config, None, Accelerator(cpu=True), tmp_path, None) as session:
        for count in (1, 2, 5, 3):
            session.grid({"seed": range(count)}, lambda folder, seed: {"seed": seed})
    assert made == [2, "closed", 5, "closed"]


def test_a_point_alone_has_all_threads_and_several_have_their_share(tiny_config, monkeypatch):
    monkeypatch.setattr(workers, "_start", lambda config, threads: pytest.skip("no helper is to start"))
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        pool = workers.Pool(tiny_config.resolved(), 1, Progress(0, shown=False))
        torch.set_num_threads(2)
        for points in ([{"alpha": 0.5}], [{"alpha": 0.5}, {"alpha": 1.0}]):
            pool.work_off(1, points, lambda point: seen.append(torch.get_num_threads()))
        assert (seen, torch.get_num_threads()) == ([4, 2, 2], 2)
        pool.close()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_two_ways_to_share_at_once_are_refused_in_one_sentence(tiny_config):
    both = dataclasses.replace(tiny_config, workers=2, processes=2)
    with pytest.raises(ValueError, match="processes, workers: each is a way of its own"):
        both.resolved()


def test_a_helper_at_a_grids_end_waits_for_the_point_that_the_studys_own_process_has(tiny_config):
    pool, answers, askers = workers.Pool(tiny_config.resolved(), 1, Progress(0, shown=False)), [], []

    def ask():
        with pool._lock:
            answers.append(pool._point_for(1, 1))

    def run(point):
        askers.append(threading.Thread(target=ask, daemon=True))
        askers[0].start()
        askers[0].join(0.3)
        assert answers == [], "it would go on, and train this point a second time"

    pool.work_off(1, [{"alpha": 0.5}], run)
    askers[0].join(10)
    pool.close()
    assert answers == [None]


def test_a_helper_that_fails_at_an_import_says_why():
    class Config:
        def to_dict(self):
            return {}

    Config.__module__ = "bklm.nowhere"
    helper = workers._start(Config(), 1)
    helper.wait(120)
    assert "No module named 'bklm.nowhere'" in workers._last_words(helper)
    helper.errors.close()
