"""Running a batch: several notebooks at a time, each result recorded as it comes, one page and one zip at the end."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import nbformat
from tqdm.auto import tqdm

from bklm.batch import job
from bklm.batch.plan import OUTCOME_KEYS, Outcome, Run
from bklm.batch.summary import write_summary
from bklm.files.atomic import read_result, replacing, write_json
from bklm.files.locks import lock
from bklm.harness.bundle import read_notebook, write_html, zip_study

GRACE_SECONDS = 15.0  # for a process that was asked to end, its kernel with it


@dataclass(frozen=True)
class BatchResult:
    """Every run's outcome, in the file's order; the page that shows them, and the zip of everything."""

    outcomes: list[Outcome]
    summary: Path
    bundle: Path

    @property
    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == "failed"]


@dataclass
class _Job:
    run: Run
    process: multiprocessing.Process
    pipe: Any
    started: float
    cells_done: int = 0
    error: str | None = None
    has_ended: bool = False
    # By the process's own last word, or by whoever stopped it; else its exit code tells.
    is_explained: bool = False


def run_batch(
    runs: Sequence[Run],
    output_dir: Path,
    *,
    workers: int = 1,
    minutes: float | None = None,
    tell: Callable[[str], None] = tqdm.write,
) -> BatchResult:
    """Execute every run that is not done yet into ``output_dir/<name>``; a failed one does not stop the rest.

    Args:
        workers: notebooks at a time; the processor's cores are divided among them.
        minutes: a run is stopped and counts as failed after so long; None: never.
        tell: called with one line as each run ends.

    Raises:
        ValueError: a run's folder holds one of that name with another notebook or other parameters; or see ``check_limits``.
        OSError: ``output_dir`` cannot be written.
        RuntimeError: another batch is working in ``output_dir``.
    """
    check_limits(workers, minutes)
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held = lock(
            output_dir / ".batch.lock",
            f"output_dir: another batch is working in {output_dir}; wait for it or choose another folder",
        )
    except OSError as error:
        raise OSError(
            f"output_dir: cannot write to {output_dir} ({error.strerror}); choose another."
        ) from error
    try:
        outcomes = {run.name: kept for run in runs if (kept := _kept(run, output_dir / run.name))}
        for name in outcomes:
            tell(f"{name}: done before, kept")
        waiting = [run for run in runs if run.name not in outcomes]
        with _Workers(waiting, output_dir, workers, minutes) as pool:
            for outcome in pool.outcomes():
                outcomes[outcome.name] = outcome
                write_json(output_dir / outcome.name / "run.json", asdict(outcome))
                end = f"failed, {outcome.error}" if outcome.error else "done"
                tell(f"{outcome.name}: {end} ({outcome.seconds:.0f} s; {len(outcomes)} of {len(runs)})")
        ordered = [outcomes[run.name] for run in runs]
        summary = write_summary(output_dir, ordered)
        return BatchResult(ordered, summary, _zip(output_dir, ordered))
    finally:
        held.release()


def check_limits(workers: int, minutes: float | None) -> None:
    """Refuse what is no number of notebooks at a time, or no time that a run can be given.

    Raises:
        ValueError: one sentence.
    """
    if workers < 1:
        raise ValueError(f"workers: got {workers}; allowed is an integer of at least 1.")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"minutes: got {minutes}; allowed is a number above 0; leave it out for no limit.")


def _kept(run: Run, folder: Path) -> Outcome | None:
    """The recorded outcome of a run that is done; None for one to execute.

    Raises:
        ValueError: the folder is another run's.
    """
    recorded = read_result(folder / "run.json", OUTCOME_KEYS)
    if recorded is None:
        return None
    parameters = json.loads(json.dumps(run.parameters, default=str))
    changed = [
        f"{key} ({recorded['parameters'].get(key)!r} there, {parameters.get(key)!r} now)"
        for key in sorted({*recorded["parameters"], *parameters})
        if recorded["parameters"].get(key) != parameters.get(key)
    ]
    if recorded["notebook"] != run.notebook.name:
        changed.append(f"the notebook ({recorded['notebook']} there, {run.notebook.name} now)")
    if changed:
        raise ValueError(
            f"{run.name}: {folder} holds a run with other settings: {'; '.join(changed)}. Give this run another name, "
            "or the batch another output_dir; nothing was changed."
        )
    is_done = recorded["status"] != "failed" and recorded["fingerprint"] == run.fingerprint()
    return Outcome(**{key: recorded[key] for key in OUTCOME_KEYS} | {"status": "kept"}) if is_done else None


class _Workers:
    """Runs in processes of their own, so many at a time; none outlives the ``with`` block."""

    def __init__(self, runs: Sequence[Run], output_dir: Path, workers: int, minutes: float | None) -> None:
        self.waiting, self.output_dir, self.workers = deque(runs), output_dir, workers
        self.limit = None if minutes is None else 60 * minutes
        self.threads = max(1, (os.cpu_count() or 1) // workers)
        self.running: list[_Job] = []
        # Read before anything runs: a notebook that is gone by its turn is one failed run.
        self.parameters = {run.name: run.all_parameters(output_dir / run.name) for run in runs}
        self.fingerprints = {run.name: run.fingerprint() for run in runs}
        self.cells = {run.name: len(nbformat.read(run.notebook, as_version=4).cells) for run in runs}
        self.bar = tqdm(
            total=sum(self.cells.values()) + len(runs), unit="cell", mininterval=1.0, disable=not runs
        )

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for job_ in self.running:
            job_.process.terminate()  # the kernel ends with it; the studies in it keep what is finished
        for job_ in self.running:
            _wait_for(job_.process)
        self.bar.close()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield an Outcome as each run ends."""
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.workers:
                self.running.append(self._start(self.waiting.popleft()))
            self.bar.set_description(", ".join(j.run.name for j in self.running)[:60], refresh=False)
            ready = wait(
                [j.pipe for j in self.running] + [j.process.sentinel for j in self.running], timeout=1.0
            )
            for job_ in list(self.running):
                if job_.pipe in ready:
                    self._listen(job_)
                if self.limit is not None and time.monotonic() - job_.started > self.limit:
                    job_.error = f"stopped after {self.limit / 60:g} minutes"
                    job_.has_ended = job_.is_explained = True
                    job_.process.terminate()
                if job_.has_ended or not job_.process.is_alive():
                    yield self._end(job_)

    def _start(self, run: Run) -> _Job:
        folder = self.output_dir / run.name
        folder.mkdir(exist_ok=True)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        arguments = (
            str(run.notebook.resolve()), str(_executed(folder, run, ".running")), self.parameters[run.name],
            str(folder / "printed.txt"), self.threads, sender,
        )  # fmt: skip
        # Spawned, not forked: this process has threads, and CUDA perhaps, that a fork would break.
        process = multiprocessing.get_context("spawn").Process(target=job.execute, args=arguments, daemon=False)
        process.start()
        sender.close()
        return _Job(run, process, receiver, time.monotonic())

    def _listen(self, job_: _Job) -> None:
        try:
            while job_.pipe.poll():
                kind, value = job_.pipe.recv()
                if kind == "cell":
                    self.bar.update(value - job_.cells_done)
                    job_.cells_done = value
                else:
                    job_.error = value
                    job_.has_ended = job_.is_explained = True
        except (EOFError, OSError):  # OSError: the process died in the middle of a word
            job_.has_ended = True

    def _end(self, job_: _Job) -> Outcome:
        ended_by_itself = _wait_for(job_.process)
        self._listen(job_)
        self.running.remove(job_)
        if not job_.is_explained:
            job_.error = _explained(job_.process.exitcode if ended_by_itself else None)
        run, error, folder = job_.run, job_.error, self.output_dir / job_.run.name
        try:
            _keep_notebook(folder, run, error)
        except (
            Exception
        ) as failure:  # nbformat and nbconvert raise what a half-written file happens to trip over
            error = error or f"its notebook could not be kept ({type(failure).__name__}: {failure})"
            # It has that name already where the run itself had failed.
            with contextlib.suppress(FileNotFoundError):
                _executed(folder, run).replace(_executed(folder, run, ".failed"))
        self.bar.update(self.cells[run.name] + 1 - job_.cells_done)
        seconds = round(time.monotonic() - job_.started, 1)
        parameters = json.loads(json.dumps(run.parameters, default=str))
        status = "failed" if error else "done"
        error = error and " ".join(error.split())[:500]
        return Outcome(
            run.name, status, run.notebook.name, parameters, seconds, error, self.fingerprints[run.name]
        )


