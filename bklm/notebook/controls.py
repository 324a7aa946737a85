"""Controls of a study: widgets built from its config, an estimate of its time, and buttons that run and stop it."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as widgets
from IPython.display import clear_output, display

from bklm.harness.config import FieldSpec, StudyConfig
from bklm.harness.estimate import duration_in_words
from bklm.harness.folder import other_experiment
from bklm.harness.launch import spoils_a_launch
from bklm.notebook.form import as_typed
from bklm.notebook.process import StudyRun

Config = TypeVar("Config", bound=StudyConfig)

WIDTH = "min(34em, 96%)"  # fits a phone
SHOWN_LINES = 10
# What ipywidgets 7 and 8 call it.
TOOLTIP = "tooltip" if "tooltip" in widgets.Text.class_trait_names() else "description_tooltip"
OTHER_MINUTES = 0.5  # imports, compilation, figures and the zip of a run; measured 20 to 40 s on two cores


class Controls:
    """Widgets for some fields of a config. Headless they are not shown, and ``config`` returns what was given.

    A field that nobody moved follows the profile; one that was moved keeps its value. Only what the ipywidgets of Colab
    (7.7.1) and 8 both have is used.
    """

    def __init__(
        self,
        config: StudyConfig,
        names: Sequence[str],
        headless: bool = False,
        estimate: Callable[[Any], float] | None = None,
    ) -> None:
        """Make the widgets; ``show`` displays them.

        Args:
            names: the fields that get a widget, in this order.
            estimate: minutes that a resolved config's study takes on this machine.

        Raises:
            ValueError: the config itself is refused.
        """
        self._config, self._headless, self._estimate = config, headless, estimate
        self._specs = {spec.name: spec for spec in config.specs()}
        self._moved: set[str] = set()
        self._is_filling = False
        self.study: StudyRun | None = None
        resolved = config.resolved()
        self.widgets = {name: _widget(self._specs[name], getattr(resolved, name)) for name in names}
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._moved_by_hand(name), names="value")
        self._message = widgets.HTML()
        self._guess = widgets.HTML()
        self.run_button = widgets.Button(description="Run", button_style="success", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.run_button.on_click(lambda button: self._start())
        self.stop_button.on_click(lambda button: self._stop())
        self._bar = widgets.IntProgress(min=0, max=100, layout=_layout())
        self._status, self._log = widgets.HTML(), widgets.HTML()
        self._picture = widgets.Image(format="png", layout=widgets.Layout(width="100%", max_width="760px"))
        self._progress = widgets.VBox([self._bar, self._status, self._log, self._picture])
        self._progress.layout.display = "none"
        self._drawn: tuple[Path, float] | None = None
        self._noted = ""

    def show(self) -> None:
        """Display the controls. The cells below take their values when they run; the Run button runs the study at once."""
        if self._headless:
            return
        clear_output(wait=True)  # what the cell said while it imported
        buttons = widgets.HBox([self.run_button, self.stop_button])
        display(widgets.VBox([*self.widgets.values(), self._message, self._guess, buttons, self._progress]))
        self._validate()

    def keep(self, before: Controls) -> None:
        """Take the values that controls made before from the same form were moved to, and say so: *Run all* makes them anew.

        A field whose value in the form was changed since follows the form. A study that runs is taken over with its buttons.
        """
        if before._is_running:
            self.study, before.study = before.study, None
            self.run_button.disabled, self.stop_button.disabled = True, False
            self._progress.layout.display = ""
            self.study.tell(self._update)
            self._update()
        moved = [n for n in before.widgets if n in before._moved and n in self.widgets]
        kept = [n for n in moved if getattr(self._config, n) == getattr(before._config, n)]
        for name in kept:
            self.widgets[name].value = before.widgets[name].value
        for words, names in (
            ("keep what they were moved to", kept),
            ("follow the form again", set(moved) - set(kept)),
        ):
            values = ", ".join(f"{n} = {self.widgets[n].value}" for n in moved if n in names)
            if values:
                print(f"The controls {words}: {values}.")

    def config(self) -> StudyConfig:
        """The config with the controls' values.

        When the study's folder already holds a run with other settings, an interactive run gets the next free folder
        beside it and says so; headless the study itself refuses.

        Raises:
            ValueError: a value that the config does not allow.
        """
        if self._headless:
            return self._config
        config, note = _in_free_folder(self._chosen())
        if note and note != self._noted:
            print(note)
        self._noted = note
        return config

    def _chosen(self) -> StudyConfig:
        return replace(self._config, **{name: self.widgets[name].value for name in self._moved})

    def _moved_by_hand(self, name: str) -> None:
        if not self._is_filling:
            self._moved.add(name)
            self._validate()

    def _validate(self) -> None:
        """Say at once what is wrong with a value; else let the unmoved fields follow, and estimate the time."""
        try:
            resolved = self._chosen().resolved()
        except ValueError as error:
            self._message.value = f'<span style="color:#b00020">{html.escape(str(error))}</span>'
            self._guess.value = ""
            self.run_button.disabled = True
            return
        self._message.value = ""
        self.run_button.disabled = self._is_running
        with self._filling():
            for name in self.widgets.keys() - self._moved:
                _show_value(self.widgets[name], getattr(resolved, name))
        if self._estimate is not None and not self._is_running:
            self._guess.value = "Estimating the time ..."
            self._guess.value = _state_minutes(self._estimate, resolved)

    @contextlib.contextmanager
    def _filling(self) -> Iterator[None]:
        self._is_filling = True
        try:
            yield
        finally:
            self._is_filling = False

    @property
    def _is_running(self) -> bool:
        return self.study is not None and self.study.is_running

    def _start(self) -> None:
        if self._is_running:
            return
        config, note = _in_free_folder(self._chosen())
        self.run_button.disabled, self.stop_button.disabled = True, False
        self._bar.value, self._bar.bar_style = 0, ""
        self._status.value, self._log.value = html.escape(note) or "Starting ...", ""
        self._picture.layout.display, self._drawn = "none", None
        self._progress.layout.display = ""
        self.study = None
        self.study = StudyRun(config, self._update)
        self._update()  # its thread may have told of an early end before that assignment

    def _stop(self) -> None:
        if self.study is not None:
            self.study.stop()
            self._status.value = "Stopping after the step at hand ... (press Stop again to end it at once)"

    def _update(self) -> None:
        """Show how the study's process is doing; called from its reader's thread."""
        study = self.study
        if study is None:
            return
        self._bar.value = study.percent
        if study.is_running:
            if study.counts and not self._status.value.startswith("Stopping"):
                self._status.value = html.escape(f"{study.doing} · {study.counts}")
        else:
            self._bar.bar_style = "success" if study.returncode == 0 else "warning"
            self._status.value = _ending(study)
            self.run_button.disabled, self.stop_button.disabled = False, True
        self._log.value = as_pre(list(study.lines)[-SHOWN_LINES:])
        picture = study.picture()
        drawn = picture and (picture, picture.stat().st_mtime)
        if drawn and drawn != self._drawn:
            self._drawn, self._picture.value = drawn, picture.read_bytes()
            self._picture.layout.display = ""


def _ending(study: StudyRun) -> str:
    time = f"{study.seconds / 60:.1f} min" if study.seconds >= 90 else f"{study.seconds:.0f} s"
    if study.returncode == 0:
        return (
            f"Done in {time}. The cells below read the results from {html.escape(str(study.folder))}; run them."
        )
    if study.was_stopped:
        return f"Stopped after {time}. What was finished is kept; Run goes on from there."
    return f"Ended after {time} with exit code {study.returncode}; its last lines say why."


def as_pre(lines: Iterable[str]) -> str:
    """Lines of a log as HTML."""
    style = "white-space:pre; overflow-x:auto; line-height:1.3; font-size:12px; margin:0"
    return f'<pre style="{style}">{html.escape(chr(10).join(lines))}</pre>'


def _state_minutes(estimate: Callable[[Any], float], resolved: StudyConfig) -> str:
    if spoils_a_launch(resolved):
        return "No estimate: steps on a GPU in this kernel would keep it from launching several processes."
    try:
        minutes = estimate(resolved)
    except (ValueError, OSError, RuntimeError) as error:
        return f"No estimate: {html.escape(str(error))}"
    # What every run needs besides: its process imports and compiles, and its report measures and draws.
    words = duration_in_words(minutes + OTHER_MINUTES)
    return f"Takes <b>{words}</b> on this machine, imports and report included, if nothing is done yet."


def _layout() -> widgets.Layout:
    return widgets.Layout(width=WIDTH)


def _widget(spec: FieldSpec, value: Any) -> widgets.Widget:
    common = {
        "description": spec.name.replace("_", " "),
        # Shown where the pointer rests: what it is, its unit, and what is allowed.
        TOOLTIP: f"{spec.help}; {spec.allowed()}",
        "style": {"description_width": "8.5em"},
        "layout": _layout(),
    }
    if spec.is_slider and spec.base in (int, float):
        kind = widgets.IntSlider if spec.base is int else widgets.FloatSlider
        bounds = {name: spec.base(getattr(spec, name)) for name in ("low", "high", "step")}
        return kind(
            value=value,
            min=bounds["low"],
            max=bounds["high"],
            step=bounds["step"],
            continuous_update=False,
            **common,
        )
    if spec.choices and not spec.is_tuple:
        return widgets.Dropdown(options=list(spec.choices), value=value, **common)
    if spec.base is bool:
        return widgets.Checkbox(value=bool(value), indent=True, **common)
    # Text for everything else: a number box would silently move a value into its bounds instead of naming them.
    return widgets.Text(value=as_typed(value), placeholder=spec.help, **common)


def _show_value(widget: widgets.Widget, value: Any) -> None:
    widget.value = as_typed(value) if isinstance(widget, widgets.Text) else value


def _in_free_folder(config: Config) -> tuple[Config, str]:
    """The config, moved to the next folder that is free or holds this very experiment; and a sentence when it moved."""
    base, number = config.output_dir, 1
    while other_experiment(config.resolved()):
        number += 1
        config = replace(config, output_dir=str(Path(base) / f"run_{number}"))
    if number == 1:
        return config, ""
    return (
        config,
        f"{base} holds a run with other settings and stays as it is; this one goes to {config.output_dir}.",
    )
