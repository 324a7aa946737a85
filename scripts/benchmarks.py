"""Run benchmarks and write the page that shows what they printed: docs/benchmarks.md.

    python scripts/benchmarks.py                    # all of them, an hour and a half on two quiet cores
    python scripts/benchmarks.py bk_core moe        # these; the others keep what they printed last
    python scripts/benchmarks.py bk_core --jax PYTHON    # where jax is a peer: an interpreter that has it
    python scripts/benchmarks.py reading_search --text FOLDER    # of what trains: train.txt, valid.txt and test.txt
    python scripts/benchmarks.py --page             # only the page

What each prints is kept as it is in docs/results/benchmarks/NAME.txt, under the command and the date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

from bklm.harness.machine import git_revision

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "results" / "benchmarks"
BENCHMARKS = {
    "bk_core": "The BK-core: forward and exact backward against the published recursion, a plain copy, and what one "
    "would pick instead. Targets: 150 and 60 times the loop at (32, 128) and (32, 512); for (8, 65536) and (1, 1000000) "
    "at most 6 and 4 copies of 52 B per element (52 read and 52 written, in one thread, as when the targets were set; "
    "the table shows a copy on all threads beside it), 20 B of extra memory per element, 6 times faster than jax's "
    "solve with its gradient (``--jax``); 10 s of compilation in all, 0.3 s of import above torch's.",
    "resolvent_solve": "The solve against jax's and scipy's, and as models use it against a copy. Targets: 5 times "
    "faster than scipy forward; with gradients 6, 4 and 4 times faster than jax (``--jax``; it needs a Python of its "
    "own).",
    "reading_step": "A training step of the model that reads beside GPT, LSTM, NewLLM and the diagonal model of its "
    "size, and a token of generation by position. Targets: 1.5, 2, 3 and 5 times GPT's tokens/s at windows of 64, "
    "1,024, 4,096 and 16,384; 1.25 times the time of its own products; half of GPT's memory at 1,024; an exponent of "
    "1.0 over N.",
    "train_step": "One optimiser step of ResNet-BK, with the published mixer and with GRAD_BLEND's (solve), against "
    "whole logits and the recursion. Targets: 2 times the tokens/s (aim 3), a third of the peak memory; for both models "
    "at most 1.3 times the time of their matrix products.",
    "moe": "The analytic mixture of experts against autograd. Targets: *selected* 2 times in time and memory at E = 8, "
    "k = 1; *exact* not slower than *dense*; at E = 4, k = 1 as fast as the dense layer of its active size. Claimed by "
    "the original: 10 times.",
    "baseline_step": "A training step of NewLLM against the literal loop over positions, and against *steps*: one "
    "position after the other, NewLLM's only engine when the targets were set. Targets: 1.3 times the tokens/s of "
    "*steps* at 16 x 64 positions, 2 times at 1 x 4,096.",
    "quick_sweep": "Notebook 01's quick sweep, whole process, against the revision before the house was rebuilt. "
    "Target: 1.5 times faster on two cores.",
    "data_scale": "Text of 10 to 100 MB to ids and to a Kneser-Ney model of order 5, against tokenizers, KenLM's "
    "published layout and nltk. Targets: time linear (an exponent of at most 1.1), 24 bytes an n-gram at most in "
    "training, model and scoring, 1,000 times as fast as nltk.",
    "sweep_storm": "A sweep that workers share through PostgreSQL, with trials that cost nothing: workers killed, the "
    "server crashed, and by the costs when the database is the limit. Targets: no point lost or stored twice; no cost "
    "that grows with the points by more than a tenth.",
    "scaling": "Several processes on one machine: notebooks, one training, one shared sweep. No target; "
    "[scaling.md](scaling.md) says what follows.",
    "reading_search": "Which defaults read best: one epoch of four for each variant of the model that reads, of GPT and of "
    "the LSTM that study 03 compares, one seed (``--text``; other models of study 03 have the published defaults). *taken* is "
    "what the package has. No target; more variants were tried of the model that reads (`bklm/models/resnet_bk_config.py`).",
    "freeze_phase2": "An epoch of phase 2 with cached contexts against the token-by-token procedure. Target: 30 times.",
}
AGAINST_JAX = ("bk_core", "resolvent_solve")
TRAINS = ("reading_search",)
HEAD = """# Benchmarks

What each script printed, on two cores of a shared virtual machine without a GPU; its first lines name the revision, the
processor and how busy the machine was. Compare within a table, not between tables: the arms of one table took turns in one
run. A script ends with its targets and whether they are held. There was no GPU; `benchmarks/bk_core_gpu.py` is ready for one.
The speeds in [findings.md](findings.md) were measured by their study, on the machine that is named there.

Write this page again with `python scripts/benchmarks.py`.
"""
QUIET, LONGEST_WAIT = 0.5, 180.0
"""The load below which a script starts, and the seconds for which that is waited for."""


def wait_until_quiet() -> None:
    """Until the work of the script before has left the average of a minute, so that the head tells of others' alone."""
    until = time.monotonic() + LONGEST_WAIT
    while hasattr(os, "getloadavg") and os.getloadavg()[0] > QUIET and time.monotonic() < until:
        time.sleep(5)


def run(name: str, jax: str | None, text: str | None) -> None:
    command = [sys.executable, f"benchmarks/{name}.py"]
    asked = ""
    if jax and name in AGAINST_JAX:
        # The page names no path of this machine.
        command, asked = [*command, "--jax", jax], " --jax PYTHON"
    if text and name in TRAINS:
        command, asked = [*command, "--data_dir", text], " --data_dir FOLDER"
    shown = (
        f"$ python benchmarks/{name}.py{asked}    # {datetime.date.today()}, revision {git_revision()[:12]}\n"
    )
    wait_until_quiet()
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
    parser.add_argument("--text", metavar="FOLDER", help="the text of what trains")
    parser.add_argument("--page", action="store_true", help="run nothing, only write the page")
    given = parser.parse_args()
    if unknown := [n for n in given.names if n not in BENCHMARKS]:
        parser.error(f"got {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}.")
    for name in [] if given.page else given.names or BENCHMARKS:
        print(f"benchmarks/{name}.py ...", file=sys.stderr, flush=True)
        run(name, given.jax, given.text)
    page = [HEAD]
    missing = []
    for name, what in BENCHMARKS.items():
        output = OUTPUTS / f"{name}.txt"
        if output.exists():
            page.append(f"## {name}\n\n{what}\n\n```text\n{output.read_text(encoding='utf-8')}```\n")
        else:
            missing.append(f"`benchmarks/{name}.py`")
    if missing:
        page.append(f"Of {', '.join(missing)} no output is kept yet.\n")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
