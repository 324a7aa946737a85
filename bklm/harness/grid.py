"""A grid of trials that several machines share, kept in an Optuna study in a PostgreSQL database.

Any number of workers take points of one grid; each point is evaluated once. What makes that sure: Optuna numbers trials
under a lock, and the grid sampler gives the first trials one point each by their numbers. A worker that dies is found by
its silence (heartbeat); its point is queued again, perhaps by two workers at once, and of trials of one point that are
alive the one with the lowest number stays. On one machine nothing of this is needed: a trial's file says that it is done.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from bklm.harness import grid_storage

log = logging.getLogger(__name__)


POLL_SECONDS = 1.0  # how often a worker with nothing to do looks at the others' trials
# User attributes: what other workers need of a trial; that it was queued again.
RESULT, QUEUED = (
    "result",
    "queued",
)


class _OnceEach(GridSampler):
    """Gives the first trials one point each, by their numbers; ``Sweep.run`` decides when the sweep ends."""

    def after_trial(self, *_: Any) -> None:
        """Optuna's would stop the loop, and takes every trial, those queued again too, for one of its own."""


class Sweep:
    """Every point of a grid, each to be evaluated once by one of those who share it."""

    def __init__(self, address: str, name: str, grid: Mapping[str, Sequence[Any]]) -> None:
        """The sweep that all workers with this ``name`` share in the PostgreSQL database at ``address``.

        Raises:
            ValueError, ConnectionError: see ``bklm.harness.grid_storage.postgresql``.
        """
        with grid_storage.postgresql(address) as storage:
            self._open(storage, name, grid)

    def _open(self, storage: BaseStorage, name: str, grid: Mapping[str, Sequence[Any]]) -> None:
        self.grid = {key: list(values) for key, values in grid.items()}
        self.points = [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            study_name=name, storage=storage, sampler=_OnceEach(self.grid, seed=0), load_if_exists=True
        )

    def missing(self) -> list[dict[str, Any]]:
        """Points without a completed trial, in grid order."""
        completed = [t.params for t in self._trials(TrialState.COMPLETE)]
        return [p for p in self.points if p not in completed]

    def results(self) -> list[tuple[dict[str, Any], Any]]:
        """(point, result) of every completed trial, whichever worker did it."""
        return [(t.params, t.user_attrs[RESULT]) for t in self._trials(TrialState.COMPLETE)]

    def run(
        self,
        evaluate: Callable[[dict[str, Any]], float],
        result_of: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        """Call ``evaluate(point) -> value`` for every missing point that no other worker has, until all are done by someone.

        An exception ends the sweep here; its point goes to the next who asks.

        Args:
            result_of: what other workers are to know of a point that was just evaluated, as JSON has it.
        """

        def objective(trial: optuna.Trial) -> float:
            if trial.number >= len(self.points) and QUEUED not in trial.user_attrs:
                raise optuna.TrialPruned  # another worker took the last point between our look and our asking
            point = {n: trial.suggest_categorical(n, values) for n, values in self.grid.items()}
            if self._is_taken(point, trial.number):
                raise optuna.TrialPruned
            value = evaluate(point)
            try:
                trial.set_user_attr(RESULT, result_of and result_of(point))
            except UpdateFinishedTrialError:
                was_taken_over.append(point)
                raise
            return value

        was_taken_over: list[dict[str, Any]] = []
        told = False
        while self.missing():
            self._fail_silent_trials()
            if not self._is_work_left() and not self._queue_a_lost_point():
                if not told:
                    log.info("Waiting for %d trials that other workers are running.", len(self.missing()))
                told = True
                time.sleep(POLL_SECONDS)
                continue
            try:
                self._study.optimize(objective, n_trials=1)
            except (UpdateFinishedTrialError, ValueError):  # Optuna's verdict comes after the trial's end
                if not was_taken_over:
                    raise
                log.warning(
                    "This worker was silent for so long that others took over trial %s; its own result is in its folder.",
                    was_taken_over.pop(),
                )

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _is_work_left(self) -> bool:
        """Whether a trial waits in the queue, or the sampler still has points that no trial ever had."""
        return bool(self._trials(TrialState.WAITING)) or len(self._trials()) < len(self.points)

    def _queue_a_lost_point(self) -> bool:
        """Queue a point again that a kill, an interrupt or an error left without a result; False when there is none."""
        alive = [t.params for t in self._trials(TrialState.COMPLETE, TrialState.RUNNING)]
        lost = [p for p in self.points if p not in alive]
        if lost:
            self._study.enqueue_trial(lost[0], user_attrs={QUEUED: True})
        return bool(lost)

    def _is_taken(self, point: dict[str, Any], number: int) -> bool:
        """Whether another trial has this point: done, or under way with a lower number."""
        deadline = time.monotonic() + grid_storage.GRACE_SECONDS
        while True:
            earlier = [t for t in self._trials(TrialState.RUNNING) if t.number < number]
            same = [t for t in earlier if t.params == point]
            same += [t for t in self._trials(TrialState.COMPLETE) if t.params == point]
            nameless = [t for t in earlier if len(t.params) < len(self.grid)]  # it is about to say its point
            if same or not nameless or time.monotonic() > deadline:
                return bool(same)
            time.sleep(0.1)

    def _fail_silent_trials(self) -> None:
        """Mark what workers left running that have not been heard of for the grace period."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(self._study)
