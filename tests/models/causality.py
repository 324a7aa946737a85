"""What every causal model must pass, written once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from bklm.models import LanguageModel


def require_no_gradient_to_the_future(model: LanguageModel, ids: Tensor, positions: Iterable[int]) -> None:
    """Logits at a position have a gradient of exactly zero in every later embedding, and another one in every earlier one.

    The gradient is that of the embedding as an input: a head tied to it does not count.
    """
    for position in positions:
        embedded: dict[str, Tensor] = {}

        def keep(module, given, output, store=embedded):
            store["x"] = output.requires_grad_()
            store["x"].retain_grad()

        handle = model.embedding.register_forward_hook(keep)
        model(ids)[:, position].square().sum().backward()
        handle.remove()
        gradient = embedded["x"].grad
        assert (gradient[:, position + 1 :] == 0).all()
        assert (gradient[:, : position + 1].abs().amax(-1) > 0).all()
