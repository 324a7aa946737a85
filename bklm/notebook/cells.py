"""The parts that only a notebook needs: where it runs, tables, sentences, live figures, and the download at the end.

Everything here also works headless (papermill, CI): nothing waits for a front end that is not there.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import json
import logging
import re
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from IPython import display as front_end
from IPython import get_ipython
from IPython.display import display

from bklm.harness.bundle import PAGE, Bundle, add_notebook, zip_study
from bklm.harness.config import StudyConfig
from bklm.harness.page import alternative_text
from bklm.harness.report import as_text
from bklm.harness.values import DRIVE, drive_path, is_mounted
from bklm.notebook import form as notebook_form
from bklm.notebook.controls import SHOWN_LINES, as_pre
from bklm.notebook.form import Config, is_headless
from bklm.notebook.saved import saved_notebook

log = logging.getLogger(__name__)

# Numbers stay on one line, so that a narrow screen scrolls a table instead of breaking them; sentences wrap.
TABLE_STYLE = (
    ".bklm td {white-space:nowrap} .bklm td.long {white-space:normal; min-width:10em} .bklm th {min-width:4em}"
    " .bklm tr > :first-child"
    + "".join(f", .bklm.words{i} tr > :nth-child({i})" for i in range(2, 11))
    + " {text-align:left}"
)
LONG_CELL = 30  # characters
PICTURE_WIDTH = 760  # pixels: readable on a desktop, and scaled down by phones
Result = TypeVar("Result")


class HTML(front_end.HTML):
    """HTML, and the text that a front end without HTML, such as a console, shows in its place."""

    def __init__(self, data: str, text: str) -> None:
        super().__init__(data)
        self._text = text

    def __repr__(self) -> str:
        return self._text


class Image(front_end.Image):
    """A PNG at a width that phones and desktops both read; where no picture can be shown, its path."""

    def __init__(self, path: Path) -> None:
        # As metadata: Colab's IPython has no argument for it.
        words = {"alt": alternative_text(path)}
        super().__init__(data=path.read_bytes(), width=PICTURE_WIDTH, metadata=words)
        self._path = path

    def __repr__(self) -> str:
        return f"Picture: {self._path.resolve()}"


def where() -> str:
    """ "colab", "jupyter" (any other kernel, papermill's too) or "shell".

    Colab is told by its kernel class: its environment variables exist on Kaggle too, and a papermill subprocess on a
    Colab machine still has them.
    """
    shell = get_ipython()
    if shell is None:
        return "shell"
    if type(shell).__module__ == "google.colab._shell":
        return "colab"
    return "jupyter" if "IPKernelApp" in shell.config else "shell"


def config_from(config_class: type[Config], namespace: dict[str, Any]) -> Config:
    """The config that the form cells (and papermill's injected cell) describe; ``namespace`` is ``globals()``.

    A folder on Google Drive is mounted first, in Colab.

    Raises:
        ValueError: a value that the config does not allow, or a Drive that cannot be mounted.
    """
    config = notebook_form.config_from(config_class, namespace)
    mount_drive(config, headless=namespace.get("headless", False))
    return config


def mount_drive(config: StudyConfig, headless: bool = False) -> None:
    """Mount the Google Drive when a folder of ``config`` lies on it, however its path is written; only Colab has one.

    Raises:
        ValueError: it is not mounted, and nobody is there to allow it, or it was not allowed; or a path that names a Drive and
            no folder of it.
    """
    if where() != "colab":
        return
    paths = {s.name: v for s in config.specs() if s.is_path and (v := getattr(config, s.name)) is not None}
    found = {f"{name}: {text}": drive_path(name, text, DRIVE) for name, text in paths.items()}
    wanted = [words for words, path in found.items() if path is not None and not is_mounted(path)]
    if not wanted:
        return
    problem = f"{wanted[0]} is on Google Drive, which is not mounted"
    if is_headless(headless):
        raise ValueError(
            f"{problem}, and nobody is there to allow it; mount it before, or choose another folder."
        )
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # Colab raises whatever its front end said
        raise ValueError(
            f"{problem} ({error}); allow it and run the cell again, or choose another folder. Where it says that the folder "
            f"must be empty, move away what was written to {DRIVE} before."
        ) from error


def run(study: Callable[..., Result], config: StudyConfig, headless: bool = False) -> Result:
    """Run a study in this cell, with the last lines of its log and its figure drawn anew as it goes on.

    Headless the log is printed line by line. Either way all of it is in the study's run.log.
    """
    figure = LiveFigure()
    is_plain = is_headless(headless) or where() == "shell"
    log_shown = contextlib.nullcontext() if is_plain else contextlib.redirect_stdout(_Tail())
    with log_shown:
        result = study(config, on_figure=figure)
    figure.refresh()
    # A finished run that is read back draws nothing as it goes on.
    drawn = [p for p in getattr(result, "paths", {}).values() if p.suffix == ".png" and p.exists()]
    if drawn and not figure.was_shown:
        show_picture(drawn[0])
    return result


class _Tail(io.TextIOBase):
    """A text stream of which a cell shows the last lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=SHOWN_LINES)
        self._begun = ""
        self._handle: Any = None

    def write(self, text: str) -> int:
        *done, self._begun = (self._begun + text).split("\n")
        self._lines.extend(done)
        shown = HTML(as_pre(self._lines), "\n".join(self._lines))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        elif done:
            self._handle.update(shown)
        return len(text)


class LiveFigure:
    """A picture in the output of one cell, shown again each time its file was drawn anew."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._path: Path | None = None

    @property
    def was_shown(self) -> bool:
        return self._path is not None

    def __call__(self, path: Path) -> None:
        self._path = path
        if where() == "shell":
            return
        image = Image(path)
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)

    def refresh(self) -> None:
        """Show the file as it is now: a study draws it once more at its end."""
        if self._path is not None and where() == "shell":
            show_picture(self._path)
        elif self._path is not None:
            self(self._path)


def show_table(rows: Sequence[dict[str, Any]], headless: bool = False) -> None:
    """A table of rows: as text where only text is streamed, as HTML otherwise, which a narrow screen can scroll."""
    text = as_text(list(rows))
    if _is_plain(headless):
        print(text)
        return
    found = pd.DataFrame(rows).fillna("")
    words = [f"words{i}" for i, name in enumerate(found, 1) if _is_words(found[name])]
    table = found.to_html(index=False, border=0, classes=["bklm", *words])
    table = re.sub(rf"<td>(?=[^<]{{{LONG_CELL},}})", '<td class="long">', table)
    display(HTML(f'<style>{TABLE_STYLE}</style><div style="overflow-x:auto">{table}</div>', text))


def _is_words(column: pd.Series) -> bool:
    """Whether a table's column holds sentences, or no number at all, with or without its unit."""
    cells = [str(cell) for cell in column]
    if any(len(cell) >= LONG_CELL for cell in cells):
        return True
    return not any(re.match(r"[x+-]?\d|under \d", cell) for cell in cells) and any(len(c) > 1 for c in cells)


def say(text: str, headless: bool = False) -> None:
    """A sentence or more, wrapped between words; as plain text where only text is streamed."""
    if _is_plain(headless):
        print(text)
    else:
        display(HTML(f'<p style="max-width:60em; line-height:1.5">{html.escape(text)}</p>', text))


def _is_plain(headless: bool) -> bool:
    """Whether only text is streamed; a script that did not ask for that is told so, once."""
    if is_headless(headless):
        return True
    if where() != "shell":
        return False
    _tell_what_is_plain()
    return True


@functools.cache
def _tell_what_is_plain() -> None:
    print("No front end shows this: tables are plain text, and a picture is named by its file.")


def show_picture(path: Path) -> None:
    """A PNG; its path where no front end can show it."""
    if where() == "shell":
        print(Image(path))
        return
    display(Image(path))


def finish(folder: Path, headless: bool = False) -> Bundle:
    """Zip the study's folder with this notebook as executed so far, and print path, size and SHA-256.

    Headless, the runner adds the executed notebook after its last cell (see colab_setup.sh).
    """
    notebook = None
    if not is_headless(headless) and where() != "shell":
        notebook = _add_this_notebook(folder)
    bundle = zip_study(folder, notebook)
    print(f"Results: {bundle.path.resolve()}\nSize:    {bundle.size / 1e6:.2f} MB ({bundle.size} bytes)")
    print(f"SHA-256: {bundle.sha256}")
    return bundle


def download(bundle: Bundle, headless: bool = False) -> None:
    """Offer the zip to the browser in Colab; elsewhere say where it lies. A blocked download loses nothing."""
    if is_headless(headless) or where() != "colab":
        print(f"The zip is on this machine's disk: {bundle.path.resolve()}")
        return
    from google.colab import files

    try:
        files.download(str(bundle.path))
    except Exception as error:
        print(
            f"The browser did not take the download ({type(error).__name__}: {error}). The zip is complete at "
            f"{bundle.path.resolve()}: open the folder icon on the left and download it from there."
        )


def _add_this_notebook(folder: Path) -> Path | None:
    """Put this notebook, as executed so far, into a study's folder; where it cannot be had, say so and what to do."""
    try:
        if where() != "colab":
            path = saved_notebook(get_ipython())
            return add_notebook(folder, path.read_text(encoding="utf-8"), path.name)
        from google.colab import _message

        reply = _message.blocking_request("get_ipynb", timeout_sec=20)
        return add_notebook(folder, json.dumps(reply["ipynb"]), "notebook.ipynb")
    except Exception as error:  # Colab's front end answers with whatever it said
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        page = (
            f"{PAGE} in the zip shows what was found"
            if (folder / PAGE).exists()
            else "the zip holds the results"
        )
        print(
            f"The notebook itself could not be added to the zip ({reason}): {page}; to have the notebook in it, too, save it "
            f"and run this cell again, or, once it is executed: python -m bklm.harness.bundle {shlex.quote(str(folder))} "
            "--notebook FILE.ipynb"
        )
        return None
