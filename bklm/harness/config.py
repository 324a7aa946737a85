"""One schema per study: a frozen dataclass whose fields carry type, bounds, choices, help and profile values.

The notebook's form cell, the widgets, the command line, papermill's parameters and the manifest are all derived from it.

A field whose value is ``None`` (or an empty string, as a form cell gives it) is *empty*: ``StudyConfig.resolved`` fills it
from the chosen profile. A value that was given always wins.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.fields import FieldSpec, setting, spec_of
from bklm.harness.tracker import check_tracker
from bklm.harness.values import anchored, as_path, is_empty

SMALLEST_BPE = 258  # entries of a byte-level BPE
WITHOUT_FOLDER = ("embedded", "hmm", "grammar")  # MADE_HERE of bklm.data, which imports torch

Profile = Literal["smoke", "quick", "full"]


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
        {"profile", "data_dir", "output_dir", "device", "storage", "workers", "processes", "tracker"}
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
        return [spec_of(cls, item) for item in cls._fields()]

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

    dataset: Literal["wikitext-2", "wikitext-103", "c4", "embedded", "hmm"] = setting(
        "wikitext-2", help="text to train on; embedded needs no network; c4 takes max_train_tokens"
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

    tracker: Literal["none", "tensorboard", "trackio", "wandb", "mlflow"] = setting(
        "none", help="where the training curves go, too; a tracker must be installed"
    )

    def resolved(self) -> TextStudyConfig:
        config = super().resolved()
        check_tracker(config.tracker)
        if config.storage:
            # SQLAlchemy takes half a second to import, and nobody else needs it.
            from bklm.sharing.database import check_address

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
