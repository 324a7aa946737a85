"""A grid of trials that several machines share, kept in an Optuna study in a PostgreSQL database.

Any number of workers take points of one grid; each point is evaluated once. What makes that sure: Optuna numbers trials
under a lock, and the trial with number n has the nth point, so that taking one reads the last number alone. When all points
are dealt, those are dealt again whose trial failed, or fell silent (heartbeat): such a trial names its point, perhaps two
workers do so at once, and of trials of one point that are alive the one with the lowest number stays. A trial that ended
is never changed, so the result of a worker that was only asleep comes too late. On one machine nothing of this is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial

from bklm.sharing import database
from bklm.sharing.database import patiently
from bklm.sharing.trials import Trials

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # how often a worker with nothing to do looks at the others' trials
RESULT = "result"  # a trial's attribute: its point's place in the grid, and what other workers need of it


class Sweep:
    """Every point of a grid, each to be evaluated once by one of those who share it."""

    def __init__(self, address: str, name: str, grid: Mapping[str, Sequence[Any]]) -> None:
        """The sweep that all workers with this ``name`` share in the PostgreSQL database at ``address``.

        Raises:
            ValueError, ConnectionError: see ``bklm.sharing.database.postgresql``.
        """
        self.points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        self._kinds = {key: CategoricalDistribution(list(values)) for key, values in grid.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)

        def open_trials() -> Trials:
            with database.postgresql(address) as storage:
                return Trials(storage, name)

        self._trials = patiently(open_trials)
        self._is_dealt = patiently(self._trials.count) >= len(self.points)
        self._first_seen: dict[int, float] = {}

    def results(self) -> list[tuple[dict[str, Any], Any]]:
        """(point, result) of every completed trial, whichever worker did it."""
        found = patiently(self._trials.attributes_of_completed, RESULT)
        return [(self.points[place], result) for place, result in found]

    def run(
        self,
        evaluate: Callable[[dict[str, Any]], float],
        result_of: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        """Call ``evaluate(point) -> value`` for every missing point that no other worker has, until all are done by someone.

        An exception ends the sweep here; its point goes to the next who asks. A database that does not answer is waited
        for.

        Args:
            result_of: what other workers are to know of a point that was just evaluated, as JSON has it.
        """
        while (taken := self._take()) is not None:
            trial, place = taken
            point = self.points[place]
            try:
                for key, kind in self._kinds.items():
                    value = kind.to_internal_repr(point[key])
                    patiently(self._trials.storage.set_trial_param, trial, key, value, kind)
                with self._heartbeats(trial):
                    value = evaluate(point)
                    result = result_of and result_of(point)
                patiently(self._trials.storage.set_trial_user_attr, trial, RESULT, [place, result])
                self._finish(trial, TrialState.COMPLETE, [value])
            except UpdateFinishedTrialError:
                log.warning(
                    "This worker was silent for so long that others took over trial %s; its own result is in its folder.",
                    point,
                )
            except BaseException:
                with contextlib.suppress(Exception):
                    self._trials.storage.set_trial_state_values(trial, TrialState.FAIL)
                raise

    def _finish(self, trial: int, state: TrialState, values: list[float] | None = None) -> None:
        try:
            patiently(self._trials.storage.set_trial_state_values, trial, state, values)
        except UpdateFinishedTrialError:
            # Where the answer to the first attempt was lost, the second finds the trial as the first left it.
            if patiently(self._trials.storage.get_trial, trial).state != state:
                raise

    def _take(self) -> tuple[int, int] | None:
        """A trial of this worker's own and its point's place; waits for one. None when all points are done."""
        told = False
        while True:
            if not self._is_dealt:
                trial, number = patiently(self._trials.create)
                if number < len(self.points):
                    return trial, number
                self._is_dealt = True
                self._finish(trial, TrialState.PRUNED)
            if patiently(lambda: self._trials.count(completed=True)) >= len(self.points):
                return None
            alive, lost = self._alive_and_lost()
            if not lost:
                if not told:
                    log.info("Waiting for %d trials that other workers are running.", len(alive))
                told = True
                time.sleep(POLL_SECONDS)
                continue
            # Not by ``random``, whose state belongs to the trainings.
            place = secrets.choice(lost)
            template = create_trial(state=TrialState.RUNNING, user_attrs={RESULT: [place, None]})
            trial, number = patiently(self._trials.create, template)
            alive, _ = self._alive_and_lost()
            if min(alive.get(place, [-1])) == number:
                return trial, place
            with contextlib.suppress(UpdateFinishedTrialError):
                self._finish(trial, TrialState.PRUNED)

    def _alive_and_lost(self) -> tuple[dict[int, list[int]], list[int]]:
        """Numbers of unfinished trials by place; places that a kill, an interrupt or an error left without a result.

        A completed trial counts as alive with number -1. Meant for the time when every point had its first trial.
        """
        self._trials.fail_silent()
        alive: dict[int, list[int]] = {}
        ended: set[int] = set()
        for row in patiently(self._trials.not_simply_done, RESULT, len(self.points)):
            place = row.number if row.number < len(self.points) else row.attribute and row.attribute[0]
            if row.state == "RUNNING" and row.is_mute:
                # Killed before its first heartbeat, perhaps: nobody else would ever call it dead.
                since = self._first_seen.setdefault(row.trial, time.monotonic())
                if time.monotonic() - since > database.GRACE_SECONDS:
                    with contextlib.suppress(UpdateFinishedTrialError):
                        patiently(self._trials.storage.set_trial_state_values, row.trial, TrialState.FAIL)
            if place is None:
                continue
            if row.state == "RUNNING":
                alive.setdefault(place, []).append(row.number)
            elif row.state == "COMPLETE":
                alive.setdefault(place, []).append(-1)
            else:
                ended.add(place)
        return alive, [place for place in ended if place not in alive]

    @contextlib.contextmanager
    def _heartbeats(self, trial: int) -> Iterator[None]:
        """Say every few seconds that the trial is alive; one that takes less time says nothing, and is nothing to wait for."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(database.HEARTBEAT_SECONDS):
                self._trials.heartbeat(trial)

        thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
