"""What autocast does to matrix products, the mixture's and the models'."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# Asked here, for the compiler of torch 2.6 cannot follow the question.
_WITH_AUTOCAST = tuple(device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device))


def _has_autocast(device: str) -> bool:
    return device in _WITH_AUTOCAST or torch.amp.is_autocast_available(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products of x; None where it is off, for double, and on devices without it ("meta")."""
    device = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which products keep the dtype of what they are given."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
