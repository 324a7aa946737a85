"""The plan of a batch: a YAML file of notebooks and parameter sets, checked whole before anything starts.

    parameters: {profile: smoke, dataset: embedded}   # for every run; optional
    runs:
      - notebook: notebooks/01_grad_blend_sweep.ipynb
        name: two-alphas                              # its folder; optional, made from the parameters otherwise
        parameters: {alphas: [0, 0.5]}
      - notebook: "notebooks/0[13]_*.ipynb"           # a pattern, or a list of paths
        grid: {batch_size: [16, 32], seeds: [0, 1]}   # one run for every combination

Paths, those among the parameters too, are relative to the current folder. Each run gets a folder of its own, so
``output_dir`` is not a parameter to give.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import papermill
import yaml

from bklm.harness.values import anchored, as_path, is_empty
from bklm.notebook.form import form_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,99}")
TAKEN_NAMES = {
    "summary.html": "the batch writes its page there",
    "checkpoints": "folders of that name are left out of the zip",
}
GIVEN_BY_BATCH = {"output_dir": "the batch gives every run a folder of its own"}


@dataclass(frozen=True)
class Run:
    """One notebook with one parameter set. ``name`` is also the name of its folder."""

    name: str
    notebook: Path
    parameters: dict[str, Any]

    def all_parameters(self, folder: Path) -> dict[str, Any]:
        """The parameters that papermill gets: the run's set, its own folder as output_dir, and headless."""
        known = known_parameters(self.notebook)
        values = dict(self.parameters)
        if "headless" in known:
            values.setdefault("headless", True)
        if "output_dir" in known:
            values["output_dir"] = str(folder.resolve())
        form = form_of(self.notebook)
        for spec in form.specs() if form else ():
            # The notebook itself works in the repository's root.
            if spec.is_path and not is_empty(values.get(spec.name)):
                values[spec.name] = anchored(spec.name, as_path(spec.name, values[spec.name]))
        return values

    def fingerprint(self) -> str:
        """SHA-256 of the notebook's file: a run is done when this notebook has ended with these parameters."""
        return hashlib.sha256(self.notebook.read_bytes()).hexdigest()


def read_runs(path: Path) -> list[Run]:
    """The runs that a YAML file describes, in its order.

    Raises:
        ValueError: one sentence: where in the file, what was given, what is allowed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = _Loader(file).get_single_data()  # what yaml.safe_load does, with this loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())}).") from None
    _check_keys(content, {"parameters", "runs"}, {"runs"}, str(path))
    common = _mapping(content.get("parameters"), f"{path}: parameters")
    entries = content["runs"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: runs: got {entries!r}; allowed is a list of one or more runs.")
    runs = [
        run
        for number, entry in enumerate(entries, start=1)
        for run in _runs_of(entry, common, f"{path}: run {number}")
    ]
    for run in runs:
        if run.name.lower() in TAKEN_NAMES:
            why = TAKEN_NAMES[run.name.lower()]
            raise ValueError(f"{path}: {run.name!r} is no name for a run: {why}; give it another one.")
    # Folders of one name but for case are one folder on some disks.
    counts = Counter(run.name.lower() for run in runs)
    twice = [run.name for run in runs if counts[run.name.lower()] > 1]
    if twice:
        raise ValueError(
            f"{path}: {twice[0]!r} is the name of more than one run; give each a name of its own, or leave one out."
        )
    return runs


class _Loader(yaml.SafeLoader):
    """YAML without its surprise: of a key that stands twice, PyYAML takes the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise ValueError(
                    f"{self.name}: line {line}: the key {key.value!r} stands twice; leave one out."
                )
            seen.add((key.tag, key.value))
        return node


def _runs_of(entry: Any, common: dict[str, Any], place: str) -> Iterator[Run]:
    _check_keys(entry, {"notebook", "name", "parameters", "grid"}, {"notebook"}, place)
    own = _mapping(entry.get("parameters"), f"{place}: parameters")
    grid = _mapping(entry.get("grid"), f"{place}: grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}: grid: {key}: got {values!r}; allowed is a list of values to try.")
        if key in own:
            raise ValueError(f"{place}: {key} stands in parameters and in grid; leave one out.")
    notebooks = list(_notebooks(entry["notebook"], place))
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for notebook in notebooks:
        for point in points:
            values = {**common, **own, **point}
            check_parameters(notebook, values, place)
            yield Run(_name(entry.get("name"), notebook, own, point, len(notebooks), place), notebook, values)


