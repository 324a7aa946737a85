"""The competitors of the baseline study, all of the size that NewLLM has with this vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from bklm.models import GPT, GPTConfig, LanguageModel, NewLLM, NewLLMConfig, ResNetBK, ResNetBKConfig
from bklm.models.sizing import gpt_of_size, resnet_bk_of_size

COMPETITORS = ("newllm", "gpt", "resnet_bk")  # what "all" compares, at equal parameters
TITLES = {
    "newllm": "NewLLM",
    "gpt": "GPT",
    "resnet_bk": "ResNetBK",
    "newllm_advanced": "NewLLM advanced",
}
CLASSES: dict[str, tuple[type[LanguageModel], type]] = {
    "newllm": (NewLLM, NewLLMConfig),
    "gpt": (GPT, GPTConfig),
    "resnet_bk": (ResNetBK, ResNetBKConfig),
    "newllm_advanced": (NewLLM, NewLLMConfig),
}


def model_names(choice: str) -> tuple[str, ...]:
    """The models that one value of the ``model`` field stands for."""
    return COMPETITORS if choice == "all" else (choice,)


def model_settings(name: str, config: Any, vocab_size: int) -> dict[str, Any]:
    """The fields of the config class of model ``name``, for a resolved `BaselineConfig`.

    GPT and ResNetBK are made as wide as NewLLM's parameter count allows. GPT has as many positions as it is trained on, not
    one more: a position that was never trained would be a wasted parameter, and its output noise. The others have no
    position embedding. "newllm_advanced" doubles context and layers, as the original's did, and is larger.
    """
    sizes = {n: getattr(config, n) for n in ("embed_dim", "hidden_dim", "context_dim", "n_layers")}
    newllm = NewLLMConfig(vocab_size, **sizes, dropout_p=config.dropout)
    if name == "newllm":
        found = newllm
    elif name == "newllm_advanced":
        found = dataclasses.replace(newllm, context_dim=2 * config.context_dim, n_layers=2 * config.n_layers)
    else:
        with torch.device("meta"):
            wanted = NewLLM(newllm).num_parameters()
        if name == "gpt":
            found = gpt_of_size(wanted, vocab_size, config.seq_len, dropout_p=config.dropout).config
        else:
            found = resnet_bk_of_size(wanted, vocab_size, None, dropout_p=config.dropout).config
    return dataclasses.asdict(found)


def build_model(name: str, settings: Mapping[str, Any]) -> LanguageModel:
    """The model ``name`` with these fields of its config class; weights from torch's global generator."""
    model_class, config_class = CLASSES[name]
    return model_class(config_class(**settings))


def active_parameters(model: LanguageModel) -> int:
    """Parameters that take part in predicting one token: all, but of a mixture only the experts that a token visits."""
    total = model.num_parameters()
    if not isinstance(model, ResNetBK):
        return total
    config = model.config
    experts = sum(p.numel() for n, p in model.named_parameters() if ".moe.up_" in n or ".moe.down_" in n)
    return total - experts * (config.num_experts - config.top_k) // config.num_experts
