"""How long does notebook 01's quick sweep take, beside the revision before the house was rebuilt (199c828)?

    python benchmarks/quick_sweep.py                 # each once: about ten minutes on two cores
    python benchmarks/quick_sweep.py --rounds 3      # in turn, three times each: half an hour
    python benchmarks/quick_sweep.py --profile smoke
    python benchmarks/quick_sweep.py --old REVISION

Both revisions run ``python -m bklm.studies.grad_blend`` on the embedded text in a process of their own, from checkouts that
git makes in a temporary folder; same Python, same machine, same settings and model (that revision has the mixer "diagonal"
only), each with its own defaults for threads and workers.
Seconds are of the whole process: imports, text, training, tables and figures. Each arm compiles its kernels in a smoke run
that is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _timing import print_table, target, where

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "199c828"


def checkout(revision: str, folder: Path) -> Path:
    """A checkout of the revision, without touching this one."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", revision], check=True)
    return folder


def seconds_of(folder: Path, profile: str, output: Path, more: list[str]) -> float:
    command = [
        sys.executable,
        "-m",
        "bklm.studies.grad_blend",
        "--profile",
        profile,
        "--dataset",
        "embedded",
        *more,
    ]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--output_dir", str(output)],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", default=BEFORE, help="revision to compare with")
    parser.add_argument("--profile", default="quick", choices=("smoke", "quick"))
    parser.add_argument("--rounds", type=int, default=1, help="of both in turn (default 1)")
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        arms = {
            f"revision {args.old}": checkout(args.old, work / "old"),
            "this revision": checkout("HEAD", work / "new"),
        }
        more = {name: ["--mixer", "diagonal"] * (folder.name == "new") for name, folder in arms.items()}
        for name, folder in arms.items():
            print(f"warming up: {name}", file=sys.stderr)
            seconds_of(folder, "smoke", work / "warm" / folder.name, more[name])
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(args.rounds):
            for name, folder in arms.items():
                taken[name].append(seconds_of(folder, args.profile, work / f"{turn}" / folder.name, more[name]))
                print(f"round {turn + 1}, {name}: {taken[name][-1]:.1f} s", file=sys.stderr)
    old, new = (statistics.median(times) for times in taken.values())
    rows = [
        {
            "revision": name,
            "seconds, median": f"{statistics.median(t):.1f}",
            "least to most": f"{min(t):.1f} to {max(t):.1f}",
            "times faster": f"{old / statistics.median(t):.2f}",
        }
        for name, t in taken.items()
    ]
    print_table(
        f"grad_blend, {args.profile}, embedded text, {os.cpu_count()} cores, rounds in turn: {args.rounds}",
        rows,
    )
    print()
    target("times as fast as the revision before", old / new if args.profile == "quick" else None, least=1.5)


if __name__ == "__main__":
    main()
