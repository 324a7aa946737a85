"""A grid of trials kept in an Optuna study, so that a sweep that was stopped goes on with what is missing."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import GridSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bklm.checkpoints import set_aside

log = logging.getLogger(__name__)


class Sweep:
    """Every point of a grid, each to be evaluated once.

    The caller must hold the study folder's lock: trials that the journal calls running are then the leftovers of a killed
    process, and are queued again.
    """

    def __init__(self, journal: Path, grid: Mapping[str, Sequence[Any]]) -> None:
        self.grid = {name: list(values) for name, values in grid.items()}
        self.points = [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.parent.mkdir(parents=True, exist_ok=True)
        for leftover in journal.parent.glob(f"{journal.name}.lock*"):
            leftover.unlink()
        _check_journal(journal)
        self._study = optuna.create_study(
            study_name=journal.stem,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=GridSampler(self.grid, seed=0),
            load_if_exists=True,
        )
        self._queue_unfinished()

    def missing(self) -> list[dict[str, Any]]:
        """Points without a completed trial, in grid order."""
        completed = [t.params for t in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
        return [p for p in self.points if p not in completed]

    def run(self, evaluate: Callable[[dict[str, Any]], float]) -> None:
        """Call ``evaluate(point) -> value`` for every missing point; an exception ends the sweep, and is resumable."""

        def objective(trial: optuna.Trial) -> float:
            return evaluate({n: trial.suggest_categorical(n, values) for n, values in self.grid.items()})

        while self.missing():
            # One at a time: the sampler would call the sweep finished while requeued trials still wait.
            self._study.optimize(objective, n_trials=1)

    def _queue_unfinished(self) -> None:
        """Queue again what a kill, an interrupt or an error left without a result: the sampler counts it as visited."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
        trials = self._study.get_trials(deepcopy=False)
        served = {_grid_id(t) for t in trials if t.state in (TrialState.COMPLETE, TrialState.WAITING)}
        for grid_id in sorted({_grid_id(t) for t in trials if t.state == TrialState.FAIL} - served - {None}):
            source = next(t for t in trials if _grid_id(t) == grid_id)
            self._study.add_trial(
                optuna.create_trial(state=TrialState.WAITING, system_attrs=dict(source.system_attrs))
            )


def _grid_id(trial: FrozenTrial) -> int | None:
    return trial.system_attrs.get("grid_id")


def _check_journal(journal: Path) -> None:
    """Set a journal aside whose last write was cut short or that holds something else. Results are in the trial folders."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    try:
        for line in content.splitlines():
            json.loads(line)
        damage = None if not content or content.endswith(b"\n") else "its last line is cut short"
    except ValueError as error:
        damage = f"not a journal line: {error}"
    if damage:
        set_aside(journal, damage)
        log.warning("The sweep goes on with a new journal; finished trials are read from their folders.")
