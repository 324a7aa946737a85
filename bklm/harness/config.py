"""One schema per study: a frozen dataclass whose fields carry type, bounds, choices, help and profile values.

The notebook's form cell, the widgets, the command line, papermill's parameters and the manifest are all derived from it.

A field whose value is ``None`` (or an empty string, as a form cell gives it) is *empty*: ``StudyConfig.resolved`` fills it
from the chosen profile. A value that was given always wins.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bklm.harness.values import anchored, as_path, is_empty, plain

SMALLEST_BPE = 258  # entries of a byte-level BPE
WITHOUT_FOLDER = ("embedded", "hmm")  # texts made on the spot: they read no folder

Profile = Literal["smoke", "quick", "full"]


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
def _spec(owner: type, item: dataclasses.Field) -> FieldSpec:
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


def with_ambient_folder(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values, ``data_dir`` taken from the environment where ``bklm.data.load_corpus`` would take it from there."""
    if "dataset" not in values or values["dataset"] in WITHOUT_FOLDER or values.get("data_dir"):
        return values
    ambient = os.environ.get("BKLM_DATA_DIR")
    return {**values, "data_dir": None if is_empty(ambient) else as_path("BKLM_DATA_DIR", ambient)}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Fields that every study has. Subclasses add theirs and set ``study`` and ``profiles``."""

    study: ClassVar[str]
    # Its notebook's name, without folder and ending.
    notebook: ClassVar[str]
    profiles: ClassVar[dict[str, dict[str, Any]]]
    # What each value of a field ``protocol`` fills in, where a study has one.
    protocols: ClassVar[dict[str, dict[str, Any]]] = {}
    # Fields of the form's first cell, at most ten, in its order; the others stand in a second one.
    basic: ClassVar[tuple[str, ...]] = ("profile", "output_dir", "device")
    # Fields that the notebook's controls show; where there are none here, the basic ones.
    controls: ClassVar[tuple[str, ...]] = ()
    # Where and how a run happens may change between a run and its continuation; what is computed may not.
    circumstances: ClassVar[frozenset[str]] = frozenset(
        {"profile", "data_dir", "output_dir", "device", "storage", "workers", "processes"}
    )

    # Loggers with several lines a trial, which go to run.log and not to the screen.
    quiet: ClassVar[tuple[str, ...]] = ()

    profile: Profile = setting("quick", help="smoke: seconds; quick: minutes; full: the original's size")
    output_dir: str = setting("results", is_path=True, help="folder for the study's files and zip")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", help="auto: the GPU if there is one")

    def __post_init__(self) -> None:
        for spec in self.specs():
            value = spec.coerce(getattr(self, spec.name))
            if value is None and spec.default is not None:
                value = spec.coerce(spec.default)
            object.__setattr__(self, spec.name, value)

    @classmethod
    def package(cls) -> str:
        """The study's package, which ``python -m`` runs, such as "bklm.studies.grad_blend"."""
        return cls.__module__.rpartition(".")[0]

    @classmethod
    def specs(cls) -> list[FieldSpec]:
        """The schema, field by field, in the order of the form."""
        return [_spec(cls, item) for item in cls._fields()]

    @classmethod
    def names(cls) -> list[str]:
        return [item.name for item in cls._fields()]

    @classmethod
    def _fields(cls) -> list[dataclasses.Field]:
        """The fields in the order of the form: ``basic`` first, the rest as declared, the base class's before."""
        place = {name: i for i, name in enumerate(cls.basic)}
        return sorted(dataclasses.fields(cls), key=lambda item: place.get(item.name, len(place)))

    def resolved(self) -> StudyConfig:
        """The same config with every empty field filled: a given value wins over the protocol's, that over the profile's.

        ``data_dir`` may stay empty: that is its meaning (use the network). Where the environment variable BKLM_DATA_DIR
        stands in for it, it is filled, so that manifest, command and estimate speak of the text that is read.
        """
        given = {n: v for n in self.names() if (v := getattr(self, n)) is not None}
        of_protocol = self.protocols.get(given.get("protocol"), {})
        values = with_ambient_folder({**self.profiles[self.profile], **of_protocol, **given})
        # A path that is no circumstance is part of what is computed, which other machines name alike.
        places = {s.name: v for s in self.specs() if s.is_path and not is_empty(v := values.get(s.name))}
        for name in places.keys() & self.circumstances:
            values[name] = anchored(name, as_path(name, places[name]))
        return type(self)(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into JSON."""
        return {n: list(v) if isinstance(v, tuple) else v for n in self.names() for v in [getattr(self, n)]}

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """Fields in which this (resolved) config computes something else than a recorded one did."""
        mine = self.to_dict()
        return [
            f"{n} ({recorded.get(n)!r} there, {mine[n]!r} now)"
            for n in self.names()
            if n not in self.circumstances and recorded.get(n) != mine[n]
        ]


@dataclass(frozen=True, kw_only=True)
class TextStudyConfig(StudyConfig):
    """Fields of a study that trains models on text, several seeds of each, and may share the work."""

    basic: ClassVar[tuple[str, ...]] = ("profile", "dataset", "data_dir", "output_dir", "device", "seeds")

    dataset: Literal["wikitext-2", "embedded", "hmm"] = setting(
        "wikitext-2", help="text to train on; embedded needs no network"
    )
    data_dir: str | None = setting(
        None, is_path=True, help="your own text: a file or a folder, used instead of the network"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", help="arithmetic of the matrix products")
    seeds: tuple[int, ...] | None = setting(None, low=0, high=2**31 - 1, help="one model per arm and seed")
    workers: int = setting(
        0, low=0, high=64, help="trials at once on this machine; 0: as cores or GPU memory allow"
    )
    processes: int = setting(
        1, low=1, high=8, step=1, help="processes that train one model together, from a notebook"
    )
    storage: str | None = setting(
        None, help="postgresql://user@host/database that several machines share; empty: this machine alone"
    )

    def resolved(self) -> TextStudyConfig:
        config = super().resolved()
        if config.storage:
            # SQLAlchemy takes half a second to import, and nobody else needs it.
            from bklm.harness.grid_storage import check_address

            check_address(config.storage)
        shared = [n for n, is_on in (("storage", config.storage), ("processes", config.processes > 1)) if is_on]
        if config.workers > 1:
            shared.append("workers")
        if len(shared) > 1:
            raise ValueError(
                f"{', '.join(shared)}: each is a way of its own to share the work; give one of them. For several workers on "
                "several machines start the command with storage that often on each."
            )
        return config


@dataclass(frozen=True, kw_only=True)
class WindowStudyConfig(TextStudyConfig):
    """Fields of a study whose models read windows of words."""

    batch_size: int = setting(32, low=4, high=512, step=4, help="sequences per optimiser step")
    seq_len: int | None = setting(None, low=2, high=65536, help="tokens per sequence")
    max_train_tokens: int | None = setting(None, low=0, high=10**12, help="training tokens used; 0: all")
    tokenizer: Literal["word", "bpe", "char"] = setting(
        "word", help="what a token is: a word between spaces, a piece of a BPE trained on the text, a character"
    )
    vocab_size: int | None = setting(None, low=3, high=1_000_000, help="largest vocabulary, tokens")
    n_layers: int | None = setting(None, low=1, high=256, help="blocks")
    dropout: float = setting(0.1, low=0, high=0.99, help="share of units dropped in training")
    weight_decay: float = setting(0.0, low=0, high=10, help="AdamW weight decay")
    schedule: Literal["constant", "cosine"] = setting("constant", help="learning rate over a run")

    def resolved(self) -> WindowStudyConfig:
        config = super().resolved()
        if config.tokenizer == "bpe" and config.vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"vocab_size: got {config.vocab_size} with tokenizer 'bpe', whose 256 bytes, <unk> and one merge make "
                f"{SMALLEST_BPE}; take at least that, or another tokenizer."
            )
        return config