def _notebooks(given: Any, place: str) -> Iterator[Path]:
    for pattern in given if isinstance(given, list) else [given]:
        # Path.glob takes no absolute pattern.
        given_path = as_path(f"{place}: notebook", pattern) if isinstance(pattern, str) else ""
        found = sorted(glob.glob(given_path)) or [given_path] * Path(given_path).is_file()  # noqa: PTH207
        if not found:
            raise ValueError(
                f"{place}: notebook: got {pattern!r}, which is no file here; allowed is the path of a notebook, "
                "a pattern such as notebooks/*.ipynb, or a list of them."
            )
        for path in found:
            if not path.endswith(".ipynb") or not Path(path).is_file():
                raise ValueError(f"{place}: notebook: got {path!r}; a notebook's name ends in .ipynb.")
            yield Path(path)


def known_parameters(notebook: Path) -> list[str]:
    """Names of a notebook's parameters: those of a form's first cell, too, which papermill does not look at."""
    inferred = papermill.inspect_notebook(notebook)
    form = form_of(notebook)
    return list(dict.fromkeys([*(form.names() if form else ()), *inferred]))


def check_parameters(notebook: Path, values: dict[str, Any], place: str) -> None:
    """Refuse a parameter that the notebook does not have, and a value that is no JSON or that its study does not allow.

    Papermill itself only warns of an unknown name, and runs with the default.

    Raises:
        ValueError: one sentence.
    """
    try:
        known = known_parameters(notebook)
    except (
        Exception
    ) as error:  # papermill raises what the JSON, nbformat or its own parser happens to trip over
        raise ValueError(f"{place}: {notebook} cannot be read as a notebook ({error}).") from None
    for name in values:
        if name in GIVEN_BY_BATCH:
            raise ValueError(f"{place}: {name}: {GIVEN_BY_BATCH[name]}; leave it out.")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"{place}: {notebook.name} has no parameter {name!r}; it has {', '.join(known) or 'none'}{hint}"
            )
        try:
            json.dumps(values[name], allow_nan=False)
        except (TypeError, ValueError):  # a date, a set, bytes; NaN; a list that holds itself
            raise ValueError(
                f"{place}: {name}: got {values[name]!r}; allowed are text, finite numbers, true, false, null, and lists and "
                "mappings of them; put a date into quotes."
            ) from None
    form = form_of(notebook)
    if form is not None:
        fields = {n: v for n, v in values.items() if n in form.names()}
        try:
            form(**fields).resolved()
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _name(given: Any, notebook: Path, own: dict[str, Any], point: dict[str, Any], many: int, place: str) -> str:
    """The name given, with what tells the runs of one entry apart; without one, the notebook's with its parameters."""
    if given is None:
        return _joined(notebook.stem, {**own, **point})
    if not isinstance(given, str) or not NAME.fullmatch(given):
        raise ValueError(
            f"{place}: name: got {given!r}; allowed are up to 100 letters, digits and . , _ - + =, a letter or digit first."
        )
    return _joined(f"{given}-{notebook.stem}" if many > 1 else given, point)


def _joined(stem: str, values: dict[str, Any]) -> str:
    """ "stem-batch_size=16-seeds=0,1"; a long or odd text is cut and told apart by its hash."""
    words = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in sorted(values.items())]
    exact = "-".join([stem, *words])
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", exact)
    if name != exact or not NAME.fullmatch(name):
        name = f"{name[:80].lstrip('_.,=+-') or 'run'}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return name


def _check_keys(given: Any, allowed: set[str], needed: set[str], place: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{place}: got {given!r}; allowed is a mapping with {', '.join(sorted(allowed))}.")
    for key in given:
        if key not in allowed:
            raise ValueError(f"{place}: got the key {key!r}; allowed are {', '.join(sorted(allowed))}.")
    for key in needed - set(given):
        raise ValueError(f"{place}: the key {key!r} is missing.")


def _mapping(given: Any, place: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{place}: got {given!r}; allowed are names with values, such as profile: smoke.")
    return given


OUTCOME_KEYS = {
    "name": str, "status": str, "notebook": str, "parameters": dict, "seconds": float, "error": str | None,
    "fingerprint": str,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How one run ended. ``seconds`` is its own time; "kept" is a run that an earlier batch had done."""

    name: str
    status: Literal["done", "kept", "failed"]
    notebook: str
    parameters: dict[str, Any]
    seconds: float
    error: str | None
    fingerprint: str
