"""Linear operators fitted to pairs of states: DMD, EDMD, their spectrum with residuals, and a block that is one.

Rows are snapshots, and operators act from the right: ``following = states @ A``. (PyDMD has snapshots as columns.)
Fits are done in float64 on the CPU, with ``torch.linalg.lstsq``, ``solve`` and ``svd``.

- DMD (Schmid 2010): A of the states themselves, by a pseudo-inverse of chosen rank.
- EDMD (Williams, Kevrekidis, Rowley 2015): A of a dictionary's values, by least squares with a ridge.
- Residuals (ResDMD; Colbrook, Townsend 2024): an eigenvalue without one may be an artefact of the dictionary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bklm.data.checks import index_or_none
from bklm.models.base import LanguageModel
from bklm.models.checks import check_real

CONSTANT = 1e-3  # a function whose spread is a smaller share of its size is the constant one


def dmd(states: Tensor, following: Tensor, rank: int | None = None) -> Tensor:
    """A (D, D') float64 with ``following ~ states @ A``: the pseudo-inverse of ``states`` (M, D), times ``following`` (M, D').

    Args:
        rank: singular values kept, the largest; None: all above rounding.

    Raises:
        ValueError: fewer snapshots than that rank, or features; rows that do not pair up. TypeError: a rank that is no
            whole number.
    """
    x, y = _paired(states, following)
    if rank is not None and index_or_none(rank) is None:
        raise TypeError(f"rank: got {rank!r}; it must be a whole number, or None for all above rounding.")
    if rank is not None and not 1 <= rank <= min(x.shape):
        raise ValueError(
            f"rank: got {rank} with {len(x)} snapshots of {x.shape[1]} features; it can be 1 to {min(x.shape)}: give a "
            "smaller rank or more snapshots."
        )
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if rank is None:
        # What single precision cannot tell from nothing is nothing.
        tiny = max(x.shape) * torch.finfo(states.dtype).eps
        rank = int((s > tiny * s[0]).sum())
    return vh[:rank].mT @ ((u[:, :rank].mT @ y) / s[:rank, None])


def edmd(features: Tensor, target: Tensor, ridge: float = 0.0) -> Tensor:
    """A (K, D') float64 that minimises ``|features @ A - target|^2 + ridge m |A|^2``, m the features' mean square times M.

    Of several that do, with ridge 0, the smallest.

    Raises:
        ValueError: a ridge below 0; rows that do not pair up.
    """
    z, y = _paired(features, target)
    check_real("ridge", ridge)
    if not 0.0 <= ridge < math.inf:
        raise ValueError(f"ridge: got {ridge}; it must be 0 or a positive, finite number.")
    if ridge == 0.0:
        return torch.linalg.lstsq(z, y, driver="gelsd").solution
    gram = z.mT @ z
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, z.mT @ y)


class Spectrum(NamedTuple):
    """Eigenvalues (K,) complex128, the largest first, and the residual of each (K,) float64; K - 1 without the constant."""

    eigenvalues: Tensor
    residuals: Tensor


def spectrum(
    features: Tensor, following: Tensor, ridge: float = 1e-9, held_out: tuple[Tensor, Tensor] | None = None
) -> Spectrum:
    """Eigenvalues of the EDMD operator of a dictionary's values (M, K) before and after a step, with their residuals.

    The residual of (lambda, v) is |features' v - lambda features v| / |features v| over the snapshots, which is
    ``v*(L - lambda A* - conj(lambda) A + |lambda|^2 G)v / v*Gv`` under the root: how far the function ``features v`` is from
    being multiplied by lambda in a step. 0 for an eigenfunction; 1 says that nothing is known. The constant function, of
    eigenvalue 1 whatever the map, is left out.

    Args:
        held_out: other pairs (M', K), over which the residuals are taken: over those of the fit they are too small.
    """
    z, after = _paired(features, following)
    values, vectors = torch.linalg.eig(edmd(z, after, ridge))
    z, after = (z, after) if held_out is None else _paired(*held_out)
    seen = z.to(vectors.dtype) @ vectors
    left = (after.to(vectors.dtype) @ vectors - seen * values).norm(dim=0)
    size = seen.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    moves = (seen - seen.mean(0)).norm(dim=0) > CONSTANT * size
    values, residuals = values[moves], (left / size)[moves]
    order = values.abs().argsort(descending=True)
    return Spectrum(values[order], residuals[order])


def _paired(states: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    if states.ndim != 2 or following.ndim != 2 or len(states) != len(following) or not len(states):
        raise ValueError(
            f"snapshots: got shapes {tuple(states.shape)} and {tuple(following.shape)}; give two matrices of as many rows, "
            "one row a snapshot."
        )
    return states.detach().double().cpu(), following.detach().double().cpu()


class Dictionary(nn.Module):
    """(B, N, D) -> (B, N, size): 1, the states of this and ``taps`` - 1 positions before, ``units`` random tanh of them.

    States before the first position are 0. Delays make DMD a Hankel DMD; no position sees a later one. The tanh units have
    fixed Gaussian weights, of a size that fits the ``sample`` (M, D) of states.
    """

    def __init__(self, sample: Tensor, taps: int = 1, units: int = 0, seed: int = 0) -> None:
        super().__init__()
        width = sample.shape[-1]
        self.taps, self.size = taps, 1 + taps * width + units
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(units, taps * width, generator=random, device="cpu") / math.sqrt(taps * width)
        centre, spread = sample.mean(0), sample.std(0).clamp_min(1e-6)
        weight = weight.to(sample) / spread.repeat(taps)
        bias = torch.randn(units, generator=random, device="cpu").to(sample) - weight @ centre.repeat(taps)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        shifted = [x, *(nn.functional.pad(x, (0, 0, k, 0))[:, : x.shape[1]] for k in range(1, self.taps))]
        delayed = torch.cat(shifted, -1)
        parts = [x.new_ones(*x.shape[:-1], 1), delayed]
        if len(self.bias):
            parts.append(torch.tanh(nn.functional.linear(delayed, self.weight, self.bias)))
        return torch.cat(parts, -1)


class LinearBlock(nn.Module):
    """x + dictionary(x) A in place of a residual block: (B, N, D) -> (B, N, D) and no state."""

    def __init__(self, dictionary: Dictionary, operator: Tensor) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.register_buffer("operator", operator.to(dictionary.weight))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.dictionary(x) @ self.operator, None


class TokenBlock(nn.Module):
    """x + f(x) with ``f`` a map of each position alone, or None: x itself."""

    def __init__(self, f: nn.Module | None = None) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x if self.f is None else x + self.f(x), None


@contextlib.contextmanager
def replaced(model: LanguageModel, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within the block, ``model.blocks[i]`` is ``blocks[i]``; for scoring: it does not stream.

    Raises:
        TypeError: a model without blocks.
    """
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise TypeError(
            f"blocks: a {type(model).__name__} has none to replace; take a ResNetBK or LinearContext."
        )
    kept = {i: model.blocks[i] for i in blocks}
    try:
        for i, block in blocks.items():
            model.blocks[i] = block
        yield
    finally:
        for i, block in kept.items():
            model.blocks[i] = block


def tie_blocks(model: LanguageModel) -> LanguageModel:
    """Put, in place, the model's first block at every depth: an autonomous map, the only kind that has one spectrum; returns
    the model."""
    for i in range(1, len(model.blocks)):
        model.blocks[i] = model.blocks[0]
    return model
