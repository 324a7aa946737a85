"""Tables of the precision study, computed from its measured cells: rows for CSV, and the same rows for people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bklm.harness.measure import is_crowded, median_and_quartiles, paired_ratio
from bklm.studies.precision import grid

Rows = Sequence[dict[str, Any]]
Cells = dict[str, dict[str, Any]]

# Less cannot be told from the measuring process's own needs.
RESOLVED_MB = 0.1
SPREAD = ("ms", "ms_low", "ms_high")
FASTER = ("times_faster", "times_faster_low", "times_faster_high")


def of_part(cells: Cells, part: str) -> list[dict[str, Any]]:
    return [cell for cell in cells.values() if cell["part"] == part]


def of_arm(table: Rows, recursion: str, precision: str) -> list[dict[str, Any]]:
    """The rows of one recursion in one precision."""
    return [r for r in table if (r["recursion"], r["precision"]) == (recursion, precision)]


def _milliseconds(seconds: list[float]) -> dict[str, float | None]:
    """Median and quartiles, None where nothing was timed."""
    if not seconds:
        return dict.fromkeys(SPREAD)
    return {name: 1e3 * x for name, x in zip(SPREAD, median_and_quartiles(seconds), strict=True)}


def _megabytes(row: dict[str, Any]) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6


def grid_table(cells: Cells) -> list[dict[str, Any]]:
    """One row per recursion, precision, N and Im z: status, errors, time with quartiles, peak memory, notes.

    Peak memory was measured at the first Im z of each N and holds for all of them: the work is the same.
    """
    costs, memory = {}, {}
    for cell in of_part(cells, "cost"):
        for row in cell["rows"]:
            costs[row["arm"], _place(cell)] = row
            if row["peak_bytes"] is not None:
                memory[row["arm"], cell["settings"]["n"]] = _megabytes(row)
    measured = of_part(cells, "accuracy")
    accuracy = {(r["recursion"], r["precision"], *_place(cell)): r for cell in measured for r in cell["rows"]}
    places = dict.fromkeys(map(_place, measured))
    table = []
    for (n, im_z), recursion, precision in itertools.product(places, grid.RECURSIONS, grid.PRECISIONS):
        error = accuracy.get((recursion, precision, n, im_z))
        if error is None and recursion == grid.THETA_PHI_LOOP:
            # The same products as the compiled recursion's, so the same overflow.
            error = {"status": accuracy[grid.THETA_PHI, precision, n, im_z]["status"]}
        arm = f"{recursion} {precision}"
        cost = costs.get((arm, (n, im_z)))
        calls = cost["total"] if cost else []
        table.append(
            {"recursion": recursion, "precision": precision, "n": n, "im_z": im_z}
            | {key: error.get(key) for key in ("status", *grid.ERRORS, "reference")}
            | _milliseconds(calls)
            | {"calls": len(calls), "peak_mb": memory.get((arm, n)), "note": _note(cost)}
        )
    return table


def _place(cell: dict[str, Any]) -> tuple[int, float]:
    return cell["settings"]["n"], cell["settings"]["im_z"]


def _note(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "not measured: no form of this recursion runs on this device"
    if cost["would_take"] is not None:
        return f"not measured: one call would take about {duration(cost['would_take'])}"
    return ""


def times_as_long(slow: dict[str, Any], fast: dict[str, Any], form: str = ".2g") -> str:
    """How many times as long one row's calls take as another's, of the medians, and within what both quartiles allow."""
    ends = (slow["ms"] / fast["ms"], slow["ms_low"] / fast["ms_high"], slow["ms_high"] / fast["ms_low"])
    middle, low, high = (format(end, form) for end in ends)
    return f"{middle} ({low} to {high})"


def duration(seconds: float) -> str:
    """ "38 ms", "4.1 s" or "12 min"."""
    if seconds < 1:
        return f"{1e3 * seconds:.2g} ms" if seconds < 0.0995 else f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _time(row: dict[str, Any]) -> str:
    """Median and quartiles, "0.24 ms (0.23 to 0.25)": the unit is repeated only where it changes."""
    median, low, high = (duration(row[name] / 1e3) for name in SPREAD)
    unit = median.partition(" ")[2]
    if low.endswith(f" {unit}") and high.endswith(f" {unit}"):
        low, high = low.removesuffix(f" {unit}"), high.removesuffix(f" {unit}")
    return f"{median} ({low} to {high})"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _difference(value: float | None) -> str:
    return "0" if value == 0 else _shown(value, ".0e")


def first_overflow(table: Rows, recursion: str, precision: str) -> int | None:
    """Smallest N at which a result was not finite (or all zeros) for some Im z; None when all were finite."""
    lost = [r["n"] for r in of_arm(table, recursion, precision) if r["status"] != "finite"]
    return min(lost, default=None)


def worst(table: Rows, recursion: str, precision: str, key: str) -> dict[str, Any] | None:
    """The finite row with the largest ``key``; None where there is none."""
    found = [r for r in of_arm(table, recursion, precision) if r.get(key) is not None]
    return max(found, key=lambda r: r[key], default=None)


def at_longest(table: Rows, recursion: str, precision: str, key: str) -> tuple[int, float] | None:
    """(N, value) of ``key`` at the first Im z and the longest N where it was measured."""
    rows = [r for r in of_arm(table, recursion, precision) if r["im_z"] == table[0]["im_z"]]
    return max(((r["n"], r[key]) for r in rows if r[key] is not None), default=None)


def readable_summary(table: Rows) -> list[dict[str, Any]]:
    """The grid in one line per recursion and precision, for people."""
    rows = []
    for recursion, precision in itertools.product(grid.RECURSIONS, grid.PRECISIONS):
        arm = table, recursion, precision
        lost, time, memory = first_overflow(*arm), at_longest(*arm, "ms"), at_longest(*arm, "peak_mb")
        value, slope = (worst(*arm, f"{k}_error") for k in ("value", "gradient"))
        rows.append(
            {
                "recursion": recursion,
                "precision": precision,
                "not finite": "never" if lost is None else f"at N = {lost:,}",
                "worst value error": "-" if value is None else f"{value['value_error']:.0e}",
                "worst gradient error": "-" if slope is None else f"{slope['gradient_error']:.0e}",
                "time": "-" if time is None else f"{duration(time[1] / 1e3)} at N = {time[0]:,}",
                "peak memory": "-" if memory is None else f"{megabytes(memory[1])} at N = {memory[0]:,}",
            }
        )
    return rows


def megabytes(value: float) -> str:
    return f"under {RESOLVED_MB} MB" if value < RESOLVED_MB else f"{value:.3g} MB"


def readable_costs(table: Rows) -> list[dict[str, Any]]:
    """Time at the first Im z, one line per recursion and precision, one column per N, or why there is none."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for r in table:
        if r["im_z"] == table[0]["im_z"]:
            arm = {key: r[key] for key in ("recursion", "precision")}
            line = lines.setdefault(tuple(arm.values()), arm)
            shown = r["note"].removeprefix("not measured: one call ") if r["ms"] is None else _time(r)
            line[f"N = {r['n']:,}"] = shown
    return list(lines.values())


