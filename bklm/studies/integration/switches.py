"""The switches: what studies 01 to 07 changed, each on or off in one model. 08's replay needs a second text; there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core import BKCore
from bklm.compression import PrunedModel
from bklm.data.embeddings import svd_embedding
from bklm.models import GPT, LanguageModel, ResNetBK, ResNetBKConfig, gpt_of_size
from bklm.models.resnet_bk_mixers import SolveCore
from bklm.studies.integration.config import IntegrationConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.energy_terms import DepthEnergy
from bklm.training.koopman import KoopmanTerm

Build = Callable[[int], LanguageModel]
POSITIONS = 4  # of the short convolution


class Switch(NamedTuple):
    """``study``: the number of the one it came from; ``on``, ``off``: what the model has."""

    study: str
    on: str
    off: str


SWITCHES = {
    "gradient": Switch("01", "exact gradient", "its published blend with hypothesis-7"),
    "kernel": Switch("02", "fused kernel", "scans in torch operations"),
    "reading": Switch("03", "resolvent applied to values", "its diagonal, as published"),
    "convolution": Switch("03", "short causal convolution", "none"),
    "tying": Switch("04", "head tied to the embedding", "head of its own"),
    "start": Switch("04", "embedding from co-occurrences", "random embedding"),
    "koopman": Switch("05", "Koopman term in the loss", "none"),
    "energy": Switch("06", "energy term in the loss", "none"),
    "pruning": Switch("07", "body pruned while it learns", "all weights kept"),
}
# What the published operator has in this package without being asked: its gradient, and the kernel that computes it.
OF_PLAIN = frozenset({"gradient", "kernel"})
# The diagonal mixer has no short convolution: without the first there is no second.
NEEDS = {"convolution": "reading"}


def together(names: Collection[str]) -> frozenset[str]:
    """The switches of these names that have what they need."""
    return frozenset(n for n in names if NEEDS.get(n, n) in names)


@dataclass(frozen=True)
class Training:
    """What a switch must know of the training: its text's co-occurrences (None: a model to be read back), and its steps."""

    table: np.ndarray | None
    steps: int


def co_occurrences(ids: np.ndarray, vocabulary: int, width: int) -> np.ndarray:
    """An embedding (vocabulary, up to ``width``) of the training text alone; one column fewer than it has distinct tokens."""
    return svd_embedding([ids], vocabulary, min(width, len(np.unique(ids)) - 1))[0]


def build(config: IntegrationConfig, names: Collection[str], training: Training) -> Build:
    """The model with the switches of these names on. Arms draw the model first, so those of one shape begin alike."""
    on = together(names)

    def made(vocabulary: int) -> LanguageModel:
        model: LanguageModel = ResNetBK(_config(config, on, vocabulary))
        if "start" in on and training.table is not None:
            _start_from(model.embedding.weight, training.table)
        if "kernel" not in on:
            for module in model.modules():
                if isinstance(module, BKCore | SolveCore):
                    module.backend = "torch"
        size = (config.d_model, config.n_layers)
        if "koopman" in on:
            model = WithTerm(model, KoopmanTerm(*size, 2 * config.d_model), config.koopman_weight)
        if "energy" in on:
            model = WithTerm(model, DepthEnergy(*size), config.energy_weight, limit=config.limit)
        # The last quarter of the steps is for what is left to settle.
        pruned = max(1, training.steps * 3 // 4)
        return PrunedModel(model, config.sparsity, pruned) if "pruning" in on else model

    return made


def _config(config: IntegrationConfig, on: Collection[str], vocabulary: int) -> ResNetBKConfig:
    mixer = {"mixer": "diagonal", "n_seq": config.seq_len}
    if "reading" in on:
        mixer = {"mixer": "solve", "convolution": POSITIONS if "convolution" in on else 0}
    return ResNetBKConfig(
        vocabulary, config.d_model, config.n_layers, num_experts=1, dropout_p=config.dropout,
        n_heads=math.gcd(config.n_heads, config.d_model), tied="tying" in on,
        grad_blend=0.0 if "gradient" in on else config.blend, **mixer,
    )  # fmt: skip


@torch.no_grad()
def _start_from(weight: Tensor, table: np.ndarray) -> None:
    """The table's columns in place of the first of ``weight`` (V, D), as large as what was drawn."""
    size = weight.std()
    found = torch.from_numpy(table)
    weight[:, : found.shape[1]] = found * (size / found.std())


def rival(config: IntegrationConfig) -> Build:
    """A GPT with as many parameters as the model with every switch on has without its terms."""

    def made(vocabulary: int) -> GPT:
        with torch.device("meta"):
            wanted = ResNetBK(_config(config, SWITCHES, vocabulary)).num_parameters()
        size = {"n_layers": config.n_layers, "n_heads": math.gcd(config.n_heads, config.d_model)}
        return GPT(gpt_of_size(wanted, vocabulary, config.seq_len, dropout_p=config.dropout, **size).config)

    return made
