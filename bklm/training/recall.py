"""The recall task on models of equal size: who remembers a pair, and over what distance?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from bklm.data.recall import Recall
from bklm.models import GPT, LanguageModel, LinearContext, NewLLM, NewLLMConfig, ResNetBK
from bklm.models.sizing import gpt_of_size, linear_context_of_size, resnet_bk_of_size
from bklm.training.evaluation import evaluate

HEADS = 4


def models_of_equal_size(task: Recall, width: int, n_layers: int) -> dict[str, Callable[[int], LanguageModel]]:
    """Builders, which take the vocabulary, of a NewLLM of this width and of four others with as many parameters.

    "LinearContext" is the gated one; "LRU" is linear with input. GPT has as many positions as it is trained on, and cannot
    be asked beyond. None has dropout: no sequence comes twice with the same answers.
    """

    def newllm(vocabulary: int) -> NewLLM:
        return NewLLM(NewLLMConfig(vocabulary, width, width, width, n_layers=n_layers, dropout_p=0.0))

    with torch.device("meta"):
        size = newllm(task.vocab_size).num_parameters()
    more = {"n_layers": n_layers, "dropout_p": 0.0}
    solve = {"mixer": "solve", "num_experts": 1, "n_heads": HEADS}
    found = {
        "ResNetBK": (ResNetBK, functools.partial(resnet_bk_of_size, n_seq=None, **solve, **more)),
        "GPT": (GPT, functools.partial(gpt_of_size, n_seq=task.seq_len, n_heads=HEADS, **more)),
        "LinearContext": (LinearContext, functools.partial(linear_context_of_size, **more)),
        "LRU": (LinearContext, functools.partial(linear_context_of_size, recurrence="lru", **more)),
    }
    builders: dict[str, Callable[[int], LanguageModel]] = {"NewLLM": newllm}
    for name, (model, sized) in found.items():
        builders[name] = lambda vocabulary, model=model, sized=sized: model(sized(size, vocabulary).config)
    return builders


def accuracy_by_distance(
    model: LanguageModel, task: Recall, distances: Sequence[int]
) -> dict[str, float | None]:
    """Share of right answers at each distance, by its number as text; None where the model has no such position."""
    found: dict[str, float | None] = {}
    for distance in distances:
        fits = model.n_seq is None or 2 * task.pairs + distance <= model.n_seq
        found[str(distance)] = evaluate(model, task.at_distance(distance), None).accuracy if fits else None
    return found
