"""The C library's memory on Linux: what a step frees is kept for the next one.

By default glibc gives the end of its heap back to the system when much of it is free, and maps and unmaps every large block
anew. A training step frees all that its forward has made, so the next one waits for the same pages again: measured once by
hand on two cores, 300 MB of page faults a step and a sixth of its time. The process keeps its peak size instead, which it
would reach again at the next step anyway.
"""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**30
"""Bytes at the heap's end, and in one block, from which on memory is given back."""
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
