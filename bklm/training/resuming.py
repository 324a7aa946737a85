"""Which checkpoint a run goes on from, and what must agree before it may."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model

from bklm.files.atomic import DamagedError
from bklm.models import LanguageModel
from bklm.training.checkpoints import CheckpointFolder, is_checkpoint, read_state
from bklm.training.processes import broadcast
from bklm.training.records import EpochRecord

log = logging.getLogger(__name__)

# What may differ between a run and its continuation from a checkpoint that was asked for by name.
CONTINUABLE = frozenset(
    {"epochs", "patience", "min_delta", "clip", "accumulate", "schedule", "warmup", "resume_from"}
)


def find_checkpoint(
    checkpoints: CheckpointFolder | None,
    identity: dict[str, Any] | None,
    resume_from: Path | None,
    accelerator: Accelerator,
) -> Path | None:
    """The newest checkpoint of the run's own folder, else ``resume_from``, else None; the same in every process.

    Raises:
        ValueError: it belongs to another run, or ``resume_from`` is no whole checkpoint.
    """
    own = checkpoints.newest() if checkpoints is not None and accelerator.is_main_process else None
    own = broadcast(accelerator, own)
    if own is not None:
        require_same_run(own, identity)
        return own
    if resume_from is not None:
        require_same_run(resume_from, identity, CONTINUABLE)
    return resume_from


def require_same_run(
    place: Path, identity: dict[str, Any] | None, may_differ: frozenset[str] = frozenset()
) -> None:
    """Refuse a checkpoint of another model, text or setting, naming what differs.

    Raises:
        ValueError: it differs, or it is no whole checkpoint.
        ReadError: memory is short, or its files may not be read.
    """
    place = Path(place)
    if not is_checkpoint(place):
        raise ValueError(
            f"resume_from: {place} is no checkpoint; give a folder such as epoch_0005_ppl_36.700 that holds "
            "model.safetensors and state.pt."
        )
    try:
        recorded = read_state(place)["identity"]
    except (DamagedError, KeyError, TypeError) as error:
        raise ValueError(
            f"resume_from: the checkpoint {place} is damaged ({error}); take another one."
        ) from error
    if identity is None or recorded is None:
        return
    different = [
        f"{name} ({recorded.get(name)!r} there, {identity.get(name)!r} now)"
        for name in sorted({*recorded, *identity} - may_differ)
        if recorded.get(name) != identity.get(name)
    ]
    if different:
        raise ValueError(
            f"the checkpoint {place} was written by another run: {', '.join(different)}. "
            "Take the same settings, another checkpoint, or an empty folder."
        )


def restore(
    place: Path | None,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    accelerator: Accelerator,
) -> list[EpochRecord]:
    """Load weights, optimiser, schedule and scaler from the checkpoint at ``place``; returns the epochs done so far."""
    if place is None:
        return []
    load_model(model, str(place / "model.safetensors"))
    state = read_state(place)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": state["scheduler_step"]})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return [EpochRecord(**record) for record in state["records"]]


def warn_of_rise(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, label: str
) -> None:
    """Say so where a decayed learning rate goes up again, because the schedule now ends later: a warm restart."""
    stopped_at = optimizer.param_groups[0]["lr"]
    planned = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
    if planned > 1.001 * stopped_at:
        log.warning(
            "%s: the schedule is stretched over more steps, so the learning rate rises again from %.3g to %.3g; a run of this "
            "length from the start would end elsewhere.", label, stopped_at, planned,
        )  # fmt: skip
