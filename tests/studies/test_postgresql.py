"""One sweep, many workers: through a real PostgreSQL that the tests start, and that only this machine can reach."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from meanwhile import LONGEST

from bklm.harness.report import command_for
from bklm.sharing import database as sweep_storage
from bklm.sharing.sweep import Sweep
from bklm.studies.grad_blend import train as grad_blend
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.run import run_grad_blend
from bklm.training.non_finite import NonFiniteError

GRID = {"alpha": [0.0, 0.5, 1.0], "seed": [0, 1]}
POINTS = [(a, s) for a in GRID["alpha"] for s in GRID["seed"]]
fork = multiprocessing.get_context("fork")


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is taken for dead after six seconds; forked workers inherit it."""
    monkeypatch.setattr(sweep_storage, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(sweep_storage, "GRACE_SECONDS", 6)


def worker(address: str, journal: Path, evaluate: Callable[[dict], float]) -> None:
    """Run the shared sweep, and write each point evaluated into ``journal``, one line at its start and one at its end."""

    def recorded(point: dict) -> float:
        with journal.open("a") as file:
            file.write(json.dumps(["begin", os.getpid(), *point.values()]) + "\n")
        value = evaluate(point)
        with journal.open("a") as file:
            file.write(json.dumps(["end", os.getpid(), *point.values()]) + "\n")
        return value

    sweep = Sweep(address, "test", GRID)
    sweep.run(recorded, lambda point: {"found": sum(point.values()), "by": os.getpid()})


def lines(journal: Path) -> list[list]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def ended(journal: Path) -> Counter:
    return Counter((a, s) for what, _, a, s in lines(journal) if what == "end")


def quick(point: dict) -> float:
    time.sleep(0.05)
    return sum(point.values())


@pytest.mark.slow
def test_workers_that_start_together_evaluate_each_point_once_and_each_sees_all_results(database, tmp_path):
    journal = tmp_path / "journal"
    workers = [fork.Process(target=worker, args=(database, journal, quick)) for _ in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(LONGEST)
        assert process.exitcode == 0
    assert ended(journal) == Counter(POINTS)
    results = {tuple(p.values()): r["found"] for p, r in Sweep(database, "test", GRID).results()}
    assert results == {(a, s): a + s for a, s in POINTS}


def test_the_trial_of_a_worker_killed_with_signal_9_is_taken_over_by_another(database, tmp_path, short_silence):
    journal = tmp_path / "journal"
    victim = fork.Process(target=worker, args=(database, journal, lambda point: time.sleep(600) or 0.0))
    victim.start()
    while not lines(journal):
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    others = [fork.Process(target=worker, args=(database, journal, quick)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(LONGEST)
        assert process.exitcode == 0
    assert ended(journal) == Counter(POINTS)
    assert len(lines(journal)) == 2 * len(POINTS) + 1  # the victim began one that it never ended


@pytest.mark.slow
def test_a_worker_that_was_only_asleep_gives_way_and_finishes_without_an_error(
    database, tmp_path, short_silence
):
    journal = tmp_path / "journal"
    sleeper = fork.Process(target=worker, args=(database, journal, quick))
    sleeper.start()
    while not lines(journal):
        time.sleep(0.005)
    os.kill(sleeper.pid, signal.SIGSTOP)
    other = fork.Process(target=worker, args=(database, journal, quick))
    other.start()
    other.join(LONGEST)
    assert other.exitcode == 0
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join(LONGEST)
    assert sleeper.exitcode == 0
    results = Sweep(database, "test", GRID).results()
    assert Counter(tuple(p.values()) for p, _ in results) == Counter(POINTS)


@pytest.mark.slow
def test_a_worker_holds_no_connection_while_it_trains(database, monkeypatch):
    monkeypatch.setattr(sweep_storage, "HEARTBEAT_SECONDS", 0.2)
    engine = sqlalchemy.create_engine(sqlalchemy.make_url(database).set(drivername="postgresql+psycopg"))
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    def connections() -> int:
        with engine.connect() as connection:
            return connection.execute(sqlalchemy.text(others)).scalar()

    def train(point: dict) -> float:
        deadline = time.monotonic() + 20
        while connections() and time.monotonic() < deadline:
            time.sleep(0.05)
        left.append(connections())
        return 0.0

    left: list[int] = []
    Sweep(database, "test", {"seed": [0, 1]}).run(train)
    assert left == [0, 0]


@pytest.mark.slow
def test_four_workers_of_which_one_is_killed_give_the_table_of_one(database, tiny_config, tmp_path):
    alone = run_grad_blend(dataclasses.replace(tiny_config, epochs_per_trial=3))
    shorter = "from bklm.sharing import database as s; s.HEARTBEAT_SECONDS, s.GRACE_SECONDS = 1, 4"
    start = f"import runpy, sys; {shorter}; runpy.run_module('bklm.studies.grad_blend', run_name='__main__', alter_sys=True)"
    processes, folders = [], [tmp_path / f"worker_{k}" for k in range(4)]
    for folder in folders:
        config = dataclasses.replace(alone.config, storage=database, output_dir=str(folder))
        words = shlex.split(command_for(config))[3:]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", start, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    victim = None
    try:
        while victim is None:
            assert all(p.poll() is None for p in processes)
            begun = [
                k
                for k, f in enumerate(folders)
                if list(f.glob("grad_blend/internals/trials/*/checkpoints/epoch_*"))
            ]
            victim = begun[0] if begun else None
            time.sleep(0.01)
        processes[victim].kill()
        for k, process in enumerate(processes):
            printed, _ = process.communicate(timeout=500)
            assert k == victim or process.returncode == 0, printed
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for k, folder in enumerate(folders):
        if k != victim:
            rows = json.loads((folder / "grad_blend" / "summary.json").read_text())["table"]
            for row, expected in zip(rows, alone.table, strict=True):
                assert {n: v for n, v in row.items() if n != "seconds"} == {
                    n: v for n, v in expected.items() if n != "seconds"
                }


@pytest.mark.slow
def test_two_workers_share_the_search_and_the_runs_of_the_baseline_study_and_report_the_same(
    database, small_text, tmp_path
):
    script = (
        "import sys; from bklm.studies.baseline import BaselineConfig, figures, run, run_baseline\n"
        "run.measure_models = lambda runs, *a, **k: {}\n"
        "figures.save_figure = lambda path, *a, **k: path\n"
        "run_baseline(BaselineConfig(**eval(sys.argv[1])))"
    )
    settings = {
        "profile": "smoke", "model": "newllm", "data_dir": str(small_text), "device": "cpu", "seeds": (0, 1), "epochs": 2,
        "learning_rates": (1e-3, 1e-2), "search_tokens": 200, "batch_size": 8, "seq_len": 8, "vocab_size": 100,
        "embed_dim": 8, "hidden_dim": 16, "context_dim": 8, "n_layers": 1, "max_train_tokens": 300, "storage": database,
    }  # fmt: skip
    folders = [tmp_path / "one", tmp_path / "two"]
    words = [repr({**settings, "output_dir": str(folder)}) for folder in folders]
    processes = [subprocess.Popen([sys.executable, "-c", script, word]) for word in words]
    for process in processes:
        assert process.wait(timeout=200) == 0
    first, second = (json.loads((f / "baseline" / "summary.json").read_text()) for f in folders)
    assert first == second
    assert len(first["learning_rate_search"]) == 2
    trained = [{p.name for p in f.glob("baseline_checkpoints/*_seed_*")} for f in folders]
    assert trained[0] | trained[1] == {"newllm_seed_0", "newllm_seed_1"}
    assert not trained[0] & trained[1]
    for folder, runs in zip(folders, trained, strict=True):
        kept = {p.parent.name for p in folder.glob("baseline/runs/*/best_model.safetensors")}
        # The weights of the first seed that was trained there; none where the other worker trained them all.
        assert kept == set(sorted(runs)[:1])


@pytest.mark.slow
def test_a_trial_that_diverged_with_one_worker_is_adopted_as_such_by_the_next(
    database, tiny_config, tmp_path, monkeypatch
):
    real = grad_blend.train

    def train(*arguments, label, **options):
        if label == "alpha 0, seed 1":
            raise NonFiniteError(f"{label}: the loss was nan")
        return real(*arguments, label=label, **options)

    monkeypatch.setattr(grad_blend, "train", train)
    first = run_grad_blend(dataclasses.replace(tiny_config, storage=database))
    assert [(t["alpha"], t["seed"]) for t in first.diverged] == [(0.0, 1)]

    def only_the_final(*arguments, label, **options):
        assert label.startswith("best "), f"{label} was trained again"
        return real(*arguments, label=label, **options)

    monkeypatch.setattr(grad_blend, "train", only_the_final)
    other = dataclasses.replace(tiny_config, storage=database, output_dir=str(tmp_path / "other"))
    second = run_grad_blend(other)
    assert (second.table, second.finding, second.diverged) == (first.table, first.finding, first.diverged)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("mysql://host/db", "allowed is postgresql://user@host/database"),
        ("postgresql://host", "allowed is postgresql://user@host/database"),
        ("not an address", "allowed is postgresql://user@host/database"),
        ("postgresql://me:secret@host/db", "an address with a password"),
        ("postgresql://me@host/db?password=secret", "an address with a password"),
        ("postgresql://me%3Asecret@host/db", "an address with a password"),
        ("postgresql://me@host/db?PASSWORD=secret", "the setting 'PASSWORD'; allowed after the .* are host,"),
        (
            "postgresql://me@host/db?sslmode=require&sslpassword=secret&passfile=x",
            "the setting 'sslpassword'; allowed",
        ),
        ("postgresql://me@host/db?options=secret", "the setting 'options'; allowed"),
        ("postgresql://me:1/secret@host/db", "an address with a password"),
        ("postgresql://me:secret@host:secret/db", "allowed is postgresql://user@host/database"),
        ("postgresql://me:secret@host", "allowed is postgresql://user@host/database"),
        ("mysql://me:secret@host/db", "allowed is postgresql://user@host/database"),
        ("host=h dbname=d password=secret", "allowed is postgresql://user@host/database"),
    ],
)
def test_an_address_that_will_not_do_is_refused_before_anything_and_a_password_never_repeated(
    tiny_config, address, sentence
):
    config = GradBlendConfig(profile="smoke", storage=address)
    with pytest.raises(ValueError, match=f"storage: got .*{sentence}") as caught:
        config.resolved()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://host/db",
        "postgresql://me@host:5432/db",
        "postgresql://me@/db?host=/run/postgresql&port=5433",
        "postgresql://me@host/db?sslmode=verify-full&sslrootcert=/ca.pem&application_name=bklm&connect_timeout=5",
        "postgresql://me@host/db?host=a&host=b&target_session_attrs=read-write",
    ],
)
def test_an_address_without_a_secret_is_accepted_with_the_settings_that_it_can_need(address):
    sweep_storage.check_address(address)


