"""The arms of the Koopman study, and what is measured of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bklm.harness.arms import Arm
from bklm.models import LanguageModel, ResNetBK, ResNetBKConfig
from bklm.models.koopman import tie_blocks
from bklm.models.modes import evaluating
from bklm.studies.koopman.config import KoopmanConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.context_gain import measure_context_gain, short_lengths
from bklm.training.evaluation import evaluate
from bklm.training.koopman import KoopmanTerm, PublishedTerm, describe_lifting, koopman_forward


def plain(config: KoopmanConfig, vocabulary: int) -> ResNetBK:
    """The model that reads; with the original's protocol the published one."""
    same = {"d_model": config.d_model, "n_layers": config.n_layers, "dropout_p": config.dropout}
    if config.protocol == "original":
        return ResNetBK(ResNetBKConfig.original(vocabulary, n_seq=config.seq_len, grad_blend=0.5, **same))
    heads = math.gcd(config.n_heads, config.d_model)
    # Without the short convolution: with its mixer off a block must hear of no other position, and the gates read that.
    solve = {"mixer": "solve", "num_experts": 1, "n_heads": heads, "convolution": 0}
    return ResNetBK(ResNetBKConfig(vocabulary, **solve, **same))


def tied(config: KoopmanConfig) -> Arm:
    """One block at every depth, for the spectrum, which is that of one model."""
    return Arm(lambda vocabulary: tie_blocks(plain(config, vocabulary)), seeds=1)


def arms_of(config: KoopmanConfig, steps: int) -> dict[str, Arm]:
    """The arms of a resolved config; ``steps`` of an epoch. The plain one is "none"."""
    size = (config.d_model, config.n_layers, config.lift)

    def term(weight: float, **more: Any) -> Callable[[int], LanguageModel]:
        placebo = {"placebo": more.pop("placebo", False)}

        def build(vocabulary: int) -> WithTerm:
            model = plain(config, vocabulary)
            if config.protocol == "corrected":
                return WithTerm(model, KoopmanTerm(*size, **placebo), weight, **more)
            published = PublishedTerm(
                *size, most=weight or max(config.weights), start=config.start_epoch, epochs=config.epochs, steps=steps,
                threshold=config.threshold, **placebo,
            )  # fmt: skip
            # Without a weight there is nothing to clip, and a norm with zeros in it is rounded otherwise.
            return WithTerm(model, published, 1.0 if weight else 0.0, apart=not weight)

        return build

    arms = {"none": Arm(lambda vocabulary: plain(config, vocabulary))}
    if config.parts not in ("all", "auxiliary"):
        return arms
    name = {"corrected": "mended", "original": "published"}[config.protocol]
    # That what the term does not touch is equal to the last bit is checked, on one seed, and not judged.
    same = {"kept": False, "seeds": 1, "same_as": "none"}
    arms["weight 0"] = Arm(term(0.0), **same)
    many = len(config.weights) > 1 or config.protocol == "corrected"
    for weight in (w for w in config.weights if w):
        called = f"{name} {weight:g}" if many else name
        placebo = f"placebo {weight:g}" if many else "placebo"
        arms[called] = Arm(term(weight), ("none", placebo), kept=False)
        arms[placebo] = Arm(term(weight, placebo=True), ("none",), kept=False)
    if config.protocol == "corrected" and any(config.weights):
        arms["detached"] = Arm(term(max(config.weights), detached=True), **same)
    return arms


def measure(text: Any, ids: Tensor, tokens: int) -> Callable[[LanguageModel], dict[str, Any]]:
    """What is recorded of a trained model: its gain from context, windows scored on so many validation tokens (0: all), and
    what its lifting learned on ``ids``."""

    def found(model: LanguageModel) -> dict[str, Any]:
        gained = measure_context_gain(
            model,
            text.val_loader(),
            text.unk_id,
            windows_of=lambda length: text.context_loader(length, tokens),
            window=text.seq_len,
            lengths=short_lengths(text.seq_len),
        )
        lifting: dict[str, float] = {}
        if isinstance(model, WithTerm):
            here = ids.to(next(model.parameters()).device)
            lifting = describe_lifting(model.model, model.term, here)
            if isinstance(model.term, PublishedTerm):
                lifting |= _koopman_mode(model, text, here)
        return {
            "vocabulary": text.vocab_size,
            **gained.record(),
            "lifting": lifting,
        }

    return found


@torch.no_grad()
def _koopman_mode(model: WithTerm, text: Any, ids: Tensor) -> dict[str, float]:
    """Perplexity of the published Koopman forward, and how many other positions' logits a changed token moves there."""
    with evaluating(model):
        middle = ids.shape[1] // 2
        changed = ids[:1].clone()
        changed[0, middle] = (ids[0, middle] + 1) % text.vocab_size
        with koopman_forward(model.model, model.term):
            perplexity = evaluate(model.model, text.val_loader(), text.unk_id).perplexity
            moved = (model.model(ids[:1]) != model.model(changed)).any(-1)[0]
    return {"koopman_ppl": perplexity, "koopman_moves": float(int(moved.sum()) - int(moved[middle]))}
