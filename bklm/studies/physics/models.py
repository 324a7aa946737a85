"""The arms of the physics study, and what is measured of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from bklm.data import Pieces
from bklm.harness.arms import Arm
from bklm.harness.measure import Arm as Call
from bklm.harness.text import StudyText
from bklm.models import (
    Conservative,
    ConservativeConfig,
    LanguageModel,
    ResNetBK,
    ResNetBKConfig,
    conservative_of_size,
)
from bklm.models.dropout import dropout
from bklm.models.reversible import BACKWARDS
from bklm.studies.physics.config import PhysicsConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.context_gain import measure_context_gain
from bklm.training.energy_drift import block_energies
from bklm.training.energy_terms import (
    DepthEnergy,
    PublishedEnergy,
    embedding_norm,
    gradient_share,
    measure_energy,
)
from bklm.training.stability import with_spectral_norm

Build = Callable[[int], LanguageModel]
NO_CLIP = math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class PhysicsText(StudyText):
    """A study's text whose passes are scored ``pieces`` times."""

    pieces: int = 1

    def train_loader(self, seed: int) -> Any:
        loader = super().train_loader(seed)
        return Pieces(loader, self.pieces) if self.pieces > 1 else loader

    def first(self, tokens: int) -> PhysicsText:
        """The first training tokens (0: all), each pass scored once."""
        cut = dataclasses.replace(self.tokens, train=self.tokens.train[: tokens or None])
        return dataclasses.replace(self, tokens=cut, pieces=1)