def test_a_database_that_does_not_answer_is_one_sentence_without_a_traceback(tmp_path):
    pytest.importorskip("psycopg")
    for settings in (f"host={tmp_path}", f"host={tmp_path}&connect_timeout=soon", "sslmode=perhaps"):
        with pytest.raises(
            ConnectionError, match=r"storage: .* does not answer \(.*\); start the database"
        ) as caught:
            Sweep(f"postgresql://me@/sweeps?{settings}", "test", GRID)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "seconds"), [("", 10), ("?connect_timeout=3", "3")])
def test_the_time_to_connect_is_the_addresss_own_where_it_has_one(monkeypatch, settings, seconds):
    pytest.importorskip("psycopg")
    given = {}

    def connect(**options):
        given.update(options)
        raise sqlalchemy.exc.OperationalError("connect", {}, Exception("nobody there"))

    monkeypatch.setattr("psycopg.connect", lambda *words, **options: connect(**options))
    with pytest.raises(ConnectionError):
        Sweep(f"postgresql://me@host/sweeps{settings}", "test", GRID)
    assert given["connect_timeout"] == seconds


def test_without_a_driver_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sweep_storage, "DRIVERS", ("no_such_driver",))
    with pytest.raises(ConnectionError, match="pip install 'psycopg"):
        Sweep("postgresql://me@host/sweeps", "test", GRID)


def test_runs_share_a_sweep_when_and_only_when_they_compute_the_same(tiny_config):
    from bklm.harness.folder import experiment_name

    config = tiny_config.resolved()
    same = dataclasses.replace(config, output_dir="elsewhere", storage="postgresql://h/d", device="auto")
    assert experiment_name(same, "text") == experiment_name(config, "text")
    assert experiment_name(dataclasses.replace(config, clip=1.0), "text") != experiment_name(config, "text")
    assert experiment_name(config, "other text") != experiment_name(config, "text")
