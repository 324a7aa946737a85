"""Settings of the physics study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting
from bklm.models.potentials import LARGEST_STEP

# Up to rates that no plain model survives: which of two arms is the more stable shows where the other breaks. Smaller ones
# decide nothing, since every arm is trained with 1e-2 in its search.
STABLE_RATES = (3e-2, 1e-1, 3e-1, 1.0, 3.0)
PUBLISHED_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig(WindowStudyConfig):
    """Settings of the study. ``protocol="original"`` is the published term on the published model: it sees the future."""

    study: ClassVar[str] = "physics"
    notebook: ClassVar[str] = "06_physics_informed"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "protocol", "parts", "step", "seeds", "epochs",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "seeds": (0, 1), "epochs": 1, "pieces": 2, "batch_size": 32, "seq_len": 32, "vocab_size": 300, "d_model": 16,
            "n_layers": 2, "max_train_tokens": 4096, "learning_rates": (3e-3, 1e-2), "decays": (1.0,), "score_tokens": 1024,
            "stable_rates": (1e-2, 1e-1), "stable_tokens": 2048, "memory_layers": (2, 4),
        },
        "quick": {
            "seeds": (0, 1, 2), "epochs": 2, "pieces": 3, "batch_size": 8, "seq_len": 64, "vocab_size": 1000, "d_model": 32,
            "n_layers": 2, "max_train_tokens": 32_000, "learning_rates": (3e-3, 1e-2, 3e-2), "decays": (1.0, 3.0),
            "score_tokens": 4096, "stable_rates": STABLE_RATES, "stable_tokens": 16_000, "memory_layers": (4, 8, 16, 32),
        },
        # 8,000 of the original's 30,000 words: a seventh of the words is left unknown, and the time goes into steps.
        "full": {
            "seeds": (0, 1, 2), "epochs": 2, "pieces": 6, "batch_size": 16, "seq_len": 128, "vocab_size": 8_000,
            "d_model": 64, "n_layers": 4, "max_train_tokens": 0, "learning_rates": (1e-3, 3e-3, 1e-2, 3e-2),
            "decays": (0.3, 1.0, 3.0), "score_tokens": 8192, "stable_rates": STABLE_RATES, "stable_tokens": 60_000,
            "memory_layers": (4, 8, 16, 32),
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {"parts": "all"},
        "original": {"parts": "loss", "learning_rates": (PUBLISHED_RATE,)},
    }

    protocol: Literal["corrected", "original"] = setting(
        "corrected", help="original: as published; it sees the future"
    )
    parts: Literal["all", "loss", "blocks"] | None = setting(
        None, help="loss: energies as a term; blocks: conservative ones; empty: the protocol's"
    )
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training text")
    pieces: int | None = setting(None, low=1, high=1000, help="scores in a pass, for the steps to a loss")
    d_model: int | None = setting(None, low=4, high=8192, help="model width; half of it are positions")
    n_heads: int = setting(
        4, low=1, high=256, help="heads, or as many as half the width has in common with that"
    )
    batch_size: int | None = setting(None, low=4, high=512, help="sequences per optimiser step")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="AdamW rates tried by every arm; original: the published one"
    )
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay, the published one at first")
    score_tokens: int | None = setting(
        None,
        low=0,
        high=10**12,
        help="validation tokens of scores within a pass and of the gain from context; 0: all",
    )
    clip: float = setting(0.5, above=0, high=1e6, help="largest gradient norm")
    weight: float = setting(
        0.05, low=0, high=10, help="published energy term: lambda at first; 0: the least, 0.01"
    )
    mended_weight: float = setting(0.1, low=0, high=1e6, help="weight of the mended energy term")
    limit: float = setting(0.05, above=0, high=1e6, help="largest norm of a term's gradient clipped apart")
    start: float = setting(
        0.4, low=0, high=0.95, help="share of the training before the published term sets in"
    )
    decays: tuple[float, ...] | None = setting(
        None,
        low=0,
        high=100,
        help="weight decays tried without a term; kept is the one nearest the published arm's embedding norm",
    )
    step: float = setting(1.0, above=0, high=1e3, help="leapfrog step of a conservative block")
    stable_rates: tuple[float, ...] | None = setting(
        None, above=0, high=100, help="rates of the stability grid, one pass each"
    )
    stable_tokens: int | None = setting(None, low=0, high=10**12, help="training tokens of that pass; 0: all")
    memory_layers: tuple[int, ...] | None = setting(
        None, low=1, high=512, help="depths whose memory is measured"
    )

    def resolved(self) -> PhysicsConfig:
        config = super().resolved()
        if config.step >= LARGEST_STEP:
            raise ValueError(
                f"step: got {config.step:g}; leapfrog is unstable from {LARGEST_STEP:g} on with the first weights: take a "
                "smaller one."
            )
        if config.precision == "fp16" and config.parts != "blocks":
            raise ValueError(
                "precision: got 'fp16', whose loss scale a term's own limit does not know; take fp32 or bf16, or parts "
                "'blocks'."
            )
        if config.d_model % 2:
            raise ValueError(f"d_model: got {config.d_model}; half of it are positions: take an even width.")
        if 0 < config.score_tokens <= config.seq_len:
            raise ValueError(
                f"score_tokens: got {config.score_tokens}; a window of seq_len {config.seq_len} takes one more than that: "
                "take more, or 0 for all."
            )
        if config.n_layers < 2:
            raise ValueError(
                f"n_layers: got {config.n_layers}; an energy that blocks conserve needs 2 blocks or more."
            )
        if config.protocol == "original" and config.parts != "loss":
            raise ValueError(
                f"parts: got {config.parts!r} with protocol 'original', which had no conservative block: take 'loss', or "
                "protocol 'corrected'."
            )
        return config
