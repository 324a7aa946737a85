"""What does the BK-core cost, forward + exact backward, and what would it cost written otherwise?

    python benchmarks/bk_core.py                        # all tables
    python benchmarks/bk_core.py --quick                # small sizes, short rounds, for CI
    python benchmarks/bk_core.py --only loop copy       # some of: loop copy roofline around first
                                                        # compile jax linear peers overhead batched
    python benchmarks/bk_core.py --only copy --size 4 250000
    python benchmarks/bk_core.py --save results.json    # interrupted? the same command goes on with the next case

loop        the whole call from Python in complex64 against the theta/phi recursion as a Python loop in complex128 under
            vmap: with autograd through the loop, and with its forward and the published diagonal backward
copy        few long rows against copying 52 B per element between two existing buffers: in one thread, as when the
            targets were set, which are judged by it, and in all; with the extra memory per element
roofline    the passes of a call beside a copy: bytes moved, time, the share of the memory's bandwidth
around      a small call's kernels, what torch's autograd takes around nothing, and the rest
first       import and first call of a fresh process, in processor time
compile     processor time that fresh processes take to compile: the operator's kernels, bklm selftest, notebook 00
jax         its tridiagonal solve of one column with the gradient of a, in a second process (--jax PYTHON)
linear      time per element from 4,096 to 4,000,000 positions
peers       what else one would reach for: dense inverse, banded solves, torch's associative scan, our torch path
overhead    the same call through torch.library's registered op, and through autograd with nothing inside
batched     gradients of a batch: one sample at a time, vmap, vmap in chunks, and the fused call

Times are medians of samples taken in turns (quartiles in brackets). Ratios are theirs / ours: larger is better for us.
Memory: for copy the rise of the resident size at its peak during one call, in a process of its own (Linux); for batched
the most that torch had allocated at once (the fused kernel's own buffer, 2 MB per thread, is kept between calls).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _bk_core_arms import (
    BATCHED,
    YARDSTICK,
    associative_scan,
    banded,
    dense,
    fused,
    inputs,
    loop_autograd,
    loop_diagonal,
    nothing,
    ours,
    registered,
    theta_phi_rows,
)
from _bk_core_first_use import compilation_case, first_use_case
from _bk_core_roofline import around_case, jax_case, machine, passes_case
from _bk_core_targets import judge
from _timing import (
    Timing,
    copy,
    duration,
    peak_memory,
    peak_tensor_memory,
    print_table,
    refuse_if_too_large,
    take_turns,
    where,
)
from tqdm import tqdm

from bklm.training.allocator import keep_freed_memory

HELD = 120  # bytes per element that a call may hold beside its inputs
HELD_BY_SCAN = 610  # the same for torch's associative scan with its graph, the hungriest of the peers
HELD_BY_LOOP = 200  # and for the theta/phi loop's, which besides makes NODES bytes of graph at every position
NODES = 13_000
Row = dict[str, object]


# --- tables --------------------------------------------------------------------------------------------------------------


def loop_case(m: int, n: int, seconds: float) -> Row:
    refuse_if_too_large(f"({m}, {n})", n * (m * HELD_BY_LOOP + NODES))
    a, gbar = inputs(m, n)
    with torch.no_grad():
        finite = bool(torch.isfinite(torch.view_as_real(theta_phi_rows(a.double()))).all())
    arms = {"ours": ours(a, gbar), "causal": ours(a, gbar, causal=True)}
    if finite:
        arms |= {"autograd": loop_autograd(a, gbar), "diagonal": loop_diagonal(a, gbar)}
    found = take_turns(arms, seconds)
    row: Row = {"B, N": f"{m}, {n}", "bidirectional": found["ours"], "causal": found["causal"]}
    for name, title in (("autograd", "loop, autograd"), ("diagonal", "loop, diagonal backward")):
        row[title] = found[name] if finite else "overflows"
        row[f"{name} / ours"] = ratio(found[name], found["ours"]) if finite else ""
    return row


def copy_case(m: int, n: int, seconds: float) -> Row:
    size = YARDSTICK * m * n
    refuse_if_too_large(f"({m}, {n})", 2 * size + m * n * HELD)
    a, gbar = inputs(m, n)
    arms = {"ours": ours(a, gbar), "causal": ours(a, gbar, causal=True)}
    arms |= {"one": copy(size, 1), "all": copy(size, torch.get_num_threads())}
    found = take_turns(arms, seconds)
    peak = extra_bytes(m, n)
    return {
        "B, N": f"{m}, {n}",
        "bidirectional": found["ours"],
        "causal": found["causal"],
        "copy of 52 B/element, one thread": found["one"],
        "ours / copy": ratio(found["ours"], found["one"]),
        "causal / copy": ratio(found["causal"], found["one"]),
        "the same, all threads": found["all"],
        "ours / it": ratio(found["ours"], found["all"]),
        "extra B/element": "not measured" if peak is None else f"{peak / (m * n):.0f}",
    }


def linear_case(n: int, seconds: float) -> Row:
    refuse_if_too_large(f"(1, {n})", n * HELD)
    a, gbar = inputs(1, n)
    found = take_turns({"ours": ours(a, gbar), "causal": ours(a, gbar, causal=True)}, seconds)
    return {
        "N": f"{n:,}",
        "bidirectional": found["ours"],
        "ns/element": f"{found['ours'].median / n * 1e9:.2f}",
        "causal": found["causal"],
        "ns/element, causal": f"{found['causal'].median / n * 1e9:.2f}",
    }


def peers_case(m: int, n: int, seconds: float) -> list[Row]:
    refuse_if_too_large(f"({m}, {n})", m * n * HELD_BY_SCAN)
    a, gbar = inputs(m, n)
    arms = {
        "ours, forward + backward": ours(a, gbar),
        "ours, causal": ours(a, gbar, causal=True),
        "our torch path": ours(a, gbar, backend="torch"),
    }
    if m * n * n <= 2**22:
        arms |= {
            "torch.linalg.inv, forward only": dense(a, gbar),
            "scipy solve_banded, complex128, forward only": banded(a, gbar),
        }
    try:
        arms["torch associative_scan, complex128, causal"] = associative_scan(a, gbar)
    except ImportError:
        tqdm.write("this torch has no associative_scan: left out")
    found = take_turns(arms, seconds)
    first = found["ours, forward + backward"]
    return [
        {"B, N": f"{m}, {n}", "arm": x, "time": t, "theirs / ours": ratio(t, first)} for x, t in found.items()
    ]


def overhead_case(m: int, n: int, seconds: float) -> list[Row]:
    a, gbar = inputs(m, n)
    arms = {
        "eager": ours(a, gbar),
        "torch.library": registered(a, gbar),
        "autograd around nothing": nothing(a, gbar),
    }
    found = take_turns(arms, seconds)
    extra = found["torch.library"].median - found["eager"].median
    rows: list[Row] = [{"B, N": f"{m}, {n}", "road": name, "time": t} for name, t in found.items()]
    return [
        *rows,
        {"B, N": f"{m}, {n}", "road": "torch.library beyond eager", "time": duration(max(extra, 0.0))},
    ]


def batched_case(m: int, n: int, seconds: float) -> list[Row]:
    refuse_if_too_large(f"({m}, {n})", n * (m * HELD_BY_LOOP + NODES))
    a, gbar = inputs(m, n)
    found = take_turns({name: functools.partial(f, a, gbar) for name, f in BATCHED.items()}, seconds)
    exact = fused(a, gbar)
    rows: list[Row] = []
    for name, timing in found.items():
        rows.append(
            {
                "B, N": f"{m}, {n}",
                "variant": name,
                "time": timing,
                "time / fused": ratio(timing, found["fused"]),
                "peak kB": f"{peak_tensor_memory(functools.partial(BATCHED[name], a, gbar)) / 1e3:.0f}",
                "largest difference": f"{(BATCHED[name](a, gbar) - exact).abs().max() / exact.abs().max():.1e}",
            }
        )
    return rows


# --- memory, in a process of its own -------------------------------------------------------------------------------------


def extra_bytes(m: int, n: int) -> int | None:
    """Peak bytes of one forward + backward beside its inputs; None where the system does not tell."""
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "4096"}
    command = [sys.executable, __file__, "--size", str(m), str(n), "--peak"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(m: int, n: int) -> None:
    ours(*inputs(min(m, 64), min(n, 2000)))()  # loads and compiles
    print(json.dumps(peak_memory(ours(*inputs(m, n)))))


# --- the run -------------------------------------------------------------------------------------------------------------


def ratio(other: Timing, ours: Timing) -> str:
    return f"{other.median / ours.median:.3g}"


TITLES = {
    "loop": "Forward + exact backward in complex64 against the theta/phi loop in complex128",
    "copy": "Few long rows against a copy",
    "roofline": "Where the time of a call goes",
    "around": "A small call from Python",
    "first": "The first call of a process, processor time",
    "compile": "Compilation, seconds of processor time",
    "jax": "Ours: the diagonal of (T - z)^-1 and its gradient of a. jax: tridiagonal_solve, which is (T - z)^-1 x of one "
    "column, and its gradient of a",
    "linear": "Linear in N",
    "peers": "Other ways to compute it, in complex64 but where an arm says complex128",
    "overhead": "Overhead",
    "batched": "Batched gradients; the loop in complex128",
}


def cases(options: argparse.Namespace) -> list[tuple[str, Callable, tuple[int, ...]]]:
    """(table, function, arguments) in order."""
    quick = options.quick
    size = tuple(options.size) if options.size else None
    plan: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
        "loop": (loop_case, [(8, 128)] if quick else [(8, 128), (32, 128), (32, 512)]),
        "copy": (copy_case, [(2, 65536)] if quick else [(8, 65536), (1, 1_000_000)]),
        "roofline": (passes_case, [(4, 2048)] if quick else [(32, 128), (32, 512), (8, 65536), (1, 1_000_000)]),
        "around": (around_case, [(32, 128)]),
        "first": (lambda seconds: first_use_case(), [()]),
        "compile": (lambda seconds: compilation_case(quick), [()]),
        "jax": (
            lambda m, n, seconds: jax_case(m, n, options.jax, seconds),
            [(8, 65536), (1, 1_000_000)] if options.jax else [],
        ),
        "linear": (
            linear_case,
            [(n,) for n in ((4096, 65536) if quick else (4096, 65536, 1_000_000, 4_000_000))],
        ),
        "peers": (peers_case, [(4, 64)] if quick else [(8, 128), (32, 128), (1, 65536)]),
        "overhead": (overhead_case, [(32, 128)]),
        "batched": (batched_case, [(4, 32)] if quick else [(1, 128), (8, 128), (32, 128), (64, 128)]),
    }
    if size:
        for table in ("loop", "copy", "roofline", "around", "peers", "overhead", "batched"):
            plan[table] = plan[table][0], [size]
        plan["linear"] = plan["linear"][0], [(size[1],)]
    chosen = options.only or list(plan)
    return [(table, plan[table][0], arguments) for table in chosen for arguments in plan[table][1]]


def as_text(row: Row) -> Row:
    return {name: str(value) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, short rounds")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), help="tables to print")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("ROWS", "N"), help="instead of the sizes of the tables"
    )
    parser.add_argument("--seconds", type=float, default=None, help="time for each case (default 6, quick 0.5)")
    parser.add_argument("--save", type=Path, help="keep finished cases here, and go on from them")
    parser.add_argument("--jax", metavar="PYTHON", help="a Python interpreter that has jax, for its table")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)  # used by the script on itself
    options = parser.parse_args()
    if options.size and min(options.size) < 1:
        parser.error(f"--size {options.size[0]} {options.size[1]}: at least 1 row of 1 position is needed.")
    if options.peak:
        print_peak(*options.size)
        return
    seconds = options.seconds or (0.5 if options.quick else 6.0)
    done = json.loads(options.save.read_text()) if options.save and options.save.exists() else {}
    keep_freed_memory()  # as training does
    print(where())
    tables: dict[str, list[Row]] = {}
    for table, function, arguments in tqdm(cases(options), desc="cases", leave=False):
        key = f"{table} {arguments} {seconds}"
        if key not in done:
            rows = function(*arguments, seconds)
            done[key] = [as_text(row) for row in (rows if isinstance(rows, list) else [rows])]
            if options.save:
                unfinished = options.save.with_suffix(".part")
                unfinished.write_text(json.dumps(done, indent=1))
                unfinished.replace(options.save)
        tables.setdefault(table, []).extend(done[key])
    for table, rows in tables.items():
        print_table(f"{TITLES[table]} ({machine()})", rows)
    print()
    judge(tables)


if __name__ == "__main__":
    main()
