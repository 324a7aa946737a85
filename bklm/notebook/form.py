"""The form cells of a notebook, written from its study's config, and the config read back from the cells' variables.

The first holds the basic fields, the second, folded away, the others. The second is papermill's parameters cell: the values
that papermill is given come behind it, and so behind both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import nbformat

from bklm.files.atomic import write_text
from bklm.harness.bundle import read_notebook
from bklm.harness.config import StudyConfig
from bklm.harness.fields import FieldSpec
from bklm.harness.values import as_typed
from bklm.studies import configs

FORMS: dict[str, type[StudyConfig]] = {f"notebooks/{c.notebook}.ipynb": c for c in configs()}
"""Which notebook's form belongs to which config."""

Config = TypeVar("Config", bound=StudyConfig)

# The line with which a notebook opens its study.
HANDLE = re.compile(r"^\s*(?:\w+\s*=\s*)?(?:notebook\.)?study\(\s*[\"'](\w+)[\"']", re.MULTILINE)


FORM_IDS = ("settings", "parameters")
"""Ids of a notebook's two form cells; the second is tagged "parameters", too."""


def form_cells(config_class: type[StudyConfig]) -> tuple[str, str]:
    """Sources of the two form cells: the basic fields; the others, ``headless`` last. One Colab form line a field."""
    specs = config_class.specs()
    basic = [_form_line(spec) for spec in specs if spec.name in config_class.basic]
    others = [_form_line(spec) for spec in specs if spec.name not in config_class.basic]
    others.append('headless = False  # @param {type:"boolean"}')
    titled = (("Settings", basic), ("More settings", others))
    return tuple("\n".join([f'# @title {title} {{ display-mode: "form" }}', *lines]) for title, lines in titled)


def _form_line(spec: FieldSpec) -> str:
    default: Any = spec.default
    if isinstance(default, tuple):
        default = as_typed(default)
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


def config_from(config_class: type[Config], namespace: dict[str, Any]) -> Config:
    """The config that the form cells (and papermill's injected cell) describe; ``namespace`` is ``globals()``.

    Raises:
        ValueError: a value that the config does not allow; a form that is not this version's, or was not run.
    """
    names = {*config_class.names(), "headless"}
    # What IPython has run, where it runs this.
    forms = [source for source in namespace.get("In", []) if re.match("# @title (More s|S)ettings ", source)]
    written = {name for source in forms for name in re.findall(r"(?m)^(\w+) = .*# @param", source)}
    if missing := [name for name in config_class.names() if name not in namespace]:
        raise ValueError(
            f"settings: this notebook's form has no {', '.join(missing)}. Run both settings cells; if they have no such line, "
            f"this is a copy from another version of bklm: open notebooks/{config_class.notebook}.ipynb of this one."
        )
    if unknown := sorted(written - names):
        raise ValueError(
            f"settings: {', '.join(unknown)} of this notebook's form is not known to this version of bklm; open "
            f"notebooks/{config_class.notebook}.ipynb of this one, or remove the line and restart."
        )
    return config_class(**{name: namespace[name] for name in config_class.names()})


def form_of(notebook: Path) -> type[StudyConfig] | None:
    """The config of the study that a notebook opens a handle on; None where it opens none.

    It is told by what the notebook holds: Colab names a copy "Copy of 01_...", Jupyter "01_...-Copy1".
    """
    for cell in read_notebook(notebook.read_text(encoding="utf-8")).cells:
        if cell.cell_type == "code" and (found := HANDLE.search(cell.source)):
            return {c.study: c for c in configs()}.get(found[1])
    return None


def is_headless(value: Any) -> bool:
    """Whether nobody looks, as form cells, papermill and callers say it: the text "False" is False, and nothing is False.

    Raises:
        ValueError: neither true nor false.
    """
    spec = FieldSpec("headless", bool, False, (), False, "", None, None, None, None, False)
    return bool(spec.coerce(value))


def write_forms(root: Path = Path()) -> None:
    """Write both form cells into every notebook from the config that it belongs to."""
    for file, config_class in FORMS.items():
        path = root / file
        notebook = read_notebook(path.read_text(encoding="utf-8"))
        cells = {cell.id: cell for cell in notebook.cells}
        for name, source in zip(FORM_IDS, form_cells(config_class), strict=True):
            cells[name].source = source
        write_text(path, nbformat.writes(notebook) + "\n")
        print("wrote", path)
