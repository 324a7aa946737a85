"""Tables of the precision study, computed from its measured cells: rows for CSV, and the same rows for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bklm.harness.measure import median_and_quartiles, paired_ratio
from bklm.studies.precision.grid import LEFT_RIGHT, PRECISIONS, THETA_PHI, THETA_PHI_LOOP

Rows = Sequence[dict[str, Any]]
Cells = dict[str, dict[str, Any]]

RECURSIONS = (LEFT_RIGHT, THETA_PHI, THETA_PHI_LOOP)
RESOLVED_MB = 0.1  # less cannot be told from the measuring process's own needs
SPREAD = ("ms", "ms_low", "ms_high")


def of_part(cells: Cells, part: str) -> list[dict[str, Any]]:
    return [cell for cell in cells.values() if cell["part"] == part]


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
        n, im_z = cell["settings"]["n"], cell["settings"]["im_z"]
        for row in cell["rows"]:
            costs[row["arm"], n, im_z] = row
            if row["peak_bytes"] is not None:
                memory[row["arm"], n] = _megabytes(row)
    accuracy = {
        (row["recursion"], row["precision"], cell["settings"]["n"], cell["settings"]["im_z"]): row
        for cell in of_part(cells, "accuracy")
        for row in cell["rows"]
    }
    places = {(cell["settings"]["n"], cell["settings"]["im_z"]): None for cell in of_part(cells, "accuracy")}
    table = []
    for n, im_z in places:
        for recursion in RECURSIONS:
            for precision in PRECISIONS:
                error = accuracy.get((recursion, precision, n, im_z))
                cost = costs.get((f"{recursion} {precision}", n, im_z))
                if error is None and recursion == THETA_PHI_LOOP:
                    # The same products as the compiled recursion's, so the same overflow.
                    error = {"status": accuracy[THETA_PHI, precision, n, im_z]["status"]}
                table.append(
                    {
                        "recursion": recursion,
                        "precision": precision,
                        "n": n,
                        "im_z": im_z,
                        "status": error["status"],
                        "value_error": error.get("value_error"),
                        "gradient_error": error.get("gradient_error"),
                        "gradient_error_small_rows": error.get("gradient_error_small_rows"),
                        "reference": error.get("reference"),
                        **_milliseconds(cost["total"] if cost else []),
                        "calls": len(cost["total"]) if cost else 0,
                        "peak_mb": memory.get((f"{recursion} {precision}", n)),
                        "note": _note(cost),
                    }
                )
    return table


def _note(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "not measured: this recursion has no form for this device"
    if cost["would_take"] is not None:
        return f"not measured: one call would take about {duration(cost['would_take'])}"
    return ""


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


def _difference(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}" if value else "0"


def first_overflow(table: Rows, recursion: str, precision: str) -> int | None:
    """Smallest N at which a result was not finite (or all zeros) for some Im z; None when all were finite."""
    lost = [
        r["n"]
        for r in table
        if (r["recursion"], r["precision"]) == (recursion, precision) and r["status"] != "finite"
    ]
    return min(lost, default=None)


def worst(table: Rows, recursion: str, precision: str, key: str) -> dict[str, Any] | None:
    """The finite row with the largest ``key``; None where there is none."""
    found = [
        r
        for r in table
        if (r["recursion"], r["precision"]) == (recursion, precision) and r.get(key) is not None
    ]
    return max(found, key=lambda r: r[key], default=None)


def at_longest(table: Rows, recursion: str, precision: str, key: str) -> tuple[int, float] | None:
    """(N, value) of ``key`` at the first Im z and the longest N where it was measured."""
    im_z = table[0]["im_z"]
    found = [
        (r["n"], r[key])
        for r in table
        if (r["recursion"], r["precision"], r["im_z"]) == (recursion, precision, im_z) and r[key] is not None
    ]
    return max(found, default=None)


def summary_readable(table: Rows) -> list[dict[str, Any]]:
    """The grid in one line per recursion and precision, for people."""
    rows = []
    for recursion in RECURSIONS:
        for precision in PRECISIONS:
            lost = first_overflow(table, recursion, precision)
            value, slope = (worst(table, recursion, precision, f"{k}_error") for k in ("value", "gradient"))
            time, memory = (at_longest(table, recursion, precision, k) for k in ("ms", "peak_mb"))
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


def costs_readable(table: Rows) -> list[dict[str, Any]]:
    """Time at the first Im z, one line per recursion and precision, one column per N; what would take too long says so."""
    im_z = table[0]["im_z"]
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for r in table:
        if r["im_z"] != im_z:
            continue
        line = lines.setdefault(
            (r["recursion"], r["precision"]), {"recursion": r["recursion"], "precision": r["precision"]}
        )
        shown = r["note"].removeprefix("not measured: one call ") if r["ms"] is None else _time(r)
        line[f"N = {r['n']:,}"] = shown
    return list(lines.values())


def compared_table(cells: Cells, part: str) -> list[dict[str, Any]]:
    """One row per cell and arm of a part: settings, time, ratio to the cell's first arm, memory, difference from it."""
    table = []
    for cell in of_part(cells, part):
        first = cell["rows"][0]
        for row in cell["rows"]:
            ratio = paired_ratio(first["total"], row["total"])
            table.append(
                {
                    **{
                        k: v
                        for k, v in cell["settings"].items()
                        if k in ("batch", "length", "tokens", "experts")
                    },
                    "arm": row["arm"],
                    **_milliseconds(row["total"]),
                    "forward_ms": _milliseconds(row["forward"])["ms"],
                    "times_faster": ratio[0],
                    "times_faster_low": ratio[1],
                    "times_faster_high": ratio[2],
                    "peak_mb": _megabytes(row),
                    "difference": row.get("difference"),
                }
            )
    return table


def compared_readable(table: Rows) -> list[dict[str, Any]]:
    """The same for people."""
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
    (cell,) = of_part(cells, "model")
    full = cell["rows"][0]
    table = []
    for row in cell["rows"]:
        measured = bool(row["step_seconds"])
        ratio = paired_ratio(full["step_seconds"], row["step_seconds"]) if measured else (None,) * 3
        table.append(
            {
                "format": row["format"],
                "support": row["support"],
                "why": row["why"],
                **_milliseconds(row["step_seconds"]),
                "times_faster": ratio[0],
                "times_faster_low": ratio[1],
                "gradient_difference": row["gradient_difference"],
                "last_loss": row["losses"][-1] if measured else None,
                "steps": len(row["losses"]) + 1 if measured else 0,
            }
        )
    return table


def model_readable(table: Rows) -> list[dict[str, Any]]:
    """The same for people."""

    def shown(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    return [
        {
            "format": r["format"],
            "here": r["support"],
            "because": r["why"],
            "step": "-" if r["ms"] is None else duration(r["ms"] / 1e3),
            "times faster than fp32": shown(r["times_faster"], ".2f"),
            "gradient differs by": _difference(r["gradient_difference"]),
            "loss after the same steps": shown(r["last_loss"], ".4f"),
        }
        for r in table
    ]
