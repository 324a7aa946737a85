"""The folder of one study: opened once, locked while in use, refused when it holds another experiment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bklm import __version__
from bklm.files.atomic import read_result, remove_leftovers, write_json, write_text
from bklm.files.locks import lock
from bklm.harness.config import StudyConfig

log = logging.getLogger("bklm")

# The only version whose config.json did not say by which it was written.
VERSION_UNTOLD = "0.1.0"
# Below a study's folder: what nobody but the study itself reads, such as the records of its trials.
INTERNALS = "internals"
NEEDED_BYTES = 200_000_000  # checkpoints of the largest default run, twice, and the zip


@contextlib.contextmanager
def study_folder(config: StudyConfig) -> Iterator[Path]:
    """Open ``<output_dir>/<study>`` for a resolved config; log to its ``run.log`` meanwhile.

    Raises:
        OSError: the folder cannot be written, or its disk is (nearly) full.
        ValueError: it holds a study made with another config; the message names the differing fields.
        RuntimeError: another process is working in it.
    """
    folder = Path(config.output_dir) / config.study
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output_dir: cannot write to {folder} ({error.strerror}); choose a folder you may write to."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"output_dir: {folder} has {free / 1e6:.0f} MB left; the study needs up to {NEEDED_BYTES / 1e6:.0f} MB; "
            "free some space or choose another folder."
        )
    held = lock(
        folder / ".lock",
        f"output_dir: another run is working in {folder}; wait for it, stop it, or choose another folder",
    )
    try:
        refuse_other_experiment(folder, config)
        remove_leftovers(folder)
        shorten_tracebacks(folder / "run.log")
        with logging_to(folder / "run.log", quiet=config.quiet):
            yield folder
    finally:
        held.release()


def shorten_tracebacks(path: Path) -> None:
    """Leave of each traceback in an earlier run's log its last line, so that a traceback in it is of the latest run."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    # A line of the log begins with its time; what stands between two of them belongs to the first.
    lines = re.split(r"(?m)^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} )", text)
    short = [_without_traceback(line) for line in lines]
    if short != lines:
        write_text(path, "".join(short))


def _without_traceback(line: str) -> str:
    head, begins, trace = line.partition("\nTraceback (most recent call last):\n")
    return f"{head}: {trace.rstrip().splitlines()[-1]}\n" if begins and trace.strip() else line


def other_experiment(config: StudyConfig, text_sha256: str | None = None) -> list[str]:
    """What differs between a resolved config and the study in its folder; [] when they agree or there is none."""
    recorded = _claimed(config)
    if recorded is None:
        return []
    different = config.differences(recorded["config"])
    if recorded["bklm"] != __version__:
        different.append(f"bklm's version ({recorded['bklm']} there, {__version__} now)")
    if text_sha256 not in (None, recorded["text_sha256"]):
        different.append(f"the text (SHA-256 {recorded['text_sha256'][:8]}... there, {text_sha256[:8]}... now)")
    return different


def _claimed(config: StudyConfig) -> dict[str, Any] | None:
    """What config.json says of the study in a config's folder; None where there is none."""
    path = Path(config.output_dir) / config.study / "config.json"
    found = read_result(path, {"config": dict, "text_sha256": str | None})
    return found and {"bklm": VERSION_UNTOLD, **found}


def experiment_name(config: StudyConfig, text_sha256: str | None = None) -> str:
    """A name that two runs share when and only when they compute the same thing: study, settings, text, version."""
    circumstances = type(config).circumstances
    computed = {n: v for n, v in config.to_dict().items() if n not in circumstances}
    words = json.dumps([__version__, computed, text_sha256], sort_keys=True)
    return f"{config.study}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"


def fingerprint(text: Any) -> str | None:
    """SHA-256 (hex) of what a study reads; a text that is more than its corpus has a ``fingerprint`` of its own."""
    return text and getattr(text, "fingerprint", text.corpus.sha256)


def claim(folder: Path, config: StudyConfig, text_sha256: str | None = None) -> None:
    """Record that the folder belongs to this experiment; call it when nothing can be refused any more.

    ``text_sha256`` is None for a study that reads no text.

    Raises:
        ValueError: the folder belongs to another experiment.
    """
    refuse_other_experiment(folder, config, text_sha256)
    marker = folder / f".{experiment_name(config, text_sha256)}"
    if not (folder / "config.json").exists():
        # An empty file cannot be truncated: its name still tells what the folder holds when config.json is damaged.
        if any(folder.glob(f".{config.study}-*")) and not marker.exists():
            raise ValueError(
                f"output_dir: {folder} holds results whose config.json is missing or damaged, and they were made with other "
                "settings than these; choose another output_dir, or the settings they were made with."
            )
        write_json(
            folder / "config.json",
            {"bklm": __version__, "config": config.to_dict(), "text_sha256": text_sha256},
        )
        marker.touch()


def refuse_other_experiment(folder: Path, config: StudyConfig, text_sha256: str | None = None) -> None:
    different = other_experiment(config, text_sha256)
    claimed = _claimed(config)
    if len(different) == 1 and claimed["bklm"] != __version__:
        # Its finished trials would be paired with new ones of other code, and nothing in the tables would tell.
        raise ValueError(
            f"output_dir: {folder} holds a study begun with bklm {claimed['bklm']}, and this is bklm {__version__}; choose "
            f"another output_dir, or install bklm {claimed['bklm']} to go on with it; nothing was changed."
        )
    if different:
        raise ValueError(
            f"output_dir: {folder} holds a study made with other settings: {'; '.join(different)}. "
            "Choose another output_dir, or the same settings to go on with it; nothing was changed."
        )


class _LogFile(logging.FileHandler):
    """A log that a full disk ends with one line on the screen, and not with a traceback for every line."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.has_failed:
            self.has_failed = True
            print(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}).", file=sys.stderr)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written before; ``handleError`` has said so
            self.has_failed = True


@contextlib.contextmanager
def logging_to(path: Path, *, quiet: Sequence[str] = (), on_screen: bool = True) -> Iterator[None]:
    """Log to ``path``, and to the screen what is no mere information from a logger named in ``quiet``."""
    to_file = _LogFile(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = logging.StreamHandler(sys.stdout) if on_screen else logging.NullHandler()
    to_screen.setFormatter(logging.Formatter("%(message)s"))
    to_screen.addFilter(lambda record: record.levelno > logging.INFO or record.name not in quiet)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(to_file)
    log.addHandler(to_screen)
    try:
        yield
    except Exception:
        to_file.handle(
            log.makeRecord("bklm", logging.ERROR, __file__, 0, "the run stopped", (), sys.exc_info())
        )
        raise
    finally:
        for handler in (to_file, to_screen):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate
