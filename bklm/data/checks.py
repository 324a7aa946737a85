"""Refusing bad numbers in one sentence, before any time is spent."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any

import numpy as np


def require_whole(name: str, value: int, least: int, why: str = "") -> int:
    """``value`` as an int; ValueError naming it unless it is a whole number from ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number from {least}{why}")
    return int(value)


def index_or_none(value: Any) -> int | None:
    """``value`` as an index where it is one number (numpy's and torch's without dimensions included), else None."""
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_ids(ids: Any) -> np.ndarray:
    """Token ids as an array, one that maps a file left as it is; TypeError unless they are integers in one dimension."""
    ids = np.asanyarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise TypeError(
            f"token ids must be a one-dimensional array of integers, not {ids.dtype} of shape {ids.shape}"
        )
    return ids
