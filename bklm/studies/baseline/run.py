"""The baseline study: NewLLM as published, beside a GPT and a ResNetBK of the same size.

Each model gets the same small search of the learning rate, then one training per seed with the best one: equal parameters,
text, batches and steps. ``protocol="original"`` cuts the text as the original did, so that its perplexities can be compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState

from bklm.harness.folder import claim, study_folder
from bklm.harness.report import as_text
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.costs import measure_models
from bklm.studies.baseline.models import model_names
from bklm.studies.baseline.report import BaselineResult, write_report
from bklm.studies.baseline.tables import readable_contexts, readable_cost, readable_quality, readable_search
from bklm.studies.baseline.text import prepare_text
from bklm.studies.baseline.train import Runner
from bklm.training.processes import main_first, make_accelerator, require_launch

log = logging.getLogger(__name__)


def run_baseline(
    config: BaselineConfig, on_figure: Callable[[Path], None] | None = None
) -> BaselineResult | None:
    """Run the comparison and write everything to ``<output_dir>/baseline`` and its zip.

    A run that was stopped goes on where it was; a finished one is read back, not run again. Under torchrun or accelerate
    launch all processes call this together; with ``config.processes`` above 1 it launches them itself.

    Args:
        on_figure: called with the path of training_curves.png, drawn anew each time a training is done.

    Returns:
        The result; None in every process of a launch but the main one.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        require_launch(config.processes, config.device)
        AcceleratorState._reset_state(
            True
        )  # the launcher wants none, and a run before this one has left its own
        notebook_launcher(_train_only, (config,), num_processes=config.processes, use_port=_free_port())
    return _run(config, on_figure)


def _train_only(config: BaselineConfig) -> None:
    """In each launched process: the trainings. The process that launched them reads the results and writes the report."""
    if (
        torch.distributed.is_torchelastic_launched()
    ):  # not where the launcher sees one device and calls this at once
        sys.stdout = (
            sys.__stdout__
        )  # a notebook's own stream belongs to the kernel that this process was forked from
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    _run(config, None, report=False)


def _run(
    config: BaselineConfig, on_figure: Callable[[Path], None] | None, report: bool = True
) -> BaselineResult | None:
    accelerator = make_accelerator(config.device, config.precision)
    main = accelerator.is_main_process
    with study_folder(config) if main else contextlib.nullcontext() as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        with main_first(accelerator):  # the others read the tokens that the main process has cached
            text = prepare_text(config)
        if main:
            claim(folder, config, text.corpus.sha256)
        names = model_names(config.model)
        with Runner(config, text, accelerator, folder, on_figure) as runner:
            rates = runner.search(names)
            runs = runner.train_all(names, rates)
        if not (main and report):
            return None
        measured = measure_models(config, text, runs, folder)
        return write_report(config, text, runner.search_results, runs, runner.diverged, measured, folder)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def show(result: BaselineResult | None) -> None:
    """Print a result; nothing in the processes of a launch that have none."""
    if result is None:
        return
    print(as_text(readable_search(result.search, result.table)))
    print(as_text(readable_quality(result.table, result.baselines, result.diverged)))
    if "context_lengths.png" in result.paths:
        print(as_text(readable_contexts(result.table)))
    print(as_text(readable_cost(result.table, result.measured)))
    print(as_text(result.claims))
    print(result.finding)
    print(result.bundle)
