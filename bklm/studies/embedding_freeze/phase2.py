"""Phase 2 of one arm: training on contexts that phase 1 left, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from bklm.models import ContextTokenLM
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.contexts import corpus_contexts
from bklm.training.two_phase.phase1 import effective_rank
from bklm.training.two_phase.phase2 import build

if TYPE_CHECKING:
    from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig

VALIDATION_ROWS = 8  # windows per evaluation batch; their number changes no score


def train_phase2(
    model: ContextTokenLM,
    train_ids: np.ndarray,
    val_ids: np.ndarray,
    config: EmbeddingFreezeConfig,
    learning_rate: float,
    seed: int,
    *,
    accelerator: Accelerator,
    unk_id: int | None,
    folder: Path,
    label: str,
    on_step: Callable[[int], None],
    on_skip: Callable[[int], None],
) -> dict[str, Any]:
    """Train what ``model`` leaves trainable with Adam until the validation loss stops falling.

    Returns:
        Scores at the best epoch (perplexity, accuracy, ``gap`` in nats), parameter counts, tokens per trained parameter,
        ``seconds`` of the optimiser's steps, how far the contexts of the validation text moved (``context_drift``, relative;
        None where nothing under them was trained), and every epoch's record.
    """
    moves = any(p.requires_grad for p in (model.embedding.weight, *model.norm.parameters()))
    before = corpus_contexts(model, val_ids).final if moves else None
    cached = build(model, {"train": train_ids, "valid": val_ids}, refresh=moves and config.recompute_contexts)
    batches = cached.batches("train", config.batch_tokens, shuffle=True, seed=seed)
    settings = TrainingSettings(
        config.epochs,
        learning_rate=learning_rate,
        weight_decay=0.0,  # AdamW without decay is Adam, the original's
        clip=config.clip,
        seed=seed,
        patience=config.patience,
    )
    records = train(
        cached,
        batches,
        cached.batches("valid", config.batch_tokens, rows=VALIDATION_ROWS),
        settings,
        accelerator=accelerator,
        unk_id=unk_id,
        folder=folder,
        label=label,
        on_step=on_step,
        on_skip=on_skip,
    )
    best = min(records, key=lambda r: r.val_loss)
    trainable = model.num_parameters(trainable_only=True)
    after = None if before is None else corpus_contexts(model, val_ids).final
    return {
        "train_tokens": len(train_ids),
        "val_ppl": best.val_perplexity,
        "val_ppl_without_unk": best.val_perplexity_without_unk,
        "accuracy": best.val_accuracy,
        "train_ppl": best.train_perplexity,
        "gap": best.val_loss - best.train_loss,
        "best_epoch": best.epoch,
        "parameters": model.num_parameters(),
        "trainable_parameters": trainable,
        "tokens_per_parameter": len(train_ids) / trainable,
        "seconds": sum(r.seconds for r in records),
        "contexts": str(cached.plan),
        "context_drift": None
        if after is None
        else float(torch.linalg.norm(after - before) / torch.linalg.norm(before)),
        "context_rank": None if after is None else effective_rank(after),
        "epochs": [r.to_dict() for r in records],
    }
