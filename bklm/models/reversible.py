"""Leapfrog steps as the layers of a network: an exact inverse, and a backward that keeps nothing but the last state.

A block with force F moves (q, p) by one step h of the leapfrog (Stoermer-Verlet) scheme, kick, drift, kick:

    p' = p + h/2 F(q),    q1 = q + h p',    p1 = p' + h/2 F(q1)

Read from the last line to the first it is its own inverse, whatever F is: a gradient, a causal mixer, or a sum of both. So
the backward rebuilds each block's input from its output while it differentiates (Gomez et al. 2017, RevNet; Chang et al.
2018): memory does not grow with depth, and each force is evaluated twice in all, as often as with checkpoints.

With gbar the gradients of q1 and p1, and J the Jacobian of F, one block's backward is

    q1bar += h/2 J(q1)^T p1bar,    pbar = p1bar + h q1bar,    qbar = q1bar + h/2 J(q)^T pbar

Dropout draws its masks from a number of each kick, so that a force computed again is the same force.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bklm.models.checks import is_plain_wanted

BACKWARDS = ("reversible", "checkpoint", "plain")

Force = Callable[[Tensor, int | None], Tensor]
"""(q, number of the kick) -> the force, of q's shape; None: no dropout. A module's parameters get gradients."""


def leapfrog(force: Force, q: Tensor, p: Tensor, h: float, kick: int | None = None) -> tuple[Tensor, Tensor]:
    """One step; ``kick`` is the number of its first kick, the second has the next one."""
    p = p + h / 2 * force(q, kick)
    q = q + h * p
    return q, p + h / 2 * force(q, _after(kick))


def leapfrog_inverse(
    force: Force, q: Tensor, p: Tensor, h: float, kick: int | None = None
) -> tuple[Tensor, Tensor]:
    """What ``leapfrog`` was given, from what it returned."""
    p = p - h / 2 * force(q, _after(kick))
    q = q - h * p
    return q, p - h / 2 * force(q, kick)


def _after(kick: int | None, kicks: int = 1) -> int | None:
    return None if kick is None else kick + kicks


def run_blocks(
    forces: Sequence[nn.Module],
    q: Tensor,
    p: Tensor,
    h: float,
    *,
    seed: int | None = None,
    backward: str = "reversible",
) -> tuple[Tensor, Tensor]:
    """(q, p) after one leapfrog step of each force.

    Args:
        seed: number of the first kick, from which the forces draw their dropout; None: they draw none; below 0: they draw
            other masks each time, so "plain" it is.
        backward: "reversible" keeps the last state alone, "checkpoint" each block's first, "plain" what autograd keeps. The
            gradients are the same, to any order. What looks inside (torch.func, tracers, compilers) is given "plain", and so
            is a gradient that will be differentiated again.
    """
    saves = torch.is_grad_enabled() and not (is_plain_wanted(q, p) or torch.compiler.is_compiling())
    saves = saves and (seed is None or seed >= 0)
    if backward == "reversible" and saves:
        bound = [_Bound(force) for force in forces]
        return _Reversible.apply(bound, h, seed, q, p, *_parameters(bound))
    for block, force in enumerate(forces):
        step = (q, p, h, _after(seed, 2 * block))
        if backward == "checkpoint" and saves:
            # Masks come from numbers: there is no random state to keep.
            q, p = checkpoint(leapfrog, _Bound(force), *step, use_reentrant=False, preserve_rng_state=False)
        else:
            q, p = leapfrog(force, *step)
    return q, p


def undo_blocks(
    forces: Sequence[nn.Module], q: Tensor, p: Tensor, h: float, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """What ``run_blocks`` was given, from what it returned."""
    for block in reversed(range(len(forces))):
        q, p = leapfrog_inverse(forces[block], q, p, h, _after(seed, 2 * block))
    return q, p


class _Bound:
    """A force with the weights that it has now, also where torch.func.functional_call has put others in by then or taken
    these away: the backward comes after its end."""

    def __init__(self, force: nn.Module) -> None:
        self.force, self.weights = force, dict(force.named_parameters())

    def __call__(self, q: Tensor, kick: int | None, weights: dict[str, Tensor] | None = None) -> Tensor:
        if weights is None:
            if all(self.weights[name] is x for name, x in self.force.named_parameters()):
                return self.force(q, kick)
            weights = self.weights
        return functional_call(self.force, weights, (q, kick))

    def learning(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.weights.items() if x.requires_grad}


def _parameters(forces: Sequence[_Bound]) -> list[Tensor]:
    """Those that learn, each once."""
    return list({id(x): x for force in forces for x in force.learning().values()}.values())


def _autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager]:
    """What brings the present autocast of a device back."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    found = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return lambda: torch.autocast(*found)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forces: list[_Bound],
        h: float,
        seed: int | None,
        q: Tensor,
        p: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.forces, ctx.h, ctx.seed, ctx.autocast = forces, h, seed, _autocast_of(q.device.type)
        for block, force in enumerate(forces):
            q, p = leapfrog(force, q, p, h, _after(seed, 2 * block))
        ctx.save_for_backward(q, p, *parameters)
        return q, p

    @staticmethod
    def backward(ctx: Any, q_bar: Tensor, p_bar: Tensor) -> tuple[Tensor | None, ...]:
        # Parameters are read for the check that nobody has changed them since; activation checkpointing gives copies.
        q, p, *_ = ctx.saved_tensors
        parameters = _parameters(ctx.forces)
        h, found = ctx.h, {id(x): None for x in parameters}
        with ctx.autocast():
            # once_differentiable is no way to refuse a second derivative: autograd.grad drops what it marks without a word.
            if torch.is_grad_enabled() or is_plain_wanted(q_bar, p_bar):
                return (None, None, None, *_plain_gradients(ctx, q, p, q_bar, p_bar))
            for block in reversed(range(len(ctx.forces))):
                force, kick = ctx.forces[block], _after(ctx.seed, 2 * block)
                kicked, pulled = _pull(force, q, _after(kick), h / 2 * p_bar, found)
                q_bar = q_bar + pulled
                p = p - h / 2 * kicked
                q = q - h * p
                p_bar = p_bar + h * q_bar
                kicked, pulled = _pull(force, q, kick, h / 2 * p_bar, found)
                q_bar = q_bar + pulled
                p = p - h / 2 * kicked
        return (None, None, None, q_bar, p_bar, *(found[id(x)] for x in parameters))


