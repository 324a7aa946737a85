"""A term added to a language model's training loss, computed from the states between its blocks.

    model = WithTerm(ResNetBK(config), term, weight=0.1)

``term(states)`` gets the tensors (B, N, D) before the first block and after every block, and returns a scalar. It has
parameters of its own, which no logit depends on. Scoring and generation are the model's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bklm.models import LanguageModel


class _LimitGradient(torch.autograd.Function):
    """The identity; the gradient that passes back is scaled to a norm of at most ``most``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (ctx.most / gradient.norm().clamp_min(ctx.most)), None


@contextlib.contextmanager
def recorded_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the list fills with the states of every forward: before the first block, and after each.

    Raises:
        TypeError: a model without blocks, of which it has no states.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise TypeError(
            f"block states: got a {type(model).__name__}, which has no residual blocks; take a ResNetBK, GPT or LinearContext."
        )
    states: list[Tensor] = []

    def keep(block: nn.Module, given: tuple, out: Any) -> None:
        if not states:
            states.append(given[0])
        states.append(out[0] if isinstance(out, tuple) else out)

    # A block that is used at several depths has one hook, which is called at each.
    hooks = [block.register_forward_hook(keep) for block in {id(b): b for b in blocks}.values()]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def other_sequence(x: Tensor) -> Tensor:
    """x (B, N, D), each row from another sequence at the same position: what a placebo reads. With one row, half a row on."""
    return x.roll(1, 0) if len(x) > 1 else x.roll(max(1, x.shape[1] // 2), 1)


class WithTerm(LanguageModel):
    """``model`` with ``weight * term(states)`` added to its training loss.

    Args:
        weight: 0 or more; with 0 everything is computed, and nothing but rounding differs from the model alone.
        detached: the states are detached, so the term alone learns from it.
        limit: largest norm of the weighted term's gradient in each state; None: no limit. The model's own gradient is
            untouched by it.
        apart: the term's parameters are clipped on their own, and take nothing of the model's share of the clipping norm.

    Raises:
        ValueError, TypeError: a weight below 0, a limit that is not positive, a model without blocks.
    """

    def __init__(
        self,
        model: LanguageModel,
        term: nn.Module,
        weight: float,
        *,
        detached: bool = False,
        limit: float | None = None,
        apart: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"weight: got {weight}; a term's weight is 0 or a positive, finite number.")
        if limit is not None and not limit > 0:
            raise ValueError(
                f"limit: got {limit}; the largest norm of a gradient is positive; give None for no limit."
            )
        with recorded_states(model):
            pass
        self.model, self.term, self.weight = model, term, weight
        self.detached, self.limit, self.apart = detached, limit, apart
        self.config, self.vocab_size, self.n_seq = model.config, model.vocab_size, model.n_seq
        self.streams, self.sees_future = model.streams, model.sees_future
        self._term: Tensor | None = None

    def hidden(self, input_ids: Tensor) -> Tensor:
        if not self.training:
            return self.model.hidden(input_ids)
        with recorded_states(self.model) as states:
            hidden = self.model.hidden(input_ids)
        if self.detached:
            states = [x.detach() for x in states]
        elif self.limit is not None:
            states = [_LimitGradient.apply(x, self.limit) for x in states]
        self._term = self.weight * self.term(states)
        return hidden

    def auxiliary_loss(self) -> Tensor | None:
        own, term, self._term = self.model.auxiliary_loss(), self._term, None
        return term if own is None or term is None else own + term

    def parameters_apart(self) -> list[nn.Parameter]:
        return list(self.term.parameters()) if self.apart else []

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

    def reset_expert_counts(self, counts: Any = ()) -> None:
        self.model.reset_expert_counts(counts)

    def expert_counts(self) -> list[list[int]]:
        return self.model.expert_counts()


def without_term(model: LanguageModel) -> LanguageModel:
    """The model inside a ``WithTerm``; any other as it is."""
    return model.model if isinstance(model, WithTerm) else model
