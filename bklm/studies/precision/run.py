"""The precision study: which recursion and which precision for the BK-core, and what the original's speed claims amount to.

Everything is measured in one run on one machine: errors against 50 digits, time, peak memory, the original's ways to take
a batch's gradients, autograd beside the analytic backward, the rest of the model in 16 bits. Each measured cell is
written to ``internals/cells/`` as soon as it is done; a run that was stopped goes on after the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bklm.harness.estimate import best_of
from bklm.harness.measure import FEWEST_REPEATS, MemoryMeter
from bklm.harness.report import Report, StudyResult
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.studies.precision import cells as bench
from bklm.studies.precision import figures, grid, tables
from bklm.studies.precision.claims import adaptive_finding, claims_table, is_busy, readable_claims, recommend
from bklm.studies.precision.config import PrecisionConfig
from bklm.studies.precision.tables import (
    Cells,
    compared_table,
    errors_note,
    grid_table,
    machine_note,
    model_table,
)
from bklm.training.processes import make_accelerator

# Of a grid cell: inputs, reference and the hungriest arm; measured 360.
BYTES_PER_POSITION = 400
# For an estimate: a length at which a call is more work than overhead, and one for 50 digits, slow from the first position.
TIMED_N, EXACT_N = 256, 16
# Of a cell outside the grid, about.
ARMS = 4


@dataclass(frozen=True)
class PrecisionResult(StudyResult):
    """What ``run_precision`` found: ``table`` is the grid, one row per recursion, precision, N and Im z."""

    batched: list[dict[str, Any]]
    backward: list[dict[str, Any]]
    moe: list[dict[str, Any]]
    model: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    adaptive_finding: str
    machine_note: str
    spoken = ("finding", "adaptive_finding", "machine_note")

    @property
    def best_precision(self) -> str:
        """The one to use with left/right."""
        return self.best

    @property
    def recommendation(self) -> str:
        """Which one that is, and why, in one sentence."""
        return self.finding

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        return {
            "summary": lambda: tables.readable_summary(self.table),
            "claims": lambda: readable_claims(self.claims),
            "costs": lambda: tables.readable_costs(self.table),
            "batched": lambda: tables.readable_compared(self.batched),
            "backward": lambda: tables.readable_compared(self.backward),
            "moe": lambda: tables.readable_compared(self.moe),
            "model": lambda: tables.readable_model(self.model),
        }

    def show(self, *names: str) -> None:
        """Print what a command line shows: of the tables, those two that fit a screen."""
        super().show(*(names or ("summary", "claims")))


def run_precision(
    config: PrecisionConfig, on_figure: Callable[[Path], None] | None = None
) -> PrecisionResult | None:
    """Measure what is not measured yet, and write everything to ``<output_dir>/precision`` and its zip.

    Arguments, result and errors as in ``bklm.harness.study.run_study``; the figure is precision_errors.png, drawn anew after
    each length.
    """
    config = config.resolved()
    _refuse_what_does_not_fit(max(config.sizes), _device(config))
    return run_study(config, _measure, _report, on_figure=on_figure)


def estimated_minutes(config: PrecisionConfig) -> float:
    """Minutes that a resolved config's measurements take here, at most; compiling and memory are left out.

    The first call times every way of the grid once or twice (seconds); later ones remember it.

    Raises:
        ValueError: there is no such device here.
    """
    exact, calls = _speed(_device(config))
    seconds = 0.0
    for n in config.sizes:
        rows = bench.accuracy_rows(n)
        once = {name: call * n / TIMED_N for name, call in calls.items()}
        with_loop = n <= bench.LOOP_ACCURACY_N
        compared = sum(call for (name, _), call in once.items() if with_loop or name != grid.THETA_PHI_LOOP)
        seconds += len(config.shifts) * (
            (exact * n * rows if n <= config.reference_n else 0.0)
            + compared * rows / bench.ROWS
            + sum(_timed(call, config.repeats, config.seconds) for call in once.values())
        )
    # The claims' cells (total, mixed, moe, architecture) and the model's.
    patient = bench.CLAIM_PATIENCE * (1 + 1 + len(bench.MOE_EXPERTS) + 1) + bench.MODEL_PATIENCE
    seconds += ARMS * config.seconds * (2 * len(config.batch_sizes) + patient)
    return seconds / 60


def _timed(call: float, repeats: int, seconds: float) -> float:
    """Seconds for all timed calls of one way that takes ``call`` seconds: none where even the fewest would not fit."""
    if call * FEWEST_REPEATS > seconds:
        return 0.0
    return call * (1 + min(repeats, max(FEWEST_REPEATS, seconds / call)))


@functools.lru_cache
def _speed(device: str) -> tuple[float, dict[tuple[str, str], float]]:
    """Seconds per position of the exact answer, and per call of every way at TIMED_N."""
    short = grid.Problem.make(1, EXACT_N, 1.0, 0)
    exact = best_of(lambda: grid.truth(short, EXACT_N)) / EXACT_N
    problem = grid.Problem.make(bench.ROWS, TIMED_N, 1.0, 0, device)
    return exact, {name: best_of(arm) for name, arm in grid.arms(problem).items()}


def _device(config: PrecisionConfig) -> str:
    """ "cuda" or "cpu"; ValueError where there is no such device."""
    return make_accelerator(config.device, "fp32").device.type


def _refuse_what_does_not_fit(n: int, device: str) -> None:
    needed = BYTES_PER_POSITION * bench.accuracy_rows(n) * n
    free = {"memory": psutil.virtual_memory().available}
    if device == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info()[0]
    for name, there in free.items():
        if needed > there:
            raise ValueError(
                f"sizes: N = {n:,} needs about {needed / 1e9:.1f} GB of {name} and {there / 1e9:.1f} GB are free; "
                "leave that length out."
            )


def _plan(config: PrecisionConfig, device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, part, settings) of every cell, the grid first."""
    here = {"seed": config.seed, "device": device}
    places = [(f"N{n}_z{im_z:g}", {"n": n, "im_z": im_z}) for n in config.sizes for im_z in config.shifts]
    for name, place in places:
        rows = bench.accuracy_rows(place["n"])
        yield f"accuracy_{name}", "accuracy", {"rows": rows, **place, "seed": config.seed}
    for name, place in places:
        yield f"cost_{name}", "cost", {"rows": bench.ROWS, **place, **here}
    common = {"length": config.batch_length, **here}
    for part in ("batched", "backward"):
        for batch in config.batch_sizes:
            yield f"{part}_B{batch}", part, {"batch": batch, **common}
    batch = config.published_batch
    yield "total", "total", {"batch": batch, **common}
    yield "mixed", "mixed", {"rows": batch, "n": config.batch_length, "im_z": 1.0, **here}
    for experts in bench.MOE_EXPERTS:
        yield f"moe_E{experts}", "moe", {"tokens": bench.MOE_TOKENS, "experts": experts, **here}
    size = {"batch": bench.ARCHITECTURE_BATCH, "length": bench.ARCHITECTURE_N}
    yield "architecture", "architecture", {**size, **here}
    yield "model", "model", {"batch": config.model_batch, "vocab": config.model_vocab, **common}


