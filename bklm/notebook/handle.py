"""One handle on a study for its notebook: settings, controls, text, run, tables, figures, sample, zip.

    study = notebook.study("grad_blend", globals())
    study.text()
    study.run()
    study.table()
    study.zip()

The study's module ``run`` gives ``run_NAME``, ``estimated_minutes`` and, where it reads a text, ``prepare_text``. What else a
notebook shows, the study's package may hand on:

- ``describe_text(text)``: sentences on the source and the sizes of its text; ``readable_baselines(rows)``: its n-gram table.
- ``NAME_table(result, text)``: rows for people that ``study.table("NAME")`` shows, where the result's own ``tables()`` has no
  such name: what is measured only when somebody asks.
- ``write_sample(result, text, ...)``: what a trained model writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from bklm import studies
from bklm.harness.bundle import Bundle
from bklm.harness.config import StudyConfig
from bklm.harness.int8 import int8_table
from bklm.harness.report import StudyResult
from bklm.harness.text import readable_baselines
from bklm.notebook import cells
from bklm.notebook.controls import Controls
from bklm.notebook.form import is_headless
from bklm.notebook.process import StudyRun
from bklm.trained.model import load
from bklm.trained.run import open_run


def describe_text(text: Any) -> list[str]:
    """Where a text comes from, and its sizes."""
    train, valid = f"{text.train_tokens:,} training tokens", f"{len(text.tokens.valid):,} validation tokens"
    return [
        f"{text.corpus.name}, from {text.corpus.source}",
        f"{train}, {valid}, vocabulary {text.vocab_size:,}",
    ]


DEFAULTS = {"describe_text": describe_text, "readable_baselines": readable_baselines}


def study(name: str, namespace: dict[str, Any]) -> Study:
    """The study of that name with the settings of the notebook's form cells; its controls are shown.

    Args:
        name: one of ``bklm.studies.STUDIES``.
        namespace: the notebook's ``globals()``.

    Raises:
        ValueError: there is no such study, or a value that its config does not allow.
    """
    if name not in studies.STUDIES:
        raise ValueError(f"study: got {name!r}; allowed is one of {', '.join(map(repr, studies.STUDIES))}.")
    return Study(getattr(studies, f"{studies.STUDIES[name]}Config"), namespace)


class Study:
    """A study in a notebook. Headless, everything is plain text, and nobody is waited for.

    ``text`` and ``run`` take the values that the controls have at that moment; everything else shows what was run.
    """

    def __init__(self, config_class: type[StudyConfig], namespace: dict[str, Any]) -> None:
        """Read the form cells' variables, mount a Google Drive that they name, and show the controls.

        Raises:
            ValueError: a value that the config does not allow, or a Drive that cannot be mounted.
        """
        self.headless = is_headless(namespace.get("headless")) or cells.where() == "shell"
        self._package = importlib.import_module(config_class.package())
        self._module = importlib.import_module(f"{config_class.package()}.run")
        self.controls = Controls(
            cells.config_from(config_class, namespace),
            config_class.controls or config_class.basic,
            self.headless,
            estimate=self._module.estimated_minutes,
        )
        self.result: StudyResult | None = None
        self._prepared: tuple[StudyConfig, Any] | None = None
        self._bundle: Bundle | None = None
        self._chat: tuple[Any, Any] | None = None
        self._button: StudyRun | None = None  # of the Run button, as the last run or reading back found it
        self.controls.show()
        before = [v for v in namespace.values() if isinstance(v, Study) and v._module is self._module]
        if before and not self.headless:
            self.controls.keep(before[-1].controls)

    def text(self) -> None:
        """Prepare the text, and show its source, its sizes and what counting alone achieves on it."""
        text = self._text_of(self._config())
        for sentence in self._find("describe_text")(text):
            cells.say(sentence, self.headless)
        cells.show_table(self._find("readable_baselines")(text.baselines), self.headless)

    def run(self) -> None:
        """Run the study in this cell, or read back what an earlier run or the Run button has left."""
        self._run(self._config())

    def _run(self, config: StudyConfig) -> None:
        # First, so that no cell shows an earlier run's result where this one fails.
        self.result, self._bundle = None, None
        button = self.controls.study
        run = getattr(self._module, f"run_{config.study}")
        if self._reads_text:
            run = partial(run, text=self._text_of(config))
        self.result = cells.run(run, config, self.headless)
        # One that was still at work is read when it has ended.
        if button is not None and button.returncode is not None:
            self._button = button

    def table(self, name: str = "") -> None:
        """Show a table: the main one, or one by name. One that this run has no rows for is a sentence."""
        result = self._done()
        tables = result.tables()
        name = name or next(iter(tables), "main")
        also = self._find(f"{name}_table") or {"int8": int8_table}.get(name)
        if name not in tables and also is None:
            cells.say(f"This run has no table {name!r}; it has {', '.join(tables) or 'none'}.", self.headless)
            return
        rows = tables[name]() if name in tables else also(result, self._text_of(result.config))
        if rows:
            cells.show_table(rows, self.headless)
        else:
            cells.say(f"This run has no rows for the table {name!r}.", self.headless)

    def figure(self, name: str) -> None:
        """Show one of the study's pictures by its file's name; one that this run did not draw is a sentence."""
        path = self._done().folder / name
        if path.exists():
            cells.show_picture(path)
            return
        drawn = ", ".join(sorted(p.name for p in path.parent.glob("*.png")))
        cells.say(f"This run drew no {name}; it drew {drawn or 'nothing'}.", self.headless)

    def finding(self) -> None:
        """Say what was found."""
        self.say("finding")

    def say(self, name: str) -> None:
        """Say something else that the result knows in words, such as ``machine_note``; nothing where it is empty.

        Raises:
            ValueError: it knows nothing of that name.
        """
        result = self._done()
        words = getattr(result, name, 0)
        if words is not None and not isinstance(words, str):
            raise ValueError(f"say: got {name!r}; the result has no sentence of that name.")
        for sentence in (words or "").splitlines():
            cells.say(sentence, self.headless)

    def sample(self, **choices: Any) -> None:
        """Let a trained model write: ``prompt``, ``temperature`` and what else the study's ``write_sample`` takes.

        Raises:
            ValueError: a choice that it does not allow, or a study that has no model to write.
        """
        result, write = self._done(), self._find("write_sample")
        if write is None:
            raise ValueError(f"sample: the study {result.config.study!r} has no model that writes.")
        cells.say(write(result, self._text_of(result.config), **choices), self.headless)

    def features(self, sentence: str, model: str = "") -> None:
        """Show what a trained ResNetBK makes of a sentence: the potential of each word and the resolvent, as a figure.

        Without ``model`` it is the best ResNetBK of this run; a run without one, or too long a sentence, is said.
        """
        folder = self._done().folder
        try:
            trained = load(
                folder, model or next((m.name for m in open_run(folder).models() if m.has_potential), None)
            )
            cells.show_picture(trained.features(sentence).figure(folder / "features.png"))
        except ValueError as error:
            cells.say(str(error), self.headless)

    def chat(self, turn: str, model: str = "", temperature: float = 0.8, start_again: bool = False) -> None:
        """Say something to a trained model of dialogues; its reply comes token by token, with what it saw.

        The dialogue goes on from call to call, until ``start_again`` or another model or temperature.
        """
        from bklm.trained.chat import Chat

        key = (self._done().folder, model, temperature)
        try:
            if start_again or self._chat is None or self._chat[0] != key:
                self._chat = key, Chat(load(key[0], model or None), temperature)
            talk = self._chat[1]
            pieces = talk.say(turn)
            first = next(pieces, "")
        # A field that is wrong stops no cell below.
        except (ValueError, OSError) as error:
            cells.say(str(error), self.headless)
            return
        print(f"{talk.trained.name}: {first}", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(f"\n({talk.saw})")

    def zip(self) -> None:
        """Zip the study's folder with this notebook as executed so far; print path, size and SHA-256."""
        self._done().renew_page()
        self._bundle = cells.finish(self._done().folder, self.headless)

    def download(self) -> None:
        """Offer the zip to the browser, in Colab."""
        cells.download(self._bundle or self._done().bundle, self.headless)

    @property
    def _reads_text(self) -> bool:
        return hasattr(self._module, "prepare_text")

    def _config(self) -> StudyConfig:
        return self.controls.config().resolved()

    def _text_of(self, config: StudyConfig) -> Any:
        """The text of a config, made once; None where the study reads none."""
        if not self._reads_text:
            return None
        if self._prepared is None or self._prepared[0] != config:
            self._prepared = None
            self._prepared = config, self._module.prepare_text(config)
        return self._prepared[1]

    def _done(self) -> StudyResult:
        button = self.controls.study
        if button is not None and button is not self._button and button.returncode == 0:
            # What the Run button has left since is what the cells below show, read back with log and main picture.
            self._run(button.config.resolved())
        if self.result is None:
            raise ValueError("study: nothing has been run yet; run the cell with study.run() first.")
        return self.result

    def _find(self, name: str) -> Callable[..., Any] | None:
        return getattr(self._package, name, DEFAULTS.get(name))