def _wait_for(process: multiprocessing.Process) -> bool:
    """Join a process that is ending; one that does not end within its grace time is killed, and the answer is False."""
    process.join(GRACE_SECONDS)
    if not process.is_alive():
        return True
    process.kill()
    process.join()
    return False


def _explained(exit_code: int | None) -> str:
    """Why a process that said nothing has ended; None: it closed its pipe, did not end, and was killed here."""
    if exit_code is None:
        return "the notebook's process hung as it ended and was stopped; run the batch again"
    if exit_code >= 0:
        return f"the notebook's process ended without a word, with exit code {exit_code}; see printed.txt in its folder"
    name = next((s.name for s in signal.Signals if s == -exit_code), f"signal {-exit_code}")
    if name == "SIGKILL":
        return (
            "the notebook's process was killed by SIGKILL, most often because memory was short; give the batch fewer "
            "workers or the run a smaller model or batch, and run the batch again"
        )
    return f"the notebook's process was killed by {name}; run the batch again"


def _executed(folder: Path, run: Run, mark: str = "") -> Path:
    return folder / f"{run.notebook.stem}{mark}.ipynb"


def _keep_notebook(folder: Path, run: Run, error: str | None) -> None:
    """Name the executed notebook after its end, render it, and put it into the zips of the run's studies."""
    running = _executed(folder, run, ".running")
    if not running.exists():
        return
    for mark in ("", ".failed"):
        for suffix in (".ipynb", ".html"):
            _executed(folder, run, mark).with_suffix(suffix).unlink(missing_ok=True)
    kept = running.replace(_executed(folder, run, ".failed" if error else ""))
    write_html(read_notebook(kept.read_text(encoding="utf-8")), kept.with_suffix(".html"))
    for manifest in folder.glob("*/manifest.json"):
        zip_study(manifest.parent, kept)


def _zip(output_dir: Path, outcomes: Sequence[Outcome]) -> Path:
    """One zip beside ``output_dir``: the page and these runs' folders, without checkpoints and the zips in them."""
    target = output_dir.with_name(output_dir.name + ".zip")
    files = [output_dir / "summary.html"]
    for outcome in outcomes:
        files += sorted(p for p in (output_dir / outcome.name).rglob("*") if p.is_file())
    with (
        replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for file in files:
            inside = file.relative_to(output_dir)
            is_hidden = any(part.startswith(".") for part in inside.parts)
            if not is_hidden and file.suffix != ".zip" and "checkpoints" not in inside.parts:
                archive.write(file, Path(output_dir.name) / inside)
    return target
