"""Refusing bad numbers in one sentence, before any time is spent."""

from __future__ import annotations

from numbers import Integral


def require_whole(name: str, value: int, least: int, why: str = "") -> int:
    """`value` as an int; ValueError naming it unless it is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number from {least}{why}")
    return int(value)
