"""Settings of the integration study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting


@dataclass(frozen=True, kw_only=True)
class IntegrationConfig(WindowStudyConfig):
    """Settings of the study."""

    study: ClassVar[str] = "integration"
    notebook: ClassVar[str] = "09_integration"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "budgets", "seeds", "epochs",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "seeds": (0, 1), "epochs": 1, "scores": 2, "score_tokens": 1000, "batch_size": 16, "seq_len": 32,
            "vocab_size": 300, "d_model": 16, "n_layers": 2, "max_train_tokens": 4096, "learning_rates": (1e-2,), "repeats": 3,
        },
        "quick": {
            "seeds": (0, 1, 2), "epochs": 2, "scores": 4, "score_tokens": 8000, "batch_size": 8, "seq_len": 64,
            "vocab_size": 1000, "d_model": 32, "n_layers": 2, "max_train_tokens": 40_000,
            "learning_rates": (3e-3, 1e-2, 3e-2), "repeats": 20,
        },
        # 8,000 of the original's 30,000 words: a seventh of the words is left unknown, and the time goes into steps.
        # Intervals for all switches at once are three times as wide from three seeds as from five.
        "full": {
            "seeds": (0, 1, 2, 3, 4), "epochs": 3, "scores": 12, "score_tokens": 10_000, "batch_size": 16, "seq_len": 128,
            "vocab_size": 8_000, "d_model": 64, "n_layers": 4, "max_train_tokens": 0,
            "learning_rates": (3e-4, 1e-3, 3e-3, 1e-2), "repeats": 30,
        },
    }  # fmt: skip

    budgets: Literal["both", "steps"] = setting(
        "both",
        help="both: what gains time and loses loss, and the full set, also for as long as the plain arm takes",
    )
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training text, of equal steps")
    scores: int | None = setting(None, low=1, high=1000, help="scores in a training, for the time to a loss")
    score_tokens: int | None = setting(
        None, low=0, high=10**12, help="validation tokens of these scores and of short windows; 0: all"
    )
    d_model: int | None = setting(None, low=16, high=8192, help="model width")
    n_heads: int = setting(4, low=1, high=256, help="heads, or as many as the width has in common with that")
    batch_size: int | None = setting(None, low=4, high=512, help="sequences per optimiser step")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="AdamW rates tried by every arm; one alone is taken without a search"
    )
    clip: float = setting(0.5, above=0, high=1e6, help="largest gradient norm")
    blend: float = setting(
        0.5, above=0, high=1, help="share of hypothesis-7 where the exact gradient is switched off"
    )
    koopman_weight: float = setting(0.1, above=0, high=1e6, help="weight of the Koopman term")
    energy_weight: float = setting(0.1, above=0, high=1e6, help="weight of the energy term")
    limit: float = setting(
        0.05, above=0, high=1e6, help="largest norm of the energy term's gradient in a state"
    )
    sparsity: float = setting(0.5, low=0.05, high=0.95, help="share of zeros in the body's weights when pruned")
    repeats: int | None = setting(None, low=3, high=1000, help="timed steps of every arm, in turns")

    def resolved(self) -> IntegrationConfig:
        config = super().resolved()
        if config.n_layers < 2:
            raise ValueError(
                f"n_layers: got {config.n_layers}; the energy term compares the energies of blocks: take 2 or more."
            )
        if config.precision == "fp16":
            raise ValueError(
                "precision: got 'fp16', whose loss scale a term's own limit does not know; take fp32 or bf16."
            )
        return config
