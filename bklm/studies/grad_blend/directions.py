"""How long the candidate gradients of the potential are, and where they point, compared with the exact one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bklm.bk_core import BKCore
from bklm.models import ResNetBK
from bklm.models.resnet_bk_mixers import SolveCore

Core = BKCore | SolveCore


def measure_directions(
    model: ResNetBK, x: Tensor, y: Tensor, alphas: Sequence[float], gradient: str
) -> list[dict[str, Any]]:
    """Norm and cosine of each blended gradient against the exact one, on one real batch, layer by layer.

    The cotangent dL/dG of every layer is that of the exact backward pass of the same weights in evaluation mode, so all
    candidates answer the same question: given this dL/dG, in which direction does each rule move the potential v?

    Args:
        model: weights to measure at; left untouched.
        x, y: token ids and targets (B, N).
        alphas: blends to measure; ``gradient`` is their theory part ("exact", "local" or "original"). The mixer "solve" has
            "exact" only; dL/dG is dL/dy there, what the solve gives back.

    Returns:
        rows with layer (1-based, or "all": layers concatenated), direction, norm, norm_ratio and cosine.
    """
    device = next(model.parameters()).device
    exact = ResNetBK(dataclasses.replace(model.config, gradient="exact", grad_blend=0.0)).to(device).eval()
    exact.load_state_dict(model.state_dict())
    captured: list[tuple[Core, tuple[Tensor, ...], Tensor]] = []

    def keep(core: Core, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        output.retain_grad()
        captured.append((core, tuple(t.detach() for t in inputs), output))

    cores = [m for m in exact.modules() if isinstance(m, BKCore | SolveCore)]
    hooks = [core.register_forward_hook(keep) for core in cores]
    exact.loss(x.to(device), y.to(device)).backward()
    for hook in hooks:
        hook.remove()

    candidates = [("exact", "exact", 0.0), ("hypothesis-7", "exact", 1.0)]
    if model.config.mixer == "diagonal":
        candidates += [("local", "local", 0.0), ("original", "original", 0.0)]
        candidates += [("original hypothesis-7", "original", 1.0)]
    candidates += [(f"alpha {a:g}", gradient, a) for a in alphas]
    rows: list[dict[str, Any]] = []
    everything: dict[str, list[Tensor]] = {name: [] for name, *_ in candidates}
    for layer, (core, inputs, output) in enumerate(captured, start=1):
        directions = {}
        for name, theory, alpha in candidates:
            (grad,) = _gradient(core, theory, alpha, inputs, output.grad)
            directions[name] = grad.double().flatten()
            everything[name].append(directions[name])
        rows += _compare(layer, directions)
    return rows + _compare("all", {name: torch.cat(parts) for name, parts in everything.items()})


def _gradient(
    core: Core, theory: str, alpha: float, inputs: tuple[Tensor, ...], cotangent: Tensor
) -> tuple[Tensor, ...]:
    """What the potential receives from one rule."""
    if isinstance(core, SolveCore):
        values, v, bonds, z = inputs
        v = v.clone().requires_grad_(True)
        return torch.autograd.grad(SolveCore(core.causal, alpha)(values, v, bonds, z)[0], v, cotangent)
    v = inputs[0].clone().requires_grad_(True)
    return torch.autograd.grad(BKCore(core.n_heads, core.causal, theory, alpha, core.eta)(v), v, cotangent)


def _compare(layer: int | str, directions: dict[str, Tensor]) -> list[dict[str, Any]]:
    exact = directions["exact"]
    return [
        {
            "layer": layer,
            "direction": name,
            "norm": float(d.norm()),
            "norm_ratio": float(d.norm() / exact.norm()),
            "cosine": float(torch.dot(d, exact) / (d.norm() * exact.norm())),
        }
        for name, d in directions.items()
    ]
