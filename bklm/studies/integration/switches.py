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
from bklm.models import LanguageModel, ResNetBK, ResNetBKConfig, reading_settings
from bklm.models.resnet_bk_mixers import SolveCore
from bklm.studies.integration.config import IntegrationConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.energy_terms import DepthEnergy
from bklm.training.koopman import KoopmanTerm

Build = Callable[[int], LanguageModel]
POSITIONS = 4  # of the short convolution
ETA = 0.3  # of the diagonal: with 1 it hardly reads beyond the token before
# Of what is drawn: a tied model whose rows of neighbours are alike would begin 4% below a uniform guess with all of it.
START = 0.5


class Switch(NamedTuple):
    """``study``: the number of the one it came from; ``on``, ``off``: what the model has. ``same_step``: a step computes the
    same with and without it, so no time is judged; ``untimed``: nor is it where a step without it leaves the fused kernel,
    too; ``same_loss``: the losses are the same but for rounding."""

    study: str
    on: str
    off: str
    same_step: bool = False
    same_loss: bool = False
    untimed: bool = False


SWITCHES = {
    "gradient": Switch("01", "exact gradient", "its published blend with hypothesis-7", untimed=True),
    "kernel": Switch("02", "fused kernel", "scans in torch operations", same_loss=True),
    "reading": Switch("03", "resolvent applied to values", "its diagonal, as published"),
    "convolution": Switch("03", "short causal convolution", "none"),
    "tying": Switch("04", "head tied to the embedding", "head of its own"),
    "start": Switch("04", "embedding from co-occurrences", "random embedding", same_step=True),
    "koopman": Switch("05", "Koopman term in the loss", "none"),
    "energy": Switch("06", "energy term in the loss", "none"),
    "pruning": Switch("07", "body pruned while it learns", "all weights kept"),
}
# What the published operator has in this package without being asked: its gradient, and the kernel that computes it.
OF_PLAIN = frozenset({"gradient", "kernel"})
# The diagonal mixer has no short convolution: without the first there is no second.
NEEDS = {"convolution": "reading"}


def removed(name: str) -> tuple[str, ...]:
    """The switches that go off with the one of this name."""
    return (name, *(n for n, needed in NEEDS.items() if needed == name))


def together(names: Collection[str]) -> frozenset[str]:
    """The switches of these names that have what they need."""
    return frozenset(n for n in names if NEEDS.get(n, n) in names)


def with_needed(names: Collection[str]) -> frozenset[str]:
    """The switches of these names, and those that they need."""
    return frozenset(names) | {NEEDS[n] for n in names if n in NEEDS}


@dataclass(frozen=True)
class Training:
    """What a switch must know of the training: its text's co-occurrences (None: a model to be read back), and its steps."""

    table: np.ndarray | None
    steps: int


def co_occurrences(ids: np.ndarray, vocabulary: int, width: int) -> np.ndarray:
    """An embedding (vocabulary, up to ``width``) of the training text alone; one column fewer than it has distinct tokens."""
    return svd_embedding([ids], vocabulary, min(width, len(np.unique(ids)) - 1))[0]


def build(config: IntegrationConfig, names: Collection[str], training: Training, placebo: str = "") -> Build:
    """The model with the switches of these names on; the term of the name ``placebo`` reads other sequences. Arms draw the
    model first, so those of one shape begin alike."""
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
            lifted = KoopmanTerm(*size, 2 * config.d_model, placebo=placebo == "koopman")
            model = WithTerm(model, lifted, config.koopman_weight)
        if "energy" in on:
            energy = DepthEnergy(*size, placebo=placebo == "energy")
            model = WithTerm(model, energy, config.energy_weight, limit=config.limit)
        # The last quarter of the steps is for what is left to settle.
        pruned = max(1, training.steps * 3 // 4)
        return PrunedModel(model, config.sparsity, pruned) if "pruning" in on else model

    return made


def _config(config: IntegrationConfig, on: Collection[str], vocabulary: int) -> ResNetBKConfig:
    mixer = {"mixer": "diagonal", "n_seq": config.seq_len, "eta": ETA, "num_experts": 1}
    if "reading" in on:
        mixer = reading_settings(config.seq_len) | {"convolution": POSITIONS if "convolution" in on else 0}
    return ResNetBKConfig(
        vocabulary, config.d_model, config.n_layers, dropout_p=config.dropout,
        n_heads=math.gcd(config.n_heads, config.d_model), tied="tying" in on,
        grad_blend=0.0 if "gradient" in on else config.blend, **mixer,
    )  # fmt: skip


@torch.no_grad()
def _start_from(weight: Tensor, table: np.ndarray) -> None:
    """The table's columns in place of the first of ``weight`` (V, D), ``START`` as large as what was drawn."""
    size = weight.std()
    found = torch.from_numpy(table)
    weight[:, : found.shape[1]] = found * (START * size / found.std())
