"""The cells of the precision study: how each is measured, and read back where an earlier run has measured it here.

A cell is a dict: ``part``, ``settings``, ``rows`` (what was measured), ``machine``, ``seconds``, and ``other_cores``, which
other processes used meanwhile, on average.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bklm.files.atomic import read_result, write_json
from bklm.harness import measure
from bklm.harness.machine import machine_fingerprint
from bklm.studies.precision import grid, model, parts

log = logging.getLogger(__name__)

GRID, PARTS = f"{grid.__name__}:grid", parts.__name__
# Sequences of a timed grid cell: one with large and one with small upstream gradients.
ROWS = 2
# The worst of 2 sequences tells little about the worst of many.
MOST_ACCURACY_ROWS, ACCURACY_ELEMENTS = 32, 2**20
# Beyond, the loop's values are those of the compiled recursion: not finite.
LOOP_ACCURACY_N = 1024
# Below, an arm's memory is near the 0.1 MB that can be told apart.
MEMORY_N = 512
# The length of the original's claim.
ARCHITECTURE_N, ARCHITECTURE_BATCH = 2048, 2
# Multiples of calls and time for the few cells that claims are judged by, and of time for the model's.
CLAIM_PATIENCE, MODEL_PATIENCE = 4, 10
MOE_TOKENS, MOE_EXPERTS = 4096, (4, 8)
CELL_KEYS = {
    "part": str,
    "settings": dict,
    "rows": list,
    "machine": dict,
    "seconds": float,
    "other_cores": float,
}

Settings = dict[str, Any]
Measured = list[dict[str, Any]]


@dataclass
class Bench:
    """Measures the cells that are not on disk yet.

    Attributes:
        folder: of the cells' files.
        repeats, seconds: most calls and time of one arm in one cell.
        reference_n: longest N compared with 50 digits.
        weighed_shift: the Im z at which the grid's memory is measured; the work is the same at the others.
    """

    folder: Path
    device: str
    memory: measure.MemoryMeter
    repeats: int
    seconds: float
    reference_n: int
    weighed_shift: float
    # Whether it was told that cells of another machine lie here.
    _told: bool = False

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        return machine_fingerprint(self.device)

    def cell(self, name: str, part: str, settings: Settings) -> tuple[dict[str, Any], bool]:
        """A cell read from disk when it was measured on this machine, else measured and written; and whether it is new."""
        path = self.folder / f"{name}.json"
        found, here = read_result(path, CELL_KEYS), self.machine
        if found is not None and found["machine"] == here:
            return found, False
        if found is not None and not self._told:
            self._told = True
            changed = [f"{k} {v!r} then, {here[k]!r} now" for k, v in found["machine"].items() if v != here[k]]
            log.info("Cells measured elsewhere (%s) are measured again.", "; ".join(changed))
        own = ("accuracy", "cost", "mixed", "architecture", "model")
        measured = getattr(self, f"_{part}") if part in own else self._compared
        started, before = time.perf_counter(), self._processor_seconds()
        cell = {"part": part, "settings": settings, "rows": measured(part, settings), "machine": here}
        seconds, after = time.perf_counter() - started, self._processor_seconds()
        everybody, ours = (b - a for a, b in zip(before, after, strict=True))
        cell["seconds"] = round(seconds, 3)
        cell["other_cores"] = round(max(0.0, everybody - ours) / seconds, 2)
        write_json(path, cell)
        return cell, True

    def _processor_seconds(self) -> tuple[float, float]:
        """Busy seconds of all cores since the machine started, and those of this process and its helpers."""
        every = psutil.cpu_times()
        idle = every.idle + sum(getattr(every, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
        return sum(every) - idle, sum(os.times()[:4]) + self.memory.processor_seconds()

    def _accuracy(self, part: str, settings: Settings) -> Measured:
        problem = grid.Problem.make(**settings)
        exact = grid.truth(problem, self.reference_n)
        arms = grid.arms(problem, loops=settings["n"] <= LOOP_ACCURACY_N)
        if self.device == "cuda":
            arms |= grid.arms(grid.Problem.make(**settings, device="cuda"), loops=False)
        return [
            {"recursion": recursion, "precision": precision, "reference": exact.source}
            | grid.errors(*arm(), exact)
            for (recursion, precision), arm in arms.items()
        ]

    def _cost(self, part: str, settings: Settings) -> Measured:
        loops = {f"{grid.THETA_PHI_LOOP} {p}": settings["n"] * self._loop_speed for p in grid.PRECISIONS}
        with_memory = settings["im_z"] == self.weighed_shift and settings["n"] >= MEMORY_N
        return self._measured(GRID, settings, with_memory, loops)

    def _compared(self, part: str, settings: Settings) -> Measured:
        """Time and memory of a part's arms, and how far their results are from the first one's."""
        difference = dict(parts.differences(measure.build(f"{PARTS}:{part}", settings)))
        patience = CLAIM_PATIENCE if part in ("moe", "total") else 1
        rows = self._measured(f"{PARTS}:{part}", settings, patience=patience)
        return [{**row, "difference": difference[row["arm"]]} for row in rows]

    def _mixed(self, part: str, settings: Settings) -> Measured:
        """The grid's arms at the original's batch, and how far each is from the same recursion's complex128."""
        arms = measure.build(GRID, settings)
        rows = self._measured(GRID, settings, patience=CLAIM_PATIENCE)
        for row in rows:
            _, gradient = arms[row["arm"]]()
            _, wanted = arms[row["arm"].rsplit(" ", 1)[0] + " complex128"]()
            apart = parts.difference(gradient, wanted)
            # theta/phi in complex64 may have overflowed.
            row["difference"] = apart if math.isfinite(apart) else None
        return rows

    def _architecture(self, part: str, settings: Settings) -> Measured:
        """Two blocks side by side, and whether the original's recursion gives numbers at this length."""
        problem = grid.Problem.make(1, settings["length"], 1.0, settings["seed"])
        arm = grid.arms(problem, loops=False)[grid.THETA_PHI, "complex128"]
        status = grid.errors(*arm(), grid.truth(problem, 0))["status"]
        rows = self._measured(f"{PARTS}:{part}", settings, patience=CLAIM_PATIENCE)
        return [{**row, "theta_phi_status": status} for row in rows]

    def _model(self, part: str, settings: Settings) -> Measured:
        return model.measure(**settings, repeats=self.repeats, seconds=MODEL_PATIENCE * self.seconds)

    def _measured(
        self,
        part: str,
        settings: Settings,
        with_memory: bool = True,
        predicted: dict[str, float] | None = None,
        patience: int = 1,
    ) -> Measured:
        """One row per arm: arm, total and forward (seconds of every call), would_take, peak_bytes, why_no_memory."""
        arms = measure.build(part, settings)
        repeats, seconds = patience * self.repeats, patience * self.seconds
        rows = []
        for name, times in measure.time_arms(arms, repeats, seconds, self.device, predicted).items():
            peak, why = None, "not measured in this cell"
            if with_memory and times["would_take"] is None:
                peak, why = self.memory.measure(part, settings, name)
            rows.append({"arm": name, **times, "peak_bytes": peak, "why_no_memory": why})
        return rows

    @functools.cached_property
    def _loop_speed(self) -> float:
        """Seconds per position of the theta/phi loop, at a short length."""
        arms = grid.arms(grid.Problem.make(ROWS, 64, 1.0, 0, self.device))
        loop = {"loop": arms[grid.THETA_PHI_LOOP, "complex128"]}
        times = measure.time_arms(loop, 5, 1.0, self.device)["loop"]["total"]
        return sorted(times)[len(times) // 2] / 64


def accuracy_rows(n: int) -> int:
    """Sequences over which errors are the worst of: many where they are short, 2 at a million positions."""
    return max(ROWS, min(MOST_ACCURACY_ROWS, ACCURACY_ELEMENTS // n // 2 * 2))


def name_cell(cell: str) -> str:
    """A cell's name as the progress bar says it: "accuracy, N = 1024, Im z = 0.1"."""
    for short, words in (("_N", ", N = "), ("_z", ", Im z = "), ("_B", ", batch "), ("_E", ", experts ")):
        cell = cell.replace(short, words)
    return cell
