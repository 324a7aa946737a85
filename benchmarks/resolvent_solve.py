"""What does resolvent_solve cost, and what do jax's and scipy's tridiagonal solves cost in the same run?

    python benchmarks/resolvent_solve.py                              # all tables
    python benchmarks/resolvent_solve.py --jax /path/to/jax/python    # also against jax.lax.linalg.tridiagonal_solve
    python benchmarks/resolvent_solve.py --quick                      # small sizes, short rounds, for CI
    python benchmarks/resolvent_solve.py --size 8 65536 1             # B N D instead of the sizes of the first table

peers       bidirectional, complex64 x (B, N, D), real a, b, c, complex z: forward, and forward + gradients of all five inputs
around      the peers' call with gradients, the shortest: its kernels, what torch's autograd takes by itself, and the rest
models      causal, real x (rows, N, columns a head), number b and c: forward, and forward + gradients of x and a, against
            a copy on all threads that moves the bytes that must be moved at least (12 and 32 a number of y)

jax needs a Python of its own, where ``python -m pip install "jax[cpu]"`` put it; it runs there in a second process and
takes turns with ours. Times are medians of samples taken in turns (quartiles in brackets). Ratios are theirs / ours: larger
is better for us. Threads: torch.get_num_threads(), jax's and scipy's own choice for theirs.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import Timing, copy, duration, print_table, take_turns, target, where
from scipy.linalg import solve_banded
from torch import Tensor

from bklm.bk_core import resolvent_solve
from bklm.bk_core.cpu import backend, solve
from bklm.training.allocator import keep_freed_memory

PEERS = ((32, 128, 32), (8, 65536, 1), (1, 1_000_000, 1))
MODELS = ((64, 256, 32), (64, 1024, 48), (16, 4096, 64), (256, 128, 24))
AGAINST_JAX = dict(zip(PEERS, (6, 4, 4), strict=True))
"""Targets of the peers' table: so many times as fast as jax with gradients, and everywhere AGAINST_SCIPY forward."""
AGAINST_SCIPY = 5
CALLS = 4
"""Calls in a row for a sample, of ours and scipy as of jax, whose every sample is a question and an answer as well."""
SETTLE = 0.1
"""Seconds of calls before each sample that are not timed."""
MISSING = "not installed"
PATIENCE = 15
"""Seconds; the longest answer, the first, compiles for a few."""
Call = Callable[[], object]


def in_a_row(call: Call) -> Call:
    """``CALLS`` calls as one."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def each_of(timing: Timing) -> Timing:
    """The time of one of ``CALLS`` calls."""
    return Timing(*(t / CALLS for t in timing))


def inputs(m: int, n: int, columns: int) -> tuple[Tensor, ...]:
    """x, a, b, c, z and gbar of the peers' table."""
    g = torch.Generator().manual_seed(0)
    x, gbar = (torch.randn(m, n, columns, dtype=torch.complex64, generator=g) for _ in range(2))
    b, c = (torch.rand(m, n - 1, generator=g) * 0.8 + 0.6 for _ in range(2))
    return x, torch.randn(m, n, generator=g), b, c, torch.full((m,), 0.2 + 1j), gbar


def ours(given: tuple[Tensor, ...], gbar: Tensor, causal: bool) -> tuple[Call, Call]:
    """Forward, and forward + backward of every tensor in ``given``."""
    leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in given]

    def forward() -> Tensor:
        with torch.no_grad():
            return resolvent_solve(*leaves, causal=causal)

    def both() -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                leaf.grad = None
        resolvent_solve(*leaves, causal=causal).backward(gbar)

    return forward, both


