"""How much faster do several processes get through the work of docs/scaling.md on this machine?

    python benchmarks/scaling.py                                         # all three parts, a quarter of an hour on two cores
    python benchmarks/scaling.py --storage postgresql://me@host/sweeps   # the sweep through this server, not one of its own
    python benchmarks/scaling.py --parts training --rounds 1             # some of it

batch       notebooks through bklm.batch; training: one training under torchrun; sweep: one sweep that workers share through
            PostgreSQL, a server of its own where one is installed

Every time is that of the whole command, as its user waits for it: start of Python, reading of the text, figures and zip
included. Arms take turns; the shortest and the longest of the rounds are shown. "x" is the first arm's median over this arm's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import yaml
from _postgresql import NotInstalledError, Server
from _timing import duration, print_table, where

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("batch", "training", "sweep")
NOTEBOOKS = 4
SWEEP = "--profile quick --dataset embedded --alphas 0 1 --seeds {} --epochs_per_trial 3 --final_epochs 1 --device cpu"
TRAINING = "--dataset embedded --model newllm --seeds 0 --epochs 4 --learning_rates 0.001 --device cpu"

Arm = Callable[[Path], float]


def run_all(commands: list[list[str]], threads: int | None) -> float:
    """Seconds until the last of the commands, started together, has ended; each with ``threads`` threads (None: its own)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            c, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for c in commands
    ]
    messages = [process.communicate()[1] for process in running]
    for process, message in zip(running, messages, strict=True):
        if process.returncode:
            raise SystemExit(f"{process.args} ended with exit code {process.returncode}:\n{message[-2000:]}")
    return time.perf_counter() - started


def batch(workers: int) -> Arm:
    def arm(folder: Path) -> float:
        plan = folder / "plan.yaml"
        run = {"notebook": str(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb"), "name": "sweep"}
        run |= {"parameters": {"dataset": "embedded"}, "grid": {"seeds": [[seed] for seed in range(NOTEBOOKS)]}}
        plan.write_text(yaml.safe_dump({"parameters": {"profile": "smoke"}, "runs": [run]}), encoding="utf-8")
        words = f"-m bklm.batch {plan} --workers {workers} --output_dir {folder / 'out'}"
        return run_all([[sys.executable, *words.split()]], None)

    return arm


def shared_sweep(workers: int, threads: int | None, storage: str, seeds: itertools.count) -> Arm:
    def arm(folder: Path) -> float:
        # Another set of seeds is another sweep: the database would give the results of one that it knows.
        words = SWEEP.format(" ".join(str(next(seeds)) for _ in range(4)))
        start = [sys.executable, "-m", "bklm.studies.grad_blend", *words.split()]
        storage_words = ["--storage", storage] if workers > 1 else []
        return run_all(
            [[*start, *storage_words, "--output_dir", str(folder / f"worker_{k}")] for k in range(workers)],
            threads,
        )

    return arm


def training(processes: int, threads: int, profile: str) -> Arm:
    """Seconds of the epochs alone, which the processes share; starting them would outweigh so small a model."""

    def arm(folder: Path) -> float:
        words = f"-m torch.distributed.run --nproc_per_node {processes} -m bklm.studies.baseline {TRAINING}"
        options = ["--profile", profile, "--output_dir", str(folder)]
        run_all([[sys.executable, *words.split(), *options]], threads)
        return float(pd.read_csv(folder / "baseline" / "epochs.csv")["seconds"].sum())

    return arm


def named(n: int, what: str) -> str:
    """ "1 worker", "2 workers"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}{'es' if what.endswith('s') else 's'}"


def compare(title: str, arms: dict[str, Arm], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(arm(Path(folder)))
    first = statistics.median(next(iter(times.values())))
    rows = [
        {
            "arm": name,
            "time": f"{duration(min(found))} - {duration(max(found))}",
            "x": f"{first / statistics.median(found):.2f}",
        }
        for name, found in times.items()
    ]
    print_table(title, rows)
    sys.stdout.flush()


@contextlib.contextmanager
def database(storage: str | None) -> Iterator[str]:
    """The address given, or of a database on a server that lives as long as the context."""
    if storage:
        yield storage
        return
    try:
        server = Server()
    except NotInstalledError as missing:
        raise SystemExit(f"the sweep: {missing}; or name a database with --storage.") from None
    with server:
        yield server.create("sweeps")


def compare_sweeps(storage: str, cores: int, counts: list[int], rounds: int) -> None:
    seeds = itertools.count(int(time.time()) % 1_000_000 * 1000)
    arms = {"1 worker, without a database": shared_sweep(1, None, storage, seeds)}
    for n in counts:
        if n > 1:
            threads = max(1, cores // n)
            arms[f"{named(n, 'worker')}, {named(threads, 'thread')} each"] = shared_sweep(
                n, threads, storage, seeds
            )
    compare("one sweep of 8 points shared through PostgreSQL", arms, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", default="quick", help="of the training (default quick)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--storage", help="a PostgreSQL database for the sweep, in place of a server of its own"
    )
    arguments = parser.parse_args()
    cores, counts = os.cpu_count() or 1, arguments.workers
    print(f"{where()}; no GPU used, {arguments.rounds} rounds")
    if "batch" in arguments.parts:
        compare(
            f"{NOTEBOOKS} notebooks (01, smoke) through bklm.batch; the cores are divided among the workers",
            {named(n, "worker"): batch(n) for n in counts},
            arguments.rounds,
        )
    if "training" in arguments.parts:
        split = [(1, 1), *((n, cores // n) for n in counts if n <= cores)]
        compare(
            f"one training (NewLLM, {arguments.profile}) under torchrun, its epochs",
            {
                f"{named(n, 'process')}, {named(threads, 'thread')} each": training(
                    n, threads, arguments.profile
                )
                for n, threads in split
            },
            arguments.rounds,
        )
    if "sweep" in arguments.parts:
        with database(arguments.storage) as storage:
            compare_sweeps(storage, cores, counts, arguments.rounds)


if __name__ == "__main__":
    main()
