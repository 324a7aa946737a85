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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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
        seed: number of the first kick, from which the forces draw their dropout; None: they draw none.
        backward: "reversible" keeps the last state alone, "checkpoint" each block's first, "plain" what autograd keeps. The
            gradients are the same; "plain" alone can be differentiated twice.
    """
    if backward == "reversible" and torch.is_grad_enabled():
        parameters = [x for force in forces for x in force.parameters() if x.requires_grad]
        return _Reversible.apply(list(forces), h, seed, q, p, *parameters)
    for block, force in enumerate(forces):
        step = (force, q, p, h, _after(seed, 2 * block))
        if backward == "checkpoint" and torch.is_grad_enabled():
            # Masks come from numbers: there is no random state to keep.
            q, p = checkpoint(leapfrog, *step, use_reentrant=False, preserve_rng_state=False)
        else:
            q, p = leapfrog(*step)
    return q, p


def undo_blocks(
    forces: Sequence[nn.Module], q: Tensor, p: Tensor, h: float, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """What ``run_blocks`` was given, from what it returned."""
    for block in reversed(range(len(forces))):
        q, p = leapfrog_inverse(forces[block], q, p, h, _after(seed, 2 * block))
    return q, p


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forces: list[nn.Module],
        h: float,
        seed: int | None,
        q: Tensor,
        p: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = q.device.type
        ctx.forces, ctx.h, ctx.seed = forces, h, seed
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for block, force in enumerate(forces):
            q, p = leapfrog(force, q, p, h, _after(seed, 2 * block))
        ctx.save_for_backward(q, p, *parameters)
        return q, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_bar: Tensor, p_bar: Tensor) -> tuple[Tensor | None, ...]:
        # Read for the check that nobody has changed them since.
        q, p, *parameters = ctx.saved_tensors
        h, found = ctx.h, {id(x): None for x in parameters}
        with torch.autocast(*ctx.autocast):
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
    force: nn.Module, q: Tensor, kick: int | None, p_bar: Tensor, found: dict[int, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The force at q, and J^T p_bar there; adds the gradients of the force's parameters to ``found``."""
    with torch.enable_grad():
        leaf = q.detach().requires_grad_()
        value = force(leaf, kick)
    own = [x for x in force.parameters() if x.requires_grad]
    pulled, *gradients = torch.autograd.grad(value, [leaf, *own], p_bar, allow_unused=True)
    for x, gradient in zip(own, gradients, strict=True):
        if gradient is not None:
            before = found[id(x)]
            found[id(x)] = gradient if before is None else before + gradient
    return value.detach(), torch.zeros_like(q) if pulled is None else pulled
