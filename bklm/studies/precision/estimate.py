"""How long the precision study will take on this machine, at most."""

from __future__ import annotations

import functools

from bklm.harness.estimate import best_of
from bklm.harness.measure import FEWEST_REPEATS
from bklm.studies.precision import grid as precision_grid
from bklm.studies.precision.cells import CLAIM_PATIENCE, LOOP_ACCURACY_N, MOE_EXPERTS, ROWS, accuracy_rows
from bklm.studies.precision.config import PrecisionConfig
from bklm.studies.precision.run import device_of

TIMED_N, EXACT_N = (
    256,
    16,
)  # long enough that a call is more work than overhead; 50 digits are slow from the first position
ARMS = 4  # of a cell outside the grid, about


def estimated_minutes(config: PrecisionConfig) -> float:
    """Minutes that a resolved config's measurements take; compiling and memory are left out.

    The first call times every way of the grid once or twice (seconds); later ones remember it.

    Raises:
        ValueError: a device that is not to be had.
    """
    exact, calls = _speed(device_of(config.device))
    seconds = 0.0
    for n in config.sizes:
        rows = accuracy_rows(n)
        once = {name: call * n / TIMED_N for name, call in calls.items()}
        compared = sum(
            call for (recursion, _), call in once.items()
            if n <= LOOP_ACCURACY_N or recursion != precision_grid.THETA_PHI_LOOP
        )  # fmt: skip
        seconds += len(config.shifts) * (
            (exact * n * rows if n <= config.reference_n else 0.0)
            + compared * rows / ROWS
            + sum(_timed(call, config) for call in once.values())
        )
    patient = CLAIM_PATIENCE * (1 + 1 + len(MOE_EXPERTS) + 1) + 10  # total, mixed, moe, architecture; model
    seconds += ARMS * config.seconds * (2 * len(config.batch_sizes) + patient)
    return seconds / 60


def _timed(call: float, config: PrecisionConfig) -> float:
    """Seconds for all timed calls of one way that takes ``call`` seconds: none where even the fewest would not fit."""
    if call * FEWEST_REPEATS > config.seconds:
        return 0.0
    return call * (1 + min(config.repeats, max(FEWEST_REPEATS, config.seconds / call)))


@functools.lru_cache
def _speed(device: str) -> tuple[float, dict[tuple[str, str], float]]:
    """Seconds per position of the exact answer, and per call of every way at TIMED_N."""
    short = precision_grid.Problem.make(1, EXACT_N, 1.0, 0)
    exact = best_of(lambda: precision_grid.truth(short, EXACT_N)) / EXACT_N
    problem = precision_grid.Problem.make(ROWS, TIMED_N, 1.0, 0, device)
    return exact, {name: best_of(arm) for name, arm in precision_grid.arms(problem).items()}
