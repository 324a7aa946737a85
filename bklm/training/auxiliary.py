"""A term added to a language model's training loss, computed from the states between its blocks.

    model = WithTerm(ResNetBK(config), term, weight=0.1)

``term(states)`` gets the tensors (B, N, D) before the first block and after every block, and returns a scalar. It has
parameters of its own, which no logit depends on. Scoring and generation are the model's. A term that moves numbers of its
own at each step says so by an attribute ``keeps_state = True``: it is computed where a call is a step, and refused elsewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bklm.models import LanguageModel
from bklm.models.checks import check_real, is_plain_wanted, is_without_numbers
from bklm.models.wrapped import Wrapped
from bklm.moe.ops import in_backward

_WITHOUT_GRADIENT = (
    "the auxiliary term has no gradient, because the forward that left it ran without grad mode, as reentrant activation "
    "checkpointing does: use checkpoint(..., use_reentrant=False), or, for the number alone, call it under torch.no_grad()"
)


class _LimitGradient(torch.autograd.Function):
    """The identity; the gradient that passes back is scaled to a norm of at most ``most``, each sample's own under vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.most = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)

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


class WithTerm(Wrapped):
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
        check_real("weight", weight)
        if limit is not None:
            check_real("limit", limit, ", or None for no limit")
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"weight: got {weight}; a term's weight is 0 or a positive, finite number.")
        if limit is not None and not limit > 0:
            raise ValueError(
                f"limit: got {limit}; the largest norm of a gradient is positive; give None for no limit."
            )
        with recorded_states(model):
            pass
        super().__init__(model)
        self.term, self.weight = term, weight
        self.detached, self.limit, self.apart = detached, limit, apart
        self._term: Tensor | None = None
        self._could_learn = True

    @property
    def loss_is_likelihood(self) -> bool:
        return self.weight == 0 and self.model.loss_is_likelihood

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's, so that one term may stand around another."""
        return self.model.blocks

    def hidden(self, input_ids: Tensor) -> Tensor:
        if not self.training:
            return self.model.hidden(input_ids)
        self._could_learn = torch.is_grad_enabled()
        with recorded_states(self.model) as states:
            hidden = self.model.hidden(input_ids)
        if getattr(self.term, "keeps_state", False):
            self._require_a_step(hidden)
        if not self.detached:
            self._require_gradients(states)
        self._term = self.weight * self.term(self.given(states))
        return hidden

    def given(self, states: list[Tensor]) -> list[Tensor]:
        """The states as the term is given them: detached, or with its gradient limited, where that was asked for."""
        if self.detached:
            return [x.detach() for x in states]
        return states if self.limit is None else [_LimitGradient.apply(x, self.limit) for x in states]

    def _require_gradients(self, states: list[Tensor]) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_plain_wanted():
            return
        for block, x in zip(self.model.blocks, states[1:], strict=True):
            if not x.requires_grad and any(p.requires_grad for p in block.parameters()):
                raise RuntimeError(_WITHOUT_GRADIENT)

    def _require_a_step(self, hidden: Tensor) -> None:
        """Refuse to compute a term with a state where that is no training step, or no number can be read."""
        name = type(self.term).__name__
        if not torch.compiler.is_compiling() and in_backward():
            raise RuntimeError(
                f"{name}: activation checkpointing computes this term a second time, and each time is a training step to it; "
                "checkpoint the model's blocks, not its hidden or loss."
            )
        if is_without_numbers(hidden):
            raise RuntimeError(
                f"{name}: this term reads numbers that it keeps from step to step, and torch.func, torch.export, a tracer or "
                "a tensor without values gives none; call eval() before, or take the model inside: without_term(model)."
            )

    def auxiliary_loss(self) -> Tensor | None:
        own, term, self._term = self.model.auxiliary_loss(), self._term, None
        if term is not None and torch.is_grad_enabled() and not self._could_learn:
            raise RuntimeError(_WITHOUT_GRADIENT)
        return term if own is None or term is None else own + term

    def parameters_apart(self) -> list[nn.Parameter]:
        return [*self.model.parameters_apart(), *(self.term.parameters() if self.apart else ())]

    def __getstate__(self) -> dict[str, Any]:
        # The term belongs to the graph of one forward; copies and pickles of the model must not drag it along.
        return {**self.__dict__, "_term": None}


def without_term(model: LanguageModel) -> LanguageModel:
    """The model inside a ``WithTerm``, or inside several; any other as it is."""
    while isinstance(model, WithTerm):
        model = model.model
    return model
