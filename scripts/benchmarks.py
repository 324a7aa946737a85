"""Run benchmarks and write the page that shows what they printed: docs/benchmarks.md.

    python scripts/benchmarks.py                    # all of them, about half an hour on two quiet cores
    python scripts/benchmarks.py bk_core moe        # these; the others keep what they printed last
    python scripts/benchmarks.py bk_core --jax PYTHON    # where jax is a peer: an interpreter that has it
    python scripts/benchmarks.py --page             # only the page

What each prints is kept as it is in docs/results/benchmarks/NAME.txt, under the command and the date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from bklm.harness.machine import git_revision

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "results" / "benchmarks"
BENCHMARKS = {
    "bk_core": "The BK-core: forward and exact backward against the published recursion, a plain copy, and what one "
    "would pick instead. Targets: 150 and 60 times the loop at (32, 128) and (32, 512); 6 and 4 copies for (8, 65536) and "
    "(1, 1000000), 20 B per element, 6 times faster than jax's solve there; 10 s of compilation, 0.3 s of import.",
    "resolvent_solve": "The solve against jax's and scipy's, and as models use it against a copy. Targets: 5 times "
    "faster than scipy forward; with gradients 6, 4 and 4 times faster than jax (``--jax``; it needs a Python of its own).",
    "reading_step": "A training step of the model that reads beside GPT, LSTM and the diagonal model of its size, and a token "
    "of generation by position. Targets: 1.5, 2, 3 and 5 times GPT's tokens/s at windows of 64, 1,024, 4,096 and 16,384; 1.25 "
    "times the time of its own products; half of GPT's memory at 1,024; an exponent of 1.0 over N.",
    "train_step": "One optimiser step of ResNet-BK against whole logits and the recursion. Targets: 2 times the tokens/s "
    "(aim 3), a third of the peak memory.",
    "moe": "The analytic mixture of experts against autograd. Targets: *selected* 2 times in time and memory at E = 8, "
    "k = 1; *exact* not slower than *dense*. Claimed by the original: 10 times.",
    "baseline_step": "A training step of NewLLM against the literal loop over positions, and of a long text against its own "
    "loop of single steps. Targets: 1.5 times the literal loop; of one sequence of 4,096 twice the loop of single steps.",
    "quick_sweep": "Notebook 01's quick sweep, whole process, against the revision before the house was rebuilt. Target: "
    "1.5 times faster on two cores.",
    "data_scale": "Text of 10 to 100 MB to ids and to a Kneser-Ney model of order 5, against tokenizers, KenLM's published "
    "layout and nltk. Targets: time and memory linear, 24 bytes an n-gram at most, 1,000 times as fast as nltk.",
    "sweep_storm": "A sweep that workers share through PostgreSQL, with trials that cost nothing: workers killed, the server "
    "crashed, and by the costs when the database is the limit. Targets: no point lost or stored twice, no cost that grows.",
    "freeze_phase2": "An epoch of phase 2 with cached contexts against the token-by-token procedure. Target: 30 times.",
}
AGAINST_JAX = ("bk_core", "resolvent_solve")
HEAD = """# Benchmarks

What each script printed, on two cores of a shared virtual machine without a GPU. Compare within a table, not between
tables: the arms of one table took turns in one run. There was no GPU; `benchmarks/bk_core_gpu.py` is ready for one, and
its column is empty.

Write this page again with `python scripts/benchmarks.py`.
"""


def run(name: str, jax: str | None) -> None:
    command = [sys.executable, f"benchmarks/{name}.py"]
    asked = ""
    if jax and name in AGAINST_JAX:
        # The page names no path of this machine.
        command, asked = [*command, "--jax", jax], " --jax PYTHON"
    shown = (
        f"$ python benchmarks/{name}.py{asked}    # {datetime.date.today()}, revision {git_revision()[:12]}\n"
    )
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(
            f"benchmarks/{name}.py ended with exit code {done.returncode}; the page keeps its last output."
        )
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    (OUTPUTS / f"{name}.txt").write_text(shown + done.stdout.strip("\n") + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--jax", metavar="PYTHON", help="a Python interpreter that has jax")
    parser.add_argument("--page", action="store_true", help="run nothing, only write the page")
    given = parser.parse_args()
    if unknown := [n for n in given.names if n not in BENCHMARKS]:
        parser.error(f"got {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}.")
    for name in [] if given.page else given.names or BENCHMARKS:
        print(f"benchmarks/{name}.py ...", file=sys.stderr, flush=True)
        run(name, given.jax)
    page = [HEAD]
    for name, what in BENCHMARKS.items():
        output = OUTPUTS / f"{name}.txt"
        text = output.read_text(encoding="utf-8") if output.exists() else "(not run yet)\n"
        page.append(f"## {name}\n\n{what}\n\n```text\n{text}```\n")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
