"""Gradients that may be differentiated again, of functions whose first ones are written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    cotangents: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradient of each input of ``function(*inputs)``, in plain operations; None where an input is None or needs none.

    What a hand-written backward returns where its own result will be differentiated (grad mode is on within it), or comes in
    batches. Each input is a node of its own there: where one was made from another, as hidden states are from a tied weight,
    that way must not be gone a second time.

    Args:
        cotangents: of the function's outputs, as ``torch.autograd.grad`` takes them.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        nodes = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in nodes if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(function(*nodes), wanted, cotangents, create_graph=again, allow_unused=True)
        )
    return [next(found) if t is not None and t.requires_grad else None for t in nodes]