def compared_table(cells: Cells, part: str) -> list[dict[str, Any]]:
    """One row per cell and arm of a part: settings, time, ratio to the cell's first arm, memory, difference from it."""
    table = []
    for cell in of_part(cells, part):
        first = cell["rows"][0]["total"]
        size = {k: v for k, v in cell["settings"].items() if k in ("batch", "length", "tokens", "experts")}
        for row in cell["rows"]:
            table.append(
                {**size, "arm": row["arm"], **_milliseconds(row["total"])}
                | {"forward_ms": _milliseconds(row["forward"])["ms"]}
                | dict(zip(FASTER, paired_ratio(first, row["total"]), strict=True))
                | {"peak_mb": _megabytes(row), "difference": row.get("difference")}
            )
    return table


def readable_compared(table: Rows) -> list[dict[str, Any]]:
    """The rows of ``compared_table`` for people."""
    size = next(k for k in ("batch", "tokens") if k in table[0])
    return [
        {
            size: f"{r[size]:,}",
            **({"experts": r["experts"]} if "experts" in r else {}),
            "way": r["arm"],
            "time": _time(r),
            "times faster": f"{r['times_faster']:.3g}",
            "peak memory": "-" if r["peak_mb"] is None else megabytes(r["peak_mb"]),
            "differs by": _difference(r["difference"]),
        }
        for r in table
    ]


