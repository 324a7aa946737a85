"""Other processes at the moment that a test needs: one stopped within a training, a study's helper that has begun one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

LONGEST = 300  # seconds, on a machine that may be busy


def kill_within_a_training(process: subprocess.Popen, folder: Path) -> None:
    """Kill a study's process with signal 9 when a training below ``folder`` has done its first epoch and not its second."""
    kill_when(_is_within_a_training, process, folder)
    process.wait()


def kill_when(
    is_time: Callable[[Path], bool], process: subprocess.Popen | psutil.Process, folder: Path
) -> None:
    """Send a process that works below ``folder`` signal 9 at a moment when ``is_time(folder)``."""
    deadline = time.monotonic() + LONGEST
    while not (is_time(folder) and _stands_still(is_time, process.pid, folder)):
        ended = psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert not ended, "it ended before it could be killed"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)


def _stands_still(is_time: Callable[[Path], bool], pid: int, folder: Path) -> bool:
    # It may have gone on meanwhile; where it stands still, what is seen holds until it is killed.
    os.kill(pid, signal.SIGSTOP)
    if is_time(folder):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _is_within_a_training(folder: Path) -> bool:
    return {"epoch_0001"} in epochs_below(folder)


def epochs_below(folder: Path) -> list[set[str]]:
    """The first words of the names of epochs' folders, by the folder that they lie in."""
    # While folders come and go: a glob stops at one that is renamed meanwhile, a walk does not.
    return [{name[:10] for name in folders if name.startswith("epoch_")} for _, folders, _ in os.walk(folder)]


def when_a_helper_trains(
    run: ModuleType, trials: Path, patch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None
) -> list[str]:
    """Before the first ``run.train`` of this process, wait until its helper, which imports torch first, has done an epoch of
    a trial below ``trials``, and call ``then``. Returns the labels of what this process trains, as they come."""
    labels: list[str] = []
    real = run.train

    def train(*arguments, **options):
        deadline = time.monotonic() + LONGEST
        while not labels and not list(trials.glob("*/checkpoints/epoch_*")):
            assert time.monotonic() < deadline, "the helper trained nothing"
            time.sleep(0.005)
        if not labels:
            then()
        labels.append(options["label"])
        return real(*arguments, **options)

    patch.setattr(run, "train", train)
    return labels
