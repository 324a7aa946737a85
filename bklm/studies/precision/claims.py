"""The original's claims beside what was measured, and the recommendation that the numbers support."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bklm.harness.measure import is_crowded, paired_ratio
from bklm.studies.precision import parts
from bklm.studies.precision.grid import LEFT_RIGHT, PRECISIONS, THETA_PHI, THETA_PHI_LOOP
from bklm.studies.precision.tables import (
    Cells,
    Rows,
    at_longest,
    first_overflow,
    of_arm,
    of_part,
    times_as_long,
    worst,
)

CLAIMED_ERROR = 1e-4
UNDECIDED = "too noisy to tell"
# Quartiles further apart than this, with 1 between them, decide nothing.
NOISE = 1.5


class _Speed(NamedTuple):
    """A claimed speed-up and where its measurement lies."""

    claim: str
    low: float
    high: float
    cell: str
    slow: str
    fast: str
    short: str  # for the figure
    precisions: str = ""  # of both sides, where they differ or the names do not tell
    is_backward: bool = False  # the claim is about the backward alone


def _speed_claims(cells: Cells) -> Iterable[_Speed]:
    for recursion in (THETA_PHI_LOOP, LEFT_RIGHT):
        slow, fast = f"{recursion} complex128", f"{recursion} mixed"
        yield _Speed("mixed precision", 1.5, 2.0, "mixed", slow, fast, recursion)
    batch = cells["total"]["settings"]["batch"]
    largest = max(c["settings"]["batch"] for c in of_part(cells, "batched") if c["settings"]["batch"] <= batch)
    for fast in (parts.VMAP, parts.CHUNKS, parts.FUSED):
        yield _Speed("batched gradient", 2.0, 2.5, f"batched_B{largest}", parts.SEQUENTIAL, fast, fast)
    for cell in of_part(cells, "moe"):
        name = f"moe_E{cell['settings']['experts']}"
        for fast, kind in ((parts.EXACT, "exact"), (parts.SELECTED, "selected")):
            short = f"{kind}, {cell['settings']['experts']} experts"
            yield _Speed("analytic MoE backward", 10.0, 10.0, name, parts.DENSE, fast, short, is_backward=True)
    measured = {row["arm"] for row in cells["total"]["rows"]}
    for fast, own in ((parts.ALL_ANALYTIC, "complex64"), (parts.ALL_ANALYTIC_DOUBLE, "complex128")):
        if fast not in measured:
            continue  # a cell kept from before this arm existed
        for slow in (parts.PLAIN_SEQUENTIAL, parts.PLAIN):
            short = f"against {slow}" + (f", both {own}" if own == "complex128" else "")
            precisions = f"core in complex128 / {own}, mixture in float32"
            yield _Speed("total backward", 50.0, 50.0, "total", slow, fast, short, precisions, is_backward=True)
    slow, fast = parts.TRANSFORMER, parts.RESNET_BK
    yield _Speed("architecture at N = 2048", 6.7, 6.7, "architecture", slow, fast, "one block")


def claims_table(cells: Cells, table: Rows) -> list[dict[str, Any]]:
    """The original's claims, none of which it had measured, beside what this run measured.

    Speed-ups are ratios of paired calls with quartiles, of the backward alone where that is what was claimed and of forward
    and backward elsewhere; the last rows are the error claim.
    """
    rows = []
    for c in _speed_claims(cells):
        cell = cells[c.cell]
        times = {row["arm"]: row["total"] for row in cell["rows"]}
        together = paired_ratio(times[c.slow], times[c.fast])[0]
        if c.is_backward:
            forward = {row["arm"]: row["forward"] for row in cell["rows"]}
            times = {a: [t - f for t, f in zip(times[a], forward[a], strict=True)] for a in (c.slow, c.fast)}
        measured, low, high = paired_ratio(times[c.slow], times[c.fast])
        word = UNDECIDED if is_crowded(cell) else verdict(measured, low, high, c.low, c.high)
        compared = f"{c.slow} / {c.fast}, {_where(cell)}" + (f"; {c.precisions}" if c.precisions else "")
        compared += f"; with the forward {together:.3g}x" if c.is_backward else ""
        rows.append(_row(c.claim, (c.low, c.high), (measured, low, high), word, compared, c.short))
    published = next(r for r in cells["mixed"]["rows"] if r["arm"] == f"{THETA_PHI_LOOP} mixed")
    exact = worst(table, LEFT_RIGHT, "mixed", "gradient_error")
    place = f"N = {exact['n']:,}, Im z = {exact['im_z']:g}"
    itself = f"published formula, against itself in complex128, {_where(cells['mixed'])}"
    of_grid = f"left/right, exact gradient, worst of the grid ({place})"
    for error, compared in ((published["difference"], itself), (exact["gradient_error"], of_grid)):
        word = "holds" if error < CLAIMED_ERROR else "does not hold"
        claim, claimed = "mixed precision, relative error", (CLAIMED_ERROR, CLAIMED_ERROR)
        rows.append(_row(claim, claimed, (error, None, None), word, compared, ""))
    status = cells["architecture"]["rows"][0]["theta_phi_status"]
    for row in rows:
        if row["claim"].startswith("architecture"):
            row["compared"] += f"; the original's recursion is {status} at this length"
    return rows


def _row(claim: str, claimed: Sequence[float], measured: Sequence[float | None], *said: str) -> dict[str, Any]:
    """Of a measured speed-up with quartiles; ``said``: verdict, what was compared, and that in short for the figure."""
    keys = ("claim", "claimed_low", "claimed_high", "measured", "low", "high", "verdict", "compared", "short")
    return dict(zip(keys, (claim, *claimed, *measured, *said), strict=True))


def _where(cell: dict[str, Any]) -> str:
    s = cell["settings"]
    if "tokens" in s:
        return f"{s['tokens']:,} tokens, {s['experts']} experts"
    return f"({s.get('batch', s.get('rows'))}, {s.get('length', s.get('n'))})"


def verdict(measured: float, low: float, high: float, claimed_low: float, claimed_high: float) -> str:
    """A word for a measured speed-up (median, quartiles) beside a claimed range."""
    if low <= 1 <= high and high > NOISE * low:
        return UNDECIDED  # at any median
    if low > claimed_high:
        return "exceeded"
    if measured >= claimed_low:
        return "reached"
    if low <= 1 <= high or abs(measured - 1) < 0.05:
        return "no effect"
    return "not reached" if measured > 1 else "slower"


def readable_claims(rows: Rows) -> list[dict[str, Any]]:
    """One row per claim: the claimed and the measured ratio as words, and what was compared."""

    def claimed(r: dict[str, Any]) -> str:
        if r["low"] is None:
            return f"below {r['claimed_high']:g}"
        ends = dict.fromkeys((f"{r['claimed_low']:g}", f"{r['claimed_high']:g}"))
        return "-".join(ends) + "x"

    def measured(r: dict[str, Any]) -> str:
        if r["low"] is None:
            return f"{r['measured']:.1e}"
        return f"{r['measured']:.3g}x ({r['low']:.3g} to {r['high']:.3g})"

    return [
        {
            "claim": r["claim"],
            "claimed": claimed(r),
            "measured": measured(r),
            "verdict": r["verdict"],
            "what was compared": re.sub(r"\((\d+), (\d+)\)", r"batch \1, N = \2", r["compared"]),
        }
        for r in rows
    ]


def is_busy(cells: Cells) -> bool:
    """Whether the machine was busy during half of the measurements or more, so that times decide nothing."""
    return 2 * sum(map(is_crowded, cells.values())) >= len(cells)


def recommend(table: Rows, models: Rows, tolerance: float, busy: bool = False) -> tuple[str, str]:
    """The precision to use with left/right, and one sentence that says why.

    It is the fastest, at the longest N measured, of those that stayed finite with every gradient error within the
    tolerance; the most accurate one where none did. Of those whose times cannot be told apart (overlapping quartiles) the one
    with least memory is taken. On a busy machine times have no say, and it is the most accurate one.
    """
    errors = {p: worst(table, LEFT_RIGHT, p, "gradient_error") for p in PRECISIONS}
    finite = [p for p in PRECISIONS if first_overflow(table, LEFT_RIGHT, p) is None]
    good = [p for p in finite if errors[p]["gradient_error"] <= tolerance]
    n, _ = at_longest(table, LEFT_RIGHT, "complex128", "ms")
    times = {p: _time(table, p, n) for p in PRECISIONS}
    memory = {p: (at_longest(table, LEFT_RIGHT, p, "peak_mb") or (n, None))[1] for p in PRECISIONS}
    if good and not busy:
        fastest = min((times[p] for p in good), key=lambda t: t["ms"])
        level = [p for p in good if times[p]["ms_low"] <= fastest["ms_high"]]
        best = min(level, key=lambda p: (memory[p] or 0.0, times[p]["ms"]))
    else:
        best = min(good or finite, key=lambda p: errors[p]["gradient_error"])
    place = errors[best]
    sentence = (
        f"Use left/right in {best}: over N = {table[0]['n']:,} to {table[-1]['n']:,} it never overflowed, and its worst "
        f"gradient error is {place['gradient_error']:.0e} (N = {place['n']:,}, Im z = {place['im_z']:g}), "
        f"{'within' if best in good else 'which exceeds'} the {tolerance:g} asked for"
    )
    if busy:
        return (
            best,
            f"{sentence}; which precision or format is faster is {UNDECIDED} on this machine; {_overflows(table)}.",
        )
    if best != "complex128":
        sentence += (
            f"; complex128 takes {times_as_long(times['complex128'], times[best])} times as long at N = {n:,}"
        )
        if memory[best] and memory["complex128"]:
            sentence += f" and {memory['complex128'] / memory[best]:.2g} times the memory"
    sentence += _enough_for_larger_shifts(table, best, tolerance, times, memory)
    return best, f"{sentence}; {_overflows(table)}; {_rest_of_model(models)}."


def _enough_for_larger_shifts(
    table: Rows, best: str, tolerance: float, times: dict[str, dict[str, Any]], memory: dict[str, float | None]
) -> str:
    """Where complex64 is not the recommendation: from which Im z on it would be."""
    if best == "complex64":
        return ""
    shifts = sorted({r["im_z"] for r in table}, reverse=True)
    of_shifts = {z: [r for r in table if r["im_z"] == z] for z in shifts}
    at = {z: worst(rows, LEFT_RIGHT, "complex64", "gradient_error") for z, rows in of_shifts.items()}
    good = list(itertools.takewhile(lambda z: at[z] and at[z]["gradient_error"] <= tolerance, shifts))
    if not good:
        return ""
    error = max(at[z]["gradient_error"] for z in good)
    words = f"; for Im z of {min(good):g} or more complex64 is enough (worst gradient error {error:.0e})"
    share = times["complex64"]["ms"] / times[best]["ms"]
    words += f" at {times_as_long(times['complex64'], times[best])} {'of' if share < 1 else 'times'} the time"
    if memory["complex64"] and memory[best]:
        words += f" and {memory['complex64'] / memory[best]:.2g} of the memory"
    return words


def _time(table: Rows, precision: str, n: int) -> dict[str, Any]:
    """The row with left/right's time at a length and the first Im z."""
    place = (n, table[0]["im_z"])
    return next(r for r in of_arm(table, LEFT_RIGHT, precision) if (r["n"], r["im_z"]) == place)


