"""Settings of the Koopman study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting


@dataclass(frozen=True, kw_only=True)
class KoopmanConfig(WindowStudyConfig):
    """Settings of the study. ``protocol="original"`` is the published trainer on the published model: it sees the future."""

    study: ClassVar[str] = "koopman"
    notebook: ClassVar[str] = "05_koopman"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "protocol", "parts", "weights", "seeds", "epochs",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "weights": (0.1,), "seeds": (0, 1), "epochs": 2, "learning_rates": (3e-3, 1e-2), "seq_len": 16, "vocab_size": 500,
            "d_model": 16, "n_layers": 2, "lift": 16, "max_train_tokens": 4096, "fit_positions": 1000, "score_tokens": 1000,
            "units": 16, "delays": (1, 2), "recall_steps": 8, "recall_width": 16, "recall_pairs": 2, "recall_rates": (3e-3,),
            "batch_size": 32, "trained_distance": 16, "distances": (16, 32),
        },
        "quick": {
            "weights": (0.1,), "seeds": (0,), "epochs": 3, "learning_rates": (1e-3, 3e-3, 1e-2), "seq_len": 64,
            "vocab_size": 5000, "d_model": 64, "n_layers": 3, "lift": 128, "max_train_tokens": 60_000,
            "fit_positions": 20_000, "score_tokens": 8000, "units": 192, "delays": (1, 4), "recall_steps": 1200,
            "recall_width": 48, "recall_pairs": 1, "recall_rates": (1e-2,), "trained_distance": 128, "batch_size": 16,
            "distances": (16, 32, 64, 128, 256, 512),
        },
        # 8,000 of the original's 30,000 words: a seventh of the words is left unknown, and the time goes into steps.
        "full": {
            "weights": (0.01, 0.1, 1.0), "seeds": (0, 1, 2), "epochs": 4, "learning_rates": (1e-3, 3e-3, 1e-2, 3e-2),
            "seq_len": 128, "vocab_size": 8_000, "d_model": 64, "n_layers": 4, "lift": 256, "max_train_tokens": 0,
            "fit_positions": 20_000, "score_tokens": 30_000, "units": 192, "delays": (1, 4, 8), "recall_steps": 2000,
            "recall_width": 48, "recall_pairs": 1, "recall_rates": (3e-3, 1e-2), "trained_distance": 128, "batch_size": 16,
            "distances": (16, 32, 64, 128, 256, 512),
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {"parts": "all"},
        "original": {"parts": "auxiliary", "weights": (0.05,), "learning_rates": (1e-3,)},
    }

    protocol: Literal["corrected", "original"] = setting(
        "corrected", help="original: as published; it sees the future"
    )
    parts: Literal["all", "auxiliary", "linearise", "recall"] | None = setting(
        None, help="what is done besides training the plain model; empty: the protocol's"
    )
    weights: tuple[float, ...] | None = setting(None, low=0, high=1e6, help="of the loss, an arm each")
    batch_size: int | None = setting(None, low=4, high=512, step=4, help="sequences per optimiser step")
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training text")
    d_model: int | None = setting(None, low=1, high=8192, help="model width")
    n_heads: int = setting(4, low=1, high=256, help="heads, or as many as the width has in common with that")
    lift: int | None = setting(None, low=1, high=8192, help="width of the lifted states")
    start_epoch: int | None = setting(
        None, low=1, high=1000, help="first epoch of the published term; empty: as published, 4 of 10"
    )
    threshold: float = setting(8.0, above=0, high=1e9, help="loss above which its weight is a hundredth")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="tried by the plain model; its best one is every arm's"
    )
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay")
    clip: float = setting(0.5, above=0, high=1e6, help="largest gradient norm")
    fit_positions: int | None = setting(None, low=2, high=10**7, help="positions to fit operators to")
    score_tokens: int | None = setting(
        None, low=0, high=10**12, help="validation tokens for replaced blocks and short windows; 0: all"
    )
    units: int | None = setting(None, low=1, high=8192, help="random tanh units of EDMD")
    delays: tuple[int, ...] | None = setting(None, low=1, high=256, help="positions that an operator reads")
    rank: int = setting(0, low=0, high=10**6, help="of the plain DMD; 0: full")
    recall_steps: int | None = setting(None, low=4, high=10**7, help="training steps of the recall task")
    recall_width: int | None = setting(None, low=8, high=8192, help="width of NewLLM, whose size all have")
    recall_layers: int = setting(2, low=1, high=64, help="blocks of each model there")
    recall_pairs: int | None = setting(None, low=1, high=16, help="pairs to remember")
    recall_rates: tuple[float, ...] | None = setting(None, above=0, high=10, help="that each model tries")
    trained_distance: int | None = setting(None, low=8, high=65536, help="longest distance in training")
    distances: tuple[int, ...] | None = setting(None, low=1, high=2048, help="distances that are tested")

    def resolved(self) -> KoopmanConfig:
        config = super().resolved()
        if config.parts in ("all", "recall") and config.trained_distance < 2 * config.recall_pairs:
            raise ValueError(
                f"trained_distance: got {config.trained_distance} with {config.recall_pairs} pairs, which are "
                f"{2 * config.recall_pairs} tokens long themselves; take at least that."
            )
        if 0 < config.score_tokens <= config.seq_len:
            raise ValueError(
                f"score_tokens: got {config.score_tokens}; a window of seq_len {config.seq_len} takes one more than that: "
                "take more, or 0 for all."
            )
        if config.start_epoch is None:
            config = replace(config, start_epoch=-(-2 * config.epochs // 5))
        if config.protocol == "original" and config.parts != "auxiliary":
            raise ValueError(
                f"parts: got {config.parts!r} with protocol 'original', whose blocks see the future, so nothing "
                "is left to be foretold; take parts 'auxiliary', or protocol 'corrected'."
            )
        if config.protocol == "original" and config.start_epoch > config.epochs:
            raise ValueError(
                f"start_epoch: got {config.start_epoch} with {config.epochs} epochs, so the published term would never begin; "
                "take a smaller one, or more epochs."
            )
        most = min(config.fit_positions, 1 + config.d_model * min(config.delays))
        if config.rank > most:
            raise ValueError(
                f"rank: got {config.rank}, above the {config.fit_positions} snapshots (fit_positions) or the "
                f"{1 + config.d_model * min(config.delays)} features of a state; take at most {most}, or 0 for full rank."
            )
        if min(config.distances) < 2 * config.recall_pairs:
            raise ValueError(
                f"distances: got {min(config.distances)} with {config.recall_pairs} pairs, which are "
                f"{2 * config.recall_pairs} tokens long themselves; take distances of at least that."
            )
        return config
