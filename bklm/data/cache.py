"""Arrays kept on disk between runs: one folder an entry, written whole or not at all, checked when read.

The cache lies in the folder named by BKLM_CACHE_DIR, else in the user's cache folder (XDG_CACHE_HOME or
~/.cache, ``bklm`` in it). It only ever saves time: where it cannot be written the arrays stay in memory, and a
damaged entry is set aside (renamed, not deleted) and built anew; both are reported through ``logging``. So is an entry that
cannot be read although nothing shows damage (another user's, a failing disk): it is left as it is.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)
# What a file that is missing or has other bytes than ours can raise.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError)
Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Where cached arrays lie (it need not exist yet)."""
    if chosen := os.environ.get("BKLM_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bklm"


def load_or_build(kind: str, key: str, names: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The one-dimensional arrays ``names`` of entry ``key``, memory-mapped from disk; built and stored where it is missing.

    ``key`` must name all that the arrays depend on. Two processes may build the same entry at once: one of them
    wins, both get the same arrays.
    """
    entry = cache_folder() / kind / key
    try:
        if entry.exists():
            return _read(entry, names)
    except _DAMAGE as error:
        aside = _set_aside(entry)
        log.warning("cached %s in %s cannot be used (%s); they are built anew%s", kind, entry, error, aside)
    except OSError as error:
        text = "cached %s in %s cannot be read (%s) and are left as they are; they are built anew and stay in memory"
        log.warning(text, kind, entry, error)
        return build()
    arrays = build()
    try:
        _write(entry, arrays)
        return _read(entry, names)
    except (*_DAMAGE, OSError) as error:
        text = "%s cannot be cached in %s (%s); they stay in memory, and the next run builds them again"
        log.warning(text, kind, entry.parent, error)
        return arrays


def _write(entry: Path, arrays: Arrays) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    half = entry.parent / f".{entry.name[:8]}-{secrets.token_hex(4)}"
    half.mkdir()  # not mkdtemp, whose folders nobody else may read whatever the umask says
    try:
        index = {}
        for name, array in arrays.items():
            array.tofile(half / f"{name}.bin")
            index[name] = {"dtype": array.dtype.str, "length": len(array), "crc32": zlib.crc32(array)}
        (half / "index.json").write_text(json.dumps(index))
        try:
            half.rename(entry)
        except OSError:
            if not entry.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _read(entry: Path, names: Sequence[str]) -> Arrays:
    index = json.loads((entry / "index.json").read_text())
    return {name: _mapped(entry / f"{name}.bin", **index[name]) for name in names}


def _mapped(path: Path, dtype: str, length: int, crc32: int) -> np.ndarray:
    if np.dtype(dtype).kind not in "iu":
        raise ValueError(f"{path.name} should hold integers, not {dtype}")
    # A file of no bytes cannot be mapped.
    array = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    if array.shape != (length,) or zlib.crc32(array) != crc32:
        raise ValueError(f"{path.name} is not what was written")
    return array


def _set_aside(entry: Path) -> str:
    for number in range(1000):
        target = entry.with_name(f"{entry.name}.damaged-{number}")
        if not target.exists():
            try:
                entry.rename(target)
            except OSError:
                break
            return f", and the old ones set aside as {target.name}"
    return ""
