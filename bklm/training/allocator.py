"""What a training frees: a step's memory is kept for the next one, and its end walks through nobody else's objects.

By default glibc, the C library of Linux, gives the end of its heap back to the system when much of it is free, and maps and
unmaps every large block anew. A training step frees all that its forward has made, so the next one waits for the same pages
again: measured once by hand on two cores, 300 MB of page faults a step and a sixth of its time. The process keeps its peak
size instead, which it would reach again at the next step anyway.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**30
"""Bytes at the heap's end, and in one block, from which on memory is given back."""
SECONDS_BETWEEN_COLLECTIONS = 10.0
_collected = -math.inf  # when, on the monotonic clock
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory up to a GiB, for the rest of the process; whether it does.

    Where somebody has chosen by an environment variable, and where the C library is another, nothing is changed.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_MMAP_THRESHOLD, _KEPT))


def forget_training(accelerator: Accelerator) -> None:
    """``accelerator.free_memory()``, with its garbage collection on a CPU at most every ten seconds.

    That walks through every object of the process, torch's modules too: measured once by hand, 0.2 s after each training
    of a small study, a third of its time. A training's model and optimiser are in no cycle, so they are gone without it; a
    GPU's cache is emptied after it.
    """
    global _collected
    is_due = time.monotonic() - _collected >= SECONDS_BETWEEN_COLLECTIONS
    # Where somebody has frozen what there was, it walks through little.
    if is_due or accelerator.device.type != "cpu" or gc.get_freeze_count():
        accelerator.free_memory()
        _collected = time.monotonic()
        return
    # Nothing is left to walk through meanwhile; what was young is looked at together with the old objects afterwards.
    gc.freeze()
    try:
        accelerator.free_memory()
    finally:
        gc.unfreeze()
