"""How well is an energy conserved? Drift in units of the energy's own spread: an energy that is the same for all states
"drifts" as little as one likes, and conserves nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bklm.models.conservative import Conservative
from bklm.models.modes import evaluating
from bklm.models.potentials import LARGEST_STEP, PairPotential, Potential, energy
from bklm.models.reversible import leapfrog

STEPS = (0.2, 0.1, 0.05, 0.025, 0.0125)
TIME = 12.8  # 64 of the longest steps


def over_spread(drift: float, spread: float) -> float | None:
    """Drift in units of the spread; None for an energy that is one number for all states, and has no unit."""
    return drift / spread if spread > 0 else None


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None where one of them is."""
    return None if None in values else sum(values) / len(values)


Scheme = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def by_leapfrog(potential: nn.Module, q: Tensor, p: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """One step of the scheme that the conservative blocks use."""
    return leapfrog(lambda x, kick: -potential.gradient(x), q, p, h)


def by_euler(potential: nn.Module, q: Tensor, p: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """One step of explicit Euler, the scheme of a residual layer: the control."""
    return q + h * p, p - h * potential.gradient(q)


@torch.no_grad()
def drift(
    potential: nn.Module, start: tuple[Tensor, Tensor], h: float, time: float, scheme: Scheme = by_leapfrog
) -> float:
    """Largest |H(t) - H(0)| on the way, its mean over states, over the standard deviation of H(0) over states.

    Args:
        start: q and p, each (B, N, width).
        time: integrated over in steps of ``h``.

    Raises:
        ValueError: a step at which leapfrog is unstable.
    """
    if not 0 < h < LARGEST_STEP:
        raise ValueError(
            f"step: got {h:g}; it must be positive, and leapfrog is unstable from {LARGEST_STEP:g} on: take a smaller one."
        )
    q, p = start
    first = energy(potential, q, p)
    worst = torch.zeros_like(first)
    for _ in range(round(time / h)):
        q, p = scheme(potential, q, p, h)
        worst = torch.maximum(worst, (energy(potential, q, p) - first).abs())
    return float(worst.mean() / first.std())


def slope(steps: Sequence[float], drifts: Sequence[float]) -> float:
    """Of log drift against log step, by least squares: 2 says that halving the step quarters the drift."""
    return float(np.polyfit(np.log(steps), np.log(drifts), 1)[0])


@dataclass(frozen=True)
class DriftBySteps:
    """One force and scheme: its ``drifts`` over TIME at ``steps``, and at one step how the drift grows with time."""

    name: str
    sees_future: bool
    steps: tuple[float, ...]
    drifts: tuple[float, ...]
    short: float  # at the longest step, over TIME
    long: float  # over four times as long

    @property
    def slope(self) -> float:
        return slope(self.steps, self.drifts)


@functools.cache
def compare_forces(width: int = 8, units: int = 32, seed: int = 0) -> list[DriftBySteps]:
    """What conserves: a potential of each position; one that couples positions; that one made causal; Euler's scheme.

    Random weights and 16 random sequences of 5 positions in double precision. A few seconds' work.
    """
    generator = torch.Generator().manual_seed(seed)
    q, p = torch.randn(2, 16, 5, width, dtype=torch.float64, generator=generator, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own, pair = Potential(width, units).double(), PairPotential(width, units).double()
        pair.reset_parameters()
    cut = PairPotential(width, units, cut=True).double()
    cut.load_state_dict(pair.state_dict())
    cases = [
        ("potential of each position", own, by_leapfrog, False),
        ("potential that couples positions", pair, by_leapfrog, True),
        ("the same force, cut to be causal", cut, by_leapfrog, False),
        ("potential of each position, Euler steps", own, by_euler, False),
    ]
    found = []
    for name, potential, scheme, sees_future in cases:
        drifts = {h: drift(potential, (q, p), h, TIME, scheme) for h in STEPS}
        long = drift(potential, (q, p), STEPS[0], 4 * TIME, scheme)
        found.append(DriftBySteps(name, sees_future, STEPS, tuple(drifts.values()), drifts[STEPS[0]], long))
    return found


@torch.no_grad()
def block_energies(model: Conservative, input_ids: Tensor, *, driven: bool) -> dict[str, float | None]:
    """Of a model's own blocks on a text: mean |change of H_l over block l| and standard deviation of H_l over positions.

    Args:
        driven: with the causal drive, which does work; without it the block is left with its potential.

    Returns:
        "drift" and "spread", each averaged over the blocks with a potential, and "ratio", the mean of ``over_spread``.
    """
    drifts, spreads, h = [], [], model.config.step
    with evaluating(model):
        q, p = model.start(input_ids)
        for force in model.forces:
            after = leapfrog(force, q, p, h)
            if force.potential is not None:
                moved = after if driven else by_leapfrog(force.potential, q, p, h)
                before = energy(force.potential, q, p).double()
                drifts.append(float((energy(force.potential, *moved) - before).abs().mean()))
                spreads.append(float(before.std()))
            q, p = after
    ratios = [over_spread(d, s) for d, s in zip(drifts, spreads, strict=True)]
    return {
        name: mean_or_none(values)
        for name, values in (("drift", drifts), ("spread", spreads), ("ratio", ratios))
    }
