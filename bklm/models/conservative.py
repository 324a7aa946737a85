"""Conservative: a language model whose depth is time, each block one leapfrog step of a potential and a causal drive.

The stream is x = [q, p], positions and momenta of d / 2 channels each. Block l moves them by one step h under the force

    F_l(q) = -grad U_l(q) + g_l(q)

U_l a scalar of each text position by itself (``bklm.models.potentials``), g_l the causal resolvent mixer of
``bklm.models.resnet_bk_mixers`` on LN(q). Without g a block conserves |p|^2 / 2 + U_l(q) up to h^2; with it, g does work on
the state, as an outside drive does. It cannot be otherwise: ``bklm.models.potentials`` derives why. Either way a block has
an exact inverse and a Jacobian of determinant 1, so the backward keeps no activations (``bklm.models.reversible``).

References: Haber & Ruthotto 2017; Chang et al. 2018; Greydanus et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_choice, check_dropout, check_int, check_real
from bklm.models.dropout import draw_number, dropout, numbered_dropout
from bklm.models.modes import evaluating
from bklm.models.potentials import LARGEST_STEP, FreeForce, PairPotential, Potential
from bklm.models.resnet_bk_config import ResNetBKConfig
from bklm.models.resnet_bk_mixers import INITIAL_STD, MixerState, SolveMixer
from bklm.models.reversible import BACKWARDS, leapfrog, run_blocks, undo_blocks

KINDS = {"potential": Potential, "free": FreeForce, "coupled": PairPotential}


@dataclass(frozen=True)
class ConservativeConfig:
    """Size and kind of a Conservative.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int = 64  # of positions and momenta together
    n_layers: int = 4
    units: int = 256  # of each potential
    n_heads: int = 8
    step: float = 1.0  # h
    every: int = 1  # a potential in one of so many blocks; a drive is in each
    dropout_p: float = 0.1
    # "reversible", "checkpoint" or "plain": the same gradients, less or more memory.
    backward: str = "reversible"
    # "potential": of each position by itself. "free": a force of the same shape that is the gradient of nothing, a placebo:
    # reversible all the same. "coupled": of neighbouring positions; the model then sees the future. To show that, not to use.
    kind: str = "potential"

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 3)
        for name in ("d_model", "n_layers", "units", "n_heads", "every"):
            check_int(name, getattr(self, name), 1)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model: got {self.d_model}; half of it is shared among n_heads = {self.n_heads}; take a multiple of "
                f"{2 * self.n_heads}."
            )
        check_real("step", self.step)
        if not 0.0 < self.step < LARGEST_STEP:
            raise ValueError(
                f"step: got {self.step}; it must be positive, and leapfrog is unstable from {LARGEST_STEP:g} on: take a "
                "smaller one."
            )
        check_dropout(self.dropout_p)
        check_choice("backward", self.backward, BACKWARDS)
        check_choice("kind", self.kind, tuple(KINDS))


@dataclass(frozen=True)
class ConservativeState:
    """The position, and of every block the mixer's state at its first and at its second kick."""

    position: int
    mixers: tuple[tuple[MixerState, MixerState], ...] | None


