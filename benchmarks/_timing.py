"""What benchmarks/ share: the processor, arms in turn, medians and quartiles, a copy to compare with, peak memory, targets."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_TOLD_FROM = 2**20
"""Bytes: the system's counter of resident memory is kept to about so much, and a smaller rise may read as 0."""
SHORTEST_TIME = 1e-7
"""Seconds: what a call counts as that a coarse clock sees take no time."""


def processor() -> str:
    """Name, on x86 family and model, which tell apart what virtual machines give one name, vector width in bits, cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = (line.partition(":") for line in reversed(info.read_text().splitlines()))
        told = {key.strip(): value.strip() for key, _, value in pairs}
        model = told.get("model name", model)
        if {"cpu family", "model"} <= told.keys():
            model += f" (family {told['cpu family']}, model {told['model']})"
    features = llvmlite.binding.get_host_cpu_features()
    width = 512 if features.get("avx512f") else 256 if features.get("avx2") else 128
    return f"{model}, vectors of {width} bits, {os.cpu_count()} cores"


def where() -> str:
    """What a table was measured on, for its head: processor, torch, threads, and how busy the machine was."""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads{load}"


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{duration(self.median)} ({duration(self.low)} - {duration(self.high)})"


def duration(seconds: float) -> str:
    """Seconds for people: "182 us", "12.1 ms", "3.40 s"."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        # Three digits of more would be written as 1e+03.
        if seconds < 999.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def take_turns(
    arms: dict[str, Callable[[], object]], seconds: float = 2.0, shortest: float = 1e-2, settle: float = 0.0
) -> dict[str, Timing]:
    """Time every arm in rounds, one sample of each a round, so that a busy moment of the machine hits all of them.

    Each arm is called once to warm up; a sample repeats a short call until it takes ``shortest`` seconds, as the first calls
    after a long one find nothing in the caches. Samples take about ``seconds`` together (5 to 200 rounds). ``settle``: for
    arms of two processes, seconds of calls before each sample that are not timed: after another process's turn two threads
    share a core until the system has parted them, some 50 ms. Medians with quartiles.
    """
    repeats = {}
    round_cost = 0.0
    for name, call in arms.items():
        call()
        once = min(_clock(call, 1) for _ in range(2))
        once = max(once, SHORTEST_TIME)
        repeats[name] = max(1, int(shortest / once))
        round_cost += once * repeats[name]
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(min(200, max(5, int(seconds / round_cost)))):
        for name, call in arms.items():
            until = time.perf_counter() + settle
            while time.perf_counter() < until:
                call()
            samples[name].append(_clock(call, repeats[name]))
    found = {}
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        found[name] = Timing(median, low, high)
    return found


def _clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def copy(size: int, threads: int) -> Callable[[], None]:
    """The yardstick of memory: ``size`` bytes from one existing buffer to another, so that twice as many are moved."""
    source = torch.ones(size // 8, dtype=torch.float64)
    target = torch.empty_like(source).fill_(0.0)

    def call() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        target.copy_(source)
        torch.set_num_threads(before)

    return call


def peak_tensor_memory(call: Callable[[], object]) -> int:
    """Most bytes that torch had allocated on the CPU at once during one call, above what it had before (torch.profiler)."""
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """torch 2.13's profiler traces its own start and stop there, from C++, two lines each time."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which one call raises the resident memory at its highest; None where the system does not tell (not Linux).

    Everything counts, torch or not, but the system keeps the counter to about a megabyte.

    Freed blocks that the allocator keeps would hide part of it: call this in a process that was started with
    ``MALLOC_TRIM_THRESHOLD_=0 MALLOC_MMAP_THRESHOLD_=4096``, which returns every block of a page or more at once.
    """
    control = Path("/proc/self/clear_refs")
    if not control.exists():
        return None
    gc.collect()
    control.write_text("5")  # sets the peak counter back to the present size
    before = psutil.Process().memory_info().rss
    call()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return max(0, peak - before)


def memory_ratio(other: float, own: float) -> float | None:
    """other / own of two rises of resident memory; None where one is too small to be told from 0."""
    return other / own if min(other, own) >= MEMORY_TOLD_FROM else None


def refuse_if_too_large(what: str, needed: int) -> None:
    """Exit with the size needed where it does not fit into the memory that is free now."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise SystemExit(
            f"{what} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: choose a smaller size."
        )


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    """Columns from the first row's keys, aligned."""
    print(f"\n{title}")
    if not rows:
        return
    names = list(rows[0])
    table = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    for i, line in enumerate(table):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if i == 0:
            print("  " + "  ".join("-" * width for width in widths))


def target(what: str, found: float | None, *, least: float | None = None, most: float | None = None) -> None:
    """Print whether a target is held; ``found`` is None where this run has not measured it.

    Args:
        least, most: what is wanted, one of both.
    """
    wanted = f"at least {least:,g}" if most is None else f"at most {most:,g}"
    if found is None:
        print(f"target: {what}, {wanted}, measured: not in this run")
        return
    held = found >= least if most is None else found <= most
    shown = f"{found:,.0f}" if found >= 1000 else f"{found:.3g}"
    print(f"target: {what}, {wanted}, measured: {shown}, {'held' if held else 'missed'}")
