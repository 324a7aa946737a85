"""Koopman terms for ``bklm.training.auxiliary``: a lifting in which a block's output is a linear map of its input.

Per block: lifting phi (D -> lift), matrix K, inverse psi (lift -> D). Mended (Lusch, Kutz, Brunton 2018),

    |x - psi(phi x)|^2 / var x  +  |phi x' - phi(x) K|^2 / var phi x'  +  |x' - psi(phi(x) K)|^2 / var x'

where var is the target's own variance over batch and positions, so each part is the share that is not explained: 0 at
best, and 1 for a constant. A constant phi cannot win: its reconstruction part is 1. phi reads states in units of their
size: embeddings begin at 0.02, where tanh is linear and nothing moves. ``PublishedTerm`` is the original's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import LanguageModel
from bklm.models.koopman import edmd, replaced
from bklm.models.modes import evaluating
from bklm.moe.products import Linear, linear
from bklm.training.auxiliary import other_sequence, recorded_states

RING = 100  # means that the published DMD is fitted to
RATE = 0.1  # of its moving average


class Lifting(nn.Module):
    """phi, K and psi of one block; K acts from the right, and starts as the identity with noise of 0.01."""

    def __init__(self, width: int, lift: int) -> None:
        super().__init__()
        self.phi = nn.Sequential(Linear(width, lift), nn.Tanh(), Linear(lift, lift))
        self.psi = nn.Sequential(Linear(lift, lift), nn.Tanh(), Linear(lift, width))
        self.matrix = nn.Parameter(torch.eye(lift) + 0.01 * torch.randn(lift, lift))

    def parts(self, x: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, linearity and prediction: the shares of variance that are not explained."""
        lifted, target = self.phi(x), self.phi(after)
        foretold = linear(lifted, self.matrix.mT)
        return (
            unexplained(self.psi(lifted), x),
            unexplained(foretold, target),
            unexplained(self.psi(foretold), after),
        )


def unexplained(guess: Tensor, target: Tensor) -> Tensor:
    """Mean square error over the target's variance, (..., D), over all but the last dimension."""
    centred = target - target.mean(dim=tuple(range(target.ndim - 1)), keepdim=True)
    return (guess - target).square().sum() / centred.square().sum().clamp_min(1e-12)


