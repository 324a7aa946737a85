"""Checkpoints that survive a kill: written beside, synced, renamed into place, and never unpickled.

A checkpoint is a folder ``epoch_0003`` with ``model.safetensors`` (weights) and ``state.pt`` (optimizer, scheduler, scaler,
history), the latter read with ``torch.load(weights_only=True)``, which executes no code from the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it takes the place of ``path`` in one step.

    After a crash ``path`` holds either its old content or the new one, whole. On an error the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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


class CheckpointFolder:
    """The checkpoints of one training run, one folder per epoch; the newest ``keep`` are kept."""

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path, self.keep = Path(path), keep

    def save(self, epoch: int, model: torch.nn.Module, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``epoch`` and drop the oldest beyond ``keep``.

        Args:
            state: tensors, numbers, strings and containers of them (what ``weights_only`` loading accepts).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"epoch_{epoch:04d}"
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=self.path))
        try:
            save_model(model, str(temporary / "model.safetensors"))
            torch.save(state, temporary / "state.pt")
            for file in temporary.iterdir():
                _sync(file)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            _sync(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._epochs()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def restore(self, model: torch.nn.Module) -> tuple[Path, dict[str, Any]] | None:
        """Load the newest whole checkpoint into ``model`` and return (folder, state); None when there is none.

        Damaged checkpoints are set aside and reported, and the one before is tried.

        Raises:
            RuntimeError: the checkpoint is whole but holds another model's weights.
        """
        for leftover in self.path.glob(".epoch_*"):
            shutil.rmtree(leftover)
        for folder in reversed(self._epochs()):
            try:
                with safe_open(folder / "model.safetensors", framework="pt"):
                    pass  # opening checks the header against the file's length
                state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
            except Exception as error:  # a damaged file raises whatever its reader happens to trip over
                set_aside(folder, f"{type(error).__name__}: {str(error)[:120]}".splitlines()[0])
                continue
            load_model(model, str(folder / "model.safetensors"))
            return folder, state
        return None

    def remove(self) -> None:
        """Delete all checkpoints of this run (its result is recorded elsewhere)."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _epochs(self) -> list[Path]:
        folders = self.path.glob("epoch_*") if self.path.exists() else ()
        return sorted(p for p in folders if p.name.removeprefix("epoch_").isdigit())


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
