"""Energies as a term of the training loss (``bklm.training.auxiliary``): as published, and divided by their own spread.

``PublishedEnergy``: per layer nets T and V, x a batch's token embeddings and x' those of the batch before, an unrelated text:

    E(x, x') = sum_i T(x_i - x'_i) + sum_i V(x_i),    term = mean over layers of lambda_l mean (E(x, x') - sum_i V(x'_i))^2

lambda_l is trained, and raised by 0.01 (mean |dE| - 0.1) each step. Nothing but constant nets makes the term small.

``DepthEnergy``: one pair of nets for all blocks, x_l the state after block l, each text position for itself:

    E_l = T(x_l - x_{l-1}) + V(x_l),    term = mean over l of mean (E_{l+1} - E_l)^2 / (var E_{l+1} + var E_l)

which is 0 for an energy that blocks conserve, 1 for two independent numbers, and no smaller for a smaller E.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bklm.models import LanguageModel
from bklm.models.checks import is_without_numbers
from bklm.models.modes import evaluating, keeping_modes
from bklm.moe.ops import in_backward
from bklm.moe.products import Linear
from bklm.training.auxiliary import WithTerm, other_sequence, recorded_states
from bklm.training.energy_drift import mean_or_none, over_spread

COLUMNS = ("step", "drift", "spread", "spread_of_v", "weight")
SHARES = ("step", "gradient_share")


class Trace(nn.Module):
    """Rows of numbers over a training, in a buffer of fixed size: a checkpoint holds it. Full, every second row goes."""

    def __init__(self, rows: int = 64, columns: Sequence[str] = COLUMNS) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.register_buffer("rows", torch.zeros(rows, len(columns), dtype=torch.float64))
        self.register_buffer("state", torch.tensor([0, 0, 1]))  # steps seen, rows filled, steps from row to row

    @torch.no_grad()
    def count(self) -> tuple[int, bool]:
        """One step more: its number from 0, and whether a row is wanted.

        What transforms and activation checkpointing compute, and tensors without values, is no step: it is not counted.
        """
        if is_without_numbers(self.state) or (not torch.compiler.is_compiling() and in_backward()):
            return 0, False
        step, _, stride = self.state.tolist()
        self.state[0] += 1
        return step, step % stride == 0

    @torch.no_grad()
    def add(self, *values: float) -> None:
        filled = int(self.state[1])
        if filled == len(self.rows):
            filled //= 2
            self.rows[:filled] = self.rows[::2].clone()
            self.state[2] *= 2
        self.rows[filled] = torch.tensor(values, dtype=torch.float64, device=self.rows.device)
        self.state[1] = filled + 1

    def to_list(self) -> list[dict[str, float]]:
        """The rows as mappings of ``columns``."""
        kept = self.rows[: int(self.state[1])].tolist()
        return [dict(zip(self.columns, row, strict=True)) for row in kept]


class EnergyNets(nn.Module):
    """T and V: Linear(d, d), tanh, Linear(d, 1) each; (..., d) -> (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t, self.v = (nn.Sequential(Linear(width, width), nn.Tanh(), Linear(width, 1)) for _ in range(2))

    def kinetic(self, x: Tensor) -> Tensor:
        return self.t(x).squeeze(-1)

    def potential(self, x: Tensor) -> Tensor:
        return self.v(x).squeeze(-1)


Pairs = Sequence[tuple[Tensor, Tensor]]


class PublishedEnergy(nn.Module):
    """The published term.

    Args:
        start: steps before it sets in.
        weight: first lambda; target: of mean |dE|.
        shuffled: the tokens of x' in random order: if that changes nothing, no order of a text was in it.

    The batch before is taken as a constant; none is known at an epoch's first step, which has no term.
    """

    keeps_state = True

    def __init__(
        self, width: int, layers: int, *, start: int = 0, weight: float = 0.05, target: float = 0.1, shuffled: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.nets = nn.ModuleList(EnergyNets(width) for _ in range(layers))
        self.weights = nn.Parameter(torch.full((layers,), float(weight)))
        self.start, self.target, self.shuffled = start, target, shuffled
        self.trace = Trace()
        self.before: Tensor | None = None

    def train(self, mode: bool = True) -> PublishedEnergy:
        # An epoch ends with scoring. What a run continued there does not know, none may use.
        self.before = self.before if mode else None
        return super().train(mode)

    def pairs(self, states: Sequence[Tensor], before: Tensor) -> Pairs:
        """E(x, x') and E(x') of each layer, (B,) each."""
        x = states[0]
        return [
            (
                (net.kinetic(x - before) + net.potential(x)).sum(1),
                net.potential(before).sum(1),
            )
            for net in self.nets
        ]

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        x, before = states[0], self.before
        step, is_wanted = self.trace.count()
        self.before = x.detach()
        if before is None or before.shape != x.shape or step < self.start:
            return x.new_zeros(())
        paired = before
        if self.shuffled:
            # Draws of its own: dropout and experts draw what they draw without it.
            generator = torch.Generator("cpu").manual_seed(step)
            order = torch.randperm(x[..., 0].numel(), generator=generator, device="cpu")
            paired = before.flatten(0, 1)[order.to(x.device)].view_as(before)
        pairs = self.pairs(states, paired)
        differences = torch.stack([after - first for after, first in pairs])
        # A copy: the step below changes the weights before the backward has read them.
        term = (self.weights.clone() * differences.square().mean(1)).mean()
        with torch.no_grad():
            drift = differences.abs().mean(1)
            self.weights.add_(0.01 * (drift - self.target)).clamp_(0.01, 10.0)
            # Every row counts from where the term sets in.
            if is_wanted or int(self.trace.state[1]) == 0:
                # Never shuffled, as ``measure_energy`` has it.
                seen, spread, _ = measure_pairs(self.pairs(states, before) if self.shuffled else pairs)
                of_v = torch.stack([net.potential(x).std() for net in self.nets]).mean()
                self.trace.add(step, seen, spread, float(of_v), float(self.weights.mean()))
        return term


class DepthEnergy(nn.Module):
    """The mended term: drift from block to block in units of the energy's spread.

    Args:
        placebo: E_l is that of another sequence at the same position, which there is no reason to conserve.

    Raises:
        ValueError: fewer than two blocks, between which nothing could be conserved.
    """

    def __init__(self, width: int, layers: int, *, placebo: bool = False) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"n_layers: got {layers}; an energy that blocks conserve needs 2 blocks or more.")
        self.nets, self.placebo, self.trace = EnergyNets(width), placebo, Trace()

    def pairs(self, states: Sequence[Tensor], before: Tensor | None = None) -> Pairs:
        """E_{l+1} and E_l for each l, (B, N) each."""
        energies = [
            self.nets.kinetic(x - last) + self.nets.potential(x) for last, x in itertools.pairwise(states)
        ]
        return list(zip(energies[1:], energies[:-1], strict=True))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        own = pairs = self.pairs(states)
        if self.placebo:
            pairs = [(after, other_sequence(first.unsqueeze(-1)).squeeze(-1)) for after, first in own]
        ratios = [
            (after - first).square().mean() / (after.var() + first.var() + 1e-12) for after, first in pairs
        ]
        step, is_wanted = self.trace.count()
        if is_wanted:
            with torch.no_grad():
                # Never shuffled, as ``measure_energy`` has it.
                drift, spread, _ = measure_pairs(own)
                of_v = float(self.nets.potential(states[-1]).std())
                self.trace.add(step, drift, spread, of_v, 1.0)
        return torch.stack(ratios).mean()


def measure_pairs(pairs: Pairs) -> tuple[float, float, float | None]:
    """(mean |dE|, standard deviation of E, their ratio), each averaged over layers; see ``over_spread``."""
    drifts = [float((after - first).abs().mean()) for after, first in pairs]
    spreads = [float(after.std()) for after, _ in pairs]
    ratios = [over_spread(d, s) for d, s in zip(drifts, spreads, strict=True)]
    return mean_or_none(drifts), mean_or_none(spreads), mean_or_none(ratios)


@torch.no_grad()
def measure_energy(model: WithTerm, input_ids: Tensor) -> dict[str, float | None]:
    """Drift, spread and their ratio of a term's energy on a text, pairs as it saw them in training but never shuffled.

    A published energy's x' is another sequence: like the batch before, an unrelated text.
    """
    with evaluating(model):
        with recorded_states(model.model) as states:
            model.model.hidden(input_ids)
        found = measure_pairs(model.term.pairs(states, other_sequence(states[0])))
    return dict(zip(("drift", "spread", "ratio"), found, strict=True))


def gradient_share(model: WithTerm, x: Tensor, y: Tensor) -> float:
    """The term's part in |gradient of the term| + |gradient of the cross-entropy|: what one common clip spends on the term.

    Norms before clipping, over the parameters that are clipped together, with the term's own limit where it has one. Weights,
    term, experts' counts and random state are left as they were. A published energy's x' is the batch before, or another
    sequence where none is known.
    """
    apart = {id(p) for p in model.parameters_apart()}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    state = {name: value.clone() for name, value in model.term.state_dict().items()}
    counts, term_of_batches = model.expert_counts(), isinstance(model.term, PublishedEnergy)
    before, start = (model.term.before, model.term.start) if term_of_batches else (None, None)
    with keeping_modes(model), torch.random.fork_rng():
        model.train()
        with recorded_states(model.model) as states:
            loss = model.model.loss(x, y)
        if term_of_batches:
            is_known = before is not None and before.shape == states[0].shape
            model.term.before = before if is_known else other_sequence(states[0]).detach()
            model.term.start = 0
        term = model.weight * model.term(model.given(states))
        norms = [
            _norm(torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True))
            if v.requires_grad
            else 0.0
            for v in (term, loss)
        ]
    model.term.load_state_dict(state)
    model.reset_expert_counts(counts)
    if term_of_batches:
        model.term.before, model.term.start = before, start
    return norms[0] / (norms[0] + norms[1])