def _pull(
    force: _Bound, q: Tensor, kick: int | None, p_bar: Tensor, found: dict[int, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The force at q, and J^T p_bar there; adds the gradients of the force's parameters to ``found``."""
    own, weights = force.learning(), None
    if any(x.grad_fn is not None for x in own.values()):
        # Where one follows from another, that way must not be gone here, too.
        own = {name: x.detach().requires_grad_() for name, x in own.items()}
        weights = {**force.weights, **own}
    with torch.enable_grad():
        leaf = q.detach().requires_grad_()
        # Not the leaf itself: hooks of torch.utils.flop_counter on a module's inputs refuse one within autograd.grad.
        value = force(leaf.view_as(leaf), kick, weights)
    pulled, *gradients = torch.autograd.grad(value, [leaf, *own.values()], p_bar, allow_unused=True)
    for x, gradient in zip(force.learning().values(), gradients, strict=True):
        if gradient is not None:
            before = found[id(x)]
            found[id(x)] = gradient if before is None else before + gradient
    return value.detach(), torch.zeros_like(q) if pulled is None else pulled


def _plain_gradients(ctx: Any, q: Tensor, p: Tensor, q_bar: Tensor, p_bar: Tensor) -> list[Tensor | None]:
    """Of the blocks' input and parameters, as functions of all of them and of the two gradients that may be differentiated
    again; (q, p) the last state."""
    again = torch.is_grad_enabled()
    if ctx.seed is not None and is_plain_wanted(q_bar, p_bar):
        raise RuntimeError(
            "run_blocks: the masks of dropout cannot be drawn a second time for a batch of gradients at once; take "
            "backward='plain', or eval()."
        )
    # The first state, a function of the last one and of the parameters as that is of it: what it takes from them cancels.
    start = undo_blocks(ctx.forces, q, p, ctx.h, seed=ctx.seed)
    with torch.enable_grad():
        # Each input as a node of its own: the way by which one follows from another must not be gone twice.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in start]
        own = {id(x): x.view_as(x) for x in _parameters(ctx.forces)}
        q, p = inputs
        for block, force in enumerate(ctx.forces):
            weights = {name: own.get(id(x), x) for name, x in force.weights.items()}
            run = functools.partial(force, weights=weights)
            q, p = leapfrog(run, q, p, ctx.h, _after(ctx.seed, 2 * block))
        wanted = [*inputs, *own.values()]
        return list(torch.autograd.grad((q, p), wanted, (q_bar, p_bar), create_graph=again, allow_unused=True))
