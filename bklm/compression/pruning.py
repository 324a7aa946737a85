"""Weights set to zero: by magnitude, by Wanda's score, or at random as the floor that either must beat.

    magnitude         |w| over all matrices together                 (Han et al. 2015)
    magnitude by row  |w|, row by row: what Wanda is without its norms
    Wanda             |w_ij| * norm of input j over a text, row by row (Sun et al. 2023)

Zeros save bytes: ``save_compressed`` keeps a mask of one bit a weight and the weights that are not zero. Products stay dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bklm.compression.calibration import read_inputs
from bklm.compression.coded_model import copy_of, forget_codes, like, matrices, model_of, outer_names, put
from bklm.compression.coding import check_finite
from bklm.models import LanguageModel

METHODS = ("magnitude", "magnitude by row", "wanda", "random")
SCOPES = ("body", "outer", "all")


def prune(
    model: Any,
    sparsity: float,
    method: str = "magnitude",
    *,
    scope: str = "body",
    calibration: Iterable[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
) -> Any:
    """A copy with that share of its weights zero, in evaluation mode; the model is left as it is. It may be quantised next.

    Args:
        model: a language model, or a run of ``bklm.load``; the result is of the same kind.
        sparsity: of the matrices in scope with at least 8 inputs and outputs, 0 to below 1.
        method: one of METHODS.
        scope: "body": all but embeddings and head; "outer": these; "all".
        calibration: batches (x, y) of training text, which Wanda needs.
        seed: of a random mask.

    Raises:
        TypeError, ValueError: another kind of model, a value outside what is allowed, Wanda without text or for weights whose
            inputs are not seen.
    """
    plain = model_of(model, "prune")
    check_finite(plain.parameters())
    made = copy_of(plain)
    masks = masks_of(made, sparsity, method, scope=scope, calibration=calibration, seed=seed)
    forget_codes(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in masks:
                p.mul_(masks[name])
    put(made, {})
    return like(model, made)


def masks_of(
    model: LanguageModel,
    sparsity: float,
    method: str = "magnitude",
    *,
    scope: str = "body",
    calibration: Iterable[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Which weights stay, bool of each matrix's shape, by name; what ``prune`` applies."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity: got {sparsity}; the share of zeros lies between 0 and 1, 1 excluded.")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed are {', '.join(map(repr, METHODS))}.")
    weights = scoped(model, scope)
    if method == "wanda":
        return _wanda(model, weights, sparsity, calibration)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            n: torch.rand(w.shape, generator=generator, device="cpu").to(w.device) for n, w in weights.items()
        }
    else:
        scores = {n: w.detach().abs() for n, w in weights.items()}
    if method == "magnitude by row":
        return _largest_of_rows(scores, sparsity)
    return largest_kept(scores, sparsity)


def scoped(model: LanguageModel, scope: str) -> dict[str, Tensor]:
    """The matrices of a scope, by name.

    Raises:
        ValueError: an unknown scope, or one without a matrix.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}; allowed are {', '.join(map(repr, SCOPES))}.")
    outer = outer_names(model)
    chosen = {n: w for n, w in matrices(model).items() if scope == "all" or (n in outer) == (scope == "outer")}
    if not chosen:
        raise ValueError(
            f"scope: got {scope!r}, in which this {type(model).__name__} has no matrix with 8 inputs and outputs; take 'all'."
        )
    return chosen


def largest_kept(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks that keep the largest scores of all together; as many zeros as the sparsity says, to one."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    zeros = round(sparsity * len(flat))
    kept = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    kept[flat.topk(zeros, largest=False).indices] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape).clone() for (name, s), part in zip(scores.items(), parts, strict=True)}


def _wanda(
    model: LanguageModel,
    weights: Mapping[str, Tensor],
    sparsity: float,
    calibration: Iterable[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    inputs = read_inputs(model, calibration, "prune")
    unseen = [name for name in weights if name not in inputs]
    if unseen:
        raise ValueError(
            f"method: got 'wanda', but the inputs of {unseen[0]} of this {type(model).__name__} are not seen: it is no map "
            "of its own; take method 'magnitude', or scope 'body' where it is an embedding."
        )
    norms = {n: inputs[n].squares.sqrt().float().to(w.device) for n, w in weights.items()}
    return _largest_of_rows({n: w.detach().abs() * norms[n] for n, w in weights.items()}, sparsity)


def _largest_of_rows(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks that keep the largest scores of each row of inputs; as many zeros in every row of a matrix."""
    masks = {}
    for name, score in scores.items():
        zeros = round(sparsity * score.shape[-1])
        lost = score.topk(zeros, dim=-1, largest=False).indices
        masks[name] = torch.ones_like(score, dtype=torch.bool).scatter_(-1, lost, False)
    return masks