class UnitStart(ResNetBK):
    """The plain model on embeddings brought to unit size, as leapfrog blocks are given them: the control of that alone."""

    def _embed(self, input_ids: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        x = F.layer_norm(self.embedding(input_ids), (self.config.d_model,))
        return dropout(x, self.config.dropout_p, self.training)


def plain(config: PhysicsConfig, kind: type[ResNetBK] = ResNetBK) -> Build:
    """The model that reads; with the original's protocol the published one."""
    same = {"d_model": config.d_model, "n_layers": config.n_layers, "dropout_p": config.dropout}
    if config.protocol == "original":
        return lambda vocabulary: ResNetBK(
            ResNetBKConfig.original(vocabulary, n_seq=config.seq_len, grad_blend=0.5, **same)
        )
    # Without the short convolution, which switching the mixer off leaves on, and which no conservative block has.
    same |= {"n_heads": math.gcd(config.n_heads, config.d_model), "convolution": 0}
    return lambda vocabulary: kind(ResNetBKConfig(vocabulary, mixer="solve", num_experts=1, **same))


def conservative(config: PhysicsConfig, **more: Any) -> Build:
    """Leapfrog blocks at the plain model's width, depth and parameters."""
    heads = math.gcd(config.n_heads, config.d_model // 2)

    def build(vocabulary: int) -> Conservative:
        with torch.device("meta"):
            wanted = plain(config)(vocabulary).num_parameters()
        size = {"n_layers": config.n_layers, "n_heads": heads, "step": config.step, "dropout_p": config.dropout}
        return Conservative(conservative_of_size(wanted, vocabulary, config.d_model, **size, **more).config)

    return build


def loss_arms(config: PhysicsConfig, steps: int) -> dict[str, Arm]:
    """Arms of the energy terms; ``steps`` of the whole training."""
    base, size = plain(config), (config.d_model, config.n_layers)

    def published(shuffled: bool = False, limit: float | None = None) -> Build:
        def build(vocabulary: int) -> WithTerm:
            model = base(vocabulary)
            term = PublishedEnergy(
                *size, start=int(config.start * steps), weight=config.weight, shuffled=shuffled
            )
            return WithTerm(model, term, 1.0, limit=limit, apart=limit is not None)

        return build

    def mended(placebo: bool = False) -> Build:
        return lambda vocabulary: WithTerm(
            base(vocabulary), DepthEnergy(*size, placebo=placebo), config.mended_weight, limit=config.limit
        )

    arms = {
        "none": Arm(base),
        "published": Arm(published(), ("none", "shuffled")),
        "shuffled": Arm(published(shuffled=True), ("none",)),
    }
    if config.protocol == "corrected":
        arms |= {
            "apart": Arm(published(limit=config.limit), ("none", "shuffled")),
            "mended": Arm(mended(), ("none", "mended-placebo")),
            "mended-placebo": Arm(mended(placebo=True), ("none",)),
        }
    return arms


def block_arms(config: PhysicsConfig) -> dict[str, Arm]:
    """Kinds of block, equal in parameters. "free-force" is the placebo: reversible too, and without an energy."""
    controls = ("plain", "plain-unit", "free-force")
    return {
        "plain": Arm(plain(config)),
        "plain-unit": Arm(plain(config, UnitStart), ("plain",)),
        "conservative": Arm(conservative(config), controls),
        "every-second": Arm(conservative(config, every=2), controls),
        "free-force": Arm(conservative(config, kind="free"), ("plain", "plain-unit")),
    }


def stability_arms(config: PhysicsConfig) -> dict[float, dict[str, Arm]]:
    """Arms of the stability grid, by clipping norm."""
    base = plain(config)
    spectral = Arm(lambda vocabulary: with_spectral_norm(base(vocabulary)), kept=False)
    bare = {
        "plain": Arm(base, kept=False),
        "plain-spectral": spectral,
        "conservative": Arm(conservative(config), kept=False),
    }
    clipped = {
        "plain-clipped": Arm(base, kept=False),
        "plain-unit-clipped": Arm(plain(config, UnitStart), kept=False),
        "conservative-clipped": Arm(conservative(config), kept=False),
    }
    return {NO_CLIP: bare, config.clip: clipped}


def measured(text: PhysicsText) -> Callable[[LanguageModel], dict[str, Any]]:
    """What is recorded of a trained model: its gain from context, its embedding's size, and what its energy does."""
    x, y = text.first_batch(text.batch_size)

    def found(model: LanguageModel) -> dict[str, Any]:
        device = next(model.parameters()).device
        gained = measure_context_gain(
            model, text.val_loader(), text.unk_id, windows_of=lambda n: None, window=text.seq_len, lengths=()
        )
        return {
            "vocabulary": text.vocab_size,
            "context_gain": gained.gain,
            "embedding_norm": embedding_norm(model),
            "energy": energy_of(model, x.to(device), y.to(device)),
        }

    return found


def energy_of(model: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Drift and spread of a model's energy on a batch, untrained or trained; {} for one without an energy."""
    if isinstance(model, WithTerm):
        trace = model.term.trace.to_list()
        return measure_energy(model, x) | {"gradient_share": gradient_share(model, x, y), "trace": trace}
    if isinstance(model, Conservative) and model.config.kind == "potential":
        found = block_energies(model, x, driven=False)
        return found | {
            "work": block_energies(model, x, driven=True)["ratio"],
            "inverse_error": model.inverse_error(x),
        }
    return {}


def memory_arms(layers: int, width: int, batch: int, length: int, device: str = "cpu") -> dict[str, Call]:
    """A training step's forward and backward of residual and conservative blocks; gradients have their memory already."""
    size = {"n_layers": layers, "n_heads": 4, "dropout_p": 0.0}
    ids = torch.randint(500, (batch, length), device=device)

    def call(make: Callable[[], LanguageModel]) -> Call:
        @functools.cache
        def made() -> LanguageModel:
            model = make().to(device).train()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            return model

        return Call(lambda: made().loss(ids, ids), lambda loss: loss.backward() or loss.detach())

    config = ConservativeConfig(500, width, units=4 * width, **size)
    ways = {way: dataclasses.replace(config, backward=way) for way in BACKWARDS}
    residual = ResNetBKConfig(500, width, mixer="solve", num_experts=1, convolution=0, **size)
    return {"residual": call(lambda: ResNetBK(residual))} | {
        f"leapfrog, {way}": call(functools.partial(Conservative, own)) for way, own in ways.items()
    }
