"""Checkpoints that survive a kill: written beside, synced, renamed into place, and never unpickled.

A checkpoint is a folder such as ``epoch_0003`` with ``model.safetensors`` (weights) and ``state.pt`` (optimizer, scheduler,
scaler, history), the latter read with ``torch.load(weights_only=True)``, which executes no code from the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bklm.files.atomic import DamagedError, saying_why, set_aside, set_mode, sync, telling_damage
from bklm.training.weights import load_weights, save_weights

log = logging.getLogger(__name__)

SUMS = "sums.json"  # CRC-32 of a checkpoint's files

_NAME = re.compile(r"epoch_(\d+)(?:_ppl_(\d+\.\d+|\d(?:\.\d+)?e\d+))?")


def read_weights(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file; None where it is not there or damaged (it is then set aside).

    Raises:
        ReadError: memory is short, or the file may not be read.
    """
    try:
        with telling_damage(path):
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
        with saying_why(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()  # not mkdtemp, whose folders nobody else may read whatever the umask says
        try:
            with saying_why(target):
                save_weights(model, temporary / "model.safetensors")
                torch.save(state, temporary / "state.pt")
                sums = {file.name: _crc32(file) for file in sorted(temporary.iterdir())}
                (temporary / SUMS).write_text(json.dumps(sums), encoding="utf-8")
                for file in temporary.iterdir():
                    set_mode(file, temporary.stat().st_mode & 0o666)
                    sync(file)
                for same in self.all():
                    if epoch_of(same) == epoch:
                        shutil.rmtree(same)
                temporary.rename(target)
                sync(self.path)
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
        return sorted((p for p in folders if _NAME.fullmatch(p.name)), key=epoch_of)

    def best(self) -> Path | None:
        """The checkpoint of the lowest perplexity, the earliest on a tie; None when no name carries one."""
        scored = [p for p in self.all() if perplexity_of(p) is not None]
        return min(scored, key=perplexity_of, default=None)

    def remove(self) -> None:
        """Delete all checkpoints of this run (its result is recorded elsewhere)."""
        shutil.rmtree(self.path, ignore_errors=True)

    def keep_only(self, epoch: int) -> None:
        """Delete all checkpoints but that of one epoch: the run is done, and nothing goes on from the others."""
        for other in (p for p in self.all() if epoch_of(p) != epoch):
            shutil.rmtree(other)

    def bytes(self) -> int:
        """What all files of the folder take."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

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
    with telling_damage(folder):
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
