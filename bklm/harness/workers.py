"""Several trials at once on one machine: helpers in processes of their own take points of the study's grids.

The study's own process gives out the points and takes some itself. A helper runs the same study, asks for points where the
study comes to a grid, and leaves its results in the study's folder like anybody else; it writes no report. A helper that
dies gives its point back. Each trial is computed as it would be alone, from its own seed; with several workers on a CPU
the threads are divided among them, which can change a last digit against one worker with all of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch

from bklm.harness.config import StudyConfig
from bklm.harness.progress import Progress
from bklm.training.memory import free_bytes

log = logging.getLogger(__name__)

# Of memory that one helper takes before its model: Python, torch, the compiled kernels and the text.
HELPER_BYTES = 1_500_000_000
GPU_BYTES = 6_000_000_000
Point = dict[str, Any]


def number(config: StudyConfig, points: int) -> int:
    """How many trials run at once: ``config.workers``, or what cores and memory allow; never more than ``points``."""
    wanted = getattr(config, "workers", 1)
    if not wanted:
        # A smoke run ends before a helper would have imported torch.
        if config.profile == "smoke" or getattr(config, "storage", None):
            return 1
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        room = free_bytes("cuda" if on_gpu else "cpu") // (GPU_BYTES if on_gpu else HELPER_BYTES)
        wanted = min(cores(), max(1, room))
    return min(wanted, points)


def cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


class Pool:
    """The helpers of one study, and the points of the grid that it is at. Give the points out with ``work_off``."""

    def __init__(self, config: StudyConfig, count: int, progress: Progress) -> None:
        self.size = count
        self._progress, self._lock = progress, threading.Condition()
        # Of the grid at hand: points that nobody has, those under way by process, and the steps of those that helpers did.
        self._grid, self._waiting, self._out, self._steps = 0, [], {}, []
        self._is_closed = False
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._threads // count))
        self._helpers = [_start(config, max(1, self._threads // count)) for _ in range(count - 1)]
        for helper in self._helpers:
            threading.Thread(
                target=self._serve, args=(helper,), name="a worker's messages", daemon=True
            ).start()
        log.info("%d trials run at once, %d thread%s each.", count, *_counted(max(1, self._threads // count)))

    def work_off(self, grid: int, points: list[Point], run: Callable[[Point], Any]) -> None:
        """Until every point was run, here by ``run`` or by a helper. ``grid`` counts the study's grids from 1."""
        with self._lock:
            self._grid, self._waiting = grid, list(points)
            self._lock.notify_all()
        share = torch.get_num_threads()
        if len(points) == 1:
            # The helpers have nothing to do: their cores are free for it.
            torch.set_num_threads(self._threads)
        try:
            while (point := self._next()) is not None:
                run(point)
        finally:
            torch.set_num_threads(share)

    def done(self, points: int) -> int:
        """How many of a grid's points are done, that of this process included, whose training has just ended."""
        with self._lock:
            return points - len(self._waiting) - len(self._out) + (os.getpid() in self._out)

    def steps_of_helpers(self) -> list[tuple[Point, int]]:
        """Points of the grid that helpers have worked on, each with the optimiser steps that they told of."""
        with self._lock:
            points = [point for point, _ in self._steps]
            found = [
                (p, sum(n for q, n in self._steps if q == p))
                for i, p in enumerate(points)
                if p not in points[:i]
            ]
            self._steps = []
        return found

    def close(self) -> None:
        """End the helpers. What they had under way is kept in its checkpoints."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        for helper in self._helpers:
            helper.kill()
            helper.wait()
            helper.errors.close()
        torch.set_num_threads(self._threads)

    def _next(self) -> Point | None:
        """A point for this process; waits for those that helpers have, and may give back. None when all are done."""
        with self._lock:
            self._out.pop(os.getpid(), None)
            # With a time limit, so that an interrupt from the keyboard is heard.
            while not self._waiting and self._out:
                self._lock.wait(0.5)
            self._lock.notify_all()
            if not self._waiting:
                return None
            # A helper that comes to the grid's end waits for this one, too: it would train it a second time.
            self._out[os.getpid()] = self._waiting.pop(0)
            return self._out[os.getpid()]

    def _serve(self, helper: subprocess.Popen[str]) -> None:
        """A helper's messages, until it ends."""
        for line in helper.stdout:
            message = json.loads(line)
            if "steps" in message:
                with self._lock:
                    if helper.pid in self._out:
                        self._steps.append((self._out[helper.pid], message["steps"]))
                self._progress.step_of_helper(message["steps"])
            elif "ask" in message:
                with contextlib.suppress(OSError), self._lock:
                    self._out.pop(helper.pid, None)
                    self._lock.notify_all()
                    point = self._point_for(helper.pid, message["ask"])
                    if not self._is_closed:
                        helper.stdin.write(json.dumps({"point": point}) + "\n")
                        helper.stdin.flush()
        with self._lock:
            if not self._is_closed:
                log.warning(
                    "A worker ended early (%srun.log may say why); what it had under way is done by the others.",
                    _last_words(helper),
                )
            if (lost := self._out.pop(helper.pid, None)) is not None:
                self._waiting.insert(0, lost)
            self._lock.notify_all()

    def _point_for(self, helper: int, grid: int) -> Point | None:
        """A point of the grid that a helper has come to; None when that grid is done. Waits where neither is so yet."""
        while not self._is_closed:
            if grid < self._grid or (grid == self._grid and not self._waiting and not self._out):
                return None
            if grid == self._grid and self._waiting:
                self._out[helper] = self._waiting.pop(0)
                return self._out[helper]
            self._lock.wait()
        return None


def _counted(threads: int) -> tuple[int, str]:
    return threads, "s" * (threads > 1)


def _last_words(helper: subprocess.Popen[str]) -> str:
    """The last line that a helper that has ended wrote to its standard error: there a failing import says why; or ""."""
    helper.errors.seek(0)
    lines = helper.errors.read().split("\n")
    return next((f"it wrote {line.strip()[:200]!r}; " for line in reversed(lines) if line.strip()), "")


def _start(config: StudyConfig, threads: int) -> subprocess.Popen[str]:
    # Of no name: it is gone with the processes that have it open.
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    helper = subprocess.Popen(
        [sys.executable, "-m", "bklm.harness.helper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # An interrupt from the keyboard goes to the study's own process, which ends its helpers.
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
    )
    helper.errors = errors
    module, name = type(config).__module__, type(config).__qualname__
    helper.stdin.write(
        json.dumps({"module": module, "class": name, "config": config.to_dict(), "threads": threads}) + "\n"
    )
    helper.stdin.flush()
    return helper


class Link:
    """A helper's side: asks for points, tells of steps."""

    def __init__(self, messages: Any) -> None:
        self._messages, self._answers = messages, queue.Queue()
        threading.Thread(target=self._listen, name="the study's answers", daemon=True).start()

    def work_off(self, grid: int, run: Callable[[Point], Any]) -> None:
        """Run the points that this helper is given, until the grid is done by all."""
        while (point := self._ask(grid)) is not None:
            run(point)

    def step(self, steps: int) -> None:
        """Tell of optimiser steps just done."""
        self._say({"steps": steps})

    def _ask(self, grid: int) -> Point | None:
        self._say({"ask": grid})
        return self._answers.get()["point"]

    def _say(self, message: dict[str, Any]) -> None:
        self._messages.write(json.dumps(message) + "\n")
        self._messages.flush()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._answers.put(json.loads(line))
        # The study's process is gone, and nobody would read what this one finds.
        os._exit(1)


link: Link | None = None
"""In a helper, its connection to the study's process; None everywhere else."""
