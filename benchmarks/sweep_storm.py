"""A sweep through PostgreSQL whose trials cost nothing, in a storm: what does the database bear, and what is lost?

    python benchmarks/sweep_storm.py                  # a minute and a half on two quiet cores; starts a server of its own
    python benchmarks/sweep_storm.py --quick          # 2 workers, 100 points

1. 16 worker processes, 2,000 points; a worker is killed with signal 9 every second on average, and another started in
   its place; the server is stopped in the middle as if it crashed, and started anew. Then every point is looked for.
2. The same without kills: 1, 4 and 16 workers on the last 500 points of 500, 2,000 and 20,000, of which those before are
   put there beforehand; statements and processor time per point.
3. From these costs, when the database becomes the limit: exact mean value analysis of a closed queueing network (Reiser and
   Lavenberg 1980) of workers that train for a time, then queue for the lock of the study, and for the server's cores.

Workers say that they live every second and are taken for dead after four (15 and 60 in use), so that part 1 ends soon.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import sqlalchemy
from _postgresql import NotInstalledError, Server
from _timing import duration, print_table, processor, target
from optuna.distributions import CategoricalDistribution, distribution_to_json

from bklm.sharing import database
from bklm.sharing.sweep import RESULT, Sweep

fork = multiprocessing.get_context("fork")
SERVER_CORES = 8  # of the database's machine in part 3
TRIALS = {"1 s": 1.0, "1 min": 60.0, "1 h": 3600.0}
WORKERS = (10, 100, 1000)
COSTS_GROW = 1.1  # at most, to count as not growing
HELD_SECONDS = database.HEARTBEAT_SECONDS  # of a trial, for which its worker holds a connection
FILL = """
INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)
    SELECT n, :study, 'COMPLETE', now(), now() FROM generate_series(0, :last) n;
INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, 0, kind
    FROM trials, (VALUES ('mixer', :kind_mixer), ('rate', :kind_rate), ('size', :kind_size), ('seed', :kind_seed))
        AS kinds(name, kind);
INSERT INTO trial_values (trial_id, objective, value, value_type) SELECT trial_id, 0, number, 'FINITE' FROM trials;
INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, 'result', json_build_array(number, json_build_object('val_ppl', number, 'seconds', 0.0)) FROM trials;
ANALYZE
"""


class Cost(NamedTuple):
    """What one point costs: statements; processor seconds of its worker, of the server; seconds under the study's lock."""

    statements: float
    worker: float
    server: float


