"""One run of a study, from its config to its report.

    def run_koopman(config, on_figure=None, text=None):
        return run_study(config, _train, _report, prepare=prepare_text, on_figure=on_figure, text=text)

``_train(study)`` makes the same calls in every process that takes part: those of one training (torchrun, ``processes``),
and workers with trials of their own (``workers``); so all that trains stands in a grid, be it of one point.
``_report(study, found)`` is called once, in the main one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from bklm.harness import workers
from bklm.harness.config import StudyConfig
from bklm.harness.folder import claim, fingerprint, logging_to, study_folder
from bklm.harness.launch import is_to_launch, launch
from bklm.harness.session import Session
from bklm.harness.tracker import start_tracker
from bklm.training.denormals import flushed_denormals
from bklm.training.processes import broadcast, main_first, make_accelerator

log = logging.getLogger(__name__)

Found = TypeVar("Found")
Result = TypeVar("Result")


def run_study(
    config: StudyConfig,
    work: Callable[[Session], Found],
    report: Callable[[Session, Found], Result],
    *,
    prepare: Callable[[Any], Any] | None = None,
    on_figure: Callable[[Path], None] | None = None,
    text: Any = None,
) -> Result | None:
    """Resolve a config, open its folder, do the work and report it. A run that was stopped goes on where it was.

    Args:
        work: all that trains or measures; called in every process that takes part.
        report: writes what was found and returns the study's result; called in the main process.
        prepare: makes the text of the resolved config; None for a study that reads none.
        on_figure: called with the path of a figure each time it is drawn anew.
        text: what ``prepare`` made before, so that it is not made twice; it must be of this config.

    Returns:
        The result; None in every process but the main one.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    if is_to_launch(config):
        # What they leave is read back below, in the process that launched them.
        launch(config, _work_only, config, work, prepare)
    with _open(config, prepare, on_figure, text) as study:
        found = work(study)
        # What a report measures has the machine to itself.
        study.dismiss_helpers()
        return report(study, found) if study.is_main and workers.link is None else None


def _work_only(config: StudyConfig, work: Callable[[Session], Any], prepare: Any) -> None:
    """In each launched process: the trainings."""
    # Curves go to a tracker from the process that launched these, once.
    with _open(config, prepare, None, None, tracks=False) as study:
        work(study)


@contextlib.contextmanager
def _open(
    config: StudyConfig,
    prepare: Callable[[Any], Any] | None,
    on_figure: Callable[[Path], None] | None,
    text: Any,
    tracks: bool = True,
) -> Iterator[Session]:
    accelerator = make_accelerator(config.device, getattr(config, "precision", "fp32"))
    # A study without a text is one of precision, which asks what becomes of small numbers.
    with flushed_denormals(prepare is not None), _folder(config, accelerator) as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        if prepare is not None and text is None:
            with main_first(accelerator):  # the others read the tokens that the main process has cached
                text = prepare(config)
        if accelerator.is_main_process and workers.link is None:
            claim(folder, config, fingerprint(text))
        with Session(config, text, accelerator, broadcast(accelerator, folder), on_figure) as study:
            if tracks and accelerator.is_main_process and workers.link is None:
                start_tracker(accelerator, config, folder)
            yield study


@contextlib.contextmanager
def _folder(config: StudyConfig, accelerator: Accelerator) -> Iterator[Path | None]:
    """The study's folder, which the run that has helpers holds for all of them."""
    if not accelerator.is_main_process:
        yield None
    elif workers.link is not None:
        folder = Path(config.output_dir) / config.study
        with logging_to(folder / "run.log", on_screen=False):
            yield folder
    else:
        with study_folder(config) as folder:
            yield folder
