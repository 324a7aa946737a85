"""The sweep's bookkeeping: every point once, whatever interrupts it."""

from __future__ import annotations

import errno
import os

import pytest

from bklm.harness import grid_storage as sweep_storage
from bklm.harness.grid import Sweep

GRID = {"alpha": [0.0, 0.5, 1.0], "seed": [0, 1]}


def value(point):
    return point["alpha"] + point["seed"]


@pytest.mark.parametrize("fatal_call", [1, 3, 6])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_any_interruption_every_point_is_evaluated_to_its_end_exactly_once(tmp_path, fatal_call, error):
    ended, calls = [], []

    def evaluate(point):
        calls.append(point)
        if len(calls) == fatal_call:
            raise error("stop")
        ended.append(tuple(point.values()))
        return value(point)

    with pytest.raises(error):
        Sweep(tmp_path / "j.journal", GRID).run(evaluate)
    again = Sweep(tmp_path / "j.journal", GRID)
    assert len(again.missing()) == 6 - (fatal_call - 1)
    again.run(evaluate)
    assert sorted(ended) == [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
    assert again.missing() == []


def test_a_finished_sweep_evaluates_nothing(tmp_path):
    Sweep(tmp_path / "j.journal", GRID).run(value)
    Sweep(tmp_path / "j.journal", GRID).run(lambda point: pytest.fail("evaluated again"))


def test_a_trial_that_a_killed_process_left_running_is_done_again(tmp_path):
    sweep = Sweep(tmp_path / "j.journal", GRID)
    trial = sweep._study.ask()  # a process that dies here leaves the trial running for ever
    for name, values in GRID.items():
        trial.suggest_categorical(name, values)
    points = []
    Sweep(tmp_path / "j.journal", GRID).run(lambda p: points.append(p) or value(p))
    assert len(points) == 6


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_truncated_journal_is_set_aside_reported_and_the_sweep_starts_a_new_one(tmp_path, keep, caplog):
    journal = tmp_path / "j.journal"
    Sweep(journal, GRID).run(value)
    content = journal.read_bytes()
    journal.write_bytes(content[: int(len(content) * keep)].rstrip(b"\n"))
    sweep = Sweep(journal, GRID)
    assert len(sweep.missing()) == 6
    assert (tmp_path / "j.journal.damaged-1").exists()
    assert "set aside" in caplog.text


@pytest.mark.parametrize("error", [MemoryError, PermissionError])
def test_a_journal_that_cannot_be_read_just_now_is_not_set_aside(tmp_path, monkeypatch, error):
    def fail(path, **settings):
        raise error("not now")

    journal = tmp_path / "j.journal"
    Sweep(journal, GRID).run(value)
    with monkeypatch.context() as patch:
        patch.setattr(sweep_storage, "JournalFileBackend", fail)
        with pytest.raises(error, match="not now"):
            Sweep(journal, GRID)
    assert Sweep(journal, GRID).missing() == []


def test_a_stale_lock_of_a_killed_process_does_not_block(tmp_path):
    journal = tmp_path / "j.journal"
    Sweep(journal, GRID)
    (tmp_path / "j.journal.lock").symlink_to(journal)
    sweep = Sweep(journal, GRID)
    (tmp_path / "j.journal.lock").symlink_to(journal)  # nor one that appears later
    sweep.run(value)
    assert sweep.missing() == []


def test_a_sweep_runs_and_resumes_on_a_mount_without_links_such_as_colabs_drive(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    ended = []

    def evaluate(point):
        if len(ended) == 3:
            raise RuntimeError("stop")
        ended.append(tuple(point.values()))
        return value(point)

    with pytest.raises(RuntimeError, match="stop"):
        Sweep(tmp_path / "j.journal", GRID).run(evaluate)
    Sweep(tmp_path / "j.journal", GRID).run(lambda p: ended.append(tuple(p.values())) or value(p))
    assert sorted(ended) == [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
    assert [p.name for p in tmp_path.iterdir()] == ["j.journal"]


def test_a_process_killed_in_the_last_trial_of_the_grid_leaves_a_sweep_that_goes_on(tmp_path):
    sweep = Sweep(tmp_path / "j.journal", GRID)
    for _ in range(len(sweep.points)):  # all points given out, none of them ended
        trial = sweep._study.ask()
        for name, values in GRID.items():
            trial.suggest_categorical(name, values)
    points = []
    Sweep(tmp_path / "j.journal", GRID).run(lambda p: points.append(p) or value(p))
    assert sorted(tuple(p.values()) for p in points) == [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
