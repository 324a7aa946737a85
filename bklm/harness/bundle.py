"""One zip of a study's folder, with the executed notebook where there is one."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bklm.files.atomic import replacing, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

PAGE = "report.html"  # what a reader of the zip opens first (page.py)


@dataclass(frozen=True)
class Bundle:
    """A finished results zip."""

    path: Path
    size: int  # bytes
    sha256: str

    def __str__(self) -> str:
        return f"{self.path}  {self.size / 1e6:.2f} MB  SHA-256 {self.sha256}"


def zip_study(folder: Path, notebook: Path | None = None) -> Bundle:
    """Zip a study's folder to ``<folder>.zip``, atomically; ``PAGE`` comes first.

    Hidden files and folders are left out, and notebooks of earlier runs, which are not what was run.

    Args:
        notebook: an executed notebook; it is copied into the folder with its HTML rendering first, unless it lies there.

    Raises:
        FileNotFoundError: no such folder or notebook. ValueError: the file is no notebook.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"results zip: there is no study folder {folder}; run the study first.")
    if notebook is not None and not notebook.is_file():
        raise FileNotFoundError(f"results zip: there is no notebook {notebook}; give the executed one's file.")
    if notebook is not None and notebook.parent.resolve() != folder.resolve():
        notebook = add_notebook(folder, notebook.read_text(encoding="utf-8"), notebook.name)
    old = {p.stem for p in folder.glob("*.ipynb")} - {notebook and notebook.stem}
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    files = [
        p
        for p in inside
        if not any(part.startswith(".") for part in p.parts)
        and not (len(p.parts) == 1 and p.stem in old and p.suffix in (".ipynb", ".html"))
    ]
    target = folder.with_name(folder.name + ".zip")
    with (
        replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for file in sorted(files, key=lambda p: p.name != PAGE):
            # A run that goes on in the folder meanwhile may have removed it, as it does with checkpoints.
            with contextlib.suppress(FileNotFoundError):
                archive.write(folder / file, Path(folder.name) / file)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return Bundle(target, target.stat().st_size, digest)


def read_notebook(text: str) -> NotebookNode:
    """A notebook from its JSON text, as nbformat wants it, whichever front end saved it.

    Colab writes format 4.0 with the cells' ids among their metadata, and widgets without the key "state".

    Raises:
        ValueError: the text is no notebook.
    """
    # Two seconds that a study on its own need not wait for.
    import nbformat

    try:
        notebook = nbformat.reads(text, as_version=4)
        taken: set[str] = set()
        for number, cell in enumerate(notebook.cells):
            known = str(cell.get("id") or cell.metadata.pop("id", ""))
            is_good = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known) and known not in taken
            cell.id = known if is_good else f"cell-{number}"
            taken.add(cell.id)
        notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
        for kind, saved in notebook.metadata.get("widgets", {}).items():
            if "state" not in saved:
                notebook.metadata.widgets[kind] = {"version_major": 2, "version_minor": 0, "state": saved}
    except (
        Exception
    ) as error:  # nbformat raises what broken JSON, or JSON of another kind, happens to trip over
        raise ValueError(
            f"no notebook ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    return notebook


def write_html(notebook: NotebookNode, path: Path) -> None:
    """Render a notebook; one that cannot be rendered leaves a sentence on the screen, and no page of an earlier one."""
    from nbconvert import HTMLExporter

    try:
        html, _ = HTMLExporter().from_notebook_node(notebook)
    except Exception as error:  # a template trips over whatever a front end has written
        path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        print(
            f"{path.name} could not be rendered ({type(error).__name__}: {reason}); the notebook itself is there."
        )
        return
    write_text(path, html)


def add_notebook(folder: Path, notebook: str, name: str) -> Path:
    """Put an executed notebook, given as its JSON text, and its HTML rendering into a study's folder; return its path.

    Raises:
        ValueError: the text is no notebook.
    """
    import nbformat

    read, path = read_notebook(notebook), folder / name
    # First what cannot be made again.
    write_text(path, nbformat.writes(read))
    write_html(read, path.with_suffix(".html"))
    return path


def main() -> None:
    """``python -m bklm.harness.bundle FOLDER --notebook EXECUTED.ipynb``: put the notebook in and write the zip again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--notebook", type=Path)
    arguments = parser.parse_args()
    try:
        bundle = zip_study(arguments.folder.resolve(), arguments.notebook)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"Results: {bundle.path}\nSize:    {bundle.size / 1e6:.2f} MB ({bundle.size} bytes)\nSHA-256: {bundle.sha256}"
    )


if __name__ == "__main__":
    main()
