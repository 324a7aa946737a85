"""Training and evaluation mode within a block of code: after it every part of a model is in the mode it was in before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """After the block, also after one that raised, each module of ``model`` is in its own mode of before.

    ``model.train(was_training)`` alone would wake parts that somebody had put into evaluation mode on purpose.
    """
    was_training = model.training
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # Some modules do more than switch: they forget what belonged to the other mode.
        model.train(was_training)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` is in evaluation mode, see ``keeping_modes`` for what comes after."""
    with keeping_modes(model):
        model.eval()
        yield
