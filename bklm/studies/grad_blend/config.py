"""Settings of the GRAD_BLEND sweep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting

ORIGINAL_ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
# Of 0.001, 0.003 and 0.01 the one with the lowest perplexity for "solve" after 3 epochs on a WikiText-2 sample: 323, 263, 247.
RATES = {"diagonal": 1e-3, "solve": 1e-2}
SEARCHED = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_GRID = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True, kw_only=True)
class GradBlendConfig(WindowStudyConfig):
    """Settings of the sweep. ``protocol="original"`` turns the corrections off: the model then sees the future."""

    study: ClassVar[str] = "grad_blend"
    notebook: ClassVar[str] = "01_grad_blend_sweep"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "protocol", "batch_size", "alphas", "seeds",
        "epochs_per_trial",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "alphas": (0.0, 0.5), "seeds": (0, 1), "epochs_per_trial": 2, "final_epochs": 2, "seq_len": 32,
            "vocab_size": 1000, "d_model": 16, "n_layers": 2, "num_experts": 2, "max_train_tokens": 8192,
        },
        "quick": {
            "alphas": ORIGINAL_ALPHAS, "seeds": (0, 1, 2), "epochs_per_trial": 2, "final_epochs": 3, "seq_len": 128,
            "vocab_size": 30000, "d_model": 64, "n_layers": 4, "num_experts": 4, "max_train_tokens": 400_000,
        },
        "full": {
            "alphas": ORIGINAL_ALPHAS, "seeds": (0, 1, 2), "epochs_per_trial": 2, "final_epochs": 3, "seq_len": 128,
            "vocab_size": 30000, "d_model": 64, "n_layers": 4, "num_experts": 4, "max_train_tokens": 0,
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {"gradient": "exact", "causal": True, "router_gradient": "exact", "first_weights": "bklm"},
        "original": {
            "gradient": "original",
            "causal": False,
            "router_gradient": "none",
            "first_weights": "torch",
        },
    }

    protocol: Literal["corrected", "original"] = setting(
        "corrected", help="original: as published; it sees the future"
    )
    alphas: tuple[float, ...] | Literal["grid"] | None = setting(
        None, low=0, high=1, help="share of hypothesis-7; grid: 0, 0.1 ... 1"
    )
    epochs_per_trial: int | None = setting(
        None, low=1, high=1000, help="passes over the training text per trial"
    )
    final_epochs: int | None = setting(None, low=1, high=1000, help="passes with the best alpha at the end")
    d_model: int | None = setting(None, low=1, high=8192, help="model width")
    num_experts: int | None = setting(None, low=1, high=256, help="experts per block")
    top_k: int = setting(1, low=1, high=256, help="experts per token")
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay")
    learning_rates: tuple[float, ...] | None = setting(
        None,
        above=0,
        high=10,
        help="AdamW's; of several each alpha takes its best with the first seed; empty: four in profile full, elsewhere 0.01 "
        "with the mixer solve, 0.001 with diagonal; as published: 0.001",
    )
    first_weights: Literal["bklm", "torch"] | None = setting(
        None, help="torch: each layer's default, as the original had it; empty: the protocol's"
    )
    clip: float = setting(0.5, above=0, high=1e6, help="largest gradient norm")
    gradient: Literal["exact", "local", "original"] | None = setting(
        None, help="theory part of the blend; empty: the protocol's"
    )
    router_gradient: Literal["exact", "selected", "none"] | None = setting(
        None, help="none: the original's router, which never learns; empty: the protocol's"
    )
    balance: float = setting(0.0, low=0, high=100, help="weight of the experts' load-balancing loss")
    causal: bool | None = setting(None, help="False sees the future; empty: the protocol's")
    mixer: Literal["diagonal", "solve"] | None = setting(
        None,
        help="solve: the model that reads, alpha bends the gradient of the diagonal inside; diagonal: the published "
        "one; empty: solve where the gradient is exact and nothing sees the future",
    )

    def resolved(self) -> GradBlendConfig:
        config = super().resolved()
        if config.alphas == "grid":
            config = dataclasses.replace(config, alphas=FULL_GRID)
        able = (config.gradient, config.causal, config.protocol) == ("exact", True, "corrected")
        if config.mixer is None:
            config = dataclasses.replace(config, mixer="solve" if able else "diagonal")
        if config.learning_rates is None:
            searches = config.profile == "full" and config.protocol == "corrected"
            config = dataclasses.replace(
                config, learning_rates=SEARCHED if searches else (RATES[config.mixer],)
            )
        if config.balance and (config.router_gradient == "none" or config.num_experts == 1):
            raise ValueError(
                f"balance: got {config.balance:g} with a router that never learns ('none', or one expert); take 0."
            )
        if config.mixer == "solve" and not able:
            raise ValueError(
                f"mixer: got 'solve' with gradient {config.gradient!r}, causal {config.causal} and protocol "
                f"{config.protocol!r}; it has gradient 'exact' and causal True in protocol 'corrected' only: take those, or "
                "mixer 'diagonal'."
            )
        if config.mixer == "solve" and config.first_weights == "torch":
            raise ValueError(
                "first_weights: got 'torch' with mixer 'solve', whose heads bklm starts with memories of their own; take "
                "'bklm', or mixer 'diagonal'."
            )
        if config.top_k > config.num_experts:
            raise ValueError(
                f"top_k: got {config.top_k} with num_experts {config.num_experts}; at most as many as experts."
            )
        return config
