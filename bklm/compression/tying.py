"""A head tied to the embedding of a model that has one of each: the head is not kept, but one small matrix.

    W = E M,   E (V, e) the embedding, M (e, D)

M is that of least squares (``tie_head``), or learns with the model in further training (``TiedModel``); it is kept in half
precision. The file holds e D numbers in place of V D; in memory, and in products, the head stays one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bklm.compression.coded_model import copy_of, like, model_of, put
from bklm.compression.coding import CannotServeError, Tied
from bklm.compression.retraining import Changed
from bklm.models import LanguageModel


def tie_head(model: Any) -> Any:
    """A copy whose head is its embedding times the matrix that brings it nearest to what it was. It may be quantised next.

    Args:
        model: a language model with a head of its own, or a run of ``bklm.load``; the result is of the same kind.

    Raises:
        TypeError: another kind of model, or one whose head is its embedding already. ValueError: weights that are not finite.
    """
    made = copy_of(model_of(model, "tie_head"))
    head, source = _names(made, "tie_head")
    put(made, {head: Tied(source, _nearest(made, head, source).half())})
    return like(model, made)


class TiedModel(Changed):
    """A model that learns with its head tied; ``baked`` gives the plain one.

    Args:
        model: learns in place, but for its head, which is no longer read.

    Raises:
        TypeError, ValueError: as ``tie_head``.
    """

    def __init__(self, model: LanguageModel) -> None:
        head, source = _names(model, "TiedModel")
        nearest = _nearest(model, head, source)
        super().__init__(model)
        self._head, self._source = head, source
        self.map = nn.Parameter(nearest.to(model.embedding.weight.device))
        model.get_parameter(head).requires_grad_(False)

    def change(self) -> dict[str, Tensor]:
        # As it is kept; the gradient passes.
        return {self._head: self.model.get_parameter(self._source) @ self.map.half().to(self.map.dtype)}

    def plain(self) -> LanguageModel:
        made = copy_of(self.model).requires_grad_(True)
        put(made, {self._head: Tied(self._source, self.map.detach().cpu().half())})
        return made


def _names(model: LanguageModel, caller: str) -> tuple[str, str]:
    """Of the head's weight and of the embedding."""
    names = {id(p): name for name, p in model.named_parameters()}
    head, embedding = model.head()[0], model.embedding.weight
    if head is embedding:
        raise TypeError(
            f"{caller}: the head of this {type(model).__name__} is its embedding already; it has nothing to tie."
        )
    return names[id(head)], names[id(embedding)]


def _nearest(model: LanguageModel, head: str, source: str) -> Tensor:
    """M of the least squared error, float32 on the CPU."""
    e, w = (model.get_parameter(n).detach().cpu().double() for n in (source, head))
    if not (bool(e.isfinite().all()) and bool(w.isfinite().all())):
        raise CannotServeError(
            "weights hold NaN or infinity, so the model has diverged; take an earlier checkpoint."
        )
    found = torch.linalg.lstsq(e, w).solution.float()
    if not bool(found.half().isfinite().all()):
        raise CannotServeError(
            f"this {type(model).__name__}'s embedding is brought to its head by numbers beyond half precision; keep the head."
        )
    return found