def banded(x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Call:
    """scipy's solve, row by row: one call for all of them takes longer for short ones. The bands are built before."""
    m, n, _ = x.shape
    bands = np.zeros((m, 3, n), np.complex64)
    bands[:, 0, 1:], bands[:, 1], bands[:, 2, :-1] = b.numpy(), (a - z[:, None]).numpy(), c.numpy()
    columns = x.numpy()
    found = np.empty_like(columns)

    def call() -> np.ndarray:
        for i in range(m):
            found[i] = solve_banded((1, 1), bands[i], columns[i], check_finite=False)
        return found

    return call


class Jax:
    """The second process for one size; ``arm(name)`` makes CALLS calls there."""

    def __init__(self, python: str, folder: str, given: tuple[Tensor, ...]):
        self.folder = Path(folder)
        names = ("x", "a", "b", "c", "z", "gbar")
        np.savez(self.folder / "inputs.npz", **{k: t.numpy() for k, t in zip(names, given, strict=True)})
        self.command = [python, str(Path(__file__).with_name("_jax_solve.py")), folder, str(CALLS)]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        # What keep_freed_memory is to ours.
        kept = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **kept}
        )

    def ask(self, name: str) -> str:
        """Its answer. On two cores jax 0.10.2 waits for ever in one call of some hundreds: then another process is asked, and
        the sample that took so long is one of many."""
        for _ in range(3):
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], PATIENCE)[0]:
                answer = self.process.stdout.readline().strip()
                if not answer:
                    raise SystemExit("jax's process stopped: see its message above.")
                return answer
            print(f"jax gave no answer for {PATIENCE} s; it is started anew.", file=sys.stderr)
            self.process.kill()
            self.process.wait()
            self.process = self._start()
        raise SystemExit(f"jax gave no answer for {PATIENCE} s, three times: leave out --jax.")

    def values(self) -> np.ndarray:
        self.ask("values")
        return np.load(self.folder / "jax.npy", allow_pickle=False)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ratio(other: Timing | None, mine: Timing) -> str:
    return MISSING if other is None else f"{other.median / mine.median:.3g}"


def peers_case(m: int, n: int, columns: int, jax: str | None, seconds: float) -> dict[str, object]:
    *given, gbar = inputs(m, n, columns)
    forward, both = ours(given, gbar, causal=False)
    scipy = banded(*given)
    arms = {"forward": in_a_row(forward), "both": in_a_row(both), "scipy": in_a_row(scipy)}
    expected = torch.from_numpy(scipy())
    difference = float((forward() - expected).abs().max() / expected.abs().max())
    with tempfile.TemporaryDirectory() as folder:
        second = Jax(jax, folder, (*given, gbar)) if jax else None
        if second:
            arms |= {f"jax {name}": lambda name=name: second.ask(name) for name in ("forward", "both")}
            theirs = second.values()
            difference = max(difference, float(np.abs(theirs - forward().numpy()).max() / np.abs(theirs).max()))
        found = {name: each_of(timing) for name, timing in take_turns(arms, seconds, settle=SETTLE).items()}
        if second:
            second.close()
    return {
        "B, N, D": f"{m}, {n}, {columns}",
        "ours, forward": found["forward"],
        "scipy": found["scipy"],
        "scipy / ours": ratio(found["scipy"], found["forward"]),
        "jax, forward": found.get("jax forward", MISSING),
        "jax / ours": ratio(found.get("jax forward"), found["forward"]),
        "ours, with gradients": found["both"],
        "jax, with gradients": found.get("jax both", MISSING),
        "jax / ours ": ratio(found.get("jax both"), found["both"]),
        "largest difference": f"{difference:.1e}",
    }


