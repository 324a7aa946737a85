"""The trials of one shared grid: an Optuna study in a database.

A trial is written through Optuna's storage, so that Optuna and its dashboard read the study as any other. What is asked of
many trials at once is one query on Optuna's tables: Optuna would read each of them whole.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial
from sqlalchemy.orm import Session

from bklm.sharing.database import patiently


def _number_after_the_last(self: TrialModel, session: Session) -> int:
    """How many trials of its study are older than a trial, asked of the last of them.

    Optuna numbers a new trial so, while everybody else waits for the study's lock, and counts them one by one
    (findings/optuna_counts_older_trials.sh). They are numbered in the order of their ids, so the number of the one before and
    1 is the same.
    """
    older = session.query(TrialModel.number).filter(
        TrialModel.study_id == self.study_id, TrialModel.trial_id < self.trial_id
    )
    last = older.order_by(TrialModel.trial_id.desc()).limit(1).scalar()
    return 0 if last is None else last + 1


TrialModel.count_past_trials = _number_after_the_last


class Row(NamedTuple):
    """A trial: its id, number and state; a user attribute (None: it has none); whether it never gave a heartbeat."""

    trial: int
    number: int
    state: str
    attribute: Any
    is_mute: bool


class Trials:
    """The trials of the study ``name``, which is made where it is missing."""

    def __init__(self, database: RDBStorage, name: str) -> None:
        self.engine = database.engine
        self.storage = optuna.storages.get_storage(database)
        self._study = optuna.create_study(study_name=name, storage=self.storage, load_if_exists=True)
        self.id = self.storage.get_study_id_from_name(name)

    def create(self, template: FrozenTrial | None = None) -> tuple[int, int]:
        """A new trial: its id, and its number."""
        trial = self.storage.create_new_trial(self.id, template)
        return trial, self._ask("SELECT number FROM trials WHERE trial_id = :trial", trial=trial)[0][0]

    def count(self, *, completed: bool = False) -> int:
        """How many trials there are, or how many of them are completed."""
        only = "AND state = 'COMPLETE'" * completed
        return self._ask(f"SELECT count(*) FROM trials WHERE study_id = :study {only}")[0][0]

    def attributes_of_completed(self, key: str) -> list[Any]:
        """A user attribute of every completed trial, in the order of their numbers."""
        found = self._ask(
            "SELECT a.value_json FROM trials t JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = :key "
            "WHERE t.study_id = :study AND t.state = 'COMPLETE' ORDER BY t.number",
            key=key,
        )
        return [json.loads(value) for (value,) in found]

    def not_simply_done(self, key: str, first: int) -> list[Row]:
        """Trials that are not completed, and all with numbers from ``first`` on; each with one user attribute."""
        found = self._ask(
            "SELECT t.trial_id, t.number, t.state, a.value_json, h.trial_id IS NULL FROM trials t "
            "LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = :key "
            "LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
            "WHERE t.study_id = :study AND (t.state <> 'COMPLETE' OR t.number >= :first)",
            key=key,
            first=first,
        )
        return [Row(*row[:3], row[3] and json.loads(row[3]), row[4]) for row in found]

    def heartbeat(self, trial: int) -> None:
        """Record that a trial is alive, and hold no connection until the next time: a server has few."""
        with suppress(StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            self.storage.record_heartbeat(trial)
        self.engine.dispose()

    def fail_silent(self) -> None:
        """Mark what workers left running that have not been heard of for the grace period."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            patiently(fail_stale_trials, self._study)

    def _ask(self, query: str, **words: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(sqlalchemy.text(query), {"study": self.id} | words))
