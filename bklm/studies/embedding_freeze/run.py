"""The embedding-freeze study: does freezing the embedding help, or having pretrained it, or tying the head to it?

Every arm trains the same ContextTokenLM in two phases on the same tokens: first the context block, without labels, to a
fixed point; then the rest, on contexts that the first phase leaves. Arms differ in where the embedding starts, whether it is
trained in the second phase, and whether the head is tied to it; all else is equal, seed by seed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from bklm.harness.folder import claim, study_folder
from bklm.harness.report import as_text
from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig
from bklm.studies.embedding_freeze.report import EmbeddingFreezeResult, write_report
from bklm.studies.embedding_freeze.tables import readable
from bklm.studies.embedding_freeze.text import FreezeText, prepare_text
from bklm.studies.embedding_freeze.train import Runner
from bklm.training.processes import make_accelerator

log = logging.getLogger(__name__)


def run_embedding_freeze(
    config: EmbeddingFreezeConfig,
    on_figure: Callable[[Path], None] | None = None,
    text: FreezeText | None = None,
) -> EmbeddingFreezeResult:
    """Run both phases of every arm and write everything to ``<output_dir>/embedding_freeze`` and its zip.

    A run that was stopped goes on where it was; a finished one is read back, not run again.

    Args:
        on_figure: called with the path of arms.png, drawn anew each time a trial is done.
        text: what `prepare_text` gave for this config, where it is at hand already.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    accelerator = make_accelerator(config.device, config.precision)
    with study_folder(config) as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        text = text or prepare_text(config)
        claim(folder, config, text.fingerprint)
        with Runner(config, text, accelerator, folder, on_figure) as runner:
            phase1 = runner.run_phase1() if config.phase != "2" else runner.read_phase1()
            trials = runner.run_phase2() if config.phase != "1" else []
            diverged = runner.diverged
        log.info("Drawing the figures and writing the tables")
        return write_report(config, text, phase1, trials, diverged, folder)


def show(result: EmbeddingFreezeResult) -> None:
    if result.table:
        print(as_text(readable(result.table, result.diverged)))
    print("\n".join(result.findings))
    print(result.bundle)
