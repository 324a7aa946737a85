"""How fast and how stably something trains: steps to a loss, the largest rate that every seed survives, and a control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from bklm.models import LanguageModel


def steps_to_loss(epochs: Sequence[Mapping[str, Any]], target: float, first_loss: float) -> float | None:
    """Epochs (of whatever length they were recorded at) until the validation loss first was ``target`` or less.

    Between two scores the loss is taken as a straight line; None where it never got there.

    Args:
        epochs: records with "val_loss", in order.
        first_loss: before the first step.
    """
    before = first_loss
    for place, record in enumerate(epochs):
        loss = record["val_loss"]
        if loss <= target:
            return place + (before - target) / (before - loss) if before > target else float(place)
        before = loss
    return None


def largest_rate(
    perplexities: Mapping[float, Sequence[float | None]], unigram: float
) -> tuple[float | None, dict[float, int]]:
    """The largest learning rate at which all seeds stay finite and below the unigram model, and how many do at each.

    Args:
        perplexities: by rate, one per seed; None where training diverged.
    """
    stayed = {
        rate: sum(p is not None and math.isfinite(p) and p < unigram for p in found)
        for rate, found in sorted(perplexities.items())
    }
    whole = [rate for rate, count in stayed.items() if count == len(perplexities[rate])]
    return max(whole, default=None), stayed


def with_spectral_norm(model: LanguageModel) -> LanguageModel:
    """The model with every linear map of its blocks divided by its largest singular value (Miyato et al. 2018)."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            spectral_norm(module)
    return model
