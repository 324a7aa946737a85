"""What the first use costs in fresh processes: import, first call, and how much of the processor's time compilation takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import psutil
from _timing import duration

Row = dict[str, object]

CALL = "{}.abs().sum().backward()\n"
DIAGONAL = "from bklm.bk_core import resolvent_diagonal as g\n"
SOLVE = "from bklm.bk_core import resolvent_solve as s\n"
SHORT = DIAGONAL + CALL.format("g(torch.randn(8, 64).requires_grad_(), 1.0, 1.0, 1j)")
# In tiles and in chunks: the sweeps and joins that a short row does without.
LONG = DIAGONAL + CALL.format("g(torch.randn(1, 100_000).requires_grad_(), 1.0, 1.0, 1j)")
# One column and several, short and long rows: each has kernels of its own.
SOLVES = SOLVE + "".join(
    CALL.format(
        f"s(torch.randn({shape}, dtype=torch.complex64).requires_grad_(), torch.randn({rows}), 1.0, 1.0, 1j)"
    )
    for shape, rows in (("8, 64, 1", "8, 64"), ("8, 64, 32", "8, 64"), ("1, 100_000, 1", "1, 100_000"))
)
CPU_BACKEND = "the CPU backend: these three"
SELFTEST, NOTEBOOK = "bklm selftest", "the cells of notebook 00"
PROGRAMS = {
    "the diagonal, (8, 64)": SHORT,
    "the diagonal, a row of 100,000": LONG,
    "the solve, 1 and 32 columns, a row of 100,000": SOLVES,
    CPU_BACKEND: SHORT + LONG + SOLVES,
    SELFTEST: "from bklm.command.main import main\nassert main(['selftest']) == 0",
    NOTEBOOK: "from pathlib import Path\nfrom bklm.notebook.selftest import check_operator, draw_operator, study_times\n"
    "check_operator(), draw_operator(Path(sys.argv[1]) / 'operator.png'), study_times()",
}


def first_use_case() -> list[Row]:
    """What the import takes beside torch's, and the first call where nothing is compiled yet, and again."""
    words = f"import time, torch; clock = time.process_time; t = clock()\n{DIAGONAL}t1 = clock()\n"
    words += f"{SHORT}print(t1 - t, clock() - t1)"
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, count in (("nothing compiled", 1), ("kernels in the cache", 5)):
            runs = [[float(x) for x in _fresh(words, cache)[0].split()] for _ in range(count)]
            imports, calls = (sorted(column)[len(column) // 2] for column in zip(*runs, strict=True))
            rows.append(
                {
                    "process": name,
                    "import bklm.bk_core beyond torch": duration(imports),
                    "import, s": f"{imports:.3f}",
                    "first call, forward + backward": duration(calls),
                }
            )
    return rows


def compilation_case(quick: bool) -> list[Row]:
    """Whole processes with an empty cache, and again with what the first left there: the difference is compilation."""
    rows = []
    for name, words in list(PROGRAMS.items())[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (_fresh("import sys, torch\n" + words, cache)[1] for _ in range(2))
        rows.append(
            {
                "process, one thread": name,
                "nothing compiled, s": f"{first:.1f}",
                "kernels in the cache, s": f"{second:.1f}",
                "compilation, s": f"{first - second:.1f}",
            }
        )
    return rows


def _fresh(words: str, cache: str) -> tuple[str, float]:
    """What a process printed, and its processor seconds, those of its own children with them."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    before = psutil.Process().cpu_times()
    done = subprocess.run(
        [sys.executable, "-c", words, cache], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"a process of the table of first use failed:\n{done.stderr[-2000:]}")
    after = psutil.Process().cpu_times()
    return done.stdout, sum(
        getattr(after, f"children_{kind}") - getattr(before, f"children_{kind}") for kind in ("user", "system")
    )
