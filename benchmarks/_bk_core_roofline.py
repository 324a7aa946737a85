"""Where the time of bk_core.py's calls goes: every pass over the memory beside a copy, and what surrounds the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
from _bk_core_arms import FLOOR, copy, inputs, nothing, ours
from _timing import Timing, duration, processor, take_turns
from resolvent_solve import Jax, each_of, in_a_row

from bklm.bk_core.cpu import backend as cpu
from bklm.bk_core.cpu.vectors import REGISTER_BYTES

Row = dict[str, object]


def machine() -> str:
    """What every table names: the processor, the width of the kernels' vectors, the threads."""
    return f"{processor()}, kernels use {8 * REGISTER_BYTES}, {torch.get_num_threads()} threads"


def passes_case(m: int, n: int, seconds: float) -> list[Row]:
    """The passes of one bidirectional call, alone. Bytes: what a pass must read and write, and read before it writes."""
    a, gbar = inputs(m, n)
    k, z = torch.ones(1, n - 1), torch.full((m,), 1j)
    tile, tiles = cpu._tiling(m, n)
    G, states = cpu.forward(a, k, z, False)
    swept = {} if tiles == 1 else {
        "L of every tile's start": (8, lambda: cpu._sweep(a, k, z, tile, tiles, False)),
        "R of every tile's end": (8, lambda: cpu._sweep(a, k, z, tile, tiles, True)),
    }  # fmt: skip
    both = 8 if tiles == 1 else 24
    arms = swept | {
        "forward, with these": (both + 16, lambda: cpu.forward(a, k, z, False)),
        "backward": (
            (16 if tiles == 1 else 32) + 8,
            lambda: cpu.backward(gbar, a, k, z, G, states, False, False, False),
        ),
        "whole call": (both + (40 if tiles == 1 else 56), ours(a, gbar)),
        "copy of 52 B/element": (2 * FLOOR, copy(m, n)),
        "the same, all threads": (2 * FLOOR, copy(m, n, torch.get_num_threads())),
    }
    found = take_turns({name: call for name, (_, call) in arms.items()}, seconds)
    best = max(arms[name][0] / found[name].median for name in list(arms)[-2:])
    return [
        {
            "B, N": f"{m}, {n}",
            "pass": name,
            "B/element": size,
            "time": found[name],
            "ns/element": f"{found[name].median / (m * n) * 1e9:.2f}",
            "GB/s": f"{size * m * n / found[name].median / 1e9:.1f}",
            "of a copy's": f"{size / found[name].median / best:.0%}",
        }
        for name, (size, _) in arms.items()
    ]


def around_case(m: int, n: int, seconds: float) -> list[Row]:
    """A small call from Python: its kernels, what torch's autograd takes by itself, and the rest."""
    a, gbar = inputs(m, n)
    k, z = torch.ones(1, n - 1), torch.full((m,), 1j)
    G, states = cpu.forward(a, k, z, False)
    found = take_turns(
        {
            "whole call": ours(a, gbar),
            "kernels, forward": lambda: cpu.forward(a, k, z, False),
            "kernels, backward": lambda: cpu.backward(gbar, a, k, z, G, states, False, False, False),
            "autograd around nothing": nothing(a, gbar),
        },
        seconds,
    )
    whole, *parts = (t.median for t in found.values())
    rest = Timing(*[whole - sum(parts)] * 3)
    shares = found | {"the rest: checks, and code that others drove out of the caches": rest}
    return [
        {
            "B, N": f"{m}, {n}",
            "part": name,
            "time": str(t) if t is not rest else duration(max(t.median, 0.0)),
            "share": f"{t.median / whole:.0%}",
        }
        for name, t in shares.items()
    ]


def jax_case(m: int, n: int, python: str, seconds: float) -> Row:
    """jax's tridiagonal solve of one column with its gradients, in a second process, against our diagonal with its own."""
    a, gbar = inputs(m, n)
    bonds, z = torch.ones(m, n - 1), torch.full((m,), 1j)
    columns = torch.randn(m, n, 1, dtype=torch.complex64)
    with tempfile.TemporaryDirectory() as folder:
        second = Jax(python, folder, (columns, a, bonds, bonds, z, gbar[..., None]))
        version = second.ask("both")
        found = take_turns({"ours": in_a_row(ours(a, gbar)), "jax": lambda: second.ask("both")}, seconds)
        second.close()
    mine, theirs = (each_of(found[name]) for name in ("ours", "jax"))
    return {
        "B, N": f"{m}, {n}",
        "ours": mine,
        f"jax {version}, with gradients": theirs,
        "jax / ours": f"{theirs.median / mine.median:.3g}",
    }


def first_use_case() -> list[Row]:
    """Fresh processes: what the import takes beside torch's, and the first call where nothing is compiled yet, and again."""
    words = (
        "import time, torch; clock = time.process_time; t = clock()\n"
        "from bklm.bk_core import resolvent_diagonal; t1 = clock()\n"
        "resolvent_diagonal(torch.randn(8, 64).requires_grad_(), 1.0, 1.0, 1j).abs().sum().backward(); t2 = clock()\n"
        "print(t1 - t, t2 - t1)"
    )
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("nothing compiled", "kernels in the cache"):
            runs = [
                [float(x) for x in _fresh(words, cache).split()]
                for _ in range(1 if name == "nothing compiled" else 5)
            ]
            imports, calls = (sorted(column)[len(column) // 2] for column in zip(*runs, strict=True))
            rows.append(
                {
                    "process": name,
                    "import bklm.bk_core beyond torch": duration(imports),
                    "first call, forward + backward": duration(calls),
                }
            )
    return rows


def _fresh(words: str, cache: str) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout
