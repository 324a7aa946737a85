"""Settings of the compression study."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(WindowStudyConfig):
    """Settings of the study."""

    study: ClassVar[str] = "compression"
    notebook: ClassVar[str] = "07_compression"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "models", "bits", "sparsities", "seeds", "epochs",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "seeds": (0,), "epochs": 2, "retrain_epochs": 1, "seq_len": 16, "vocab_size": 500, "d_model": 32, "n_layers": 2,
            "max_train_tokens": 4096, "learning_rates": (1e-2,), "retrain_rates": (1e-3,), "bits": (8, 4), "groups": (0, 32),
            "sparsities": (0.5,), "trained_sparsity": 0.5, "widths": (0.5,), "temperatures": (2.0,),
            "calibration_tokens": 1024, "repeats": 3,
        },
        "quick": {
            "seeds": (0,), "epochs": 3, "retrain_epochs": 1, "seq_len": 64, "vocab_size": 5000, "d_model": 64, "n_layers": 3,
            "max_train_tokens": 60_000, "learning_rates": (1e-2,), "retrain_rates": (3e-3,), "bits": (8, 4, 2),
            "groups": (0, 32), "sparsities": (0.8,), "trained_sparsity": 0.8, "widths": (0.5, 0.25),
            "temperatures": (2.0,), "calibration_tokens": 8192, "repeats": 5,
        },
        # 8,000 of the original's 30,000 words: a seventh of the words is left unknown, and the time goes into steps.
        "full": {
            "seeds": (0, 1, 2), "epochs": 3, "retrain_epochs": 2, "seq_len": 128, "vocab_size": 8_000, "d_model": 64,
            "n_layers": 4, "max_train_tokens": 0, "learning_rates": (1e-2, 3e-2), "retrain_rates": (3e-3,),
            "bits": (8, 4, 3, 2), "groups": (0, 32, 128), "sparsities": (0.3, 0.5, 0.7, 0.8, 0.9), "trained_sparsity": 0.8,
            "widths": (0.5, 0.25, 0.125), "temperatures": (1.0, 2.0, 4.0), "calibration_tokens": 16_384, "repeats": 11,
        },
    }  # fmt: skip

    batch_size: int = setting(16, low=4, high=512, step=4, help="sequences per optimiser step")
    models: Literal["all", "resnet_bk", "newllm"] = setting(
        "all", help="which are compressed; all: both, and a ResNetBK with experts, of which some are removed"
    )
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training text")
    retrain_epochs: int | None = setting(None, low=1, high=1000, help="further passes, of every retrained arm")
    d_model: int | None = setting(None, low=16, high=8192, help="model width")
    n_heads: int = setting(4, low=1, high=256, help="heads, or as many as the width has in common with that")
    num_experts: int = setting(4, low=3, high=64, help="of the ResNetBK with experts")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="AdamW learning rates; of several each size and student takes its best"
    )
    retrain_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="those of further passes; of several each arm takes its best"
    )
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay")
    clip: float = setting(1.0, above=0, high=1e6, help="largest gradient norm")
    schedule: Literal["constant", "cosine"] = setting("cosine", help="learning rate over a run")
    bits: tuple[int, ...] | None = setting(None, low=2, high=8, help="of a weight; the fewest are trained, too")
    groups: tuple[int, ...] | None = setting(
        None, low=0, high=65536, help="inputs that share a scale, fewer than the widest map has; 0: a whole row"
    )
    sparsities: tuple[float, ...] | None = setting(
        None, low=0.05, high=0.99, help="shares of zeros in the body's weights, without training"
    )
    trained_sparsity: float | None = setting(
        None, low=0.05, high=0.99, help="share of zeros in the body's weights at the end of further training"
    )
    widths: tuple[float, ...] | None = setting(
        None, above=0, high=0.9, help="of smaller models from scratch, falling; students have the first"
    )
    temperatures: tuple[float, ...] | None = setting(None, above=0, high=100, help="of distillation")
    teacher_weight: float = setting(0.7, low=0, high=1, help="the teacher's share of a student's loss")
    smooth: float = setting(0.5, low=0, high=1, help="SmoothQuant's exponent")
    outliers: int = setting(4, low=1, high=4096, help="columns of activations that stay in float")
    calibration_tokens: int | None = setting(
        None, low=16, high=10**9, help="training tokens that scales and scores are found on"
    )
    repeats: int | None = setting(None, low=3, high=1000, help="timed calls of each way to multiply")
    torchao: bool = setting(False, help="time int8 products through torchao, too, which must be installed")

    def resolved(self) -> CompressionConfig:
        config = super().resolved()
        if config.torchao and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                "torchao: got True, but it is not installed here; pip install torchao, or give False."
            )
        if config.torchao:
            # torch comes with it, for which a refused value need not wait.
            from bklm.compression.products import multiplies_exactly

            if not multiplies_exactly():
                raise ValueError(
                    "torchao: got True, but torch's int8 product, which it sums through, saturates on this processor, which "
                    "lacks VNNI; give False."
                )
        widest = config.widest_input("NewLLM" if config.models == "newllm" else "ResNetBK")
        if max(config.groups) >= widest:
            raise ValueError(
                f"groups: got {max(config.groups)}, but at d_model {config.d_model} no map has more than {widest} inputs to "
                f"share among; give groups below {widest}, or 0 for a whole row."
            )
        return config

    def widest_input(self, family: str) -> int:
        """Inputs of the widest map of a kind of model, before it is made: the units of its dense layers."""
        return (2 if family == "NewLLM" else 4) * self.d_model
