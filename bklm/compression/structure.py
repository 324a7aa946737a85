"""Fewer parts: experts that little goes through, blocks that little depends on, and narrower models of the same kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bklm.compression.coded_model import like, model_of, put
from bklm.models import LanguageModel, ResNetBK
from bklm.models.modes import evaluating
from bklm.moe.analytic import choose
from bklm.moe.layer import AnalyticMoE
from bklm.training.evaluation import evaluate, without_padding

Batches = Iterable[tuple[Tensor, Tensor]]
WIDTHS = ("d_model", "embed_dim", "hidden_dim", "context_dim", "dense_width", "units")


@torch.no_grad()
def expert_use(model: LanguageModel, batches: Batches) -> list[list[int]]:
    """Positions that each expert of each mixture is given by its router without noise, one list a mixture.

    Raises:
        ValueError: no batches.
    """
    mixtures = [m for m in model.modules() if isinstance(m, AnalyticMoE) and m.router is not None]
    counts = [torch.zeros(m.num_experts, dtype=torch.int64) for m in mixtures]

    def listener(i: int) -> Any:
        def listen(module: AnalyticMoE, given: tuple[Tensor, ...]) -> None:
            # As the layer itself chooses, ties included: topk breaks them as it likes.
            logits = module.router(given[0]).flatten(0, -2).t()
            chosen = choose(logits, module.top_k).flatten().cpu()
            counts[i].add_(torch.bincount(chosen, minlength=module.num_experts))

        return listen

    hooks = [m.register_forward_pre_hook(listener(i)) for i, m in enumerate(mixtures)]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for x in (rows for batch in batches for rows, _ in without_padding(*batch)):
                model.hidden(x.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not any(int(c.sum()) for c in counts):
        raise ValueError(
            "remove_experts: calibration holds no text; give some batches (x, y) of the training text."
        )
    return [c.tolist() for c in counts]


def remove_experts(model: Any, keep: int, calibration: Batches) -> Any:
    """A copy with ``keep`` experts in each mixture, those that most positions of a text go to; its router chooses among them.

    The others are gone, and their parameters with them; the router takes its softmax over what is left.

    Raises:
        TypeError: a model without mixtures of experts. ValueError: more experts than there are, or fewer than its block has; a
            calibration without text.
    """
    plain = model_of(model, "remove_experts")
    config = plain.config
    if not isinstance(plain, ResNetBK) or config.num_experts == 1:
        raise TypeError(
            f"remove_experts: this {type(plain).__name__} has no mixture of experts; take a ResNetBK with num_experts above 1."
        )
    # With the mixer "solve" one expert is a layer of another kind.
    least = max(config.top_k, 2 if config.mixer == "solve" else 1)
    if not least <= keep <= config.num_experts:
        raise ValueError(f"keep: got {keep}; each mixture can keep {least} to {config.num_experts} experts.")
    kept = [
        sorted(sorted(range(len(use)), key=lambda e, use=use: -use[e])[:keep])
        for use in expert_use(plain, calibration)
    ]
    # One expert has no router to balance.
    made = ResNetBK(dataclasses.replace(config, num_experts=keep, balance=config.balance * (keep > 1)))
    state = {k: v.detach().cpu() for k, v in plain.state_dict().items()}
    for layer, experts in enumerate(kept):
        for name in ("up_weight", "up_bias", "down_weight", "down_bias", "router.weight", "router.bias"):
            key = f"blocks.{layer}.moe.{name}"
            state[key] = state[key][experts]
            if keep == 1 and name.startswith("router"):
                del state[key]
    made.load_state_dict(state)
    put(made.eval(), {})
    return like(model, made)


def skip_blocks(model: Any, count: int, calibration: Batches) -> Any:
    """A copy without ``count`` of its residual blocks: one after the other that whose loss on a text rises least without.

    Raises:
        TypeError: a model without residual blocks. ValueError: a count below 1 or not below the number of blocks, no text.
    """
    plain = model_of(model, "skip_blocks")
    blocks = getattr(plain, "blocks", None)
    if blocks is None or not hasattr(plain.config, "n_layers"):
        raise TypeError(
            f"skip_blocks: this {type(plain).__name__} has no residual blocks, so each layer needs the one before; take a "
            "ResNetBK, GPT or LinearContext."
        )
    if not 1 <= count < len(blocks):
        raise ValueError(f"count: got {count}; of {len(blocks)} blocks 1 to {len(blocks) - 1} can be skipped.")
    batches, kept = list(calibration), list(range(len(blocks)))
    for _ in range(count):
        tried = {b: _with_blocks(plain, [k for k in kept if k != b]) for b in kept}
        losses = {b: evaluate(m, batches, None).loss for b, m in tried.items()}
        kept.remove(min(losses, key=losses.__getitem__))
    made = _with_blocks(plain, kept)
    put(made, {})
    return like(model, made)


def _with_blocks(plain: LanguageModel, kept: Sequence[int]) -> LanguageModel:
    made = type(plain)(dataclasses.replace(plain.config, n_layers=len(kept)))
    place = {old: new for new, old in enumerate(kept)}
    state = {}
    for key, value in plain.state_dict().items():
        first, _, rest = key.partition(".")
        number, _, inner = rest.partition(".")
        if first != "blocks":
            state[key] = value.detach().cpu()
        elif int(number) in place:
            state[f"blocks.{place[int(number)]}.{inner}"] = value.detach().cpu()
    made.load_state_dict(state)
    return made.eval()


def narrower(config: Any, share: float, layers: int | None = None) -> Any:
    """A model configuration of the same kind with its widths times ``share``, to an even number, and ``layers`` layers.

    Heads share half a width: there are as many as divide that and the old number.

    Raises:
        ValueError: a share outside (0, 1], or layers below 1.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: got {share}; a narrower model has a share of the width above 0 and up to 1.")
    fields = {f.name for f in dataclasses.fields(config)}
    changes: dict[str, Any] = {
        name: max(2, 2 * round(getattr(config, name) * share / 2))
        for name in WIDTHS
        if name in fields and getattr(config, name) is not None
    }
    if "n_heads" in fields and "d_model" in fields:
        changes["n_heads"] = math.gcd(config.n_heads, changes["d_model"] // 2)
    if layers is not None:
        changes["n_layers"] = layers
    return dataclasses.replace(config, **changes)
