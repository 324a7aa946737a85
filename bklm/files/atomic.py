"""Files that survive a kill: written beside, synced, renamed into place; what is damaged is set aside."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

log = logging.getLogger(__name__)

HALF = ".half"  # in the name of a file that is being written


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


_TORCH_WORDS = "inline_container"  # torch.save's own error, a plain RuntimeError with the line of its source


# What shows that a file is not there or does not hold what was written; anything else may be gone at the next attempt.
_DAMAGE = (
    FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, EOFError, RecursionError,
    UnpicklingError, SafetensorError,
)  # fmt: skip


class WriteError(OSError):
    """A file could not be written; the message is one sentence with the reason and what to do."""


class DamagedError(ValueError):
    """A file is missing or not what was written; the message says in a few words how that shows."""


class ReadError(OSError):
    """A file could not be read, which is no sign of damage; the message is one sentence with the reason and what to do."""


@contextlib.contextmanager
def telling_damage(path: Path) -> Iterator[None]:
    """Turn what readers raise into DamagedError where the file is to blame, and into ReadError where the machine is."""
    try:
        yield
    except (DamagedError, ReadError):
        raise
    except (*_DAMAGE, OSError, MemoryError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0][:120]
        # torch names its reader where an archive is to blame; its other RuntimeErrors are the allocator's.
        if isinstance(error, _DAMAGE) or "PytorchStreamReader" in first_line:
            raise DamagedError(f"{type(error).__name__}: {first_line}") from error
        reason = getattr(error, "strerror", None) or first_line or "out of memory"
        raise ReadError(
            f"cannot read {getattr(error, 'filename', None) or path} ({reason}); nothing shows that it is damaged, so it was "
            "left as it is: free some memory or mend the access to it and start the same command again, or move it away to "
            "do that part anew."
        ) from error


@contextlib.contextmanager
def saying_why(path: Path, *, may_read: bool = False) -> Iterator[None]:
    """Turn what Python, torch and safetensors raise when a disk is full or a folder read-only into one sentence.

    Args:
        may_read: other files are read in the block; an error that names one of them is passed on as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_disk = isinstance(error, SafetensorError) or (
            isinstance(error, OSError) and error.errno in _DISK and not (may_read and _is_foreign(path, error))
        )
        if isinstance(error, WriteError) or not (is_disk or _TORCH_WORDS in str(error)):
            raise
        reason = " ".join(str(error).split())[:120]
        if not isinstance(error, SafetensorError):
            reason = getattr(error, "strerror", None) or "the write broke off, most likely for want of space"
        raise WriteError(
            f"cannot write {path} ({reason}); free some space or choose another folder. What was finished is kept, and the "
            "same command goes on from there."
        ) from error


def _is_foreign(path: Path, error: OSError) -> bool:
    """Whether an error names files, and none is ``path``, what is half written beside it, or a folder above it."""
    # Copying names the source first and then what it could not write.
    named = [
        Path(os.fsdecode(n)).absolute() for n in (error.filename, error.filename2) if isinstance(n, str | bytes)
    ]
    path = path.absolute()
    beside = str(path.parent / f".{path.name}.")
    return bool(named) and not any(n == path or n in path.parents or str(n).startswith(beside) for n in named)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it takes the place of ``path`` in one step.

    After a crash ``path`` holds either its old content or the new one, whole. On an error the temporary file is removed; of
    a killed process it stays, for ``remove_leftovers``.

    Raises:
        WriteError: the disk is full, or the folder may not be written.
    """
    path = Path(path)
    with saying_why(path, may_read=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{HALF}{path.suffix}")
        temporary.touch(exist_ok=False)  # not mkstemp, whose files nobody else may read whatever the umask says
        mode = temporary.stat().st_mode
        try:
            yield temporary
            set_mode(temporary, mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written in ``folder`` and for its zip; nobody else may be writing there."""
    beside = folder.parent.glob(f".{folder.name}.zip.*{HALF}.zip")
    for half in [*folder.rglob(f".*{HALF}*"), *beside]:
        half.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically. NaN and infinity are refused: JSON has no word for them."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged-K``, say so, and return its new path."""
    k = 1
    while (target := path.with_name(f"{path.name}.damaged-{k}")).exists():
        k += 1
    path.rename(target)
    log.warning("%s is damaged (%s); set aside as %s.", path, why, target.name)
    return target


def set_mode(path: Path, mode: int) -> None:
    """Give a file the permissions it was made with; safetensors puts one of its own, closed to others, in its place."""
    # One that has them is not touched: some mounted folders know no permissions.
    if path.stat().st_mode & 0o777 != mode & 0o777:
        path.chmod(mode & 0o777)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return  # it opens no folder, and has nothing of the kind
    # Windows syncs what may be written only.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network and FUSE folders (a mounted Drive) cannot sync a directory; the rename itself has happened.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def read_result(path: Path, needed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """A finished part's JSON; None when it is not there. A damaged file is set aside, so that the part is done again.

    Args:
        needed: keys with the type of their values, without which it is damaged too; a frozenset stands for a list of
            mappings that have these keys.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        wrong = [key for key, kind in (needed or {}).items() if key not in found or not _is(found[key], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is missing or of another kind")
    except (ValueError, RecursionError) as error:
        set_aside(path, str(error))
        return None
    return found


def kept_result(path: Path, make: Callable[[], dict[str, Any]], needed: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run left in a JSON file, see ``read_result``, or what ``make`` finds now, which is then kept there."""
    found = read_result(path, needed)
    if found is None:
        found = make()
        write_json(path, found)
    return found


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, frozenset):
        return isinstance(value, list) and all(isinstance(v, dict) and kind <= v.keys() for v in value)
    return isinstance(value, kind)


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is never written")
