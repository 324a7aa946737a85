"""The form cell of a notebook, written from its study's config, and the config read back from the cell's variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import nbformat

from bklm.files.atomic import write_text
from bklm.harness.config import FieldSpec, StudyConfig
from bklm.studies import configs

FORMS: dict[str, type[StudyConfig]] = {f"notebooks/{c.notebook}.ipynb": c for c in configs()}
"""Which notebook's form belongs to which config."""

Config = TypeVar("Config", bound=StudyConfig)


def form_cell(config_class: type[StudyConfig]) -> str:
    """Source of the notebook's parameters cell: one Colab form line per field of the config, `headless` last."""
    lines = ['# @title Settings { display-mode: "form" }']
    lines += [_form_line(spec) for spec in config_class.specs()]
    lines.append('headless = False  # @param {type:"boolean"}')
    return "\n".join(lines)


def _form_line(spec: FieldSpec) -> str:
    default: Any = spec.default
    if isinstance(default, tuple):
        default = as_words(default)
    words = [*spec.choices] if not spec.is_tuple else []
    if words:
        options = ", ".join(f'"{w}"' for w in ([""] if default is None else []) + words)
        return f'{spec.name} = "{default or ""}"  # @param [{options}]'
    if spec.base is str or spec.is_tuple:
        return f'{spec.name} = "{default or ""}"  # @param {{type:"string"}}'
    if spec.base is bool and default is None:
        return f'{spec.name} = None  # @param ["None", "True", "False"] {{type:"raw"}}'
    if default is None:
        return f'{spec.name} = None  # @param {{type:"raw"}}'
    if spec.is_slider:
        return f'{spec.name} = {default}  # @param {{type:"slider", min:{spec.low:g}, max:{spec.high:g}, step:{spec.step:g}}}'
    kind = {bool: "boolean", int: "integer", float: "number"}[spec.base]
    return f'{spec.name} = {default!r}  # @param {{type:"{kind}"}}'


def as_words(value: Any) -> str:
    """A field's value as one types it: "0, 0.5" for a tuple, "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(as_words(v) for v in value)
    return (
        str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
    )


def config_from(config_class: type[Config], namespace: dict[str, Any]) -> Config:
    """The config that the parameters cell (or papermill's injected cell) describes; ``namespace`` is ``globals()``.

    Raises:
        ValueError: a value that the config does not allow.
    """
    return config_class(**{name: namespace[name] for name in config_class.names()})


def write_forms(root: Path = Path()) -> None:
    """Write every form cell into its notebook from the config that it belongs to."""
    for name, config_class in FORMS.items():
        path = root / name
        notebook = nbformat.read(path, as_version=4)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = form_cell(config_class)
        write_text(path, nbformat.writes(notebook) + "\n")
        print("wrote", path)