class _Nothing(torch.autograd.Function):
    """As many inputs and gradients as the solve has, new tensors as there, and no work."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b, c, z)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gbar: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def around_case(m: int, n: int, columns: int, seconds: float) -> list[dict[str, str]]:
    """Where the time of a bidirectional call with gradients of everything goes."""
    x, a, b, c, z, gbar = inputs(m, n, columns)
    leaves = [t.clone().requires_grad_() for t in (x, a, b, c, z)]

    def nothing() -> None:
        for leaf in leaves:
            leaf.grad = None
        _Nothing.apply(*leaves).backward(gbar)

    k = b * c
    left, _ = backend.forward(a, k, z, True)
    y = solve.tridiagonal_rows(x, left, b, c)
    calls = {
        "whole call": ours((x, a, b, c, z), gbar, causal=False)[1],
        "kernel of L": lambda: backend.forward(a, k, z, True),
        "kernel of y": lambda: solve.tridiagonal_rows(x, left, b, c),
        "kernel of the adjoint": lambda: solve.tridiagonal_adjoint(gbar, left, b, c, y, False, True),
        "autograd around nothing": nothing,
    }
    arms = {name: in_a_row(call) for name, call in calls.items()}
    found = {name: each_of(timing) for name, timing in take_turns(arms, seconds, settle=SETTLE).items()}
    whole, *parts = (t.median for t in found.values())
    rest = max(whole - sum(parts), 0.0)
    shown = {name: (str(t), t.median) for name, t in found.items()} | {
        "the rest: checks, small tensors, caches": (duration(rest), rest)
    }
    return [
        {"B, N, D": f"{m}, {n}, {columns}", "part": name, "time": text, "share": f"{t / whole:.0%}"}
        for name, (text, t) in shown.items()
    ]


def models_case(m: int, n: int, columns: int, seconds: float) -> dict[str, object]:
    g = torch.Generator().manual_seed(1)
    x, a = torch.randn(m, n, columns, generator=g), torch.randn(m, n, generator=g)
    gbar = torch.randn(m, n, columns, dtype=torch.complex64, generator=g)
    forward, both = ours((x, a, 1.0, 1.0, 1j), gbar, causal=True)
    size, threads = m * n * columns, torch.get_num_threads()
    arms = {
        "forward": forward,
        "both": both,
        "copy 12": copy(6 * size, threads),
        "copy 32": copy(16 * size, threads),
    }
    found = take_turns(arms, seconds)
    return {
        "rows, N, D": f"{m}, {n}, {columns}",
        "forward": found["forward"],
        "ns / number": f"{found['forward'].median / size * 1e9:.2f}",
        "forward / copy": f"{found['forward'].median / found['copy 12'].median:.2f}",
        "with gradients": found["both"],
        "ns / number ": f"{found['both'].median / size * 1e9:.2f}",
        "with gradients / copy": f"{found['both'].median / found['copy 32'].median:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, short rounds")
    parser.add_argument("--only", nargs="+", choices=("peers", "around", "models"), help="tables to print")
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("B", "N", "D"), help="instead of the sizes of the tables"
    )
    parser.add_argument("--jax", metavar="PYTHON", help="a Python interpreter that has jax")
    parser.add_argument("--seconds", type=float, default=None, help="time for each case (default 6, quick 0.5)")
    options = parser.parse_args()
    keep_freed_memory()  # as training does
    if options.size and min(options.size) < 1:
        parser.error("--size: at least 1 row of 1 position and 1 column is needed.")
    seconds = options.seconds or (0.5 if options.quick else 6.0)
    peers, models = (((4, 64, 8), (1, 2000, 1)), ((8, 64, 24),)) if options.quick else (PEERS, MODELS)
    if options.size:
        peers = models = (tuple(options.size),)
    print(where())
    if not options.jax:
        print("jax: not installed here; name an interpreter that has it with --jax", file=sys.stderr)
    wanted = options.only or ("peers", "around", "models")
    found = {size: peers_case(*size, options.jax, seconds) for size in peers} if "peers" in wanted else {}
    if found:
        print_table("Bidirectional, complex64", list(found.values()))
    if "around" in wanted:
        print_table("A call with gradients from Python", around_case(*peers[0], seconds))
    if "models" in wanted:
        print_table("Causal, as models use it", [models_case(*s, seconds) for s in models])
    print()
    for size, least in AGAINST_JAX.items():
        row = found.get(size, {})
        for what, column, wished in (("scipy / ours, forward", "scipy / ours", AGAINST_SCIPY),
                                     ("jax / ours, with gradients", "jax / ours ", least)):  # fmt: skip
            ratio_found = float(row[column]) if row.get(column, MISSING) != MISSING else None
            target(f"{what}, at {size}", ratio_found, least=wished)


if __name__ == "__main__":
    main()
