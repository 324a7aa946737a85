"""Settings of the baseline study."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from bklm.harness.config import WindowStudyConfig, setting
from bklm.training.schedules import TrainingSettings, parse_clip

ORIGINAL_CLIP = "0.5@1, 1@11, 2@31"
# Of every profile, where the protocol says nothing else.
OTHERWISE = {"lowercase": True, "patience": 15, "schedule": "constant", "keep_checkpoints": 2}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(WindowStudyConfig):
    """Settings of the comparison. An empty field takes the value of the protocol, then of the profile."""

    study: ClassVar[str] = "baseline"
    notebook: ClassVar[str] = "03_baseline_training"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "model", "batch_size", "learning_rates", "seeds",
        "epochs",
    )  # fmt: skip
    circumstances: ClassVar[frozenset[str]] = WindowStudyConfig.circumstances | {
        "checkpoint_dir",
        "keep_checkpoints",
    }
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "seeds": (0, 1), "epochs": 2, "learning_rates": (1e-3, 3e-3), "search_tokens": 2048, "seq_len": 32,
            "vocab_size": 500, "embed_dim": 32, "hidden_dim": 64, "context_dim": 32, "n_layers": 2,
            "max_train_tokens": 8192, "clip": "1", "generate_tokens": 8, "context_tokens": 2048, **OTHERWISE,
        },
        "quick": {
            "seeds": (0, 1, 2), "epochs": 3, "learning_rates": (3e-4, 1e-3, 3e-3), "search_tokens": 20_000, "seq_len": 64,
            "vocab_size": 1000, "embed_dim": 128, "hidden_dim": 256, "context_dim": 128, "n_layers": 4,
            "max_train_tokens": 60_000, "clip": "1", "generate_tokens": 100, "context_tokens": 4096, **OTHERWISE,
        },
        "full": {
            "seeds": (0, 1, 2), "epochs": 50, "learning_rates": (1e-4, 3e-4, 1e-3, 3e-3), "search_tokens": 0, "seq_len": 64,
            "vocab_size": 1000, "embed_dim": 256, "hidden_dim": 512, "context_dim": 256, "n_layers": 6,
            "max_train_tokens": 0, "clip": ORIGINAL_CLIP, "generate_tokens": 1000, "context_tokens": 0, **OTHERWISE,
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {},
        "original": {"seq_len": 63, "learning_rates": (1e-4,), "lowercase": True},
        # As WikiText-2 is scored elsewhere: its own case, 30,000 of its 33,278 words, the test split once.
        "field": {
            "lowercase": False, "vocab_size": 30_000, "seq_len": 128, "epochs": 10, "patience": 2, "schedule": "cosine",
            "clip": "1", "learning_rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            # A free Drive holds 15 GB.
            "keep_checkpoints": 0,
        },
    }  # fmt: skip

    model: Literal[
        "all",
        "readers",
        "newllm",
        "gpt",
        "lstm",
        "resnet_bk",
        "resnet_bk_diagonal",
        "newllm_advanced",
        "linear_context",
    ] = setting(
        "all",
        help="one model; all: NewLLM, GPT, LSTM, two ResNetBK, LinearContext, of one size; readers: GPT, LSTM, ResNetBK",
    )
    protocol: Literal["corrected", "original", "field"] = setting(
        "corrected",
        help="original: its windows of lines, tails dropped; field: as others score WikiText-2, published numbers beside it",
    )
    validation: Literal["valid", "valid+test"] = setting(
        "valid", help="what is scored; valid+test where a sample has halved the validation split"
    )
    epochs: int | None = setting(None, low=1, high=10_000, help="passes over the training text, at most")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="each model is tried with each; one alone is taken without a search"
    )
    dropouts: tuple[float, ...] | None = setting(
        None,
        low=0,
        high=0.99,
        help="each model is trained whole with each and the first seed; empty: dropout for all",
    )
    search_tokens: int | None = setting(
        None, low=0, high=10**12, help="training tokens of each trial of the search, one pass; 0: all"
    )
    vocab_size: int | None = setting(None, low=5, high=1_000_000, help="largest vocabulary, tokens")
    lowercase: bool | None = setting(None, help="words in lower case, as the original's; empty: the protocol's")
    embed_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of the token embedding")
    hidden_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of its layers")
    context_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of the context vector")
    clip: str | None = setting(None, help="largest gradient norm, or by epoch, such as 0.5@1, 1@11, 2@31")
    warmup: float = setting(0.05, low=0, high=0.9, help="share of the steps that a cosine schedule warms up")
    schedule: Literal["constant", "cosine"] | None = setting(None, help="learning rate over a run")
    patience: int | None = setting(
        None, low=1, high=10_000, help="epochs without improvement before a run ends"
    )
    min_delta: float = setting(1e-3, low=0, high=10, help="fall of the loss that counts as improvement")
    accumulate: int = setting(1, low=1, high=512, help="parts that a batch is worked in, to save memory")
    checkpoint_every: int = setting(5, low=1, high=1000, help="epochs between the checkpoints that are kept")
    keep_checkpoints: int | None = setting(
        None,
        low=0,
        high=1000,
        help="how many a run keeps, besides best and newest; 0: of one that is done the best; empty: 2, as the field 0",
    )
    checkpoint_dir: str | None = setting(
        None, is_path=True, help="folder for checkpoints, such as one on a Drive"
    )
    resume_from: str | None = setting(None, is_path=True, help="a checkpoint that one run goes on from")
    generate_tokens: int | None = setting(None, low=1, high=100_000, help="tokens of a timed generation")
    context_tokens: int | None = setting(
        None, low=0, high=10**12, help="validation tokens for PPL by context length; 0: all"
    )

    def resolved(self) -> BaselineConfig:
        config = super().resolved()
        if config.protocol == "original" and (config.seq_len, config.lowercase) != (63, True):
            raise ValueError(
                f"seq_len, lowercase: got {config.seq_len} and {config.lowercase}; the original's windows hold 63 inputs in "
                "lower case, so leave both as they are or take protocol 'corrected'."
            )
        if config.protocol == "original" and config.tokenizer != "word":
            raise ValueError(
                f"tokenizer: got {config.tokenizer!r}; the original's windows hold words, so take 'word', or protocol "
                "'corrected'."
            )
        if config.protocol == "original" and config.model == "resnet_bk":
            raise ValueError(
                "model: got 'resnet_bk', which is of this suite; protocol 'original' has the published 'resnet_bk_diagonal': "
                "take that, or protocol 'corrected'."
            )
        config.training_settings(config.learning_rates[0], config.seeds[0])
        if config.resume_from is not None:
            config._check_resume()
        return config

    def training_settings(self, learning_rate: float, seed: int) -> TrainingSettings:
        """How one model of a resolved config is trained.

        Raises:
            ValueError: a clip schedule that cannot be read or is longer than the run.
        """
        same = ("weight_decay", "schedule", "warmup", "patience", "min_delta", "accumulate")
        return TrainingSettings(
            self.epochs,
            learning_rate=learning_rate,
            clip=parse_clip(self.clip),
            seed=seed,
            **{name: getattr(self, name) for name in same},
        )

    def search_settings(self, learning_rate: float, seed: int) -> TrainingSettings:
        """How one model is trained in the search: one epoch, clipped as the first one of a run."""
        settings = self.training_settings(learning_rate, seed)
        return dataclasses.replace(settings, epochs=1, clip=settings.clip_at(1))

    def checkpoint_folder(self) -> Path:
        """Where the runs' checkpoints go: outside the study's folder, whose zip they would swell."""
        return Path(self.checkpoint_dir or Path(self.output_dir) / "baseline_checkpoints")

    def _check_resume(self) -> None:
        asked = {name: getattr(self, name) for name in ("model", "seeds", "learning_rates", "dropouts")}
        many = [
            f"{n} {v}"
            for n, v in asked.items()
            if v in ("all", "readers") or (isinstance(v, tuple) and len(v) > 1)
        ]
        if many:
            raise ValueError(
                f"resume_from: a checkpoint continues one run, but several are asked for ({'; '.join(many)}); "
                "name one model, one seed, one learning rate and one dropout."
            )
        # torch comes with it, for which a refused value need not wait.
        from bklm.training.checkpoints import is_checkpoint

        if not is_checkpoint(Path(self.resume_from)):
            raise ValueError(
                f"resume_from: {self.resume_from} is no checkpoint; give a folder such as epoch_0005_ppl_36.700 that holds "
                "model.safetensors and state.pt."
            )
