"""What the precision study leaves behind: tables, figures, manifest and zip, all computed from the measured cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bklm.files.atomic import write_json
from bklm.harness.bundle import Bundle, zip_study
from bklm.harness.measure import is_crowded
from bklm.harness.report import write_csv, write_manifest
from bklm.studies.precision.claims import adaptive_finding, claims_table, recommend
from bklm.studies.precision.figures import draw_batched, draw_claims, draw_costs, draw_errors
from bklm.studies.precision.grid import ADAPTIVE_THRESHOLD
from bklm.studies.precision.tables import Cells, compared_table, grid_table, model_table, of_part

if TYPE_CHECKING:
    from bklm.studies.precision.config import PrecisionConfig


@dataclass(frozen=True)
class PrecisionResult:
    """What `run_precision` found and wrote. ``table``: the grid, one row per recursion, precision, N and Im z; ``paths``: the
    files by name; ``best_precision``: the one to use with left/right."""

    config: PrecisionConfig
    table: list[dict[str, Any]]
    batched: list[dict[str, Any]]
    backward: list[dict[str, Any]]
    moe: list[dict[str, Any]]
    model: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    best_precision: str
    recommendation: str
    adaptive_finding: str
    machine_note: str
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle


def write_report(config: PrecisionConfig, cells: Cells, folder: Path, device: str) -> PrecisionResult:
    """Write every file of the study and its zip; the same cells always give the same files."""
    table = grid_table(cells)
    compared = {
        part: compared_table(cells, part) for part in ("batched", "backward", "moe", "total", "architecture")
    }
    models, claims = model_table(cells), claims_table(cells, table)
    best, recommendation = recommend(table, models, config.tolerance)
    adaptive, machine = adaptive_finding(table), machine_note(config, cells, device)
    csv = {"grid": table, "model": models, "claims": claims, **compared}
    paths = {f"{name}.csv": folder / f"{name}.csv" for name in csv}
    for name, rows in csv.items():
        write_csv(paths[f"{name}.csv"], rows)
    figures = {
        "precision_errors.png": (draw_errors, (table, errors_note(config, cells, device))),
        "precision_costs.png": (draw_costs, (table, machine)),
        "batched_gradients.png": (
            draw_batched, (compared["batched"], compared["backward"], f"N = {config.batch_length}. {machine}"),
        ),
        "claims.png": (draw_claims, (claims, machine)),
    }  # fmt: skip
    for name, (draw, arguments) in figures.items():
        paths[name] = draw(folder / name, *arguments)
    paths["summary.json"], paths["manifest.json"] = folder / "summary.json", folder / "manifest.json"
    write_json(
        paths["summary.json"],
        {
            "recommendation": recommendation,
            "best_precision": best,
            "adaptive": adaptive,
            "machine": machine,
            "claims": claims,
            "model": models,
            "grid": table,
        },
    )
    write_manifest(
        paths["manifest.json"],
        config=config,
        corpus=None,
        seconds=sum(cell["seconds"] for cell in cells.values()),
    )
    return PrecisionResult(
        config=config,
        table=table,
        batched=compared["batched"],
        backward=compared["backward"],
        moe=compared["moe"],
        model=models,
        claims=claims,
        best_precision=best,
        recommendation=recommendation,
        adaptive_finding=adaptive,
        machine_note=machine,
        folder=folder,
        paths=paths,
        bundle=zip_study(folder),
    )


def draw_progress(config: PrecisionConfig, cells: Cells, folder: Path, device: str) -> Path:
    """precision_errors.png from the cells measured so far."""
    note = f"{len(cells)} cells done. {errors_note(config, cells, device)}"
    return draw_errors(folder / "precision_errors.png", grid_table(cells), note)


def _rows_in_words(cells: Cells) -> str:
    """Over how many rows an error is the worst: fewer where they are long."""
    rows = {cell["settings"]["n"]: cell["settings"]["rows"] for cell in of_part(cells, "accuracy")}
    most, fewest = max(rows.values()), min(rows.values())
    if most == fewest:
        return f"{most} rows"
    longest = max(n for n, count in rows.items() if count == most)
    return f"{most} rows up to N = {longest:,}, of fewer beyond ({fewest} at N = {max(rows):,})"


def errors_note(config: PrecisionConfig, cells: Cells, device: str) -> str:
    """The small print under the error picture."""
    return (
        f"Error relative to the row's largest entry, worst of {_rows_in_words(cells)}; a = v - 2, v ~ N(0, 1), b = c = 1. "
        f"Against 50 digits up to N = {config.reference_n:,}, beyond against sequential left/right in complex128. Adaptive: "
        f"double precision for rows whose largest |dL/dG| is below {ADAPTIVE_THRESHOLD:g} of the batch's. Left/right computed "
        f"on the {'GPU' if device == 'cuda' else 'CPU'}."
    )


def machine_note(config: PrecisionConfig, cells: Cells, device: str) -> str:
    """What the times were measured on, and whether it was busy."""
    machine = next(iter(cells.values()))["machine"]
    if device == "cuda":
        parts = [f"Measured on {machine['gpu']}"]
    else:
        parts = [f"Measured on {machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}"]
        parts.append(
            "no GPU here, so no GPU rows" if machine["gpu"] is None else "no GPU rows: the CPU was asked for"
        )
    parts.append(f"up to {config.repeats} calls each, the ways in turn")
    crowded = [cell for cell in cells.values() if is_crowded(cell)]
    if 2 * len(crowded) > len(cells):
        other = sum(cell["other_cores"] for cell in crowded) / len(crowded)
        parts.append(
            f"OTHER PROCESSES USED {other:.1f} CORES: trust no times; run again on a quiet machine, or with OMP_NUM_THREADS=1"
        )
    return "; ".join(parts) + "."
