"""Settings of the precision study."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from bklm.harness.config import StudyConfig, setting


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(StudyConfig):
    """Settings of the precision study."""

    study: ClassVar[str] = "precision"
    notebook: ClassVar[str] = "02_precision_benchmark"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "output_dir", "device", "sizes", "shifts", "batch_sizes", "repeats",
    )  # fmt: skip
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
        """The batch at which claims are checked: of those asked for the largest up to the original's 32, or the smallest."""
        return max((n for n in self.batch_sizes if n <= 32), default=min(self.batch_sizes))

    def resolved(self) -> PrecisionConfig:
        """Every empty field filled, sizes in ascending order (a loop's time is foretold from shorter ones)."""
        config = super().resolved()
        return dataclasses.replace(config, sizes=tuple(sorted(config.sizes)))
