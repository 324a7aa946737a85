"""Configurations of a wanted parameter count, so that a comparison of models is one at equal size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from bklm.models.base import LanguageModel
from bklm.models.checks import check_int
from bklm.models.conservative import Conservative, ConservativeConfig
from bklm.models.gpt import GPT, GPTConfig
from bklm.models.linear_context import LinearContext, LinearContextConfig
from bklm.models.lstm import LSTM, LSTMConfig
from bklm.models.resnet_bk import ResNetBK
from bklm.models.resnet_bk_config import ResNetBKConfig

Config = TypeVar("Config")
UNITS = 16  # a dense layer's width is a multiple: what vector units like


@dataclass(frozen=True)
class Sized(Generic[Config]):
    """A configuration and how close it came."""

    config: Config
    parameters: int
    wanted: int

    @property
    def difference(self) -> float:
        """Share by which the model is larger (or, negative, smaller) than wanted."""
        return self.parameters / self.wanted - 1


def gpt_of_size(
    parameters: int, vocab_size: int, n_seq: int, *, n_layers: int = 5, n_heads: int = 4, dropout_p: float = 0.1
) -> Sized[GPTConfig]:
    """The GPT of this depth and number of heads whose parameter count is nearest to ``parameters``.

    Raises:
        ValueError: even the narrowest such model is more than half as large again.
    """

    def build(width: int) -> GPTConfig:
        return GPTConfig(vocab_size, width * n_heads, n_layers, n_heads, n_seq, dropout_p)

    return _nearest(parameters, GPT, build)


def resnet_bk_of_size(
    parameters: int, vocab_size: int, n_seq: int | None, *, n_layers: int = 4, **settings: Any
) -> Sized[ResNetBKConfig]:
    """The ResNetBK of this depth whose parameter count is nearest to ``parameters``.

    Args:
        settings: further fields of ResNetBKConfig (num_experts, dropout_p, mixer, n_heads, ...).

    Raises:
        ValueError: even the narrowest such model is more than half as large again.
    """
    # The mixer "solve" shares the channels among its heads.
    solves = settings.get("mixer") == "solve"
    step = settings.get("n_heads", 1) if solves else 1

    def build(width: int) -> ResNetBKConfig:
        return ResNetBKConfig(vocab_size, width * step, n_layers, n_seq, **settings)

    found = _nearest(parameters, ResNetBK, build)
    if not solves or found.config.num_experts > 1 or found.config.dense_width is not None:
        return found
    # Its widths lie far apart, so the dense layer takes up the difference: 2 d + 1 parameters a unit and layer.
    missing = (found.wanted - found.parameters) / (n_layers * (2 * found.config.d_model + 1))
    width = max(UNITS, round((4 * found.config.d_model + missing) / UNITS) * UNITS)
    config = replace(found.config, dense_width=width)
    fitted = Sized(config, _count(ResNetBK, config), found.wanted)
    return min((found, fitted), key=lambda sized: abs(sized.difference))


def lstm_of_size(
    parameters: int, vocab_size: int, *, n_layers: int = 2, dropout_p: float = 0.1, tied: bool = True
) -> Sized[LSTMConfig]:
    """The LSTM of this depth whose parameter count is nearest to ``parameters``.

    Raises:
        ValueError: even the narrowest such model is more than half as large again.
    """

    def build(width: int) -> LSTMConfig:
        return LSTMConfig(vocab_size, width, n_layers, dropout_p, tied)

    return _nearest(parameters, LSTM, build)


def linear_context_of_size(
    parameters: int,
    vocab_size: int,
    *,
    n_layers: int = 4,
    dropout_p: float = 0.1,
    tied: bool = True,
    recurrence: str = "gated",
) -> Sized[LinearContextConfig]:
    """The LinearContext of this recurrence and depth whose parameter count is nearest to ``parameters``.

    Raises:
        ValueError: even the narrowest such model is more than half as large again.
    """

    def build(width: int) -> LinearContextConfig:
        return LinearContextConfig(vocab_size, width, n_layers, dropout_p, tied, recurrence)

    return _nearest(parameters, LinearContext, build)


def conservative_of_size(
    parameters: int, vocab_size: int, d_model: int, *, n_layers: int = 4, **settings: Any
) -> Sized[ConservativeConfig]:
    """The Conservative of this width and depth whose parameter count is nearest to ``parameters``: its potentials take up the
    difference.

    Args:
        settings: further fields of ConservativeConfig (every, step, n_heads, dropout_p, ...).

    Raises:
        ValueError: even with potentials of one unit the model is larger.
    """
    check_int("parameters", parameters, 1)
    one = ConservativeConfig(vocab_size, d_model, n_layers, units=1, **settings)
    two = replace(one, units=2)
    least = _count(Conservative, one)
    if least > parameters:
        raise ValueError(
            f"parameters: got {parameters}, but a Conservative with this vocabulary, width and depth has at least {least}; "
            "ask for more, or for a smaller width."
        )
    units = 1 + round((parameters - least) / (_count(Conservative, two) - least))
    config = replace(one, units=units)
    return Sized(config, _count(Conservative, config), parameters)


def _count(model: Callable[[Config], LanguageModel], config: Config) -> int:
    with torch.device("meta"):
        return model(config).num_parameters()


def _nearest(
    wanted: int, model: Callable[[Config], LanguageModel], build: Callable[[int], Config]
) -> Sized[Config]:
    """Bisection over the width, which the count grows with. Models are built without memory for their weights."""
    check_int("parameters", wanted, 1)

    def count(width: int) -> int:
        return _count(model, build(width))

    low, high = 1, 2
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    width = min((low, high), key=lambda w: abs(count(w) - wanted))
    found = Sized(build(width), count(width), wanted)
    if found.difference > 0.5:
        raise ValueError(
            f"parameters: got {wanted}, but the smallest {model.__name__} with this vocabulary, depth and length has "
            f"{found.parameters}; ask for more, or for fewer layers."
        )
    return found
