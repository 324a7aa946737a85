"""A pool for kernels that hold no GIL, and a scratch buffer for each thread.

Not numba's parallel mode: its default layer on Colab, workqueue, aborts when two Python threads call it at once (two
autograd engines, a data loader beside a training loop), and OpenMP does not survive a fork. Here any number of threads
may call; a forked child starts with an empty pool; ``torch.set_num_threads`` is obeyed, so that data loader workers,
where torch sets it to 1, stay single-threaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_local = threading.local()


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="bklm")
        return _pool


def scratch(length: int, dtype: type[np.floating]) -> np.ndarray:
    """An uninitialised buffer (length,) of this thread, the same one at every call."""
    buffers = _local.__dict__
    if dtype not in buffers:
        buffers[dtype] = np.zeros(length, dtype)
    return buffers[dtype]


def split(kernel: Callable[[int, int], None], n: int, worth_it: bool) -> None:
    """kernel(first, last) over 0 <= first < last <= n, in one call, or where ``worth_it`` one call for each thread."""
    parts = min(torch.get_num_threads(), n) if worth_it else 1
    if parts <= 1:
        kernel(0, n)
        return
    edges = [n * i // parts for i in range(parts + 1)]
    rest = [_executor().submit(kernel, edges[i], edges[i + 1]) for i in range(1, parts)]
    try:
        kernel(0, edges[1])
    finally:
        for part in rest:
            part.result()
