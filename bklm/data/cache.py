"""Arrays kept on disk between runs: one folder an entry, written whole or not at all, checked when read.

The cache lies in the folder named by BKLM_CACHE_DIR, else in the user's cache folder (XDG_CACHE_HOME or
~/.cache, `bklm` in it). It only ever saves time: where it cannot be written the arrays stay in memory, and a
damaged entry is set aside (renamed, not deleted) and built anew; both are reported through `logging`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["cache_folder", "load_or_build"]

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Where cached arrays lie (it need not exist yet)."""
    if chosen := os.environ.get("BKLM_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bklm"


def load_or_build(kind: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The one-dimensional arrays of entry `key`, memory-mapped from disk, or else built, stored and memory-mapped.

    `key` must name all that the arrays depend on. Two processes may build the same entry at once: one of them
    wins, both get the same arrays.
    """
    entry = cache_folder() / kind / key
    try:
        if entry.exists():
            return _read(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "cached %s %s are damaged (%s); they are built anew%s", kind, entry, error, _set_aside(entry)
        )
    arrays = build()
    try:
        _write(entry, arrays)
        return _read(entry)
    except (OSError, ValueError) as error:
        log.warning(
            "%s cannot be cached in %s (%s); they stay in memory, and the next run builds them again",
            kind,
            entry.parent,
            error,
        )
        return arrays


def _write(entry: Path, arrays: Arrays) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", dir=entry.parent))
    try:
        index = {}
        for name, array in arrays.items():
            np.save(half / f"{name}.npy", array, allow_pickle=False)
            index[name] = {"length": len(array), "crc32": zlib.crc32(np.ascontiguousarray(array))}
        (half / "index.json").write_text(json.dumps(index))
        try:
            half.rename(entry)
        except OSError:
            if not entry.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _read(entry: Path) -> Arrays:
    arrays = {}
    for name, facts in json.loads((entry / "index.json").read_text()).items():
        path = entry / f"{name}.npy"
        array = np.load(path, mmap_mode="r" if facts["length"] else None, allow_pickle=False)
        if array.shape != (facts["length"],) or zlib.crc32(array) != facts["crc32"]:
            raise ValueError(f"{path.name} is not what was written")
        arrays[name] = array
    return arrays


def _set_aside(entry: Path) -> str:
    for number in range(1000):
        target = entry.with_name(f"{entry.name}.damaged-{number}")
        if not target.exists():
            try:
                entry.rename(target)
            except OSError:
                break
            return f", the old ones are set aside as {target.name}"
    return ""
