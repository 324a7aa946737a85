"""Where the time of bk_core.py's calls goes: every pass over the memory beside a copy, and what surrounds the kernels."""

from __future__ import annotations

import tempfile

import torch
from _bk_core_arms import YARDSTICK, inputs, nothing, ours
from _timing import Timing, copy, duration, processor, take_turns
from resolvent_solve import SETTLE, Jax, each_of, in_a_row

from bklm.bk_core.cpu import backend as cpu
from bklm.bk_core.cpu.vectors import REGISTER_BYTES

Row = dict[str, object]


def machine() -> str:
    """What every table names: the processor, the width of the kernels' vectors, the threads."""
    return f"{processor()}, kernels use {8 * REGISTER_BYTES}, {torch.get_num_threads()} threads"


def passes_case(m: int, n: int, seconds: float) -> list[Row]:
    """The passes of one bidirectional call, alone. Bytes: what a pass must read and write, and read before it writes; of the
    hoppings, which the m rows share, an m-th."""
    a, gbar = inputs(m, n)
    k, z = torch.ones(1, n - 1), torch.full((m,), 1j)
    tile, tiles = cpu._tiling(m, n)
    G, states = cpu.forward(a, k, z, False)
    row = 4 + 4 / m  # a and its share of k
    swept = {} if tiles == 1 else {
        "L of every tile's start": (row, lambda: cpu._sweep(a, k, z, tile, tiles, False)),
        "R of every tile's end": (row, lambda: cpu._sweep(a, k, z, tile, tiles, True)),
    }  # fmt: skip
    forward = (len(swept) + 1) * row + 16
    # A row of several tiles reads gbar, a and k once more, for what a tile adds to the next.
    backward = (1 if tiles == 1 else 2) * (8 + row) + 8
    arms = swept | {
        "forward, with these": (forward, lambda: cpu.forward(a, k, z, False)),
        "backward": (backward, lambda: cpu.backward(gbar, a, k, z, G, states, False, False, False)),
        "whole call": (forward + backward, ours(a, gbar)),
        "copy of 52 B/element, one thread": (2 * YARDSTICK, copy(YARDSTICK * m * n, 1)),
        "the same, all threads": (2 * YARDSTICK, copy(YARDSTICK * m * n, torch.get_num_threads())),
    }
    found = take_turns({name: call for name, (_, call) in arms.items()}, seconds)
    best = max(arms[name][0] / found[name].median for name in list(arms)[-2:])
    return [
        {
            "B, N": f"{m}, {n}",
            "pass": name,
            "B/element": f"{size:.3g}",
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
    shares = found | {"the rest": rest}
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
    """jax's tridiagonal solve of one column and its gradient of a, in a second process, against our diagonal and its own.

    Ours twice: with the numbers b = c = 1 and z = i, as in all other tables, and with the tensors that jax is given.
    """
    a, gbar = inputs(m, n)
    bonds, z = torch.ones(m, n - 1), torch.full((m,), 1j)
    columns = torch.randn(m, n, 1, dtype=torch.complex64)
    with tempfile.TemporaryDirectory() as folder:
        second = Jax(python, folder, (columns, a, bonds, bonds, z, gbar[..., None]))
        version = second.ask("a")
        found = take_turns(
            {
                "numbers": in_a_row(ours(a, gbar)),
                "tensors": in_a_row(ours(a, gbar, (bonds, bonds, z))),
                "jax": lambda: second.ask("a"),
            },
            seconds,
            settle=SETTLE,
        )
        second.close()
    numbers, tensors, theirs = (each_of(found[name]) for name in ("numbers", "tensors", "jax"))
    return {
        "B, N": f"{m}, {n}",
        "ours": numbers,
        "ours, b, c and z tensors": tensors,
        f"jax {version}": theirs,
        "jax / ours": f"{theirs.median / numbers.median:.3g}",
        "jax / ours, tensors": f"{theirs.median / tensors.median:.3g}",
    }
