"""Phase 2 of one arm: the rest of the model trained on the contexts that phase 1 left, and what is measured of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from bklm.models import ContextTokenLM
from bklm.training.context_gain import measure_context_gain, relative_gain
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.contexts import corpus_contexts
from bklm.training.two_phase.phase1 import effective_rank
from bklm.training.two_phase.phase2 import CachedContextLM, build

# Windows per evaluation batch; their number changes no score.
VALIDATION_ROWS = 8


def train_phase2(
    model: ContextTokenLM,
    train_ids: np.ndarray,
    val_ids: np.ndarray,
    settings: TrainingSettings,
    *,
    batch_tokens: int,
    recompute_contexts: bool,
    **options: Any,
) -> dict[str, Any]:
    """Train what ``model`` leaves trainable until the validation loss stops falling.

    Args:
        options: those of ``bklm.training.loop.train``, the accelerator among them.

    Returns:
        Scores at the best epoch (perplexity, accuracy, ``gap`` in nats), parameter counts, tokens per trained parameter,
        ``seconds`` of the optimiser's steps, how far the contexts of the validation text moved (``context_drift``, relative;
        None where nothing under them was trained), the last epoch's gain from context, and every epoch's record.
    """
    moves = any(p.requires_grad for p in (model.embedding.weight, *model.norm.parameters()))
    before = corpus_contexts(model, val_ids).final if moves else None
    cached = build(model, {"train": train_ids, "valid": val_ids}, refresh=moves and recompute_contexts)
    batches = cached.batches("train", batch_tokens, shuffle=True, seed=settings.seed)
    validation = cached.batches("valid", batch_tokens, rows=VALIDATION_ROWS)
    records = train(cached, batches, validation, settings, **options)
    best = min(records, key=lambda r: r.val_loss)
    trainable = model.num_parameters(trainable_only=True)
    after = None if before is None else corpus_contexts(model, val_ids).final
    drift = None if after is None else float(torch.linalg.norm(after - before) / torch.linalg.norm(before))
    return {
        "train_tokens": len(train_ids), "val_ppl": best.val_perplexity, "val_ppl_without_unk": best.val_perplexity_without_unk,
        "val_accuracy": best.val_accuracy, "train_ppl": best.train_perplexity, "gap": best.val_loss - best.train_loss,
        "best_epoch": best.epoch, "parameters": model.num_parameters(), "trainable_parameters": trainable,
        "tokens_per_parameter": len(train_ids) / trainable, "seconds": sum(r.seconds for r in records),
        "contexts": str(cached.plan), "context_drift": drift, "context_rank": None if after is None else effective_rank(after),
        "epochs": [r.to_dict() for r in records], "context_gain": _context_gain(cached, validation, options),
    }  # fmt: skip


def _context_gain(cached: CachedContextLM, batches: DataLoader, options: dict[str, Any]) -> float:
    """See ``bklm.training.context_gain``; a token whose left neighbour's context is zeros is a window of one."""
    scored = {"unk_id": options["unk_id"], "accelerator": options["accelerator"]}
    found = measure_context_gain(
        cached, batches, windows_of=lambda length: None, window=1, lengths=(), **scored
    )
    with cached.without_mixing([torch.zeros(cached.model.config.context_dim)]):
        alone = evaluate(cached, batches, **scored).perplexity
    return relative_gain(found.perplexity, min(found.mixer_off, alone), {}, 1)
