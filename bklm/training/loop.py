"""Training and token-weighted evaluation of any ``bklm.models.LanguageModel``, on Accelerate.

One call, ``train``, runs epochs, records them, writes a checkpoint after each, and goes on from the newest checkpoint when
it is called again. Randomness (dropout, expert noise, batch order) is a function of (seed, epoch) alone, so a run that was
killed between two epochs ends with the numbers of an undisturbed one: bit for bit on a CPU.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bklm.data import IGNORED, set_epoch
from bklm.models import LanguageModel
from bklm.training.allocator import forget_training, keep_freed_memory
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.evaluation import evaluate
from bklm.training.memory import BatchParts, memory_shortage_explained
from bklm.training.non_finite import FiniteCheck
from bklm.training.processes import (
    require_steps_of_its_own,
    rows_of_this_process,
    sum_gradients_over_processes,
    sum_over_processes,
)
from bklm.training.records import EpochRecord, describe_experts
from bklm.training.resuming import find_checkpoint, restore, trainable_names
from bklm.training.schedules import TrainingSettings, epochs_without_improvement, learning_rate_factor

log = logging.getLogger(__name__)

# Reading a GPU's numbers stalls its queue; a non-finite step is noticed at most this many steps later, and still named.
STEPS_BETWEEN_CHECKS = 32


def train(
    model: LanguageModel,
    train_batches: Any,
    val_batches: Iterable[tuple[Tensor, Tensor]],
    settings: TrainingSettings,
    *,
    accelerator: Accelerator,
    unk_id: int | None = None,
    folder: Path | CheckpointFolder | None = None,
    label: str = "training",
    identity: dict[str, Any] | None = None,
    resume_from: Path | None = None,
    on_step: Callable[[int], None] | None = None,
    on_skip: Callable[[int], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train ``model`` in place and return one record per epoch.

    With several processes each works on its rows of every batch; all return the same records and weights, and the main one
    writes the checkpoints.

    The process is changed beyond the model: each epoch seeds torch's global generators of all devices, so what the caller
    draws later follows from (seed, epoch), and glibc keeps freed memory (``bklm.training.allocator``).

    Args:
        train_batches: a loader of (x, y) batches from ``bklm.data.make_loader``; the epoch decides the order. Another
            DataLoader, or a list of batches, will do; a DataLoader that shuffles with a generator of its own then goes on
            after a kill with other batches than without.
        val_batches: the same; it is gone through once an epoch.
        folder: where checkpoints go; an earlier run found there is continued. None: no checkpoints. A ``CheckpointFolder``
            says which are kept, and gets the validation perplexity into their names.
        label: what to call this run in messages.
        identity: plain values that say what is trained on what; kept in the checkpoints. One with another identity is
            refused.
        resume_from: a checkpoint to go on from when ``folder`` holds none yet; only ``CONTINUABLE`` entries of its identity
            may differ.
        on_step: called with the number of steps just done (for progress bars).
        on_skip: called once with the number of steps that a continued run had already done.
        on_epoch: called with each epoch's record, before its checkpoint is written.

    Raises:
        NonFiniteError: the loss or the gradient norm became infinite or NaN; see ``bklm.training.non_finite`` for fp16.
        OutOfMemoryError: one sequence at a time does not fit; before that, batches are worked through in more parts.
        ValueError: a checkpoint of another run, model or frozen part, or of more epochs; a batch without any target; a term
            with a state (``keeps_state``) and several processes, or batches in parts.
    """
    _require_batches(train_batches, val_batches)
    keep_freed_memory()
    steps = len(train_batches)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"model: no parameter of this {type(model).__name__} is trained; call requires_grad_(True) on what should be."
        )
    require_steps_of_its_own(model, accelerator, settings.accumulate)
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    factor = learning_rate_factor(settings, steps * settings.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    checkpoints = CheckpointFolder(folder) if isinstance(folder, str | Path) else folder
    model.to(accelerator.device)
    place = find_checkpoint(checkpoints, identity, resume_from, accelerator)
    records = restore(place, model, optimizer, scheduler, accelerator, steps=steps, label=label)
    if records:
        if len(records) > settings.epochs:
            raise ValueError(
                f"epochs: got {settings.epochs}, but the checkpoint {place} has done {len(records)}; ask for more epochs, or "
                "take an earlier checkpoint."
            )
        log.info("%s: goes on after epoch %d, from %s", label, len(records), place)
        if on_skip is not None:
            on_skip(len(records) * steps)
    # A run that was continued goes on with the parts that fitted.
    batch_parts = BatchParts(max([settings.accumulate, *(r.batch_parts for r in records[-1:])]), label)
    require_steps_of_its_own(model, accelerator, batch_parts.parts)
    # The model itself is not wrapped: see bklm.training.processes. Clipping unscales through the prepared optimiser.
    optimizer = accelerator.prepare(optimizer)
    check = FiniteCheck(accelerator, label)
    for epoch in range(len(records) + 1, settings.epochs + 1):
        if _should_stop(records, settings):
            log.info(
                "%s: stopped early, no fall of the validation loss by more than %g for %d epochs",
                label, settings.min_delta, settings.patience,
            )  # fmt: skip
            break
        # Processes must draw different dropout masks; the first draws those of a run on its own.
        torch.manual_seed(_epoch_seed(settings.seed, epoch) + 7_919 * accelerator.process_index)
        set_epoch(train_batches, epoch)
        model.train()
        model.reset_expert_counts()
        started = time.perf_counter()
        with memory_shortage_explained(label), check.in_experts(epoch, place):
            sums = _train_epoch(
                model, trainable, train_batches, optimizer, scheduler, settings, epoch,
                accelerator=accelerator, check=check, good=place, batch_parts=batch_parts, on_step=on_step,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            score = evaluate(model, val_batches, unk_id, accelerator)
        check.require_finite_score(score.loss, epoch, place)
        record = EpochRecord(
            epoch=epoch,
            train_loss=sums.loss,
            train_perplexity=math.exp(min(sums.loss, 700.0)) if model.loss_is_likelihood else None,
            val_loss=score.loss,
            val_perplexity=score.perplexity,
            val_perplexity_without_unk=score.perplexity_without_unk,
            val_accuracy=score.accuracy,
            gradient_norm_mean=sums.norm_mean,
            gradient_norm_variance=sums.norm_variance,
            learning_rate=float(scheduler.get_last_lr()[0]),
            tokens_per_second=sums.tokens / seconds,
            seconds=seconds,
            expert_counts=_all_expert_counts(model, accelerator),
            batch_parts=batch_parts.parts,
            gradient_norm_99=sums.norm_99,
        )
        records.append(record)
        if on_epoch is not None:
            on_epoch(record)
        if checkpoints is not None:
            state = _state(records, optimizer, scheduler, accelerator, identity)
            state |= {"trainable": trainable_names(model), "steps": steps}
            if accelerator.is_main_process:
                named = None if isinstance(folder, str | Path) else record.val_perplexity
                place = checkpoints.save(epoch, model, state, named)
            accelerator.wait_for_everyone()
        log.info(
            "%s: epoch %d/%d, train %s, validation PPL %.1f, %.1f s%s",
            label, epoch, settings.epochs, record.trained_in_words, record.val_perplexity, seconds,
            describe_experts(record.expert_counts),
        )  # fmt: skip
    forget_training(accelerator)
    return records


def _require_batches(train_batches: Any, val_batches: Any) -> None:
    """Refuse what cannot be gone through again and again, or is empty."""
    for name, batches in (("train_batches", train_batches), ("val_batches", val_batches)):
        again = isinstance(batches, Iterable) and not isinstance(batches, Iterator)
        if not again or (name == "train_batches" and not isinstance(batches, Sized)):
            raise TypeError(
                f"{name}: got a {type(batches).__name__}; give a loader from bklm.data.make_loader, a DataLoader or a list of "
                "(x, y) batches, which can be gone through once an epoch."
            )
    if len(train_batches) == 0:
        raise ValueError("train_batches: got no batch; give more text, or a smaller batch_size or seq_len.")


@dataclass(frozen=True)
class _EpochSums:
    loss: float  # mean over the epoch's targets
    tokens: float  # targets
    norm_mean: float
    norm_variance: float
    norm_99: float


def _train_epoch(
    model: LanguageModel,
    trainable: list[torch.nn.Parameter],
    batches: Any,
    optimizer: Any,
    scheduler: Any,
    settings: TrainingSettings,
    epoch: int,
    *,
    accelerator: Accelerator,
    check: FiniteCheck,
    good: Path | None,
    batch_parts: BatchParts,
    on_step: Callable[[int], None] | None,
) -> _EpochSums:
    """One pass over ``batches``: one optimiser step per batch, whatever the number of parts and processes."""
    on_cpu = accelerator.device.type == "cpu"
    apart = [p for p in model.parameters_apart() if p.requires_grad]
    together = [p for p in trainable if not any(p is other for other in apart)]
    steps, before = len(batches), (epoch - 1) * len(batches)
    losses, norms, tokens = [], [], []
    taken: list[Tensor] = []  # norms of the steps that a loss scaler did not skip
    for step, (x, y) in enumerate(batches, start=1):
        count = (y != IGNORED).sum()  # over all processes' rows: each has the whole batch at hand
        if count == 0:
            raise ValueError(
                f"{check.label}: batch {step} of epoch {epoch} has no target left after masking; leave such a batch out, or "
                "take longer lines or a smaller seq_len."
            )
        own = rows_of_this_process(accelerator, x, y)
        loss = batch_parts.backward(
            model, len(own[0]), functools.partial(_backward, model, *own, count, accelerator)
        )
        sum_gradients_over_processes(accelerator, trainable)
        norm = accelerator.clip_grad_norm_(together, settings.clip_at(epoch)).detach()
        # Of no gradient torch puts the norm on the default device. The call before took a loss scaler out of all gradients.
        if any(p.grad is not None for p in apart):
            other = torch.nn.utils.clip_grad_norm_(apart, settings.clip_at(epoch)).detach()
            # A step that is skipped for either was not taken.
            norm = torch.where(other.isfinite(), norm, other)
        optimizer.step()
        if not check.is_skipped(norm, before + step, good):
            scheduler.step()
            taken.append(norm)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        norms.append(norm)
        tokens.append(count)
        if on_step is not None:
            on_step(1)
        if on_cpu or step % STEPS_BETWEEN_CHECKS == 0 or step == steps:
            window = 1 if on_cpu else STEPS_BETWEEN_CHECKS
            check.require_finite(losses[-window:], norms[-window:], before + step, good)
    weights = torch.stack(tokens).double()
    loss_sum = (sum_over_processes(accelerator, torch.stack(losses).double()).cpu() * weights).sum()
    norm_values = torch.stack(taken or [torch.zeros((), device="cpu")]).double()  # no step taken: nothing moved
    return _EpochSums(
        loss=float(loss_sum / weights.sum()),
        tokens=float(weights.sum()),
        norm_mean=float(norm_values.mean()),
        norm_variance=float(norm_values.var(unbiased=False)),
        norm_99=float(norm_values.quantile(0.99)),
    )


def _backward(
    model: LanguageModel, x: Tensor, y: Tensor, count: Tensor, accelerator: Accelerator, parts: int
) -> Tensor:
    """Add the gradient of these rows' loss over ``count`` targets, in at most ``parts`` parts; returns that loss."""
    loss = torch.zeros((), device=accelerator.device)
    for part_x, part_y in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        if len(part_x):
            part_x = part_x.to(accelerator.device, non_blocking=True)
            part_y = part_y.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                share = model.loss(part_x, part_y, reduction="sum") / count
            accelerator.backward(share)
            loss += share.detach()
    return loss


def _should_stop(records: list[EpochRecord], settings: TrainingSettings) -> bool:
    losses = [r.val_loss for r in records]
    return (
        settings.patience is not None
        and epochs_without_improvement(losses, settings.min_delta) >= settings.patience
    )


def _all_expert_counts(model: LanguageModel, accelerator: Accelerator) -> list[list[int]]:
    counts = model.expert_counts()
    if not counts or accelerator.num_processes == 1:
        return counts
    return [
        sum_over_processes(accelerator, torch.tensor(c, device=accelerator.device)).tolist() for c in counts
    ]


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


def _state(
    records: list[EpochRecord],
    optimizer: Any,
    scheduler: Any,
    accelerator: Accelerator,
    identity: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "records": [r.to_dict() for r in records],
        "optimizer": optimizer.state_dict(),
        "scheduler_step": scheduler.last_epoch,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "identity": identity,
    }
