"""One field of a study's config: type, bounds, choices and help, and the values that it accepts."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from bklm.harness.values import as_path, is_empty, plain


def setting(
    default: Any = None,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    above: float | None = None,
    is_path: bool = False,
) -> Any:
    """Declare one field of a study's config.

    Args:
        default: the value when nothing is given; ``None`` leaves the field to the profile.
        help: one line for the form, the widget's description and ``--help``.
        low, high: inclusive bounds of the value, or of each entry of a tuple.
        step: slider step; a number with ``low``, ``high`` and ``step`` becomes a slider in the form.
        above: exclusive lower bound (learning rates, tolerances).
        is_path: the text names a file or folder, which whoever runs the study from elsewhere must make absolute.
    """
    bounds = {"low": low, "high": high, "step": step, "above": above}
    return field(default=default, metadata={"help": help, "is_path": is_path, **bounds})


@dataclass(frozen=True)
class FieldSpec:
    """What one field allows: the view of the schema that forms, widgets and the command line share."""

    name: str
    base: type  # int, float, bool or str
    is_tuple: bool
    choices: tuple[str, ...]  # the words a Literal allows, () when the value is free
    default: Any
    help: str
    low: float | None
    high: float | None
    step: float | None
    above: float | None
    is_path: bool

    @property
    def is_slider(self) -> bool:
        return None not in (self.low, self.high, self.step) and not self.is_tuple

    def allowed(self) -> str:
        """The allowed values in words, for error messages and help."""
        if self.choices and self.base is str and not self.is_tuple:
            return "one of " + ", ".join(repr(c) for c in self.choices)
        noun = {int: "an integer", float: "a number", bool: "True or False", str: "text"}[self.base]
        if self.low is not None and self.high is not None:
            noun += f" in [{_number(self.low)}, {_number(self.high)}]"
        elif self.low is not None:
            noun += f" of at least {_number(self.low)}"
        elif self.above is not None and self.high is not None:
            noun += f" in ({_number(self.above)}, {_number(self.high)}]"
        elif self.above is not None:
            noun += f" greater than {_number(self.above)}"
        if self.is_tuple:
            noun = f"one or more values without repeats, each {noun}"
            if self.choices:
                noun += ", or the word " + " or ".join(repr(c) for c in self.choices)
        return noun

    def coerce(self, value: Any) -> Any:
        """Turn what a form, papermill or a caller gives into the field's value; ``None`` when it is empty.

        Raises:
            ValueError: one sentence naming the field, the value and what is allowed.
        """
        if is_empty(value):
            return None
        value = value.strip() if isinstance(value, str) else plain(value)
        problem = ValueError(f"{self.name}: got {value!r}; allowed is {self.allowed()}.")
        if isinstance(value, str) and value in self.choices:
            return value
        if not self.is_tuple:
            return self._one(value, problem)
        if isinstance(value, str):
            value = [part for part in value.strip("[]() ").replace(",", " ").split() if part]
        elif isinstance(value, int | float):
            value = [value]
        if isinstance(value, bytes | dict) or not isinstance(value, Iterable):
            raise problem
        entries = tuple(self._one(plain(v), problem) for v in value)
        if not entries or len(set(entries)) != len(entries):
            raise problem
        if self.base is float and len({f"{v:g}" for v in entries}) < len(entries):
            raise ValueError(
                f"{self.name}: got {value!r}; they must differ within six digits, which name their files."
            )
        return entries

    def _one(self, value: Any, problem: ValueError) -> Any:
        if self.base is bool:
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            if not isinstance(value, bool):
                raise problem
            return value
        if self.base is str:
            if self.is_path:
                return as_path(self.name, value)
            if isinstance(value, bool | bytes) or not isinstance(value, str | int | float):
                raise problem
            value = str(value)
            if self.choices and value not in self.choices:
                raise problem
            return value
        if isinstance(value, bool) or getattr(value, "ndim", 0):
            raise problem
        try:
            number = plain(float(value))
        except (TypeError, ValueError):
            raise problem from None
        if not math.isfinite(number) or (self.base is int and number != int(number)):
            raise problem
        too_low = (self.low is not None and number < self.low) or (
            self.above is not None and number <= self.above
        )
        if too_low or (self.high is not None and number > self.high):
            raise problem
        return self.base(number)


def _number(bound: float) -> str:
    """ "2147483647", "0.05": a bound as one would type it."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


@functools.cache
def spec_of(owner: type, item: dataclasses.Field) -> FieldSpec:
    """The schema of one field of a config class."""
    annotation = typing.get_type_hints(owner)[item.name]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = [p for p in (typing.get_args(annotation) if is_union else (annotation,)) if p is not type(None)]
    choices: tuple[str, ...] = ()
    base, is_tuple = str, False
    for part in parts:
        if typing.get_origin(part) is Literal:
            choices = typing.get_args(part)
        elif typing.get_origin(part) is tuple:
            base, is_tuple = typing.get_args(part)[0], True
        else:
            base = part
    keys = ("help", "low", "high", "step", "above", "is_path")
    return FieldSpec(item.name, base, is_tuple, choices, item.default, **{k: item.metadata[k] for k in keys})
