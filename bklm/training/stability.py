"""How fast and how stably something trains: steps to a loss, the largest rate that every seed survives, and a control."""

from __future__ import annotations

import itertools
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
    losses: Mapping[float, Sequence[tuple[float | None, float]]],
) -> tuple[float | None, dict[float, int]]:
    """The largest stable learning rate, the last of an unbroken run from the smallest; and how many seeds are stable at each.

    A training is stable if its loss stays finite and ends no higher than the untrained model's. A higher bar, such as the
    unigram model's loss, would measure how far a training has come: a rate that is too small misses it as well.

    Args:
        losses: by rate, one (last loss, untrained loss) per seed in nats; the last one is None where training diverged.

    Returns:
        None for the rate if already the smallest loses a seed.
    """
    stable = {
        rate: sum(last is not None and math.isfinite(last) and last <= first for last, first in found)
        for rate, found in sorted(losses.items())
    }
    whole = itertools.takewhile(lambda rate: stable[rate] == len(losses[rate]), stable)
    return max(whole, default=None), stable


def with_spectral_norm(model: LanguageModel) -> LanguageModel:
    """Divide, in place, every linear map of the model's blocks by its largest singular value (Miyato et al. 2018); returns
    the model."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            spectral_norm(module)
    return model
