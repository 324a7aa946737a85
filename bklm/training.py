"""Training and token-weighted evaluation of any `bklm.models.LanguageModel`, on Accelerate.

One call, `train`, runs epochs, records them, writes a checkpoint after each, and goes on from the newest checkpoint when
it is called again. Randomness (dropout, expert noise, batch order) is a function of (seed, epoch) alone, so a run that was
killed between two epochs ends with the numbers of an undisturbed one: bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from bklm.checkpoints import CheckpointFolder
from bklm.data import set_epoch
from bklm.models import LanguageModel
from bklm.moe import unused_experts, usage_entropy

log = logging.getLogger(__name__)

# Reading a GPU's numbers stalls its queue; a non-finite step is noticed at most this many steps later, and still named.
STEPS_BETWEEN_CHECKS = 32


class NonFiniteError(RuntimeError):
    """The loss or its gradient became infinite or NaN; the message names the run, the step and the last good checkpoint."""


@dataclass(frozen=True)
class TrainingSettings:
    """How one model is trained. ``clip`` is the largest global gradient norm; ``schedule`` "cosine" decays to zero after
    ``warmup`` (a fraction of all steps) of linear warm-up."""

    epochs: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 0.5
    schedule: str = "constant"
    warmup: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Sums over every target of a split; the means follow. ``nll`` in nats."""

    nll: float
    tokens: int
    correct: int
    known_nll: float  # the same over targets that are not <unk>
    known_tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def perplexity_without_unk(self) -> float:
        return math.exp(self.known_nll / self.known_tokens)

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


