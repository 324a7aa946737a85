"""What only a notebook needs: where it runs, its form cell and controls, live figures, and the download at the end.

Everything here also works headless (papermill, CI): nothing waits for a front end that is not there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as widgets
import nbformat
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Image, display

from bklm.checkpoints import write_text
from bklm.config import FieldSpec, StudyConfig
from bklm.reporting import Bundle, add_notebook, as_text, zip_study
from bklm.studies import GradBlendConfig, PrecisionConfig
from bklm.studies.folder import other_experiment

log = logging.getLogger(__name__)
# Which notebook's form belongs to which config.
FORMS = {
    "notebooks/01_grad_blend_sweep.ipynb": GradBlendConfig,
    "notebooks/02_precision_benchmark.ipynb": PrecisionConfig,
}

PICTURE_WIDTH = 760  # pixels: readable on a desktop, and scaled down by phones

Config = TypeVar("Config", bound=StudyConfig)


def where() -> str:
    """ "colab", "jupyter" (any other kernel, papermill's too) or "shell".

    Colab is told by its kernel class: its environment variables exist on Kaggle too, and a papermill subprocess on a
    Colab machine still has them.
    """
    shell = get_ipython()
    if shell is None:
        return "shell"
    if type(shell).__module__ == "google.colab._shell":
        return "colab"
    return "jupyter" if "IPKernelApp" in shell.config else "shell"


def form_cell(config_class: type[StudyConfig]) -> str:
    """Source of the notebook's parameters cell: one Colab form line per field of the config, `headless` last."""
    lines = ['# @title Settings { display-mode: "form" }']
    lines += [_form_line(spec) for spec in config_class.specs()]
    lines.append('headless = False  # @param {type:"boolean"}')
    return "\n".join(lines)


def _form_line(spec: FieldSpec) -> str:
    default: Any = spec.default
    if isinstance(default, tuple):
        default = ", ".join(f"{v:g}" for v in default)
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
    """The config that the parameters cell (or papermill's injected cell) describes; ``namespace`` is ``globals()``."""
    return config_class(**{name: namespace[name] for name in config_class.names()})


class Controls:
    """Widgets for some fields of a config. Headless they are not shown, and `config` returns what was given."""

    def __init__(self, config: StudyConfig, names: Sequence[str], headless: bool = False) -> None:
        self._config, self._headless = config, headless
        specs = {spec.name: spec for spec in config.specs()}
        resolved = config.resolved()
        self.widgets = {name: _widget(specs[name], getattr(resolved, name)) for name in names}
        self._message = widgets.HTML()
        for widget in self.widgets.values():
            widget.observe(lambda change: self._validate(), names="value")

    def show(self) -> None:
        """Display the controls; run the next cell again after a change."""
        if not self._headless:
            display(widgets.VBox([*self.widgets.values(), self._message]))

    def config(self) -> StudyConfig:
        """The config with the controls' values.

        When the study's folder already holds a run with other settings, an interactive run gets the next free folder
        beside it and says so; headless the study itself refuses.

        Raises:
            ValueError: a value that the config does not allow.
        """
        if self._headless:
            return self._config
        config = replace(self._config, **{name: w.value for name, w in self.widgets.items()})
        return _in_free_folder(config)

    def _validate(self) -> None:
        try:
            replace(self._config, **{name: w.value for name, w in self.widgets.items()}).resolved()
        except ValueError as error:
            self._message.value = f'<span style="color:#b00020">{error}</span>'
        else:
            self._message.value = ""


def _widget(spec: FieldSpec, value: Any) -> widgets.Widget:
    common = {
        "description": spec.name.replace("_", " "),
        "style": {"description_width": "9em"},
        "layout": widgets.Layout(width="min(32em, 95%)"),
    }
    if spec.is_slider and spec.base is int:
        return widgets.IntSlider(
            value=value,
            min=int(spec.low),
            max=int(spec.high),
            step=int(spec.step),
            continuous_update=False,
            **common,
        )
    if spec.choices and not spec.is_tuple:
        return widgets.Dropdown(options=list(spec.choices), value=value, **common)
    if spec.base is bool:
        return widgets.Checkbox(value=value, **common)
    if spec.is_tuple:
        return widgets.Text(value=", ".join(f"{v:g}" for v in value), continuous_update=False, **common)
    if spec.base is int:
        return widgets.BoundedIntText(
            value=value, min=int(spec.low or 0), max=int(spec.high or 2**31), **common
        )
    return widgets.Text(value=str(value), continuous_update=False, **common)


def _in_free_folder(config: Config) -> Config:
    base, number = config.output_dir, 1
    while other_experiment(config.resolved()):
        number += 1
        config = replace(config, output_dir=str(Path(base) / f"run_{number}"))
    if number > 1:
        print(
            f"{base} holds a run with other settings and stays as it is; this one goes to {config.output_dir}."
        )
    return config


class LiveFigure:
    """A picture in the output of one cell, shown again each time its file was drawn anew."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, path: Path) -> None:
        image = Image(data=path.read_bytes(), width=PICTURE_WIDTH)
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)


def show_table(rows: Sequence[dict[str, Any]], headless: bool = False) -> None:
    """A table of rows: as text where only text is streamed, as HTML otherwise."""
    if headless:
        print(as_text(list(rows)))
    else:
        display(HTML(pd.DataFrame(rows).fillna("").to_html(index=False, border=0)))


def show_picture(path: Path) -> None:
    """A PNG at a width that phones and desktops both read."""
    display(Image(filename=str(path), width=PICTURE_WIDTH))


def finish(folder: Path, headless: bool = False) -> Bundle:
    """Zip the study's folder with this notebook as executed so far, and print path, size and SHA-256.

    Headless, the runner adds the executed notebook after its last cell (see colab_setup.sh).
    """
    if not headless:
        _add_this_notebook(folder)
    bundle = zip_study(folder)
    print(f"Results: {bundle.path.resolve()}\nSize:    {bundle.size / 1e6:.2f} MB ({bundle.size} bytes)")
    print(f"SHA-256: {bundle.sha256}")
    return bundle


def download(bundle: Bundle, headless: bool = False) -> None:
    """Offer the zip to the browser in Colab; elsewhere it already lies on disk. A blocked download loses nothing."""
    if headless or where() != "colab":
        return
    from google.colab import files

    try:
        files.download(str(bundle.path))
    except Exception as error:
        print(
            f"The browser did not take the download ({type(error).__name__}: {error}). The zip is complete at "
            f"{bundle.path.resolve()}: open the folder icon on the left and download it from there."
        )


def _add_this_notebook(folder: Path) -> None:
    if where() == "colab":
        from google.colab import _message

        try:
            reply = _message.blocking_request("get_ipynb", timeout_sec=20)
            add_notebook(folder, nbformat.from_dict(reply["ipynb"]), "notebook.ipynb")
        except Exception as error:
            print(f"The notebook itself could not be added to the zip ({type(error).__name__}: {error}).")
        return
    # Jupyter's server tells the kernel the notebook's path; what is on disk is its last saved state.
    path = Path(os.environ.get("JPY_SESSION_NAME", ""))
    if path.suffix == ".ipynb" and path.exists():
        add_notebook(folder, nbformat.read(path, as_version=4), path.name)
    else:
        print(
            "The notebook's own path is unknown here; save it and add it to the zip by hand if you want it in."
        )


def main() -> None:
    """``python -m bklm.notebook``: write every form cell into its notebook from the config it belongs to."""
    for path, config_class in FORMS.items():
        notebook = nbformat.read(path, as_version=4)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = form_cell(config_class)
        write_text(Path(path), nbformat.writes(notebook) + "\n")
        print("wrote", path, file=sys.stderr)


if __name__ == "__main__":
    main()
