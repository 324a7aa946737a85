"""Checks that model configurations share: one sentence for a field outside what is allowed."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from bklm.moe.tracing import is_ordinary, is_transformed

# Of torch 2.7 and later.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def is_plain_wanted(*tensors: Tensor | None) -> bool:
    """Whether a function with a backward of its own must be computed in ordinary operations: torch.func, forward mode,
    torch.jit.trace or torch.export look inside."""
    return is_transformed(*tensors) or _is_exporting()


def is_without_numbers(tensor: Tensor) -> bool:
    """Whether no number can be read from the tensor at any cost: a transform, a tracer or an export, or it has no values."""
    return is_plain_wanted(tensor) or tensor.is_meta or is_fake(tensor)


def values_at_hand(tensor: Tensor) -> bool:
    """Whether a value may be asked for at no cost: on a CPU, and nothing compiles, traces or maps over the tensor."""
    return tensor.device.type == "cpu" and is_ordinary(tensor) and not is_transformed(tensor)


def check_int(name: str, value: Any, least: int, also: str = "") -> None:
    """Refuse what is not a whole number (TypeError) or is below ``least`` (ValueError).

    One of numpy is refused, too: a configuration is kept as JSON, which has no word for it.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}; it must be a whole number of Python's own: give int({name}).")
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; it must be a whole number{also}.")
    if value < least:
        raise ValueError(f"{name}: got {value}; it must be at least {least}{also}.")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among ``allowed`` (ValueError)."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def check_real(name: str, value: Any, also: str = "") -> None:
    """Refuse what is not a real number (TypeError)."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; it must be a number{also}.")


def check_dropout(value: float) -> None:
    """Refuse what is not a number (TypeError), or a dropout probability outside [0, 1) (ValueError)."""
    check_real("dropout_p", value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"dropout_p: got {value}; it must be at least 0 and below 1.")
