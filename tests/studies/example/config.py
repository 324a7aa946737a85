"""Settings of the example study. Neither torch nor pandas is imported here: a refused value need not wait for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bklm.harness.config import WindowStudyConfig, setting


@dataclass(frozen=True, kw_only=True)
class ExampleConfig(WindowStudyConfig):
    """Settings of the example study."""

    study: ClassVar[str] = "example"
    notebook: ClassVar[str] = "99_example"
    basic: ClassVar[tuple[str, ...]] = (
        "profile",
        "dataset",
        "data_dir",
        "output_dir",
        "device",
        "dropouts",
        "seeds",
    )
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "dropouts": (0.0, 0.3), "seeds": (0, 1), "epochs": 2, "seq_len": 16, "vocab_size": 500, "width": 16, "n_layers": 1,
            "max_train_tokens": 4096,
        },
        "quick": {
            "dropouts": (0.0, 0.1, 0.3), "seeds": (0, 1, 2), "epochs": 3, "seq_len": 64, "vocab_size": 5000, "width": 64,
            "n_layers": 2, "max_train_tokens": 200_000,
        },
        "full": {
            "dropouts": (0.0, 0.1, 0.3, 0.5), "seeds": (0, 1, 2), "epochs": 10, "seq_len": 64, "vocab_size": 30_000,
            "width": 256, "n_layers": 4, "max_train_tokens": 0,
        },
    }  # fmt: skip

    dropouts: tuple[float, ...] | None = setting(
        None, low=0, high=0.99, help="shares of units dropped, one arm each"
    )
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training text")
    width: int | None = setting(None, low=1, high=8192, help="width of embedding, layers and context")
    learning_rate: float = setting(3e-3, above=0, high=10, help="AdamW learning rate")