class WithEnergy(WithTerm):
    """A model with an energy term, whose share of the gradient is logged every so many steps, from where the term sets in.

    Args:
        every: steps from one row of ``shares`` to the next; a row takes about one and a half steps' time.
    """

    def __init__(
        self, model: LanguageModel, term: nn.Module, weight: float, *, every: int, **more: Any
    ) -> None:
        super().__init__(model, term, weight, **more)
        self.every, self.shares = every, Trace(columns=SHARES)

    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        if self.training and torch.is_grad_enabled():
            step, is_wanted = self.shares.count()
            filled = int(self.shares.state[1]) if is_wanted else 0
            due = self.shares.rows[filled - 1, 0] + self.every if filled else getattr(self.term, "start", 0)
            # At the first step of a piece, and before the published term's start, there is no batch before.
            if is_wanted and step >= due and getattr(self.term, "before", self.term) is not None:
                self.shares.add(step, gradient_share(self, input_ids, targets))
        return super().loss(input_ids, targets, reduction=reduction)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(torch.stack([g.norm() for g in gradients if g is not None] or [torch.zeros(())]).norm())


def embedding_norm(model: LanguageModel) -> float:
    """Root mean square of a token embedding's coordinates, as far as the model has one."""
    inner: Any = model.model if isinstance(model, WithTerm) else model
    return float(inner.embedding.weight.detach().double().square().mean().sqrt())