def _measure(study: Session) -> Cells:
    """Every cell by name; see ``bklm.studies.precision.cells``. None in a process beside the main one, which measures."""
    config, device = study.config, study.accelerator.device.type
    plan = list(_plan(config, device)) if study.is_main else []
    study.expect(len(plan), unit="cell")
    cells: Cells = {}
    with MemoryMeter(device) as memory:
        limits = config.repeats, config.seconds, config.reference_n, config.shifts[0]
        measured = bench.Bench(study.folder / "internals/cells", device, memory, *limits)
        for name, part, settings in plan:
            study.progress.describe(bench.name_cell(name))
            cells[name], is_new = measured.cell(name, part, settings)
            (study.progress.step if is_new else study.progress.skip)(1)
            is_length_done = part == "accuracy" and settings["im_z"] == config.shifts[-1]
            if is_new and is_length_done and study.is_watched:
                study.show(_draw(study, cells))
    return cells


def _draw(study: Session, cells: Cells) -> Path:
    """precision_errors.png from the cells measured so far."""
    note = f"{len(cells)} cells done. {_errors_note(study, cells)}"
    return figures.draw_errors(study.folder / "precision_errors.png", grid_table(cells), note)


def _errors_note(study: Session, cells: Cells) -> str:
    return errors_note(cells, study.config.reference_n, study.accelerator.device.type)


def _report(study: Session, cells: Cells) -> PrecisionResult:
    """The same cells always give the same files."""
    config, report = study.config, Report(study)
    table, models = grid_table(cells), model_table(cells)
    claims = claims_table(cells, table)
    compared = {p: compared_table(cells, p) for p in ("batched", "backward", "moe", "total", "architecture")}
    for name, rows in {"grid": table, "model": models, "claims": claims, **compared}.items():
        report.csv(f"{name}.csv", rows)
    machine = machine_note(cells, study.accelerator.device.type, config.repeats)
    of_batches = compared["batched"], compared["backward"], f"N = {config.batch_length}. {machine}"
    report.figure("precision_errors.png", figures.draw_errors, table, _errors_note(study, cells))
    report.figure("precision_costs.png", figures.draw_costs, table, machine)
    report.figure("batched_gradients.png", figures.draw_batched, *of_batches)
    report.figure("claims.png", figures.draw_claims, claims, machine)
    best, recommendation = recommend(table, models, config.tolerance, is_busy(cells))
    adaptive = adaptive_finding(table)
    words = {"recommendation": recommendation, "best_precision": best, "adaptive": adaptive, "machine": machine}
    report.json("summary.json", {**words, "claims": claims, "model": models, "grid": table})
    return report.close(
        PrecisionResult, sum(cell["seconds"] for cell in cells.values()), table=table, best=best, best_perplexity=None,
        finding=recommendation, baselines=[], diverged=[], model=models, claims=claims, adaptive_finding=adaptive,
        machine_note=machine, **{part: compared[part] for part in ("batched", "backward", "moe")},
    )  # fmt: skip
