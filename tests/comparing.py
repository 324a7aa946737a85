"""Comparisons of times: measured again before a test fails, since what else a machine does only hides what is faster."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

PAUSES = (0, 1, 2, 4, 8)
"""Seconds before each measurement."""


def assert_exceeds(measure: Callable[[], float], least: float) -> None:
    """Fail where none of several measurements of a ratio exceeds ``least``."""
    found = []
    for pause in PAUSES:
        time.sleep(pause)
        found.append(measure())
        if found[-1] > least:
            return
    pytest.fail(f"measured {len(found)} times: {found}; each should exceed {least}")


def cores_given(threads: int) -> float:
    """Processor seconds a second that so many busy threads of this process get: a quota, and who else is at work, count."""
    data = bytes(2**20)

    def work(until: float) -> None:
        # Hashing holds no lock, so that the threads run at once.
        while time.perf_counter() < until:
            hashlib.sha256(data)

    with ThreadPoolExecutor(threads) as pool:
        started, before = time.perf_counter(), time.process_time()
        list(pool.map(work, [started + 0.2] * threads))
        return (time.process_time() - before) / (time.perf_counter() - started)
