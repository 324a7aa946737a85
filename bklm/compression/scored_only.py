"""What every model whose weights are integers has in common: it is scored and writes, and it does not learn."""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.models import LanguageModel
from bklm.models.loss import scored_targets


class ScoredOnly:
    """Comes before the class of the model that was rounded; a subclass has ``token_losses`` and says how to train instead."""

    NOT_TRAINED: str
    _counted: int

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Of the model that was rounded; none is trainable."""
        return 0 if trainable_only else self._counted

    @torch.no_grad()
    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """The loss in nats, float32, of targets (B, N) as ``LanguageModel.loss``, without a gradient.

        Raises:
            ValueError: an unknown reduction; a mean of which every target is ignored.
        """
        _, count = scored_targets(targets, reduction)
        total = self.token_losses(input_ids, targets).nll.sum()
        return total / count if reduction == "mean" else total

    def train(self, mode: bool = True) -> LanguageModel:
        if mode:
            raise TypeError(self.NOT_TRAINED)
        return super().train(False)
