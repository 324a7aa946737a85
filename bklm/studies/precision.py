"""The precision study: which recursion and which precision for the BK-core, and what the original's speed claims amount to.

Everything is measured in one run on one machine: errors against 50 digits, time, peak memory, the original's ways to take
a batch's gradients, autograd beside the analytic backward, the rest of the model in 16 bits. Each measured cell is
written to ``cells/`` as soon as it is done; a run that was stopped goes on after the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from bklm.config import StudyConfig, setting
from bklm.reporting import as_text
from bklm.studies import cli
from bklm.studies.folder import claim, study_folder
from bklm.studies.precision_claims import claims_readable
from bklm.studies.precision_measure import MemoryMeter
from bklm.studies.precision_report import PrecisionResult, write_report
from bklm.studies.precision_runner import Runner, accuracy_rows
from bklm.studies.precision_tables import summary_readable

log = logging.getLogger("bklm.studies.precision")  # __name__ is "__main__" when run with python -m

BYTES_PER_POSITION = 400  # of a grid cell: inputs, reference and the hungriest arm; measured 360


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(StudyConfig):
    """Settings of the precision study."""

    study: ClassVar[str] = "precision"
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "sizes": (16, 128, 1024, 4096), "shifts": (1.0, 0.001), "batch_sizes": (1, 4), "batch_length": 32,
            "reference_n": 128, "repeats": 3, "seconds": 0.1, "model_batch": 2, "model_vocab": 500,
        },
        "quick": {
            "sizes": (16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536, 262_144, 1_000_000),
            "shifts": (1.0, 0.1, 0.001), "batch_sizes": (1, 2, 4, 8, 16, 32, 64), "batch_length": 128,
            "reference_n": 1024, "repeats": 7, "seconds": 0.5, "model_batch": 8, "model_vocab": 8000,
        },
        "full": {
            "sizes": (*(2**i for i in range(4, 20)), 1_000_000), "shifts": (1.0, 0.1, 0.001),
            "batch_sizes": (1, 2, 4, 8, 16, 32, 64), "batch_length": 128,
            "reference_n": 4096, "repeats": 21, "seconds": 10.0, "model_batch": 32, "model_vocab": 30_000,
        },
    }  # fmt: skip

    sizes: tuple[int, ...] | None = setting(None, low=2, high=2**26, help="lengths N of the grid")
    shifts: tuple[float, ...] | None = setting(None, above=0, high=1000, help="Im z of the grid")
    batch_sizes: tuple[int, ...] | None = setting(None, low=1, high=4096, help="samples per batch")
    batch_length: int | None = setting(
        None, low=2, high=256, help="positions per sample; theta/phi must stay finite"
    )
    reference_n: int | None = setting(
        None, low=0, high=10**6, help="longest N compared with 50 digits; beyond: complex128"
    )
    repeats: int | None = setting(None, low=3, high=1000, help="timed calls per arm")
    seconds: float | None = setting(None, above=0, high=3600, help="time for the calls of one arm in one cell")
    model_batch: int | None = setting(None, low=1, high=4096, help="sequences of the model's training step")
    model_vocab: int | None = setting(None, low=3, high=1_000_000, help="vocabulary of that model")
    tolerance: float = setting(1e-4, above=0, high=1, help="largest gradient error to recommend")
    seed: int = setting(0, low=0, high=2**31 - 1, help="of the random inputs")

    @property
    def published_batch(self) -> int:
        """The batch at which the claims are checked: the original's 32, or the largest one asked for if that is less."""
        return min(32, max(self.batch_sizes))

    def resolved(self) -> PrecisionConfig:
        """Every empty field filled, sizes in ascending order (a loop's time is foretold from shorter ones)."""
        config = super().resolved()
        values = config.to_dict()
        return type(self)(**{**values, "sizes": tuple(sorted(config.sizes))})


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


def _show(result: PrecisionResult) -> None:
    print(as_text(summary_readable(result.table)))
    print(as_text(claims_readable(result.claims)))
    print(result.recommendation)
    print(result.bundle)


if __name__ == "__main__":
    cli.main(PrecisionConfig, run_precision, _show)
