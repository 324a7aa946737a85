"""The bookkeeping of a shared grid: every point once, whatever interrupts it. A file of SQLite stands in for PostgreSQL."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from bklm.sharing import database
from bklm.sharing import sweep as sweeps
from bklm.sharing.sweep import RESULT, Sweep

GRID = {"alpha": [0.0, 0.5, 1.0], "seed": [0, 1]}


@pytest.fixture(autouse=True)
def storage(monkeypatch, tmp_path):
    """One storage for all sweeps of a test."""
    storage = RDBStorage(f"sqlite:///{tmp_path}/sweeps.db", heartbeat_interval=15, grace_period=60)
    monkeypatch.setattr(database, "postgresql", lambda address: contextlib.nullcontext(storage))
    return storage


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
    assert len(again.results()) == fatal_call - 1
    again.run(evaluate)
    assert sorted(ended) == [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
    assert len(again.results()) == 6


def test_a_finished_sweep_evaluates_nothing_and_hands_out_what_was_found():
    sweep().run(value, lambda point: {"found": value(point)})
    again = sweep()
    again.run(lambda point: pytest.fail("evaluated again"))
    assert {tuple(p.values()): r["found"] for p, r in again.results()} == {
        (a, s): a + s for a in GRID["alpha"] for s in GRID["seed"]
    }


def fail_first(sweep_of_one):
    """Leave the sweep's first point lost and deal all others to a worker that ends them."""
    calls = []

    def evaluate(point):
        calls.append(point)
        if len(calls) == 1:
            raise RuntimeError("stop")
        return value(point)

    with pytest.raises(RuntimeError):
        sweep_of_one.run(evaluate)
    return calls[0]


def test_of_two_workers_that_take_a_lost_point_at_once_the_later_gives_way_and_returns_when_the_other_dies(
    monkeypatch,
):
    worker = sweep()
    lost = fail_first(worker)
    trials, place = worker._trials, worker.points.index(lost)
    create, rivals, waited = trials.create, [], []

    def create_after_a_rival(template=None):
        if template is not None and not rivals:
            rivals.append(create(create_trial(state=TrialState.RUNNING, user_attrs={RESULT: [place, None]})))
        return create(template)

    def wait(seconds):
        waited.append(evaluated.count(lost))
        trials.storage.set_trial_state_values(rivals[0][0], TrialState.FAIL)

    monkeypatch.setattr(trials, "create", create_after_a_rival)
    monkeypatch.setattr(sweeps.time, "sleep", wait)
    evaluated = []
    worker.run(lambda point: evaluated.append(point) or value(point))
    assert waited == [0]
    assert len(evaluated) == 6
    assert evaluated.count(lost) == 1


def test_a_trial_whose_worker_was_killed_before_its_first_heartbeat_is_taken_over(monkeypatch):
    worker = sweep()
    worker._trials.create()
    monkeypatch.setattr(database, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(sweeps, "POLL_SECONDS", 0.02)
    evaluated = []
    worker.run(lambda point: evaluated.append(tuple(point.values())) or value(point))
    assert sorted(evaluated) == sorted(tuple(p.values()) for p in worker.points)


def test_what_a_point_costs_the_database_does_not_grow_with_the_points_that_are_done(storage):
    statements, told = [0], []

    @sqlalchemy.event.listens_for(storage.engine, "after_cursor_execute")
    def count(*_):
        statements[0] += 1

    many = Sweep("postgresql://me@host/sweeps", "many", {"alpha": [0.5], "seed": list(range(30))})
    many.run(lambda point: told.append(statements[0]) or 0.0)
    costs = [after - before for before, after in itertools.pairwise(told)]
    assert len(costs) == 29
    # The first point also asks what kind of parameters the study has.
    assert set(costs[1:]) == {costs[-1]}
    # 15 with optuna 5.0, 18 with 4.3.
    assert costs[-1] <= 18


def test_what_the_database_reads_for_a_point_does_not_grow_with_the_points_that_are_done(storage):
    """By the steps of SQLite's machine: a statement that counts all earlier trials is one statement, too."""
    steps, told = [0], []

    @sqlalchemy.event.listens_for(storage.engine, "checkout")
    def count(connection, *_):
        connection.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)

    many = Sweep("postgresql://me@host/sweeps", "many", {"alpha": [0.5], "seed": list(range(1000))})
    with many._trials.engine.begin() as connection:
        row = {"study": many._trials.id}
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO trials (number, study_id, state) VALUES (:number, :study, 'COMPLETE')"
            ),
            [row | {"number": number} for number in range(20)],
        )
    many._is_dealt = False

    def spent() -> int:
        before = steps[0]
        told.append(many._take())
        return steps[0] - before

    spent()
    few = spent()
    with many._trials.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO trials (number, study_id, state) VALUES (:number, :study, 'COMPLETE')"
            ),
            [row | {"number": number} for number in range(22, 900)],
        )
    assert 0 < spent() <= 1.2 * few
    assert [number for _, number in told] == [20, 21, 900]


class Away(Exception):
    """What a driver says of a server that is gone."""


def lose(call, plan):
    """``call``, of which the first attempts fail: at "nothing" before it did anything, at "answer" after it did all."""

    def losing(*words):
        lost = plan.pop(0) if plan else None
        told = None if lost == "nothing" else call(*words)
        if lost:
            gone = sqlalchemy.exc.OperationalError("SELECT 1", {}, Away("the server closed the connection"))
            raise StorageInternalError("An exception is raised during the commit.") from gone
        return told

    return losing


def test_a_database_that_goes_away_is_waited_for_and_an_answer_that_was_lost_stores_nothing_twice(
    monkeypatch, caplog
):
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    worker = sweep()
    storage = worker._trials.storage
    for name, plan in {
        "set_trial_param": ["answer"],
        "set_trial_user_attr": ["nothing"],
        "set_trial_state_values": ["nothing", "answer"],
    }.items():
        monkeypatch.setattr(storage, name, lose(getattr(storage, name), plan))
    evaluated = []
    worker.run(lambda point: evaluated.append(tuple(point.values())) or value(point), lambda point: point)
    assert len(evaluated) == len(set(evaluated)) == 6
    assert sorted(tuple(p.values()) for p, _ in worker.results()) == sorted(evaluated)
    assert all(result == point for point, result in worker.results())
    assert "The database does not answer (the server closed the connection); waiting for it." in caplog.text


def test_what_is_no_matter_of_waiting_is_raised_at_once():
    def refused():
        raise sqlalchemy.exc.DataError("INSERT", {}, Away("value too long"))

    with pytest.raises(sqlalchemy.exc.DataError):
        database.patiently(refused)
