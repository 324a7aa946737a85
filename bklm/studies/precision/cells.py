"""The cells of the precision study: which there are, how each is measured, and which are on disk already."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm.auto import tqdm

from bklm.files.atomic import read_result, write_json
from bklm.harness import measure as precision_measure
from bklm.harness.machine import machine_fingerprint
from bklm.studies.precision import grid as precision_grid
from bklm.studies.precision import model as precision_model
from bklm.studies.precision import parts as precision_parts
from bklm.studies.precision.report import draw_progress

if TYPE_CHECKING:
    from bklm.studies.precision.config import PrecisionConfig

log = logging.getLogger(__name__)

GRID = f"{precision_grid.__name__}:grid"
ROWS = 2  # sequences of a timed grid cell: one with large and one with small upstream gradients
MOST_ACCURACY_ROWS, ACCURACY_ELEMENTS = (
    32,
    2**20,
)  # the worst of 2 sequences tells little about the worst of many
LOOP_ACCURACY_N = 1024  # beyond, the loop's values are those of the compiled recursion: not finite
MEMORY_N = 512  # below, an arm's memory is near the 0.1 MB that can be told apart
ARCHITECTURE_N, ARCHITECTURE_BATCH = 2048, 2  # the length of the original's claim
CLAIM_PATIENCE = 4
CELL_KEYS = {
    "part": str,
    "settings": dict,
    "rows": list,
    "machine": dict,
    "seconds": float,
    "other_cores": float,
}
MOE_TOKENS, MOE_EXPERTS = 4096, (4, 8)


class Runner:
    """Measures the cells of a study that are not on disk yet, with one progress bar over all of them."""

    def __init__(
        self,
        config: PrecisionConfig,
        device: str,
        folder: Path,
        memory: precision_measure.MemoryMeter,
        on_figure: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.device, self.folder, self.memory = config, device, folder, memory
        self.on_figure = on_figure
        self.machine = machine_fingerprint(device)
        self.cells: dict[str, dict[str, Any]] = {}
        self.told = False  # that cells of another machine lie here
        self.loop_speed: float | None = None  # seconds per position of the theta/phi loop

    def run(self) -> dict[str, dict[str, Any]]:
        """Every cell by name, each a dict with part, settings, rows, seconds, load and machine."""
        plan = list(self._plan())
        with tqdm(total=len(plan), unit="cell", mininterval=1.0) as bar:
            for name, part, settings, measure in plan:
                bar.set_description(_in_words(name))
                self.cells[name], is_new = self._cell(name, part, settings, measure)
                bar.update()
                is_length_done = part == "accuracy" and settings["im_z"] == self.config.shifts[-1]
                if is_new and is_length_done and self.on_figure is not None:
                    self.on_figure(draw_progress(self.config, self.cells, self.folder, self.device))
        return self.cells

    def _plan(self) -> Iterator[tuple[str, str, dict[str, Any], Callable]]:
        """(name, part, settings, function) of every cell, the grid first."""
        config = self.config
        for n in config.sizes:
            for im_z in config.shifts:
                settings = {"rows": accuracy_rows(n), "n": n, "im_z": im_z, "seed": config.seed}
                yield f"accuracy_N{n}_z{im_z:g}", "accuracy", settings, self._accuracy
        for n in config.sizes:
            for im_z in config.shifts:
                settings = {"rows": ROWS, "n": n, "im_z": im_z, "seed": config.seed, "device": self.device}
                yield f"cost_N{n}_z{im_z:g}", "cost", settings, self._cost
        common = {"length": config.batch_length, "seed": config.seed, "device": self.device}
        for part in ("batched", "backward"):
            for batch in config.batch_sizes:
                yield f"{part}_B{batch}", part, {"batch": batch, **common}, self._compared
        batch = config.published_batch
        yield "total", "total", {"batch": batch, **common}, self._compared
        settings = {
            "rows": batch,
            "n": config.batch_length,
            "im_z": 1.0,
            "seed": config.seed,
            "device": self.device,
        }
        yield "mixed", "mixed", settings, self._mixed
        for experts in MOE_EXPERTS:
            settings = {"tokens": MOE_TOKENS, "experts": experts, "seed": config.seed, "device": self.device}
            yield f"moe_E{experts}", "moe", settings, self._compared
        settings = {**common, "batch": ARCHITECTURE_BATCH, "length": ARCHITECTURE_N}
        yield "architecture", "architecture", settings, self._architecture
        settings = {"batch": config.model_batch, "vocab": config.model_vocab, **common}
        yield "model", "model", settings, self._model

    def _cell(
        self, name: str, part: str, settings: dict[str, Any], measure: Callable
    ) -> tuple[dict[str, Any], bool]:
        """A cell read from disk when it was measured on this machine, else measured and written; and whether it is new."""
        path = self.folder / "cells" / f"{name}.json"
        found = read_result(path, CELL_KEYS)
        if found is not None and found["machine"] == self.machine:
            return found, False
        if found is not None and not self.told:
            self.told = True
            changed = [
                f"{k} {v!r} then, {self.machine[k]!r} now"
                for k, v in found["machine"].items()
                if v != self.machine[k]
            ]
            log.info("Cells measured elsewhere (%s) are measured again.", "; ".join(changed))
        started, before = time.perf_counter(), self._processor_seconds()
        cell = {"part": part, "settings": settings, "rows": measure(part, settings), "machine": self.machine}
        seconds, after = time.perf_counter() - started, self._processor_seconds()
        everybody, ours = (b - a for a, b in zip(before, after, strict=True))
        cell["seconds"] = round(seconds, 3)
        cell["other_cores"] = round(
            max(0.0, everybody - ours) / seconds, 2
        )  # used by other processes, on average
        write_json(path, cell)
        return cell, True

    def _processor_seconds(self) -> tuple[float, float]:
        """Busy seconds of all cores since the machine started, and those of this process and its helpers."""
        every = psutil.cpu_times()
        idle = every.idle + sum(getattr(every, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
        return sum(every) - idle, sum(os.times()[:4]) + self.memory.processor_seconds()

    def _accuracy(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        problem = precision_grid.Problem.make(**settings)
        exact = precision_grid.truth(problem, self.config.reference_n)
        arms = precision_grid.arms(problem, loops=settings["n"] <= LOOP_ACCURACY_N)
        if self.device == "cuda":
            arms |= precision_grid.left_right_arms(precision_grid.Problem.make(**settings, device="cuda"))
        return [
            {
                "recursion": recursion,
                "precision": precision,
                "reference": exact.source,
                **precision_grid.errors(*arm(), exact),
            }
            for (recursion, precision), arm in arms.items()
        ]

    def _cost(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        measure_memory = settings["im_z"] == self.config.shifts[0] and settings["n"] >= MEMORY_N
        return self._measured(GRID, settings, measure_memory, self._predicted(settings["n"]))

    def _compared(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Time and memory of a part's arms, and how far their results are from the first one's."""
        difference = dict(precision_parts.differences(precision_measure.build(_of_parts(part), settings)))
        rows = self._measured(
            _of_parts(part), settings, patience=CLAIM_PATIENCE if part in ("moe", "total") else 1
        )
        return [{**row, "difference": difference[row["arm"]]} for row in rows]

    def _mixed(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The grid's arms at the original's batch, and how far each is from the same recursion's complex128."""
        arms = precision_measure.build(GRID, settings)
        rows = self._measured(GRID, settings, patience=CLAIM_PATIENCE)
        for row in rows:
            _, gradient = arms[row["arm"]]()
            _, wanted = arms[row["arm"].rsplit(" ", 1)[0] + " complex128"]()
            apart = precision_parts.difference(gradient, wanted)
            row["difference"] = (
                apart if math.isfinite(apart) else None
            )  # theta/phi in complex64 may have overflowed
        return rows

    def _architecture(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Two blocks side by side, and whether the original's recursion gives numbers at this length."""
        problem = precision_grid.Problem.make(1, settings["length"], 1.0, settings["seed"])
        arm = precision_grid.arms(problem, loops=False)[precision_grid.THETA_PHI, "complex128"]
        status = precision_grid.errors(*arm(), precision_grid.truth(problem, 0))["status"]
        rows = self._measured(_of_parts(part), settings, patience=CLAIM_PATIENCE)
        return [{**row, "theta_phi_status": status} for row in rows]

    def _model(self, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        return precision_model.measure(
            **settings, repeats=self.config.repeats, seconds=10 * self.config.seconds
        )

    def _measured(
        self,
        part: str,
        settings: dict[str, Any],
        with_memory: bool = True,
        predicted: dict[str, float] | None = None,
        patience: int = 1,
    ) -> list[dict[str, Any]]:
        """One row per arm: arm, total and forward (seconds of every call), would_take, peak_bytes, why_no_memory.

        ``patience`` multiplies calls and time: for the few cells that claims are judged by.
        """
        arms = precision_measure.build(part, settings)
        repeats, seconds = patience * self.config.repeats, patience * self.config.seconds
        taken = precision_measure.time_arms(arms, repeats, seconds, self.device, predicted)
        rows = []
        for name, times in taken.items():
            peak, why = None, "not measured in this cell"
            if with_memory and times["would_take"] is None:
                peak, why = self.memory.measure(part, settings, name)
            rows.append({"arm": name, **times, "peak_bytes": peak, "why_no_memory": why})
        return rows

    def _predicted(self, n: int) -> dict[str, float]:
        """Seconds per call of the theta/phi loops, from their time per position at a short length."""
        if self.loop_speed is None:
            arm = precision_grid.arms(precision_grid.Problem.make(ROWS, 64, 1.0, 0, self.device))
            name = (precision_grid.THETA_PHI_LOOP, "complex128")
            times = precision_measure.time_arms({"loop": arm[name]}, 5, 1.0, self.device)["loop"]["total"]
            self.loop_speed = sorted(times)[len(times) // 2] / 64
        return {f"{precision_grid.THETA_PHI_LOOP} {p}": n * self.loop_speed for p in precision_grid.PRECISIONS}


def _of_parts(part: str) -> str:
    return f"{precision_parts.__name__}:{part}"


def accuracy_rows(n: int) -> int:
    """Sequences over which errors are the worst of: many where they are short, 2 at a million positions."""
    return max(ROWS, min(MOST_ACCURACY_ROWS, ACCURACY_ELEMENTS // n // 2 * 2))


def _in_words(cell: str) -> str:
    """A cell's name as the progress bar says it: "accuracy, N = 1024, Im z = 0.1"."""
    for short, words in (("_N", ", N = "), ("_z", ", Im z = "), ("_B", ", batch "), ("_E", ", experts ")):
        cell = cell.replace(short, words)
    return cell
