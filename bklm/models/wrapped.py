"""A model that runs another one: what it does not say itself is that one's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bklm.models.base import LanguageModel


class Wrapped(LanguageModel):
    """``model``, part of this module, with its config, vocabulary and positions; a subclass has another training loss."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.config, self.vocab_size, self.n_seq = model.config, model.vocab_size, model.n_seq
        self.streams, self.sees_future = model.streams, model.sees_future

    @property
    def loss_is_likelihood(self) -> bool:
        return self.model.loss_is_likelihood

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self.model.hidden(input_ids)

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.model.head()

    def init_state(self, batch_size: int) -> Any:
        return self.model.init_state(batch_size)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        return self.model.prefill(input_ids)

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.model.step(token, state)

    def state_bytes(self, position: int) -> int:
        return self.model.state_bytes(position)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """What the model counts as its own, and what the wrapper adds: the parameters of a term, say."""
        inside = {id(p) for p in self.model.parameters()}
        added = [p for p in self.parameters() if id(p) not in inside]
        added = sum(p.numel() for p in added if p.requires_grad or not trainable_only)
        return self.model.num_parameters(trainable_only) + added

    def reset_expert_counts(self, counts: Any = ()) -> None:
        self.model.reset_expert_counts(counts)

    def expert_counts(self) -> list[list[int]]:
        return self.model.expert_counts()