class DrivenForce(nn.Module):
    """One block's force F(q), (B, N, d / 2) -> (B, N, d / 2)."""

    def __init__(self, config: ConservativeConfig, has_potential: bool) -> None:
        super().__init__()
        half = config.d_model // 2
        self.dropout_p = config.dropout_p
        self.potential = KINDS[config.kind](half, config.units) if has_potential else None
        self.norm = nn.LayerNorm(half)
        own = {"n_heads": config.n_heads, "mixer": "solve", "num_experts": 1, "convolution": 0}
        self.mixer = SolveMixer(ResNetBKConfig(config.vocab_size, half, **own))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.potential is not None:
            self.potential.reset_parameters()
        self.norm.reset_parameters()
        self.mixer.reset_parameters()

    def forward(self, q: Tensor, kick: int | None = None) -> Tensor:
        """The force; with ``kick`` its dropout is drawn from that number."""
        return self.with_state(q, kick)[0]

    def with_state(self, q: Tensor, kick: int | None = None) -> tuple[Tensor, MixerState]:
        """The force, and the mixer's state after the last position."""
        drive, state = self.mixer(self.norm(q))
        return self._sum(q, drive, kick), state

    def step(self, q: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """One position q (B, 1, d / 2) after the one whose state is given, or the first."""
        drive, state = self.mixer.step(self.norm(q), state)
        return self._sum(q, drive, None), state

    def _sum(self, q: Tensor, drive: Tensor, kick: int | None) -> Tensor:
        force = drive.to(q.dtype)
        if self.potential is not None:
            force = force - self.potential.gradient(q).to(q.dtype)
        return force if kick is None else numbered_dropout(force, self.dropout_p, kick)


class Conservative(LanguageModel):
    """Token embedding brought to unit size, ``n_layers`` leapfrog steps, a final LayerNorm, a tied head.

    Streams, unless "coupled": that one sees the future.
    """

    def __init__(self, config: ConservativeConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.sees_future = config.kind == "coupled"
        self.streams = not self.sees_future
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.forces = nn.ModuleList(
            DrivenForce(config, block % config.every == 0) for block in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: as ``ResNetBK`` with the mixer "solve", and potentials that are shallow bowls."""
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        for force in self.forces:
            force.reset_parameters()
        self.norm.reset_parameters()

    def head(self) -> tuple[Tensor, None]:
        return self.embedding.weight, None

    def hidden(self, input_ids: Tensor) -> Tensor:
        q, p = self.start(input_ids)
        # The number of the first kick is one draw of torch's generator.
        seed = draw_number(q) if self.training and self.config.dropout_p > 0 else None
        return self._end(
            *run_blocks(self.forces, q, p, self.config.step, seed=seed, backward=self.config.backward)
        )

    def start(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(q, p) before the first block, each (B, N, d / 2)."""
        x = F.layer_norm(self.embedding(input_ids), (self.config.d_model,))
        # A view of a larger tensor would keep that one alive.
        q, p = dropout(x, self.config.dropout_p, self.training).chunk(2, -1)
        return q.contiguous(), p.contiguous()

    @torch.no_grad()
    def inverse_error(self, input_ids: Tensor) -> float:
        """Largest difference between (q, p) before the first block and what is rebuilt from the last one's output."""
        with evaluating(self):
            before = self.start(input_ids)
            after = run_blocks(self.forces, *before, self.config.step)
            rebuilt = undo_blocks(self.forces, *after, self.config.step)
        return max(float((x - y).abs().max()) for x, y in zip(before, rebuilt, strict=True))

    def init_state(self, batch_size: int) -> ConservativeState:
        self._require_streams()
        return ConservativeState(0, None)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, ConservativeState]:
        self._require_streams()
        self.check_prompt(input_ids)
        states: list[MixerState] = []

        def watched(force: DrivenForce) -> Any:
            def run(q: Tensor, kick: int | None) -> Tensor:
                value, state = force.with_state(q, kick)
                states.append(state)
                return value

            return run

        q, p = self.start(input_ids)
        for force in self.forces:
            q, p = leapfrog(watched(force), q, p, self.config.step)
        pairs = tuple(zip(states[::2], states[1::2], strict=True))
        return self.logits(self._end(q, p)[:, -1]), ConservativeState(input_ids.shape[1], pairs)

    @torch.no_grad()
    def step(self, token: Tensor, state: ConservativeState) -> tuple[Tensor, ConservativeState]:
        self._require_streams()
        self.check_token(token)
        q, p = self.start(token.unsqueeze(1))
        pairs, h = [], self.config.step
        for force, before in zip(self.forces, state.mixers or [(None, None)] * len(self.forces), strict=True):
            kick, first = force.step(q, before[0])
            p = p + h / 2 * kick
            q = q + h * p
            kick, second = force.step(q, before[1])
            p = p + h / 2 * kick
            pairs.append((first, second))
        return self.logits(self._end(q, p)[:, 0]), ConservativeState(state.position + 1, tuple(pairs))

    def state_bytes(self, position: int) -> int:
        self._require_streams()
        # Two kicks a block: one complex resolvent per head, and the complex y of d / 2 channels.
        numbers = 2 * (2 * self.config.n_heads + self.config.d_model)
        return self.config.n_layers * numbers * self.norm.weight.element_size()

    def _require_streams(self) -> None:
        if not self.streams:
            raise TypeError(self._cannot_stream())

    def _end(self, q: Tensor, p: Tensor) -> Tensor:
        return self.norm(torch.cat((q, p), -1))
