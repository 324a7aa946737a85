"""The arms of the physics study, and what is measured of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bklm.data import Pieces, make_loader, windows
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
from bklm.studies.physics.tables import PLAIN
from bklm.training.context_gain import measure_context_gain
from bklm.training.energy_drift import block_energies
from bklm.training.energy_terms import (
    DepthEnergy,
    PublishedEnergy,
    WithEnergy,
    embedding_norm,
    gradient_share,
    measure_energy,
)
from bklm.training.evaluation import evaluate
from bklm.training.stability import with_spectral_norm

Build = Callable[[int], LanguageModel]
SHARES = 12  # rows of an energy's share of the gradient, over a training
SHORT_WINDOWS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class PhysicsText(StudyText):
    """A study's text whose passes are scored ``pieces`` times, on the first ``scored`` validation tokens."""

    pieces: int = 1
    scored: int = 0

    def train_loader(self, seed: int) -> Any:
        loader = super().train_loader(seed)
        return Pieces(loader, self.pieces) if self.pieces > 1 else loader

    def val_loader(self) -> DataLoader:
        return self.search_val_loader(self.scored)

    def whole_val_loader(self) -> DataLoader:
        """The whole split, for a model that is done."""
        return self.search_val_loader(0)

    def scored_windows(self, length: int) -> DataLoader:
        """The targets of ``val_loader`` in windows of another length."""
        data = windows(self.tokens.valid[: self.scored or None], length, pad_id=self.tokens.pad_id)
        return make_loader(data, min(max(1, self.batch_size * self.seq_len // length), len(data)))

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


LATE = ("published", "shuffled", "apart", "apart-shuffled")
"""Arms whose term sets in after a share of the training (``start``)."""


def loss_arms(config: PhysicsConfig, steps: int) -> dict[str, Arm]:
    """Arms of the energy terms, the model without one first; ``steps`` of the whole training."""
    published, mended = functools.partial(_published, config, steps), functools.partial(_mended, config, steps)
    arms = {
        PLAIN: Arm(plain(config)),
        "published": Arm(published(), (PLAIN, "shuffled")),
        "shuffled": Arm(published(shuffled=True), (PLAIN,)),
    }
    if config.protocol == "corrected":
        nothing = published(times=0.0, limit=config.limit)
        arms |= {
            "apart": Arm(published(limit=config.limit), (PLAIN, "apart-shuffled")),
            "apart-shuffled": Arm(published(shuffled=True, limit=config.limit), (PLAIN,)),
            "mended": Arm(mended(), (PLAIN, "mended-placebo")),
            "mended-placebo": Arm(mended(placebo=True), (PLAIN,)),
            "weight-0": Arm(nothing, kept=False, seeds=1, same_as=PLAIN),
        }
    return arms


def detached_arm(config: PhysicsConfig, steps: int, is_plain: bool) -> Arm:
    """The mended term's nets on states that no gradient of theirs reaches: what they find to conserve in a model that no term
    has touched. ``is_plain``: whether it is trained at the plain model's rate, and so is that model to the last bit."""
    return Arm(_mended(config, steps, detached=True), same_as=PLAIN * is_plain)


def _published(
    config: PhysicsConfig, steps: int, *, shuffled: bool = False, limit: float | None = None, times: float = 1.0
) -> Build:
    def build(vocabulary: int) -> WithEnergy:
        model, size = plain(config)(vocabulary), (config.d_model, config.n_layers)
        term = PublishedEnergy(*size, start=int(config.start * steps), weight=config.weight, shuffled=shuffled)
        return WithEnergy(
            model, term, times, every=max(1, steps // SHARES), limit=limit, apart=limit is not None
        )

    return build


def _mended(config: PhysicsConfig, steps: int, *, placebo: bool = False, detached: bool = False) -> Build:
    def build(vocabulary: int) -> WithEnergy:
        model, term = plain(config)(vocabulary), DepthEnergy(config.d_model, config.n_layers, placebo=placebo)
        more = {"every": max(1, steps // SHARES), "limit": config.limit, "detached": detached}
        return WithEnergy(model, term, config.mended_weight, **more)

    return build


def block_arms(config: PhysicsConfig) -> dict[str, Arm]:
    """Kinds of block, equal in parameters. "free-force" is the placebo: reversible too, and without an energy."""
    controls = (PLAIN, "plain-unit", "free-force")
    return {
        PLAIN: Arm(plain(config)),
        "plain-unit": Arm(plain(config, UnitStart), (PLAIN,)),
        "conservative": Arm(conservative(config), controls),
        "every-second": Arm(conservative(config, every=2), controls),
        "free-force": Arm(conservative(config, kind="free"), (PLAIN, "plain-unit")),
    }


def stability_arms(config: PhysicsConfig) -> dict[str, Arm]:
    """Arms of the stability grid, each with the usual clipping. Without it no claim is made, and none is decided."""
    base = plain(config)
    return {
        PLAIN: Arm(base, kept=False),
        "plain-unit": Arm(plain(config, UnitStart), kept=False),
        "plain-spectral": Arm(lambda vocabulary: with_spectral_norm(base(vocabulary)), kept=False),
        "conservative": Arm(conservative(config), kept=False),
    }


def untrained_losses(
    text: PhysicsText, arms: Mapping[str, Arm], seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """By arm and seed (as a word), the loss on ``text.val_loader()`` before the first step."""

    def loss(arm: Arm, seed: int) -> float:
        torch.manual_seed(seed)
        return evaluate(arm.build(text.vocab_size), text.val_loader(), text.unk_id).loss

    with torch.random.fork_rng():
        return {name: {str(seed): loss(arm, seed) for seed in seeds} for name, arm in arms.items()}


def measured(text: PhysicsText) -> Callable[[LanguageModel], dict[str, Any]]:
    """What is recorded of a trained model: its score on the whole split, its gain from context, its embedding's size, and
    what its energy does."""
    x, y = text.first_batch(text.batch_size)

    def found(model: LanguageModel) -> dict[str, Any]:
        device = next(model.parameters()).device
        score = evaluate(model, text.whole_val_loader(), text.unk_id)
        gained = measure_context_gain(
            model, text.val_loader(), text.unk_id, windows_of=text.scored_windows, window=text.seq_len,
            lengths=sorted({n for n in SHORT_WINDOWS if n < text.seq_len} | {text.seq_len}),
        )  # fmt: skip
        return {
            **score.record(),
            "vocabulary": text.vocab_size,
            **gained.record(),
            "embedding_norm": embedding_norm(model),
            "energy": energy_of(model, x.to(device), y.to(device)),
        }

    return found


def energy_of(model: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Drift and spread of a model's energy on a batch, untrained or trained; {} for one without an energy."""
    if isinstance(model, WithEnergy):
        own = {"trace": model.term.trace.to_list(), "shares": model.shares.to_list()}
        return measure_energy(model, x) | {"gradient_share": gradient_share(model, x, y)} | own
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
