"""What an int8 copy of a model does differently: its head, its losses, pickling; and that it does not train."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.compression.scored_only import ScoredOnly
from bklm.data.loaders import IGNORED
from bklm.models import LanguageModel, TokenLosses

HEAD = "int8_head"  # the head's name among a copy's modules


class Quantised(ScoredOnly):
    """What an int8 copy does differently from the model whose class it also has: its head, and that it does not train."""

    NOT_TRAINED = "an int8 model is not trained: its weights have no gradient; train the float one."

    def head(self) -> tuple[Tensor, Tensor | None]:
        raise TypeError("an int8 model has no float head; use its logits() or token_losses().")

    def logits(self, hidden: Tensor) -> Tensor:
        return getattr(self, HEAD)(hidden)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        # Rows that are not scored would make the scale coarser for the others.
        hidden = self.hidden(input_ids).masked_fill((targets == IGNORED).unsqueeze(-1), 0.0)
        logits = self.logits(hidden)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return TokenLosses(nll.view(targets.shape), logits.argmax(-1) == targets)

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class is made on the spot, for models of other people's classes too, so pickle cannot find it by name.
        return _empty_copy, (type(self).plain_class,), self.__dict__


@functools.cache
def class_of(model: type[LanguageModel]) -> type[LanguageModel]:
    """The class of the int8 copies of models of a class."""
    return type(f"Quantised{model.__name__}", (Quantised, model), {"plain_class": model})


def _empty_copy(model: type[LanguageModel]) -> LanguageModel:
    """An int8 copy before pickle or copy gives it its attributes."""
    kind = class_of(model)
    return kind.__new__(kind)
