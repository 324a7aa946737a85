"""The bookkeeping of a shared grid: every point once, whatever interrupts it. Optuna's memory stands in for PostgreSQL."""

from __future__ import annotations

import contextlib

import pytest
from optuna.storages import InMemoryStorage

from bklm.harness import grid_storage
from bklm.harness.grid import Sweep

GRID = {"alpha": [0.0, 0.5, 1.0], "seed": [0, 1]}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """One storage for all sweeps of a test."""
    storage = InMemoryStorage()
    monkeypatch.setattr(grid_storage, "postgresql", lambda address: contextlib.nullcontext(storage))


def sweep() -> Sweep:
    return Sweep("postgresql://me@host/sweeps", "test", GRID)


def value(point):
    return point["alpha"] + point["seed"]


@pytest.mark.parametrize("fatal_call", [1, 3, 6])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_any_interruption_every_point_is_evaluated_to_its_end_exactly_once(fatal_call, error):
    ended, calls = [], []

    def evaluate(point):
        calls.append(point)
        if len(calls) == fatal_call:
            raise error("stop")
        ended.append(tuple(point.values()))
        return value(point)

    with pytest.raises(error):
        sweep().run(evaluate)
    again = sweep()
    assert len(again.missing()) == 6 - (fatal_call - 1)
    again.run(evaluate)
    assert sorted(ended) == [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
    assert again.missing() == []


def test_a_finished_sweep_evaluates_nothing_and_hands_out_what_was_found():
    sweep().run(value, lambda point: {"found": value(point)})
    again = sweep()
    again.run(lambda point: pytest.fail("evaluated again"))
    assert {tuple(p.values()): r["found"] for p, r in again.results()} == {
        (a, s): a + s for a in GRID["alpha"] for s in GRID["seed"]
    }
