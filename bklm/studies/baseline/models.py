"""The competitors of the baseline study, all of the size that NewLLM has with this vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

from bklm.models import (
    GPT,
    LSTM,
    GPTConfig,
    LanguageModel,
    LinearContext,
    LinearContextConfig,
    LSTMConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
    reading_settings,
)
from bklm.models.sizing import Sized, gpt_of_size, linear_context_of_size, lstm_of_size, resnet_bk_of_size
from bklm.training.context_gain import WINDOW_LENGTHS

# What "all" compares, at equal parameters.
COMPETITORS = ("newllm", "gpt", "lstm", "resnet_bk", "resnet_bk_diagonal", "linear_context")
LATER = ("resnet_bk", "linear_context")  # than what was published
# Those that make much of their context, for a text that five models take too long on.
READERS = ("gpt", "lstm", "resnet_bk")
TITLES = {
    "newllm": "NewLLM",
    "gpt": "GPT",
    "resnet_bk": "ResNetBK",
    "newllm_advanced": "NewLLM advanced",
    "lstm": "LSTM",
    "resnet_bk_diagonal": "ResNetBK diagonal",
    "linear_context": "LinearContext",
}
CONTEXT_LENGTHS = WINDOW_LENGTHS  # windows that trained models are scored with
HEADS = (8, 4, 2, 1)  # of the ResNetBK that reads: the most that have
LEAST_WIDTH = 8  # so many channels each
BYTES_PER_PARAMETER = 12  # weight and Adam's two moments, in float32
CLASSES: dict[str, tuple[type[LanguageModel], type]] = {
    "newllm": (NewLLM, NewLLMConfig),
    "gpt": (GPT, GPTConfig),
    "resnet_bk": (ResNetBK, ResNetBKConfig),
    "newllm_advanced": (NewLLM, NewLLMConfig),
    "lstm": (LSTM, LSTMConfig),
    "resnet_bk_diagonal": (ResNetBK, ResNetBKConfig),
    "linear_context": (LinearContext, LinearContextConfig),
}


def model_names(choice: str, protocol: str) -> tuple[str, ...]:
    """The models that one value of the ``model`` field stands for; "original" has what was published only."""
    if choice == "readers":
        return READERS
    if choice != "all":
        return (choice,)
    return tuple(name for name in COMPETITORS if protocol != "original" or name not in LATER)


def model_settings(name: str, vocab_size: int, seq_len: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config class of model ``name``; ``sizes`` are NewLLM's other fields.

    The others are made as wide as NewLLM's parameter count allows. GPT has as many positions as it is trained on, not one
    more: a position that was never trained would be a wasted parameter, and its output noise. The others have no position
    embedding. "resnet_bk" applies the resolvent to values, "resnet_bk_diagonal" is the published model. "newllm_advanced"
    doubles context and layers, as the original's did, and is larger.
    """
    newllm = NewLLMConfig(vocab_size, **sizes)
    if name == "newllm":
        found = newllm
    elif name == "newllm_advanced":
        found = dataclasses.replace(newllm, context_dim=2 * newllm.context_dim, n_layers=2 * newllm.n_layers)
    else:
        size = (count_parameters("newllm", dataclasses.asdict(newllm)), vocab_size)
        more: dict[str, Any] = {"dropout_p": newllm.dropout_p}
        found = {
            "gpt": lambda: gpt_of_size(*size, seq_len, **more),
            "lstm": lambda: lstm_of_size(*size, **more),
            "resnet_bk": lambda: _reading_resnet_bk(*size, seq_len, **more),
            "resnet_bk_diagonal": lambda: resnet_bk_of_size(*size, None, **more),
            "linear_context": lambda: linear_context_of_size(*size, **more),
        }[name]().config
    return dataclasses.asdict(found)


def _reading_resnet_bk(parameters: int, vocab_size: int, seq_len: int, **more: Any) -> Sized[ResNetBKConfig]:
    solve = reading_settings(seq_len) | more
    width = resnet_bk_of_size(parameters, vocab_size, None, **solve).config.d_model
    heads = next(h for h in HEADS if h == 1 or width >= h * LEAST_WIDTH)
    return resnet_bk_of_size(parameters, vocab_size, None, n_heads=heads, **solve)


def count_parameters(name: str, settings: Mapping[str, Any]) -> int:
    """Of a model that is built without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, settings).num_parameters()


def build_model(name: str, settings: Mapping[str, Any]) -> LanguageModel:
    """The model ``name`` with these fields of its config class; weights from torch's global generator."""
    model_class, config_class = CLASSES[name]
    return model_class(config_class(**settings))


def read_model(name: str, settings: Mapping[str, Any], weights: Path) -> LanguageModel:
    """The model with the weights of a safetensors file; on the CPU, in evaluation mode."""
    model = build_model(name, settings)
    load_model(model, str(weights))
    return model.eval()


def active_parameters(model: LanguageModel) -> int:
    """Parameters that take part in predicting one token: all, but of a mixture only the experts that a token visits."""
    total = model.num_parameters()
    if not isinstance(model, ResNetBK):
        return total
    config = model.config
    experts = sum(p.numel() for n, p in model.named_parameters() if ".moe.up_" in n or ".moe.down_" in n)
    return total - experts * (config.num_experts - config.top_k) // config.num_experts