def grid(points: int) -> dict[str, list[int]]:
    """Four factors of whole numbers, the last of which grows with the points (a multiple of 50).

    No factor has more than 40 values: Optuna writes the list of all with each trial, and what a list of hundreds costs would
    be taken for what many points cost.
    """
    sizes = 1 if points % 500 else 10
    values = {"mixer": 5, "rate": 10, "size": sizes, "seed": points // 50 // sizes}
    return {name: list(range(count)) for name, count in values.items()}


def place(point: dict[str, int], points: int) -> int:
    """Of a point in the grid: its only result."""
    found = 0
    for name, values in grid(points).items():
        found = found * len(values) + point[name]
    return found


def work(address: str, name: str, points: int, journal: Path, spent: Any, slot: int, gate: Any) -> None:
    """One worker: in ``spent`` its statements, its processor seconds and its evaluations, from ``slot`` on."""

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
    def count(*_: Any) -> None:
        spent[slot] += 1

    sweep = Sweep(address, name, grid(points))
    if gate is not None:
        gate.wait()
    spent[slot], begun = 0, time.process_time()
    file = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def evaluate(point: dict[str, int]) -> float:
        # One write of a short line is whole or not there, whoever else writes.
        os.write(file, f"{time.time():.4f} {place(point, points)}\n".encode())
        spent[slot + 1] = time.process_time() - begun
        spent[slot + 2] += 1
        return float(place(point, points))

    sweep.run(evaluate, lambda point: {"val_ppl": float(place(point, points)), "seconds": 0.0})


class Storm:
    """Workers on one sweep, until all of them have ended."""

    def __init__(self, server: Server, folder: Path, workers: int, points: int, there: int = 0) -> None:
        self.server, self.points, self.count = server, points, workers
        self.name = f"storm_{workers}_{points}_{time.time_ns()}"
        self.address = server.create(self.name)
        self.journal = folder / self.name
        self.spent = RawArray("d", 3 * 1_000)
        self.started: list[Any] = []
        self.gate: Any = None
        self.there = there
        if self.there:
            self.fill()

    def fill(self) -> None:
        """Put the results of the first points there, as workers leave them: to run all would take minutes and show no more."""
        factors = grid(self.points)
        trials = Sweep(self.address, "storm", factors)._trials
        kinds = {f"kind_{k}": distribution_to_json(CategoricalDistribution(v)) for k, v in factors.items()}
        with trials.engine.begin() as connection:
            for statement in FILL.split(";"):
                words = kinds | {"study": trials.id, "last": self.there - 1}
                connection.execute(sqlalchemy.text(statement), words)

    def start_one(self) -> Any:
        slot = 3 * len(self.started)
        if slot >= len(self.spent):
            raise SystemExit("the workers end with an error again and again: see above")
        words = (self.address, "storm", self.points, self.journal, self.spent, slot, self.gate)
        process = fork.Process(target=work, args=words)
        process.start()
        self.started.append(process)
        return process

    def begun(self) -> list[list[str]]:
        return [line.split() for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def run(self, kill_every: float = 0.0, restart: bool = False) -> dict[str, Any]:
        draw, killed, restarted = random.Random(0), 0, not restart
        # What is measured without kills begins when all have opened the sweep, which takes more than a point.
        self.gate = None if kill_every else fork.Barrier(self.count + 1)
        alive = [self.start_one() for _ in range(self.count)]
        if self.gate is not None:
            self.gate.wait()
        before = self.server.cpu_seconds()
        next_kill = time.monotonic() + 2.0
        while alive:
            # As its user does who started it while the server was away.
            crashed = [p for p in alive if p.exitcode]
            alive = [p for p in alive if p.exitcode is None] + [self.start_one() for _ in crashed]
            share = len(self.begun()) / self.points if kill_every else 0.0
            if not restarted and share > 0.5:
                restarted = True
                self.server.stop()
                time.sleep(2.0)
                self.server.start()
            if kill_every and alive and share < 0.95 and time.monotonic() > next_kill:
                victim = draw.choice(alive)
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                alive = [p for p in alive if p is not victim] + [self.start_one()]
                killed += 1
                next_kill = time.monotonic() + draw.expovariate(1 / kill_every)
            time.sleep(0.05)
        return self.found(killed, self.server.cpu_seconds() - before)

    def found(self, killed: int, server_seconds: float) -> dict[str, Any]:
        failed = [p.exitcode for p in self.started if p.exitcode not in (0, -signal.SIGKILL)]
        sweep = Sweep(self.address, "storm", grid(self.points))
        results = sweep.results()
        # Points of killed workers get a second trial, after all first ones.
        again = sum(row.state == "COMPLETE" for row in sweep._trials.not_simply_done(RESULT, self.points))
        places = [(place(point, self.points), result["val_ppl"]) for point, result in results]
        stored = Counter(number for number, result in places if number == result)
        begun = self.begun()
        times = sorted(float(at) for at, _ in begun)
        tenth = max(1, len(times) // 10)
        statements, worker_seconds, evaluated = (sum(self.spent[k::3]) for k in range(3))
        return {
            "workers": self.count,
            "points": self.points,
            "there before": self.there,
            "killed": killed,
            "ended with an error": len(failed),
            "begun": len(begun),
            "begun twice": sum(n > 1 for n in Counter(number for _, number in begun).values()),
            "dealt again": again,
            "lost": self.points - len(stored),
            "stored twice": sum(n > 1 for n in stored.values()),
            "seconds": times[-1] - times[0],
            "first tenth": tenth / (times[tenth] - times[0]),
            "last tenth": tenth / (times[-1] - times[-1 - tenth]),
            "cost": Cost(statements / evaluated, worker_seconds / evaluated, server_seconds / evaluated),
        }


def seconds_under_lock(server: Server, folder: Path, points: int) -> float:
    """Seconds that one trial's creation holds the study's lock, that is at most those of its transaction; the median.

    In a study of which all ``points`` but 50 are done.
    """
    study = Storm(server, folder, 1, points, there=points - 50)
    trials = Sweep(study.address, "storm", grid(points))._trials
    times = []
    for _ in range(200):
        started = time.perf_counter()
        trials.storage.create_new_trial(trials.id)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def throughput(workers: int, think: float, lock: float, cores: float, number_of_cores: int) -> float:
    """Points per second by mean value analysis: ``think`` seconds elsewhere, then ``lock`` and ``cores`` seconds queued for.

    Exact for one queue at the lock and one at a single core; several cores by Seidmann's rule (1987): one queue that is as
    many times faster, and the rest of the time without a queue.
    """
    demands = (lock, cores / number_of_cores)
    delay = think + cores * (1 - 1 / number_of_cores)
    queues, rate = [0.0, 0.0], 0.0
    for count in range(1, workers + 1):
        waits = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate = count / (delay + sum(waits))
        queues = [rate * wait for wait in waits]
    return rate


def show_storm(found: dict[str, Any]) -> None:
    keys = (
        "workers",
        "points",
        "killed",
        "ended with an error",
        "dealt again",
        "begun twice",
        "lost",
        "stored twice",
    )
    row = {key: f"{found[key]:,}" for key in keys} | {"seconds": f"{found['seconds']:.0f}"}
    row["points/s"] = f"{found['points'] / found['seconds']:.0f}"
    print_table("the storm: workers killed at random, the server crashed and started anew once", [row])
    sys.stdout.flush()


def show_costs(found: list[dict[str, Any]], lock: float) -> None:
    cores = os.cpu_count() or 1
    rows = []
    for one in found:
        cost = one["cost"]
        expected = throughput(one["workers"], 0.0, lock, cost.worker + cost.server, cores)
        rows.append(
            {
                "workers": one["workers"],
                "points": f"{one['points']:,}",
                "put there by SQL": f"{one['there before']:,}",
                "points/s": f"{one['begun'] / one['seconds']:.0f}",
                "by the model": f"{expected:.0f}",
                "in the first and last tenth": f"{one['first tenth']:.0f}, {one['last tenth']:.0f}",
                "statements a point": f"{cost.statements:.1f}",
                "worker's processor": duration(cost.worker),
                "server's": duration(cost.server),
            }
        )
    print_table(f"without kills; workers and server share {cores} cores; fsync is on", rows)


def show_limits(cost: Cost, lock: float) -> None:
    rows = []
    for name, seconds in TRIALS.items():
        think = seconds + cost.worker
        row: dict[str, Any] = {"a trial takes": name}
        for workers in WORKERS:
            rate = throughput(workers, think, lock, cost.server, SERVER_CORES)
            held = math.ceil(workers * min(1.0, HELD_SECONDS / seconds))
            row[f"{workers:,} workers"] = f"{rate:.3g}/s, {rate * seconds / workers:.1%}, {held:,}"
        slowest = max(lock, cost.server / SERVER_CORES)
        row["limit from"] = f"{(think + lock + cost.server) / slowest:,.0f} workers"
        rows.append(row)
    print_table(
        f"points per second, how much of its time a worker trains, and connections held on average (PostgreSQL allows 100 "
        f"unless told otherwise); each worker on a machine of its own, the server with "
        f"{SERVER_CORES} cores; a point costs {duration(lock)} under the study's lock and {duration(cost.server)} of a core",
        rows,
    )


def judge(storm: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Print every target and whether it is held; the costs with the most workers, from the fewest points to the most."""
    few, many = found[0]["cost"], found[-1]["cost"]
    print()
    target("points of killed workers that others were dealt in the storm", storm["dealt again"], least=1)
    target("points lost in the storm", storm["lost"], most=0)
    target("points stored twice in the storm", storm["stored twice"], most=0)
    rates = [one["begun"] / one["seconds"] for one in (found[0], found[-1])]
    grown = f"with {found[-1]['points']:,} points over those with {found[0]['points']:,}"
    for what, key in (
        ("statements a point", "statements"),
        ("the worker's processor a point", "worker"),
        ("the server's processor a point", "server"),
    ):
        target(f"{what}, {grown}", getattr(many, key) / getattr(few, key), most=COSTS_GROW)
    target(f"points/s, {grown}", rates[1] / rates[0], least=1 / COSTS_GROW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--points", type=int, nargs="+", default=[500, 2_000, 20_000])
    parser.add_argument("--storm", type=int, default=2_000, help="points of part 1 (default 2,000)")
    parser.add_argument("--quick", action="store_true", help="2 workers, 100 points")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.storm, arguments.workers, arguments.points = 100, [1, 2], [50, 100]
    workers, points, most = arguments.workers, arguments.points, max(arguments.workers)
    database.HEARTBEAT_SECONDS, database.GRACE_SECONDS = 1, 4
    memory = psutil.virtual_memory().total / 2**30
    print(f"{processor()}, {memory:.0f} GiB, 1 thread a worker")
    try:
        server = Server()
    except NotInstalledError as missing:
        raise SystemExit(f"{missing}.") from None
    with server, tempfile.TemporaryDirectory() as folder:
        # First, so that the workers, which are forks of this process, find SQLAlchemy's mappings made.
        lock = seconds_under_lock(server, Path(folder), points[-1])
        storm = Storm(server, Path(folder), most, arguments.storm)
        stormed = storm.run(kill_every=2.0 if arguments.quick else 1.0, restart=True)
        show_storm(stormed)
        sizes = [(n, points[0]) for n in workers] + [(most, n) for n in points[1:]]
        found = [Storm(server, Path(folder), *size, there=size[1] - points[0]).run() for size in sizes]
        show_costs(found, lock)
        show_limits(max((one["cost"] for one in found), key=lambda cost: cost.server), lock)
        judge(stormed, [one for one in found if one["workers"] == most])


if __name__ == "__main__":
    main()
