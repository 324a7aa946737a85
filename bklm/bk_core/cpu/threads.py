"""Threads for kernels that hold no GIL, and a scratch buffer for each.

They are torch's own, where torch brings GNU's OpenMP (pip's torch on Linux): after a matrix product these wait for more
work with their core busy, and threads of a pool would have to drive them off first, 0.2 ms a call (measured once by hand).
Elsewhere, and in a forked child, which OpenMP's threads do not survive, a pool.

Not numba's parallel mode: its default layer on Colab, workqueue, aborts when two Python threads call it at once (two
autograd engines, a data loader beside a training loop). Here any number of threads may call; a forked child starts with an
empty pool; ``torch.set_num_threads`` is obeyed, so that data loader workers, where torch sets it to 1, stay
single-threaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

PARTS_PER_THREAD = 4
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_is_forked = False
_scratch: dict[tuple[int, type[np.floating], int], np.ndarray] = {}
_TEAM_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _forget_threads() -> None:
    global _pool, _lock, _is_forked
    _pool, _lock, _is_forked = None, threading.Lock(), True
    _scratch.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """libgomp's call of a function by a team of threads (what ``#pragma omp parallel`` becomes), of torch's own libgomp."""
    libraries = [*Path(torch.__file__).parent.glob("lib/libgomp*.so*")]
    return ctypes.CDLL(str(libraries[0])).GOMP_parallel if libraries else None


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="bklm")
        return _pool


def scratch(length: int, dtype: type[np.floating]) -> np.ndarray:
    """An uninitialised buffer (length,) of this thread, the same one at every call for that length."""
    # Not threading.local: to Python, OpenMP's threads are new ones at every call.
    key = threading.get_ident(), dtype, length
    if key not in _scratch:
        _scratch[key] = np.zeros(length, dtype)
    return _scratch[key]


def run(
    kernel: Callable[..., object],
    count: int,
    worth_it: bool,
    buffer: tuple[int, type[np.floating]],
    arguments: tuple[object, ...],
) -> None:
    """kernel(scratch, first, last, *arguments) over 0 <= first < last <= count as :func:`split` does; each thread's scratch
    has the length and the type of ``buffer``."""
    if not worth_it:  # at once: a short call takes a few microseconds
        kernel(scratch(*buffer), 0, count, *arguments)
        return
    split(lambda first, last: kernel(scratch(*buffer), first, last, *arguments), count, worth_it)


def split(
    kernel: Callable[[int, int], None], n: int, worth_it: bool, parts_per_thread: int = PARTS_PER_THREAD
) -> None:
    """kernel(first, last) over 0 <= first < last <= n, in one call, or where ``worth_it`` in parts shared among threads.

    The calling thread works too, and parts are handed out one by one: a core that is busy with something else delays the
    call by no more than the part that it took. Each costs some ten microseconds of Python (measured once by hand).
    """
    workers = min(torch.get_num_threads(), n) if worth_it else 1
    if workers <= 1:
        kernel(0, n)
        return
    count = min(n, parts_per_thread * workers)
    edges = [n * i // count for i in range(count + 1)]
    parts = deque(itertools.pairwise(edges))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while parts:
                try:
                    first, last = parts.popleft()
                except IndexError:  # another thread took the last part
                    return
                kernel(first, last)
        except BaseException as error:  # it can pass through neither C nor another thread
            errors.append(error)
            parts.clear()

    team = None if _is_forked else _openmp()
    if team is None:
        _in_pool(work, workers, parts)
    else:
        _in_team(work, workers, team)
    if errors:
        # Ctrl-C before another thread's error.
        raise next((error for error in errors if not isinstance(error, Exception)), errors[0])


def _in_pool(work: Callable[[], None], workers: int, parts: deque[tuple[int, int]]) -> None:
    begun: list[None] = []
    ended: list[None] = []
    helpers = []

    def help_out() -> None:
        begun.append(None)
        work()
        ended.append(None)

    try:
        for _ in range(workers - 1):
            helpers.append(_executor().submit(help_out))
        work()
        for helper in helpers:
            if not helper.cancel():  # begun
                helper.result()
    finally:
        parts.clear()  # who has not begun finds nothing to do
        _outlast(begun, ended)


def _outlast(begun: list[None], ended: list[None]) -> None:
    """Return when every helper that began has ended, however often Ctrl-C is pressed: they write to the caller's tensors."""
    while len(ended) < len(begun):
        with contextlib.suppress(BaseException):  # one is on its way out already
            time.sleep(1e-3)


def _in_team(work: Callable[[], None], workers: int, team: Callable[..., None]) -> None:
    ended = []

    def member(_: None) -> None:
        work()
        ended.append(threading.get_ident())

    team(_TEAM_FUNCTION(member), None, workers, 0)
    if threading.get_ident() not in ended:
        # Ctrl-C on this thread's way into Python or out: ctypes prints and forgets it.
        raise KeyboardInterrupt
    # What a member that was lost would have taken is still there.
    work()
