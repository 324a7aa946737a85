"""Which checkpoint a run goes on from, and what must agree before it may."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bklm.files.atomic import DamagedError
from bklm.models import LanguageModel
from bklm.training.checkpoints import CheckpointFolder, is_checkpoint, read_state
from bklm.training.processes import broadcast
from bklm.training.records import EpochRecord
from bklm.training.weights import load_weights, plain_name

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
    *,
    steps: int,
    label: str = "training",
) -> list[EpochRecord]:
    """Load weights, moments, the place in the schedule and the scaler from the checkpoint at ``place``; returns the epochs
    done so far.

    Learning rate, weight decay and the like are the optimiser's own: they come from the settings and the schedule of the
    call, not from the checkpoint.

    Args:
        steps: per epoch. Where that many were not taken before, the schedule goes on after as many whole epochs.

    Raises:
        ValueError: the checkpoint holds another model (``bklm.training.weights.OtherModelError``), or one of which other
            parts were frozen. The model is then left as it is.
    """
    if place is None:
        return []
    state = read_state(place)
    saved = state["optimizer"]
    _require_same_trainable(place, state, model, optimizer)
    load_weights(model, place / "model.safetensors")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    records = [EpochRecord(**record) for record in state["records"]]
    done = state["scheduler_step"]
    if state.get("steps", steps) != steps:
        done = len(records) * steps
        log.warning("%s: an epoch has %d steps now and had %d; the schedule goes on after %d epochs.",
                    label, steps, state["steps"], len(records))  # fmt: skip
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": done})
    for group, base, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(done)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    _warn_of_rise(saved["param_groups"][0]["lr"], optimizer, scheduler, label)
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return records


def trainable_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are trained, in the optimiser's order."""
    return [plain_name(name) for name, p in model.named_parameters() if p.requires_grad]


def _require_same_trainable(
    place: Path, state: dict[str, Any], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse moments of other parameters than those that are trained now."""
    names, moments = trainable_names(model), state["optimizer"]["state"]
    before = state.get("trainable")
    if before is None:  # written before names were kept: only numbers and shapes can tell
        count = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        fits = count == len(names) and all(
            moments[i]["exp_avg"].shape == p.shape for i, p in enumerate(parameters) if i in moments
        )
        difference = None if fits else f"{count} parameters were trained there and {len(names)} are now"
    else:
        changed = [(n, "now") for n in names if n not in before] + [
            (n, "there") for n in before if n not in names
        ]
        difference = f"{changed[0][0]} is trained only {changed[0][1]}" if changed else None
    if difference:
        raise ValueError(
            f"the checkpoint {place} is of another model, or of a run of which other parts were frozen: {difference}; "
            "freeze the same parts, or take an empty folder and start from its weights."
        )


def _warn_of_rise(
    stopped_at: float,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    label: str,
) -> None:
    """Say so where a decayed learning rate goes up again, because the schedule now ends later: a warm restart."""
    planned = optimizer.param_groups[0]["lr"]
    # A larger rate that was asked for is no stretched schedule.
    if planned > 1.001 * stopped_at and stopped_at < 0.999 * scheduler.base_lrs[0] and scheduler.last_epoch:
        log.warning(
            "%s: the schedule is stretched over more steps, so the learning rate rises again from %.3g to %.3g; a run of this "
            "length from the start would end elsewhere.", label, stopped_at, planned,
        )  # fmt: skip
