"""Values as people write them, the same for every reader: "None", "~", a folder on Google Drive, numbers of arrays."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

DRIVE = Path("/content/drive")  # where Colab mounts a Google Drive
# Folders of a mounted Drive, and what people call the mount point, in small letters.
_OF_A_DRIVE = {
    "mydrive": "MyDrive",
    "my drive": "MyDrive",
    "shareddrives": "Shareddrives",
    "shared drives": "Shareddrives",
}
_MOUNT_POINTS = ("drive", "gdrive", "google drive", "googledrive")


def is_empty(value: Any) -> bool:
    """Whether a value is none at all: None, blanks, or the word None as shells and papermill hand it on."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "None"))


def as_path(name: str, value: str | os.PathLike[str]) -> str:
    """A path without blanks at its ends and with "~" and "~user" put in full.

    Raises:
        ValueError: what is no path, or a home folder that this machine does not have; the sentence begins with ``name``.
    """
    if isinstance(value, bytes) or not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}: got {value!r}; allowed is the path of a file or folder, as text.")
    text = os.fspath(value).strip()
    if "\0" in text:
        raise ValueError(f"{name}: got {text!r}; a path holds no NUL character; write it again.")
    full = os.path.expanduser(text)  # noqa: PTH111, which would drop a "./" that keeps a "~" as it is
    if full.startswith("~"):
        raise ValueError(
            f"{name}: got {text!r}; this machine has no home folder of that name: write the path in full, or ./{text} for a "
            "folder that is called so."
        )
    return full


def anchored(name: str, text: str) -> str:
    """An absolute path, from the current folder; in Colab one that names Google Drive lies on it, however it is written.

    Raises:
        ValueError: in Colab, a Drive that is not mounted, or a path beside the folders that a Drive has.
    """
    if in_colab() and (on_drive := drive_path(name, text)) is not None:
        if not is_mounted(on_drive):
            raise ValueError(
                f"{name}: {text} is on Google Drive, which is not mounted, and what is written there would be lost with the "
                "runtime; run this in a cell first: from google.colab import drive; drive.mount('/content/drive')"
            )
        return str(on_drive)
    return os.path.abspath(text)  # noqa: PTH100, Path.absolute keeps ".."


def in_colab() -> bool:
    """Whether this process runs in a Colab runtime, be it the notebook's kernel or a command of a ``!`` line."""
    # The variable alone is set on Kaggle, too.
    return "google.colab" in sys.modules or bool(
        os.environ.get("COLAB_RELEASE_TAG")
        and importlib.util.find_spec("google")
        and importlib.util.find_spec("google.colab")
    )


def drive_path(name: str, text: str, drive: Path = DRIVE) -> Path | None:
    """The path on Google Drive that a text means in Colab: "drive/MyDrive/x", "gdrive/My Drive/x"; None for any other.

    Raises:
        ValueError: it names a Drive, and no folder that a Drive has.
    """
    path = Path(text)
    for index, part in enumerate(path.parts):
        if found := _OF_A_DRIVE.get(part.casefold()):
            here = Path(*path.parts[:index])
            place = (
                here if here.is_absolute() and here != Path(here.anchor) and os.path.ismount(here) else drive
            )
            return place.joinpath(found, *path.parts[index + 1 :])
    first = path.relative_to(drive.parent) if path.is_relative_to(drive.parent) else path
    names = [part.casefold() for part in first.parts if part != first.anchor]
    if names and names[0] in _MOUNT_POINTS:
        rest = "/".join(first.parts[-(len(names) - 1) :]) if len(names) > 1 else "bklm"
        raise ValueError(
            f"{name}: got {text!r}, which names a Google Drive and no folder of it; write {drive}/MyDrive/{rest}."
        )
    return None


def is_mounted(on_drive: Path) -> bool:
    """Whether the Drive that a path of ``drive_path`` lies on is mounted; a folder of its name is not enough."""
    return any(os.path.ismount(folder) for folder in list(on_drive.parents)[:-1])


def plain(value: Any) -> Any:
    """Python's own number for one of an array library, and one without the noise of binary arithmetic.

    An array without dimensions is a number. 0.30000000000000004, as ``linspace`` makes it, is 0.3, and a 32-bit 0.1 is 0.1:
    values name folders and look up what was reported.
    """
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "ndim", 0):
        # str of a numpy number has the digits of its own precision; torch has no such scalars.
        is_short = type(value).__module__ == "numpy" and str(value.dtype) in ("float16", "float32")
        value = float(str(value)) if is_short else value.item()
    if isinstance(value, float) and len(short := f"{value:.15g}") + 3 <= len(repr(value)):
        return float(short)
    return value


def as_typed(value: Any) -> str:
    """A field's value as one types it: "0, 0.5" for a tuple, "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(as_typed(v) for v in value)
    return (
        str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
    )