def _overflows(table: Rows) -> str:
    lost = {p: first_overflow(table, THETA_PHI, p) for p in ("complex64", "complex128")}
    found = [f"from N = {n:,} in {p}" for p, n in lost.items() if n is not None]
    if not found:
        return "theta/phi stayed finite at these lengths"
    return f"theta/phi is not finite {' and '.join(found)}"


def _rest_of_model(models: Rows) -> str:
    """Whether another format than fp32 pays for the other layers: native, and faster in three quarters of the steps."""
    faster = [r for r in models if r["support"] == "native" and (r["times_faster_low"] or 0) > 1.05]
    if not faster:
        there = [r for r in models[1:] if r["ms"] is not None]
        tried = [f"{r['format']} ({r['support']}, {r['times_faster']:.2g}x)" for r in there]
        words = f"no other format pays here, {', '.join(tried)}" if tried else "no other format runs here"
        return f"leave the rest of the model in fp32: {words}"
    best = max(faster, key=lambda r: r["times_faster"])
    return f"train the rest of the model in {best['format']}, native here and {best['times_faster']:.2g} times as fast as fp32"


def adaptive_finding(table: Rows) -> str:
    """What choosing the precision by the size of the gradient buys, in one sentence."""
    small = {p: worst(table, LEFT_RIGHT, p, "gradient_error_small_rows") for p in PRECISIONS}
    whole = {p: worst(table, LEFT_RIGHT, p, "gradient_error")["gradient_error"] for p in PRECISIONS}
    if any(row is None for row in small.values()):
        return "Adaptive precision could not be judged: no row with small gradients stayed finite."
    small = {p: row["gradient_error_small_rows"] for p, row in small.items()}
    return (
        f"Rows with small upstream gradients: relative error {small['complex64']:.0e} in complex64 and "
        f"{small['adaptive']:.0e} when they alone get double precision; rows with large ones: at most "
        f"{whole['complex64']:.0e} in both. Rounding is relative to a number's size, so small gradients need no more "
        "digits than large ones."
    )
