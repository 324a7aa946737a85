"""Energies of positions: a potential U(q), its gradient written out, and what happens when it couples positions.

    U(q) = sum_k w_k softplus(a_k . q + b_k),    grad U(q) = sum_k w_k sigmoid(a_k . q + b_k) a_k

A force -grad U moves a state (q, p) along Hamilton's equations of H(q, p) = |p|^2 / 2 + U(q), which conserve H.

Why a causal model cannot conserve an energy that couples positions: the force on position i is f_i = -dU/dq_i, so

    df_i / dq_j = -d2U / dq_i dq_j = df_j / dq_i

Causality asks for df_i / dq_j = 0 for all j > i. The matrix is symmetric, so the entries with j < i are zero as well: no
position acts on another. ``PairPotential`` shows both ends of it: whole, its force conserves and sees the future; with the
part that comes from later positions cut off, it is causal and conserves nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY = 0.5
"""Of the fastest oscillation that the first weights of a potential make, radians per unit of time."""

LARGEST_STEP = 2 / FREQUENCY
"""From here on leapfrog is unstable at the first weights: an oscillator of frequency w needs steps below 2 / w."""


class Potential(nn.Module):
    """U of each position by itself: ``forward`` (..., width) -> (...), ``gradient`` (..., width) -> (..., width)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.empty(units, width))
        self.offsets = nn.Parameter(torch.empty(units))
        self.heights = nn.Parameter(torch.empty(units))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Directions N(0, 1 / width), offsets N(0, 1), and one positive height for all: a bowl.

        The height makes the largest eigenvalue of the Hessian's bound, height / 4 times that of the directions' Gram
        matrix (Marchenko and Pastur 1967), the square of ``FREQUENCY``.
        """
        units, width = self.directions.shape
        nn.init.normal_(self.directions, std=1 / math.sqrt(width))
        nn.init.normal_(self.offsets)
        largest = units / width * (1 + math.sqrt(width / units)) ** 2
        self.heights.fill_(4 * FREQUENCY**2 / largest)

    def forward(self, q: Tensor) -> Tensor:
        return F.softplus(F.linear(q, self.directions, self.offsets)) @ self.heights

    def gradient(self, q: Tensor) -> Tensor:
        """grad U, in plain operations: it can be differentiated again."""
        slopes = torch.sigmoid(F.linear(q, self.directions, self.offsets)) * self.heights
        return slopes @ self.directions


class FreeForce(Potential):
    """A force of a potential's shape whose outgoing directions are free: the gradient of nothing, so no energy belongs to it.

    The control of a potential: whatever this one does as well is not the energy's doing.
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__(width, units)
        self.outgoing = nn.Parameter(self.directions.detach().clone())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The first force is a potential's."""
        super().reset_parameters()
        if hasattr(self, "outgoing"):
            self.outgoing.copy_(self.directions)

    def forward(self, q: Tensor) -> Tensor:
        raise TypeError("FreeForce: this force is the gradient of nothing; it has no energy to give.")

    def gradient(self, q: Tensor) -> Tensor:
        """What stands in the gradient's place."""
        slopes = torch.sigmoid(F.linear(q, self.directions, self.offsets)) * self.heights
        return slopes @ self.outgoing


class PairPotential(nn.Module):
    """U coupling each position to the one before: sum over i of V(q_i - q_{i-1}), V a ``Potential``, q_{-1} = 0.

    ``forward`` (B, N, width) -> (B,), ``gradient`` as ``Potential``. Its force on i reads q_{i+1}: it sees the future.

    Args:
        cut: leave that part out. What is left is causal, and the gradient of nothing.
    """

    def __init__(self, width: int, units: int, cut: bool = False) -> None:
        super().__init__()
        self.of_differences, self.cut = Potential(width, units), cut

    def reset_parameters(self) -> None:
        self.of_differences.reset_parameters()
        # Two neighbours pull at each position: the Hessian is at most four times that of one difference.
        with torch.no_grad():
            self.of_differences.heights.div_(4)

    def forward(self, q: Tensor) -> Tensor:
        return self.of_differences(_differences(q)).sum(-1)

    def gradient(self, q: Tensor) -> Tensor:
        pull = self.of_differences.gradient(_differences(q))
        return pull if self.cut else pull - F.pad(pull[:, 1:], (0, 0, 0, 1))


def _differences(q: Tensor) -> Tensor:
    """q_i - q_{i-1}, (B, N, width), q_{-1} = 0."""
    return q - F.pad(q[:, :-1], (0, 0, 1, 0))


def energy(potential: nn.Module, q: Tensor, p: Tensor) -> Tensor:
    """H = |p|^2 / 2 + U(q): (B, N) for a ``Potential``, (B,) for a ``PairPotential``, of q and p (B, N, width)."""
    kinetic = p.square().sum(-1) / 2
    found = potential(q)
    return found + (kinetic if found.ndim == kinetic.ndim else kinetic.sum(-1))
