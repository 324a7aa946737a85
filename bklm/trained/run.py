"""What a run left, read and never changed: its folder or its zip, its manifest, and which trained models are in it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bklm.models import LanguageModel
from bklm.models.by_name import CLASSES, built, config_class

MANIFEST, WEIGHTS, RECORD = "manifest.json", "best_model.safetensors", "result.json"
TOKENIZER, OLD_TOKENIZER = "tokenizer.json", "vocabulary.json"
# Later classes than those whose records do not name their own.
_NAMED = ("Conservative",)
# Classes whose configs have the same fields, where a record of an earlier version does not name its own.
_BY_NAME = {"lstm": "LSTM", "linear_context": "LinearContext"}


@dataclass(frozen=True)
class SavedModel:
    """One trained model of a run: the folder of its weights and the record of its training."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """ "gpt", "alpha 0.5", "pretrained, frozen, tied": the arm that it is of."""
        if "alpha" in self.record:
            return f"alpha {self.record['alpha']:g}"
        return str(self.record.get("model") or self.record.get("arm") or self.folder.name)

    @property
    def val_ppl(self) -> float:
        """Infinite where nothing was measured since the model was changed."""
        return self.record.get("val_ppl", math.inf)

    @property
    def model_class(self) -> str:
        """The name of its class in ``bklm.models``."""
        if known := self.record.get("model_class"):
            return known
        keys = set(self.record["model_config"])
        old = [c for c in CLASSES if c not in _NAMED]
        fit = [c for c in old if keys <= {f.name for f in dataclasses.fields(config_class(c))}]
        # The fewest fields besides: NewLLM's are no ResNetBK's, but an older ResNetBK had fewer than today's.
        fit.sort(key=lambda c: len(dataclasses.fields(config_class(c))))
        return _BY_NAME.get(self.record.get("model", ""), fit[0]) if fit else "of no known class"

    @property
    def has_potential(self) -> bool:
        """Whether it has a BK-core, whose potential and resolvent can be shown."""
        return self.model_class == "ResNetBK"

    def build(self) -> LanguageModel:
        """The model with fresh weights.

        Raises:
            ValueError: this version of bklm has no such model, or not with these settings.
        """
        name = self.model_class
        if name not in CLASSES:
            raise ValueError(
                f"{self.folder}: its model is {name!r}, which bklm {_version()} does not have; update bklm."
            )
        try:
            return built(name, self.record["model_config"])
        except TypeError as error:
            raise ValueError(
                f"{self.folder}: its {name} has settings that bklm {_version()} does not know ({error}); update bklm."
            ) from error


def _version() -> str:
    from bklm import __version__

    return __version__


@dataclass(frozen=True)
class SavedRun:
    """A run as a folder on disk; of a zip, the parts that are needed, unpacked for as long as this object lives."""

    folder: Path
    source: Path  # what the caller named
    manifest: Mapping[str, Any]
    temporary: tempfile.TemporaryDirectory | None = None

    def models(self) -> list[SavedModel]:
        """The models whose weights are here, the best first: the study's own choice, else the lowest validation PPL."""
        found = []
        for weights in sorted(self.folder.rglob(WEIGHTS)):
            record = weights.with_name(RECORD)
            if record.exists():
                saved = SavedModel(weights.parent, _read(record))
                known = saved.record.get("val_ppl") is not None or "changed_from" in saved.record
                if "model_config" in saved.record and known:
                    found.append(saved)
        best = self.summary().get("best_model")
        return sorted(found, key=lambda m: (m.name != best, m.val_ppl))

    def summary(self) -> dict[str, Any]:
        """summary.json; {} where the run has none."""
        path = self.folder / "summary.json"
        return _read(path) if path.exists() else {}

    def choose(self, model: str | None = None) -> SavedModel:
        """The model of that name, or the best one.

        Raises:
            ValueError: there is none of that name, or none at all.
        """
        found = self.models()
        if not found:
            raise ValueError(
                f"{self.source} holds no trained model: the run is not finished, or its study trains none that is kept; give "
                "a finished run of 01, 03, 04 or 08 (05 to 07 keep theirs for the study alone)."
            )
        for saved in found:
            if model in (None, "", saved.name, saved.folder.name):
                return saved
        names = dict.fromkeys(saved.name for saved in found)
        raise ValueError(f"model: got {model!r}; {self.source} holds {', '.join(map(repr, names))}.")


def open_run(path: str | os.PathLike[str]) -> SavedRun:
    """A run from its folder, from the folder above where that holds one run, or from its zip.

    Raises:
        FileNotFoundError: there is nothing of that name. ValueError: it is no run, or several.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _unpack(place)
    if not place.exists():
        beside = sorted(p.name for p in place.parent.glob("*.zip")) if place.parent.is_dir() else []
        there = f"; there are {', '.join(beside)} in {place.parent}" if beside else ""
        raise FileNotFoundError(f"{place} does not exist; give a run's zip or folder{there}.")
    return SavedRun(folder := _folder_of(place, place), place, _manifest(folder, place))


def _folder_of(place: Path, named: Path) -> Path:
    if (place / MANIFEST).exists():
        return place
    inside = sorted(p.parent for p in place.glob(f"*/{MANIFEST}"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ValueError(f"{named} holds several runs; give one of {', '.join(str(p) for p in inside)}.")
    raise ValueError(
        f"{named} holds no {MANIFEST}: it is no finished run of bklm; give the zip or folder of one."
    )


def _unpack(archive: Path) -> SavedRun:
    temporary = tempfile.TemporaryDirectory(prefix="bklm-run-")
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = [n for n in opened.namelist() if n.endswith((".json", ".csv", ".html", WEIGHTS))]
            # Python's own extraction keeps names below the folder.
            opened.extractall(temporary.name, wanted)
    # Damaged data, and members that are encrypted or packed in a way that Python cannot read.
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise ValueError(f"{archive} is no zip, or a damaged one ({error}); copy it again.") from error
    folder = _folder_of(Path(temporary.name), archive)
    return SavedRun(folder, archive, _manifest(folder, archive), temporary)


def _manifest(folder: Path, source: Path) -> dict[str, Any]:
    found = _read(folder / MANIFEST)
    if not isinstance(found.get("config"), dict):
        raise ValueError(
            f"{source} holds a {MANIFEST} that no run of bklm wrote; give the zip or folder of one."
        )
    return found


def make_own_folder(folder: Path, is_ours: bool, setting: str) -> None:
    """Make a folder to write into; one that is there must be empty or of an earlier such call (``is_ours``).

    Raises:
        ValueError: it holds something else, or is a file.
    """
    if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{setting}: {folder} holds other files; choose a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); take the run's zip, or run the study again.") from error
    return found