def model_table(cells: Cells) -> list[dict[str, Any]]:
    """One row per number format of the training step."""
    rows = cells["model"]["rows"]
    table = []
    for row in rows:
        taken, losses = row["step_seconds"], row["losses"]
        faster, low, _ = paired_ratio(rows[0]["step_seconds"], taken) if taken else (None,) * 3
        table.append(
            {key: row[key] for key in ("format", "support", "why")}
            | _milliseconds(taken)
            | {"times_faster": faster, "times_faster_low": low}
            | {"gradient_difference": row["gradient_difference"], "last_loss": losses[-1] if taken else None}
            | {"steps": len(losses) + 1 if taken else 0}
        )
    return table


def readable_model(table: Rows) -> list[dict[str, Any]]:
    """The rows of ``model_table`` for people."""
    return [
        {
            "format": r["format"],
            "here": r["support"],
            "because": r["why"],
            "step": "-" if r["ms"] is None else duration(r["ms"] / 1e3),
            "times faster than fp32": _shown(r["times_faster"], ".2f"),
            "gradient differs by": _difference(r["gradient_difference"]),
            "loss after the same steps": _shown(r["last_loss"], ".4f"),
        }
        for r in table
    ]


def _rows_in_words(cells: Cells) -> str:
    """Over how many rows an error is the worst: fewer where they are long."""
    rows = {cell["settings"]["n"]: cell["settings"]["rows"] for cell in of_part(cells, "accuracy")}
    most, fewest = max(rows.values()), min(rows.values())
    if most == fewest:
        return f"{most} rows"
    longest = max(n for n, count in rows.items() if count == most)
    return f"{most} rows up to N = {longest:,}, of fewer beyond ({fewest} at N = {max(rows):,})"


def errors_note(cells: Cells, reference_n: int, device: str) -> str:
    """The small print under the error picture."""
    return (
        f"Error relative to the row's largest entry, worst of {_rows_in_words(cells)}; a = v - 2, v ~ N(0, 1), b = c = 1. "
        f"Against 50 digits up to N = {reference_n:,}, beyond against sequential left/right in complex128. Adaptive: "
        f"double precision for rows whose largest |dL/dG| is below {grid.ADAPTIVE_THRESHOLD:g} of the batch's. Left/right "
        f"computed on the {'GPU' if device == 'cuda' else 'CPU'}."
    )


def machine_note(cells: Cells, device: str, repeats: int) -> str:
    """The machine that the times were measured on, and whether it was busy."""
    machine = next(iter(cells.values()))["machine"]
    if device == "cuda":
        said = [f"Measured on {machine['gpu']}"]
    else:
        why = "no GPU here, so no GPU rows" if machine["gpu"] is None else "no GPU rows: the CPU was asked for"
        threads = f"{machine['cores']} cores, threads: {machine['threads']}"
        said = [f"Measured on {machine['processor']}, {threads}", why]
    said.append(f"up to {repeats} calls each, the ways in turn")
    crowded = [cell for cell in cells.values() if is_crowded(cell)]
    if 2 * len(crowded) > len(cells):
        other = sum(cell["other_cores"] for cell in crowded) / len(crowded)
        said.append(
            f"OTHER PROCESSES USED {other:.1f} CORES: trust no times; run again on a quiet machine, or with OMP_NUM_THREADS=1"
        )
    return "; ".join(said) + "."
