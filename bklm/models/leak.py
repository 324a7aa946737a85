"""Does a model see the future? Measured, not assumed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bklm.data.checks import index_or_none
from bklm.models.base import LanguageModel


@torch.no_grad()
def future_leak(model: LanguageModel, input_ids: Tensor, position: int, new_token: int | None = None) -> Tensor:
    """Change only the token at ``position`` and report how far the logits before it move.

    A model that predicts each token from earlier ones alone gives zeros, up to the rounding of double precision
    in which a copy of the model is run (in float32 a changed grouping of the experts would show as 1e-7).

    Args:
        input_ids: (B, N) int64.
        position: 1 <= position < N, the one that changes, in every row.
        new_token: what it becomes; the id after the old one, modulo the vocabulary, when None.

    Returns:
        (position,) float64: for each earlier position the largest absolute change over rows and vocabulary;
        ``.max()`` is the leak in one number, entry ``position - 1`` the one that predicts the changed token.

    Raises:
        TypeError: a position that is no whole number.
        ValueError: a position with nothing before it or beyond the text, or a replacement that changes nothing.
    """
    model.check_ids(input_ids)
    length, place = input_ids.shape[1], index_or_none(position)
    if place is None:
        raise TypeError(f"position: got {position!r}; it must be a whole number, 1 to {length - 1}.")
    position = place
    if not 1 <= position < length:
        raise ValueError(f"position: got {position}; with {length} tokens it must lie in 1 to {length - 1}.")
    changed = input_ids.clone()
    changed[:, position] = (input_ids[:, position] + 1) % model.vocab_size if new_token is None else new_token
    if (changed == input_ids).all():
        raise ValueError(
            f"new_token: got {new_token}, which is already at position {position}; choose another id."
        )
    exact = copy.deepcopy(model).double().eval()
    before, after = exact(input_ids), exact(changed)
    return (after - before)[:, :position].abs().amax((0, 2))
