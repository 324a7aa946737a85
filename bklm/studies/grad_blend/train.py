"""One training of the sweep: a model of its alpha, seed and learning rate, and what is measured of it."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.session import Session
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.moe.layer import AnalyticMoE
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.directions import measure_directions
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.context_gain import measure_context_gain, short_lengths
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.records import EPOCH_KEYS, convergence_epoch, gradient_variance
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import save_weights

log = logging.getLogger(__name__)

KEYS = {"val_ppl": float, "seconds": float, "epochs": EPOCH_KEYS, "directions": dict, "context_gain": float,
        "windows": dict}  # fmt: skip
HEADS = 8  # of the mixer "solve", or as many as the width has in common with that
WINDOW_TOKENS = 10_000  # of the validation text, for windows shorter than those trained with
EARLY = "directions_after_one_epoch.json"
WEIGHTS = "best_model.safetensors"


def model_config(config: GradBlendConfig, vocab_size: int, alpha: float) -> ResNetBKConfig:
    """The ResNet-BK of one trial of a resolved config."""
    same = ("d_model", "n_layers", "num_experts", "top_k", "causal", "gradient", "router_gradient", "balance",
            "mixer")  # fmt: skip
    return ResNetBKConfig(
        vocab_size,
        n_seq=config.seq_len,
        dropout_p=config.dropout,
        grad_blend=alpha,
        clamps=config.protocol == "original",
        n_heads=math.gcd(HEADS, config.d_model) if config.mixer == "solve" else 1,
        **{name: getattr(config, name) for name in same},
    )


def fresh_model(config: GradBlendConfig, vocab_size: int, alpha: float, seed: int) -> ResNetBK:
    """The model of one trial of a resolved config with its first weights, the same for all alphas of a seed."""
    torch.manual_seed(seed)
    model = ResNetBK(model_config(config, vocab_size, alpha))
    if config.first_weights == "torch":
        # Every layer as torch draws it on its own: the published model started so.
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Embedding | nn.Linear | nn.LayerNorm | AnalyticMoE):
                layer.reset_parameters()
    return model


def train_trial(
    study: Session, *, alpha: float, seed: int, learning_rate: float, epochs: int, folder: Path, final: bool
) -> dict[str, Any]:
    """The record of one training from the weights of its seed, in ``folder``; the ``final`` one is tested and kept."""
    config, text = study.config, study.text
    settings = model_config(config, text.vocab_size, alpha)
    early = folder / EARLY
    if (folder / "checkpoints").exists() and read_result(early, {"directions": list}) is None:
        log.warning("%s is missing or damaged, so this trial starts again from its first epoch.", early)
        CheckpointFolder(folder / "checkpoints").remove()
    model = fresh_model(config, text.vocab_size, alpha, seed).to(study.accelerator.device)

    def directions() -> list[dict[str, Any]]:
        return measure_directions(model, *text.first_batch(sequences=8), config.alphas, config.gradient)

    def measure_early(record: Any) -> None:
        if record.epoch == 1 and study.is_main:
            write_json(early, {"directions": directions()})

    at_rate = f", learning rate {learning_rate:g}" * (len(config.learning_rates) > 1)
    own = TrainingSettings(
        epochs, learning_rate=learning_rate, weight_decay=config.weight_decay, clip=config.clip,
        schedule=config.schedule, seed=seed,
    )  # fmt: skip
    records = train(
        model,
        text.train_loader(seed=seed),
        text.val_loader(),
        own,
        accelerator=study.accelerator,
        unk_id=text.unk_id,
        folder=folder / "checkpoints",
        label=f"{'best ' * final}alpha {alpha:g}, seed {seed}{at_rate}",
        on_step=study.progress.step,
        on_skip=study.progress.skip,
        on_epoch=measure_early,
    )
    last, perplexities = records[-1], [r.val_perplexity for r in records]
    gained = measure_context_gain(
        model, text.val_loader(), text.unk_id, windows_of=lambda n: text.context_loader(n, WINDOW_TOKENS),
        window=text.seq_len, lengths=short_lengths(text.seq_len), accelerator=study.accelerator,
    )  # fmt: skip
    result = {
        "val_ppl": last.val_perplexity,
        "val_ppl_without_unk": last.val_perplexity_without_unk,
        "val_accuracy": last.val_accuracy,
        **gained.record(),
        "convergence_speed": convergence_epoch(perplexities),
        "gradient_variance": gradient_variance(records),
        "seconds": sum(r.seconds for r in records),
        "epochs": [r.to_dict() for r in records],
    }
    if final:
        test = evaluate(model, text.test_loader(), text.unk_id, study.accelerator)
        result |= {"test_ppl": test.perplexity, "parameters": model.num_parameters()}
        result["model_config"] = dataclasses.asdict(settings)
    if study.is_main:
        kept = read_result(early, {"directions": list})["directions"]
        result["directions"] = {"after one epoch": kept, "at the end": directions()}
        early.unlink()
        if final:
            with replacing(folder / WEIGHTS) as temporary:
                save_weights(model, temporary, text.vocabulary_sha256)
    return result
