#!/usr/bin/env bash
# optuna 5.0.0: a grid that is given in another order, or with one value more, is evaluated from the beginning
#
# Source: optuna.samplers.GridSampler and create_study(load_if_exists=True), the way to go on with a study that was stopped.
# Expected: points that the study holds as completed trials are done; a grid that has grown gets its new points only.
# Seen: the sampler compares its search space with the one that each trial was given, values in their order, and counts a trial
#   of any other one for nothing. [0.5, 0.0] after [0.0, 0.5] evaluates both again; one value more evaluates the old ones again, so
#   means over trials weigh them double. Nothing is said.
# bklm: trials of one machine are files named after their settings; for shared grids it asks which points have a completed trial
#   (bklm/sharing/sweep.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet optuna==5.0.0 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def evaluated(*grids):
    """What is evaluated with each of the grids in turn, one study."""
    storage, found = optuna.storages.InMemoryStorage(), []
    for grid in grids:
        seen = []

        def objective(trial, seen=seen):
            seen.append(trial.suggest_float("alpha", 0.0, 1.0))
            return seen[-1]

        sampler = optuna.samplers.GridSampler({"alpha": grid}, seed=0)
        study = optuna.create_study(study_name="grid", storage=storage, sampler=sampler, load_if_exists=True)
        study.optimize(objective)
        found.append(sorted(seen))
    return found


same = evaluated([0.0, 0.5], [0.0, 0.5])
turned = evaluated([0.0, 0.5], [0.5, 0.0])
grown = evaluated([0.0, 0.5], [0.0, 0.5, 1.0])
print(f"second round of the same grid: {same[1]}; of the grid in another order: {turned[1]}; with a third value: {grown[1]}")
assert len(same[1]) <= 1
assert turned[1] == [0.0, 0.5]
assert grown[1] == [0.0, 0.5, 1.0]
print("As described above.")
PY
