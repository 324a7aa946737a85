#!/usr/bin/env bash
# optuna 5.0.0, RDBStorage: each new trial reads every older one of its study, while all other workers wait for it
#
# Source: optuna.storages.RDBStorage.create_new_trial, which study.ask() and study.optimize() call for every trial; the storage that
#   the documentation names for workers on several machines.
# Expected: a new trial costs the same however many there are; its number is that of the last one and 1.
# Seen: the study's row is locked (SELECT ... FOR UPDATE), the trial inserted, and its number is a count of all trials of the study with
#   a smaller id, row by row. Counted in steps of SQLite's machine, a trial after 20,000 others costs more than fifty times as much as
#   one after 100: the whole of a study costs its length squared, and what grows is spent under the lock that every worker needs.
# bklm: asks for the number of the last trial in place of that count (bklm/sharing/trials.py), held by a test that counts these steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet optuna==5.0.0 sqlalchemy==2.1.9 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import optuna
import sqlalchemy

optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = optuna.storages.RDBStorage("sqlite:///trials.db")
study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "many")
steps = [0]


@sqlalchemy.event.listens_for(storage.engine, "checkout")
def count(connection, *_):
    connection.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)


def cost():
    """Steps of SQLite's machine for one new trial, and its number."""
    before = steps[0]
    trial = storage.create_new_trial(study)
    return steps[0] - before, storage.get_trial(trial).number


def fill(first, last):
    rows = [{"study": study, "number": number} for number in range(first, last)]
    with storage.engine.begin() as connection:
        statement = "INSERT INTO trials (number, study_id, state) VALUES (:number, :study, 'COMPLETE')"
        connection.execute(sqlalchemy.text(statement), rows)


cost()
fill(1, 100)
few = cost()
fill(101, 20_000)
many = cost()
print(f"trial {few[1]:,}: {few[0]:,} steps; trial {many[1]:,}: {many[0]:,} steps, {many[0] / few[0]:.0f} times as many")
assert (few[1], many[1]) == (100, 20_000)
assert many[0] > 50 * few[0]
assert many[0] > 20_000
print("As described above.")
PY