@dataclass(frozen=True)
class EpochRecord:
    """One row of a training curve. Losses in nats per token, time in seconds, norms before clipping."""

    epoch: int
    train_loss: float
    train_perplexity: float
    val_loss: float
    val_perplexity: float
    val_perplexity_without_unk: float
    val_accuracy: float
    gradient_norm_mean: float
    gradient_norm_variance: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    expert_counts: list[list[int]] = field(default_factory=list)  # tokens per expert, one list a layer

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An Accelerator for ``device`` ("auto", "cpu", "cuda") and ``precision`` ("fp32", "bf16", "fp16").

    Raises:
        ValueError: the device or the arithmetic is not to be had here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: got 'cuda', but torch sees no CUDA GPU here; choose 'auto' or 'cpu', or switch the runtime to a GPU."
        )
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if precision == "fp16" and not on_gpu:
        raise ValueError(
            "precision: got 'fp16' on a CPU, where it is slower than fp32; choose 'fp32' or 'bf16'."
        )
    if precision == "bf16" and on_gpu and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(
            f"precision: got 'bf16', which {torch.cuda.get_device_name()} only emulates; choose 'fp16' or 'fp32'."
        )
    AcceleratorState._reset_state(
        True
    )  # a notebook may ask for another device or precision than the run before
    return Accelerator(cpu=not on_gpu, mixed_precision={"fp32": "no"}.get(precision, precision))


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Iterable[tuple[Tensor, Tensor]], unk_id: int | None) -> Evaluation:
    """Score every target of ``batches`` (x, y of shape (B, N), y = -100 where masked) once, in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        nll, correct = model.token_losses(x, y)
        valid = y != -100
        known = valid if unk_id is None else valid & (y != unk_id)
        nll = nll.double()
        sums += torch.stack(
            [
                nll[valid].sum(),
                valid.sum().double(),
                (correct & valid).sum().double(),
                nll[known].sum(),
                known.sum().double(),
            ]
        )
    model.train(was_training)
    nll_sum, tokens, right, known_nll, known_tokens = sums.tolist()
    if tokens == 0:
        raise ValueError("evaluation: no target to score; every one is masked or the split is empty.")
    return Evaluation(nll_sum, int(tokens), int(right), known_nll, int(known_tokens))


def train(
    model: LanguageModel,
    train_batches: Any,
    val_batches: Iterable[tuple[Tensor, Tensor]],
    settings: TrainingSettings,
    *,
    accelerator: Accelerator,
    unk_id: int | None = None,
    folder: Path | None = None,
    label: str = "training",
    on_step: Callable[[int], None] | None = None,
    on_skip: Callable[[int], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train ``model`` in place and return one record per epoch.

    Args:
        train_batches: a loader of (x, y) batches from `bklm.data.make_loader`; the epoch decides the order.
        folder: where checkpoints go; an earlier run found there is continued. None: no checkpoints.
        label: what to call this run in messages.
        on_step: called with the number of steps just done (for progress bars).
        on_skip: called once with the number of steps that a continued run had already done.
        on_epoch: called with each epoch's record, before its checkpoint is written.

    Raises:
        NonFiniteError: the loss or the gradient norm became infinite or NaN.
    """
    steps = len(train_batches)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    factor = _schedule(settings, steps * settings.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    checkpoints = CheckpointFolder(folder) if folder else None
    model.to(accelerator.device)
    records, good = _resume(checkpoints, model, optimizer, scheduler, accelerator, label)
    if on_skip is not None and records:
        on_skip(len(records) * steps)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for epoch in range(len(records) + 1, settings.epochs + 1):
        torch.manual_seed(_epoch_seed(settings.seed, epoch))
        set_epoch(train_batches, epoch)
        model.train()
        model.reset_expert_counts()
        started = time.perf_counter()
        losses, norms, tokens = [], [], []
        for step, (x, y) in enumerate(train_batches, start=1):
            x = x.to(accelerator.device, non_blocking=True)
            y = y.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                loss = model.loss(x, y)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            norms.append(norm.detach())
            tokens.append((y != -100).sum())
            if on_step is not None:
                on_step(1)
            on_cpu = accelerator.device.type == "cpu"
            if on_cpu or step % STEPS_BETWEEN_CHECKS == 0 or step == steps:
                window = 1 if on_cpu else STEPS_BETWEEN_CHECKS
                _check_finite(losses[-window:], norms[-window:], (epoch - 1) * steps + step, label, good)
        weights = torch.stack(tokens).double()
        loss_sum = float((torch.stack(losses).double() * weights).sum())
        norm_values = torch.stack(norms).double()
        seconds = time.perf_counter() - started
        score = evaluate(model, val_batches, unk_id)
        record = EpochRecord(
            epoch=epoch,
            train_loss=loss_sum / float(weights.sum()),
            train_perplexity=math.exp(min(loss_sum / float(weights.sum()), 700.0)),
            val_loss=score.loss,
            val_perplexity=score.perplexity,
            val_perplexity_without_unk=score.perplexity_without_unk,
            val_accuracy=score.accuracy,
            gradient_norm_mean=float(norm_values.mean()),
            gradient_norm_variance=float(norm_values.var(unbiased=False)),
            learning_rate=float(scheduler.get_last_lr()[0]),
            tokens_per_second=float(weights.sum()) / seconds,
            seconds=seconds,
            expert_counts=model.expert_counts(),
        )
        records.append(record)
        if on_epoch is not None:
            on_epoch(record)
        if checkpoints is not None:
            good = checkpoints.save(epoch, model, _state(records, optimizer, scheduler, accelerator))
        log.info(
            "%s: epoch %d/%d, train PPL %.1f, validation PPL %.1f, %.0f s%s",
            label, epoch, settings.epochs, record.train_perplexity, record.val_perplexity, seconds,
            _describe_experts(record.expert_counts),
        )  # fmt: skip
    accelerator.free_memory()
    return records


def gradient_variance(records: list[EpochRecord]) -> float:
    """The original's measure: variance over steps of the pre-clip global gradient norm, averaged over epochs."""
    return sum(r.gradient_norm_variance for r in records) / len(records)


def convergence_epoch(perplexities: list[float], fraction: float = 0.9) -> int:
    """The original's "convergence speed": the first epoch (from 1) that has made 90% of the total improvement."""
    first, best = perplexities[0], min(perplexities)
    threshold = first - fraction * (first - best)
    return next(i for i, p in enumerate(perplexities, start=1) if p <= threshold)


def _describe_experts(counts: list[list[int]]) -> str:
    """Least even layer's usage entropy (1: even, 0: one expert has all) and the number of experts that dropped out."""
    layers = [layer for layer in counts if len(layer) > 1]
    if not layers:
        return ""
    entropy = min(usage_entropy(layer, normalised=True) for layer in layers)
    unused = sum(unused_experts(layer) for layer in layers)
    return f", expert usage entropy {entropy:.2f}, {unused} dropped out"


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


def _schedule(settings: TrainingSettings, total: int) -> Callable[[int], float]:
    if settings.schedule == "constant":
        return lambda step: 1.0
    warmup = max(1, round(settings.warmup * total))

    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return cosine


def _state(
    records: list[EpochRecord], optimizer: Any, scheduler: Any, accelerator: Accelerator
) -> dict[str, Any]:
    return {
        "records": [r.to_dict() for r in records],
        "optimizer": optimizer.state_dict(),
        "scheduler_step": scheduler.last_epoch,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }


def _resume(
    checkpoints: CheckpointFolder | None,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    accelerator: Accelerator,
    label: str,
) -> tuple[list[EpochRecord], Path | None]:
    found = checkpoints.restore(model) if checkpoints else None
    if found is None:
        return [], None
    folder, state = found
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": state["scheduler_step"]})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    records = [EpochRecord(**r) for r in state["records"]]
    log.info("%s: goes on after epoch %d, from %s", label, len(records), folder)
    return records, folder


def _check_finite(
    losses: list[Tensor], norms: list[Tensor], last_step: int, label: str, good: Path | None
) -> None:
    values = torch.stack([torch.stack(losses).float(), torch.stack(norms).float()])
    bad = (~torch.isfinite(values)).any(dim=0)
    if not bool(bad.any()):
        return
    first = int(bad.nonzero()[0])
    loss, norm = (float(v) for v in values[:, first])
    raise NonFiniteError(
        f"{label}: at step {last_step - len(losses) + 1 + first} the loss was {loss:g} and the gradient norm {norm:g}; "
        f"the last good checkpoint is {good if good else 'none: it was the first epoch'}. "
        "A lower learning rate, a smaller clip or fp32 are the usual remedies."
    )
