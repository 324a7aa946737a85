"""A study in a process of its own: started from a button, followed by its output, stopped within one step."""

from __future__ import annotations

import atexit
import codecs
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import bklm
from bklm.harness.config import StudyConfig
from bklm.harness.report import command_words

log = logging.getLogger(__name__)

# What tqdm writes: "alpha 0, seed 1:  35%|###5      | 12/34 [00:05<00:09,  2.31step/s]"
BAR = re.compile(r"(?:(?P<doing>.*): )?\s*(?P<percent>\d+)%\|[^|]*\|\s*(?P<counts>\S+ \[[^\]]*\])")
KEPT_LINES, LONGEST_LINE = 60, 10_000


class StudyRun:
    """``python -m bklm.studies.NAME`` with a config's settings, running beside this process.

    Attributes:
        config: the settings that it was started with.
        percent, doing, counts: what the study's progress bar said last; 0 and "" before it said anything.
        lines: the last lines that it printed besides the bar.
        returncode: None while it runs; then that of the process.
    """

    def __init__(self, config: StudyConfig, on_change: Callable[[], None] | None = None) -> None:
        """Start it. ``on_change`` is called, from a thread, after each piece of output and once at the end."""
        self.config = config
        self.folder = Path(config.resolved().output_dir) / config.study
        self.percent, self.doing, self.counts = 0, "", ""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.returncode: int | None = None
        self.started, self.seconds = time.time(), 0.0
        self._picture: Path | None = None
        self._on_change, self._is_stopping = on_change or (lambda: None), False
        root = str(Path(bklm.__file__).resolve().parent.parent)
        known = [p for p in (os.environ.get("PYTHONPATH"),) if p]
        self._process = subprocess.Popen(
            [sys.executable, *command_words(config)[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # interrupting a cell must not interrupt it too
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([root, *known])},
        )
        atexit.register(self.kill)
        self._reader = threading.Thread(target=self._follow, name="follow a study", daemon=True)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        return self.returncode is None

    @property
    def was_stopped(self) -> bool:
        """Whether it ended because ``stop`` asked for it."""
        return self._is_stopping and self.returncode not in (None, 0)

    def stop(self) -> None:
        """Ask it to end: it does so after the optimiser step (or the measured cell's call) at hand. Asked again: at once.

        Nothing that was finished is lost either way: the study goes on from its files when it is run again.
        """
        if not self.is_running:
            return
        if self._is_stopping:
            self.kill()
        elif self.lines:
            self._process.send_signal(signal.SIGINT)
        else:  # still importing, nothing to tidy up; and Python may not listen to SIGINT yet
            self._process.terminate()
        self._is_stopping = True

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait until it has ended and its output is read; its return code, or None when ``seconds`` were not enough."""
        self._reader.join(seconds)
        return self.returncode

    def picture(self) -> Path | None:
        """The picture in the study's folder that this run drew first: the one that it draws anew as it goes on."""
        if self._picture is None:
            found = [(p.stat().st_mtime, p) for p in self.folder.glob("*.png")]
            self._picture = min((pair for pair in found if pair[0] >= self.started), default=(0, None))[1]
        return self._picture

    def _follow(self) -> None:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
        pipe = self._process.stdout
        while chunk := os.read(pipe.fileno(), 65536):
            *pieces, rest = re.split(r"[\r\n]+", rest + decoder.decode(chunk))
            rest = rest[-LONGEST_LINE:]
            for piece in pieces:
                self._take(piece)
            # A bar ends in "\r" only when the next one begins.
            if BAR.match(rest):
                self._take(rest)
                rest = ""
            self._tell()
        self._take(rest)
        pipe.close()
        self.returncode = self._process.wait()
        self.seconds = time.time() - self.started
        atexit.unregister(self.kill)
        self._tell()

    def _take(self, piece: str) -> None:
        if bar := BAR.match(piece):
            self.percent = int(bar["percent"])
            self.doing, self.counts = bar["doing"] or "", bar["counts"]
            piece = piece[
                bar.end() :
            ].lstrip()  # a log line may follow the bar at once, after the blanks that erase it
        if piece.strip():
            self.lines.append(piece.rstrip())

    def tell(self, on_change: Callable[[], None]) -> None:
        """Tell someone else from here on: the controls that a cell made anew."""
        self._on_change = on_change

    def _tell(self) -> None:
        try:
            self._on_change()
        except Exception:
            # Whoever watches may be gone (a closed page); the run must still be read, or it would block.
            log.exception("showing a run's progress failed")
