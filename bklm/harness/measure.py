"""Time and peak memory of arms. Arms take turns, so that a busy moment of the machine hits all of them.

Peak memory on a CPU is a property of a process, and malloc keeps what was freed: each arm is run in a forked process of its
own, where the kernel's peak counter is set back after the inputs exist (/proc/self/clear_refs) and read after one call.
The processes are forked by one helper, ``python -m bklm.harness.measure``, in which everything is imported and
compiled. On a GPU torch counts for us.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

FEWEST_REPEATS = 3
SPARE = 0.25  # cores; a quiet system needs some itself
WARMED_AGAIN = 5e-3  # seconds; an arm that takes less is warmed up before every timed call
WARMING_CALLS = 3
LONGEST_COMPILATION = 20  # seconds
LONGEST_MEASUREMENT = 600  # seconds, of one arm's memory


class Arm(NamedTuple):
    """``forward()`` gives what ``backward`` turns into the result; without ``backward`` it is the result itself."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None

    def __call__(self) -> Any:
        state = self.forward()
        return state if self.backward is None else self.backward(state)


def build(part: str, settings: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of ``part``, "MODULE:FUNCTION", by name; plain settings, so that another process can build the same."""
    module, _, function = part.rpartition(":")
    return getattr(importlib.import_module(module), function)(**settings)


def time_arms(
    arms: Mapping[str, Arm],
    repeats: int,
    seconds: float,
    device: str,
    predicted: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Seconds per call of each arm: two calls to warm up, then rounds until every arm has ``repeats`` or has used
    ``seconds`` (with at least FEWEST_REPEATS).

    Args:
        predicted: seconds per call expected of some arms; one that could not be called FEWEST_REPEATS times within
            ``seconds`` is not called at all.

    Returns:
        by arm, "total" and "forward" (seconds of every call), and "would_take" (seconds per call; None if it was measured).
    """
    predicted = predicted or {}
    skipped = {n for n in arms if predicted.get(n, 0.0) * FEWEST_REPEATS > seconds}
    taken = {
        n: {"total": [], "forward": [], "would_take": predicted[n] if n in skipped else None} for n in arms
    }
    running = [n for n in arms if n not in skipped]
    first = {n: _call(arms[n], device)[1] for n in running}
    # A first call may compile; a second tells, but where even that would take too long for a compilation.
    short = {n for n in running if first[n] < LONGEST_COMPILATION and _call(arms[n], device)[1] < WARMED_AGAIN}
    for i in range(repeats):
        # An order of its own each round: no arm always follows the one that leaves the caches worst.
        for name in random.Random(i).sample(running, len(running)):
            if i >= FEWEST_REPEATS and sum(taken[name]["total"]) > seconds:
                continue
            for _ in range(WARMING_CALLS if name in short else 0):
                _call(arms[name], device)  # the arm before has left its own data in the caches
            forward, whole = _call(arms[name], device)
            taken[name]["forward"].append(forward)
            taken[name]["total"].append(whole)
    return taken


def _call(arm: Arm, device: str) -> tuple[float, float]:
    """Seconds of the forward and of forward and backward."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    state = arm.forward()
    wait()
    middle = time.perf_counter()
    if arm.backward is not None:
        arm.backward(state)
        wait()
    return middle - started, time.perf_counter() - started


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile)."""
    low, high = np.percentile(values, [25, 75])
    return statistics.median(values), float(low), float(high)


def paired_ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of slow / fast over the rounds that both arms ran: what is called a speed-up."""
    return median_and_quartiles([s / f for s, f in zip(slow, fast, strict=False)])


def is_crowded(cell: Mapping[str, Any]) -> bool:
    """Whether a cell's threads and the machine's other processes were more than its cores.

    Threads that wait for one that has lost its core can take a hundred times as long: such times decide nothing.
    """
    machine = cell["machine"]
    return machine["device"] == "cpu" and machine["threads"] + cell["other_cores"] > machine["cores"] + SPARE


class MemoryMeter:
    """Peak bytes of one call of an arm above what its inputs take. Use as a context manager."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.reason = ""  # why nothing can be measured here
        self._helper: subprocess.Popen[str] | None = None
        if device == "cpu" and not (hasattr(os, "fork") and Path("/proc/self/clear_refs").exists()):
            self.reason = "this system has no peak-memory counter that can be set back"

    def __enter__(self) -> MemoryMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._helper is None:
            return
        if kind is not None:
            # Who stops does not wait for what is being measured: the helper and its fork are a group of their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._helper.pid, signal.SIGKILL)
        self._helper.stdin.close()
        self._helper.wait(timeout=60)

    def measure(self, part: str, settings: Mapping[str, Any], arm: str) -> tuple[int | None, str]:
        """(bytes, "") or (None, why not)."""
        if self.reason:
            return None, self.reason
        if self.device == "cuda":
            return _cuda_peak(build(part, settings)[arm]), ""
        helper = self._running()
        helper.stdin.write(json.dumps({"part": part, "settings": dict(settings), "arm": arm}) + "\n")
        helper.stdin.flush()
        answer = helper.stdout.readline()
        if not answer:
            self.reason = "the process that measures memory ended"
            return None, self.reason
        found = json.loads(answer)
        return found.get("bytes"), found.get("why", "")

    def processor_seconds(self) -> float:
        """Busy seconds of the helper and of what it has forked."""
        if self._helper is None or self._helper.poll() is not None:
            return 0.0
        return sum(psutil.Process(self._helper.pid).cpu_times()[:4])

    def _running(self) -> subprocess.Popen[str]:
        if self._helper is None:
            environment = {
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",  # freed blocks go back to the system instead of being kept
                "MALLOC_TRIM_THRESHOLD_": "0",
                "CUDA_VISIBLE_DEVICES": "",  # autograd's GPU threads would not survive the fork
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            }
            self._helper = subprocess.Popen(
                [sys.executable, "-m", "bklm.harness.measure"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        return self._helper


def _cuda_peak(arm: Arm) -> int:
    arm()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = arm()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


# Sizes that run the same code as any other: rows longer than 256 have kernels of their own.
SMALL = {"rows": 2, "n": 600, "batch": 2, "length": 16, "tokens": 16}


def _serve() -> None:
    """The helper: one line of JSON in, one forked process, one line of JSON out."""
    torch.set_num_threads(1)  # no thread may exist when the process forks
    gc.disable()  # a collection in a fork would touch, and so copy, every page that holds an object
    warmed = set()
    for line in sys.stdin:
        request = json.loads(line)
        part, settings, arm = request["part"], request["settings"], request["arm"]
        if (part, arm) not in warmed:
            warmed.add((part, arm))
            build(part, {n: SMALL.get(n, v) for n, v in settings.items()})[arm]()
        child = os.fork()
        if child == 0:
            _answer(part, settings, arm)
        _, status = os.waitpid(child, 0)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"why": f"the measuring process ended with code {code}"}), flush=True)


def _answer(part: str, settings: dict[str, Any], arm: str) -> None:
    """In the forked process: measure, print, end without running anybody's exit handlers."""
    signal.alarm(LONGEST_MEASUREMENT)  # a fork that hangs is ended by the system and reported
    try:
        call = build(part, settings)[arm]
        call()  # brings in the pages of the libraries it runs through
        # Glibc's; returns the free pages between blocks, too.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
        kept = call()
        peak = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        found = {"bytes": int(peak.split()[1]) * 1024 - before if kept is not None else 0}
    except Exception as error:
        found = {"why": f"{type(error).__name__}: {str(error)[:200]}"}
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps(found) + "\n").encode())
    os._exit(0)


if __name__ == "__main__":
    _serve()
