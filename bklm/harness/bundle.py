"""One zip of a study's folder, with the executed notebook where there is one."""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bklm.files.atomic import replacing, write_text


@dataclass(frozen=True)
class Bundle:
    """A finished results zip."""

    path: Path
    size: int  # bytes
    sha256: str

    def __str__(self) -> str:
        return f"{self.path}  {self.size / 1e6:.2f} MB  SHA-256 {self.sha256}"


def zip_study(folder: Path, notebook: Path | None = None) -> Bundle:
    """Zip a study's folder to ``<folder>.zip``, atomically.

    Args:
        notebook: an executed notebook; it is copied into the folder with its HTML rendering first.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"results zip: there is no study folder {folder}; run the study first.")
    if notebook is not None:
        add_notebook(folder, notebook.read_text(encoding="utf-8"), notebook.name)
    target = folder.with_name(folder.name + ".zip")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    with (
        replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for file in files:
            archive.write(file, Path(folder.name) / file.relative_to(folder))
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return Bundle(target, target.stat().st_size, digest)


def add_notebook(folder: Path, notebook: str, name: str) -> None:
    """Put an executed notebook, given as its JSON text, and its HTML rendering into a study's folder."""
    # Two seconds that a study on its own need not wait for.
    import nbformat
    from nbconvert import HTMLExporter

    read = nbformat.reads(notebook, as_version=4)
    html, _ = HTMLExporter().from_notebook_node(read)
    write_text(folder / name, nbformat.writes(read))
    write_text((folder / name).with_suffix(".html"), html)


def main() -> None:
    """``python -m bklm.harness.bundle FOLDER --notebook EXECUTED.ipynb``: put the notebook in and write the zip again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--notebook", type=Path)
    arguments = parser.parse_args()
    bundle = zip_study(arguments.folder, arguments.notebook)
    print(
        f"Results: {bundle.path}\nSize:    {bundle.size / 1e6:.2f} MB ({bundle.size} bytes)\nSHA-256: {bundle.sha256}"
    )


if __name__ == "__main__":
    main()
