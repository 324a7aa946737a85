"""Checkpoints that survive a kill: written beside, synced, renamed into place, and never unpickled.

A checkpoint is a folder such as ``epoch_0003`` with ``model.safetensors`` (weights) and ``state.pt`` (optimizer, scheduler,
scaler, history), the latter read with ``torch.load(weights_only=True)``, which executes no code from the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises of a file that it will not read
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bklm.weights import load_weights, save_weights

log = logging.getLogger(__name__)

HALF = ".half"  # in the name of a file that is being written
SUMS = "sums.json"  # CRC-32 of a checkpoint's files
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_TORCH_WORDS = "inline_container"  # torch.save's own error, a plain RuntimeError with the line of its source
# What shows that a file is not there or does not hold what was written; anything else may be gone at the next attempt.
_DAMAGE = (
    FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, EOFError, RecursionError,
    UnpicklingError, SafetensorError,
)  # fmt: skip

_NAME = re.compile(r"epoch_(\d+)(?:_ppl_(\d+\.\d+|\d(?:\.\d+)?e\d+))?")


class WriteError(OSError):
    """A file could not be written; the message is one sentence with the reason and what to do."""


class DamagedError(ValueError):
    """A file is missing or not what was written; the message says in a few words how that shows."""


class ReadError(OSError):
    """A file could not be read, which is no sign of damage; the message is one sentence with the reason and what to do."""


@contextlib.contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
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
def _saying_why(path: Path, *, may_read: bool = False) -> Iterator[None]:
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
    a killed process it stays, for `remove_leftovers`.

    Raises:
        WriteError: the disk is full, or the folder may not be written.
    """
    path = Path(path)
    with _saying_why(path, may_read=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{HALF}{path.suffix}")
        temporary.touch(exist_ok=False)  # not mkstemp, whose files nobody else may read whatever the umask says
        mode = temporary.stat().st_mode
        try:
            yield temporary
            _set_mode(temporary, mode)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
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


def read_weights(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file; None where it is not there or damaged (it is then set aside).

    Raises:
        ReadError: memory is short, or the file may not be read.
    """
    try:
        with _telling_damage(path):
            if not path.exists():
                return None
            path.open("rb").close()  # safetensors calls a file that may not be read one that is not there
            return load_file(path)
    except DamagedError as error:
        set_aside(path, str(error))
        return None


class CheckpointFolder:
    """The checkpoints of one training run, one folder per epoch, "epoch_0003" or with a score "epoch_0003_ppl_36.700".

    Kept are the newest ``keep``, the one of the lowest perplexity in its name, and of every ``milestone_every``-th epoch
    the newest ``keep_milestones``. Training can go on from any of them.
    """

    def __init__(
        self, path: Path, keep: int = 1, *, milestone_every: int = 0, keep_milestones: int = 0
    ) -> None:
        self.path, self.keep = Path(path), keep
        self.milestone_every, self.keep_milestones = milestone_every, keep_milestones

    def save(
        self, epoch: int, model: torch.nn.Module, state: dict[str, Any], perplexity: float | None = None
    ) -> Path:
        """Write the checkpoint of ``epoch`` and drop those that need not be kept.

        Args:
            state: tensors, numbers, strings and containers of them (what ``weights_only`` loading accepts).
            perplexity: goes into the name, from a million on with four digits, such as "1.234e06".

        Raises:
            ValueError: a perplexity that is negative, infinite or NaN.
            WriteError: the disk is full, or the folder may not be written.
        """
        name = f"epoch_{epoch:04d}" + ("" if perplexity is None else f"_ppl_{_in_name(perplexity)}")
        target = self.path / name
        temporary = self.path / f".{name}.{secrets.token_hex(4)}"
        with _saying_why(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()  # not mkdtemp, whose folders nobody else may read whatever the umask says
        try:
            with _saying_why(target):
                save_weights(model, temporary / "model.safetensors")
                torch.save(state, temporary / "state.pt")
                sums = {file.name: _crc32(file) for file in sorted(temporary.iterdir())}
                (temporary / SUMS).write_text(json.dumps(sums), encoding="utf-8")
                for file in temporary.iterdir():
                    _set_mode(file, temporary.stat().st_mode & 0o666)
                    _sync(file)
                for same in self.all():
                    if epoch_of(same) == epoch:
                        shutil.rmtree(same)
                temporary.rename(target)
                _sync(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = self._worth_keeping()
        for old in self.all():
            if old not in kept:
                shutil.rmtree(old)
        return target

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None when there is none. Damaged ones are set aside and reported.

        Raises:
            ReadError: memory is short, or a file may not be read. That is no damage: nothing is set aside.
        """
        for leftover in self.path.glob(".epoch_*"):
            shutil.rmtree(leftover)
        for folder in reversed(self.all()):
            try:
                read_state(folder)
            except DamagedError as error:
                set_aside(folder, str(error))
                continue
            return folder
        return None

    def restore(self, model: torch.nn.Module) -> tuple[Path, dict[str, Any]] | None:
        """Load the newest whole checkpoint into ``model`` and return (folder, state); None when there is none.

        Raises:
            OtherModelError (a ValueError): the checkpoint is whole but holds another model's weights.
        """
        folder = self.newest()
        if folder is None:
            return None
        load_weights(model, folder / "model.safetensors")
        return folder, read_state(folder)

    def all(self) -> list[Path]:
        """Every checkpoint, oldest epoch first."""
        folders = self.path.glob("epoch_*") if self.path.exists() else ()
        return sorted(p for p in folders if _NAME.fullmatch(p.name))

    def best(self) -> Path | None:
        """The checkpoint of the lowest perplexity, the earliest on a tie; None when no name carries one."""
        scored = [p for p in self.all() if perplexity_of(p) is not None]
        return min(scored, key=perplexity_of, default=None)

    def remove(self) -> None:
        """Delete all checkpoints of this run (its result is recorded elsewhere)."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _worth_keeping(self) -> set[Path]:
        folders = self.all()
        kept = set(folders[-self.keep :])
        if self.milestone_every and self.keep_milestones:
            milestones = [p for p in folders if epoch_of(p) % self.milestone_every == 0]
            kept |= set(milestones[-self.keep_milestones :])
        return kept | {p for p in [self.best()] if p}


def read_state(folder: Path) -> dict[str, Any]:
    """The state that a checkpoint was saved with, on the CPU; its files, the weights too, are as they were written.

    Raises:
        DamagedError: a file is missing or not what was written.
        ReadError: memory is short, or a file may not be read.
    """
    with _telling_damage(folder):
        sums = json.loads((Path(folder) / SUMS).read_text(encoding="utf-8"))
        for name in ("model.safetensors", "state.pt"):
            if sums[name] != _crc32(Path(folder) / name):
                raise DamagedError(f"{name} is not what was written")
        return torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` has a checkpoint's name and files."""
    folder = Path(folder)
    files = (folder / "model.safetensors", folder / "state.pt", folder / SUMS)
    return bool(_NAME.fullmatch(folder.name)) and all(f.is_file() for f in files)


def epoch_of(folder: Path) -> int:
    """The epoch in a checkpoint's name."""
    return int(_NAME.fullmatch(Path(folder).name).group(1))


def perplexity_of(folder: Path) -> float | None:
    """The validation perplexity in a checkpoint's name; None when it carries none."""
    score = _NAME.fullmatch(Path(folder).name).group(2)
    return None if score is None else float(score)


def _in_name(perplexity: float) -> str:
    if not 0 <= perplexity < math.inf:
        raise ValueError(
            f"perplexity: got {perplexity:g}; a checkpoint's name holds a finite number of 0 or more, or none (None)."
        )
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.4g}".replace("+", "")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def _set_mode(path: Path, mode: int) -> None:
    """Give a file the permissions it was made with; safetensors puts one of its own, closed to others, in its place."""
    # One that has them is not touched: some mounted folders know no permissions.
    if path.stat().st_mode & 0o777 != mode & 0o777:
        path.chmod(mode & 0o777)


def _sync(path: Path) -> None:
    flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network and FUSE folders (a mounted Drive) cannot sync a directory; the rename itself has happened.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