class KoopmanTerm(nn.Module):
    """The mended term: the mean over blocks of the three parts.

    Args:
        width: of the states; blocks: how many; lift: of the lifted states.
        placebo: the state after a block is another sequence's, at the same position.
    """

    def __init__(self, width: int, blocks: int, lift: int, *, placebo: bool = False) -> None:
        super().__init__()
        self.liftings = nn.ModuleList(Lifting(width, lift) for _ in range(blocks))
        self.placebo = placebo

    @staticmethod
    def in_units(x: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Both states over the root mean square of the first, which gets no gradient: their ratio is not touched."""
        size = x.detach().square().mean().sqrt().clamp_min(1e-12)
        return x / size, after / size

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        losses = []
        for lifting, (x, after) in zip(self.liftings, itertools.pairwise(states), strict=True):
            after = other_sequence(after) if self.placebo else after
            losses.append(sum(lifting.parts(*self.in_units(x, after))))
        return torch.stack(losses).mean()


def published_dmd(states: Tensor, following: Tensor) -> Tensor | None:
    """The original's DMD matrix (D, D), which acts from the left, on snapshots (M, D): ``Y V^T S^-1 U^T`` for the SVD U S V^T.

    ``torch.svd`` gives V, and the original took it for V^T. None where the shapes then clash (M > D): the original
    swallowed the exception. The right one is ``Y V S^-1 U^T``.
    """
    x, y = states.mT, following.mT
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = int((s > 1e-6 * s[0]).sum())
    taken_for_vh = vh.mT[:kept]
    if taken_for_vh.shape[1] != y.shape[1]:
        return None
    return y @ taken_for_vh.mT @ torch.diag(1 / s[:kept]) @ u[:, :kept].mT


class PublishedTerm(nn.Module):
    """The original's term: SmoothL1(phi(x) K^T, phi(x')), no reconstruction, K pulled towards ``published_dmd`` every step.

    Use it with weight 1: its own weight is 0 before ``start`` (an epoch, from 1), then rises linearly to ``most`` in the last
    epoch; where the loss exceeds ``threshold`` it is a hundredth for ten batches, and after a NaN 0 for the epoch. All of
    this, and the ring of means, is in the checkpoint. psi gets no gradient, as published.
    """

    keeps_state = True

    def __init__(
        self, width: int, blocks: int, lift: int, *, most: float, start: int, epochs: int, steps: int, threshold: float = 8.0,
        placebo: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.liftings = nn.ModuleList(Lifting(width, lift) for _ in range(blocks))
        self.most, self.start, self.epochs, self.steps = most, start, epochs, steps
        self.threshold, self.placebo = threshold, placebo
        self.register_buffer("ring", torch.zeros(blocks, 2, RING, lift))
        # Forwards seen, means in the ring, batches of small weight left, and the epoch that a NaN switched off.
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))

    def weight(self, forwards: int) -> float:
        """Of the term after so many forwards."""
        epoch = forwards // self.steps + 1
        if epoch < self.start:
            return 0.0
        return self.most * min(1.0, (epoch - self.start + 1) / (self.epochs - self.start + 1))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        forwards, filled, small, off = self.counts.tolist()
        epoch, weight = forwards // self.steps + 1, self.weight(forwards)
        self.counts[0] += 1
        if weight == 0.0 or off == epoch:
            return states[0].new_zeros(())
        if filled >= RING:
            self._pull()  # of the step before: the optimiser has moved K since
        losses = []
        for i, (lifting, (x, after)) in enumerate(zip(self.liftings, itertools.pairwise(states), strict=True)):
            lifted = lifting.phi(x)
            target = lifting.phi(other_sequence(after) if self.placebo else after)
            losses.append(F.smooth_l1_loss(lifted @ lifting.matrix.mT, target))
            for which, of in enumerate((lifted, target)):
                self.ring[i, which, filled % RING] = of.detach().mean((0, 1))
        self.counts[1] += 1
        loss = torch.stack(losses).mean()
        if not loss.isfinite():
            self.counts[3] = epoch
            return states[0].new_zeros(())
        if small > 0:
            self.counts[2] -= 1
            weight *= 0.01
        elif loss > self.threshold:
            self.counts[2] = 10
        return weight * loss

    @torch.no_grad()
    def _pull(self) -> None:
        for lifting, (before, after) in zip(self.liftings, self.ring, strict=True):
            found = published_dmd(before, after)
            if found is not None and found.isfinite().all():
                lifting.matrix.lerp_(found, RATE)


class PublishedBlock(nn.Module):
    """The original's Koopman forward of a block: x + psi(phi(LN x) K). No position hears of another."""

    def __init__(self, norm: nn.Module, lifting: Lifting) -> None:
        super().__init__()
        self.norm, self.lifting = norm, lifting

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.lifting.psi(self.lifting.phi(self.norm(x)) @ self.lifting.matrix), None


def koopman_forward(model: LanguageModel, term: PublishedTerm):
    """A context in which ``model`` (a ResNetBK with the mixer "diagonal") runs in the original's Koopman mode."""
    pairs = zip(model.blocks, term.liftings, strict=True)
    return replaced(model, {i: PublishedBlock(block.norm, lifting) for i, (block, lifting) in enumerate(pairs)})


@torch.no_grad()
def describe_lifting(model: LanguageModel, term: KoopmanTerm | PublishedTerm, ids: Tensor) -> dict[str, float]:
    """What a term learned, on ids (B, N), mean over blocks: R^2 of K, of predicting no change, and of least squares on the
    same pairs, all of the lifted state after the block; the variance of phi; and psi's share of x that is not explained."""
    with evaluating(model), recorded_states(model) as states:
        model.hidden(ids)
    rows = []
    for lifting, (x, after) in zip(term.liftings, itertools.pairwise(states), strict=True):
        if isinstance(term, KoopmanTerm):
            x, after = term.in_units(x, after)
        lifted, target = (lifting.phi(t).flatten(0, 1).double() for t in (x, after))
        matrix = lifting.matrix.double()
        foretold = lifted @ (matrix.mT if isinstance(term, PublishedTerm) else matrix)
        best = lifted @ edmd(lifted, target, 1e-9).to(lifted)
        shares = [1 - float(unexplained(guess, target)) for guess in (foretold, lifted, best)]
        reconstruction = float(unexplained(lifting.psi(lifting.phi(x)), x))
        rows.append([*shares, float(target.var(0).mean()), reconstruction])
    names = ("r2", "r2_persistence", "r2_least_squares", "phi_variance", "psi_error")
    return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
