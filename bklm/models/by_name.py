"""Models by the name of their class: what a record or a file says of one is enough to build it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bklm import models

CLASSES = ("ResNetBK", "NewLLM", "GPT", "LSTM", "LinearContext", "ContextTokenLM", "Conservative")
"""Every class of a language model here; a new one is added to this tuple."""


def config_class(name: str) -> type:
    """The class of the configuration of ``bklm.models``' class of that name."""
    return getattr(models, "ContextTokenConfig" if name == "ContextTokenLM" else f"{name}Config")


def built(name: str, settings: Mapping[str, Any]) -> models.LanguageModel:
    """The model of that class and configuration with fresh weights.

    Raises:
        AttributeError: there is no such class. TypeError, ValueError: its configuration does not take these settings.
    """
    return getattr(models, name)(config_class(name)(**settings))
