"""One training step as a call, for what times it: the forward, backward, clipping and update of ``bklm.training.train``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from bklm.models import LanguageModel

LEARNING_RATE = 1e-3


def training_step(
    model: LanguageModel, x: Tensor, y: Tensor, accelerator: Accelerator, clip: float = 1.0
) -> Callable[[], Tensor]:
    """A call that takes one step on the batch (x, y), both (B, N), and returns the loss, detached: a scalar.

    It is what one process does with a whole batch, without a loss scaler. The model learns, and is to be in training mode and
    on the accelerator's device, as the batch.

    Args:
        clip: largest norm of the gradient, of ``model.parameters_apart()`` on its own.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    apart = [p for p in model.parameters_apart() if p.requires_grad]
    alone = {id(p) for p in apart}
    together = [p for p in trainable if id(p) not in alone]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with accelerator.autocast():
            loss = model.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(together, clip)
        if any(p.grad is not None for p in apart):
            torch.nn.utils.clip_grad_norm_(apart, clip)
        optimizer.step()
        return loss.detach()

    return step
