"""The precision study: which recursion and which precision for the BK-core, and what the original's speed claims amount to.

Everything is measured in one run on one machine: errors against 50 digits, time, peak memory, the original's ways to take
a batch's gradients, autograd beside the analytic backward, the rest of the model in 16 bits. Each measured cell is
written to ``cells/`` as soon as it is done; a run that was stopped goes on after the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from bklm.harness.folder import claim, study_folder
from bklm.harness.measure import MemoryMeter
from bklm.harness.report import as_text
from bklm.studies.precision.cells import Runner, accuracy_rows
from bklm.studies.precision.claims import claims_readable
from bklm.studies.precision.config import PrecisionConfig
from bklm.studies.precision.report import PrecisionResult, write_report
from bklm.studies.precision.tables import summary_readable

log = logging.getLogger(__name__)

BYTES_PER_POSITION = 400  # of a grid cell: inputs, reference and the hungriest arm; measured 360


def run_precision(config: PrecisionConfig, on_figure: Callable[[Path], None] | None = None) -> PrecisionResult:
    """Measure what is not measured yet, and write everything to ``<output_dir>/precision`` and its zip.

    Args:
        on_figure: called with the path of precision_errors.png, drawn anew after each length.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent.
    """
    config = config.resolved()
    device = device_of(config.device)
    _refuse_what_does_not_fit(max(config.sizes), device)
    with study_folder(config) as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items()))
        claim(folder, config)
        with MemoryMeter(device) as memory:
            cells = Runner(config, device, folder, memory, on_figure).run()
        return write_report(config, cells, folder, device)


def device_of(wanted: str) -> str:
    """ "cuda" or "cpu" for a config's "auto", "cuda" or "cpu".

    Raises:
        ValueError: there is no such device here.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: got 'cuda', but torch sees no CUDA GPU here; choose 'auto' or 'cpu', or switch the runtime to a GPU."
        )
    return "cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu"


def _refuse_what_does_not_fit(n: int, device: str) -> None:
    needed = BYTES_PER_POSITION * accuracy_rows(n) * n
    free = {"memory": psutil.virtual_memory().available}
    if device == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info()[0]
    for name, there in free.items():
        if needed > there:
            raise ValueError(
                f"sizes: N = {n:,} needs about {needed / 1e9:.1f} GB of {name} and {there / 1e9:.1f} GB are free; "
                "leave that length out."
            )


def show(result: PrecisionResult) -> None:
    print(as_text(summary_readable(result.table)))
    print(as_text(claims_readable(result.claims)))
    print(result.recommendation)
    print(result.bundle)
