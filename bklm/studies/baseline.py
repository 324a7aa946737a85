"""The baseline study: NewLLM as published, beside a GPT and a ResNetBK of the same size.

Each model gets the same small search of the learning rate, then one training per seed with the best one: equal parameters,
text, batches and steps. ``protocol="original"`` cuts the text as the original did, so that its perplexities can be compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState

from bklm.checkpoints import is_checkpoint
from bklm.config import TextStudyConfig, setting, with_ambient_folder
from bklm.processes import main_first, make_accelerator, require_launch
from bklm.schedules import TrainingSettings, parse_clip
from bklm.studies import cli
from bklm.studies.baseline_measure import measure_models
from bklm.studies.baseline_models import model_names
from bklm.studies.baseline_report import BaselineResult, show, write_report
from bklm.studies.baseline_runner import Runner
from bklm.studies.baseline_text import prepare_text
from bklm.studies.folder import claim, study_folder

log = logging.getLogger("bklm.studies.baseline")  # __name__ is "__main__" when run with python -m

ORIGINAL_CLIP = "0.5@1, 1@11, 2@31"


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(TextStudyConfig):
    """Settings of the comparison. An empty field takes the value of the protocol, then of the profile."""

    study: ClassVar[str] = "baseline"
    leading: ClassVar[tuple[str, ...]] = ("profile", "dataset", "data_dir", "model")
    circumstances: ClassVar[frozenset[str]] = TextStudyConfig.circumstances | {
        "processes",
        "checkpoint_dir",
        "keep_checkpoints",
    }
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "seeds": (0, 1), "epochs": 2, "learning_rates": (1e-3, 3e-3), "search_tokens": 2048, "seq_len": 32,
            "vocab_size": 500, "embed_dim": 32, "hidden_dim": 64, "context_dim": 32, "n_layers": 2,
            "max_train_tokens": 8192, "clip": "1", "generate_tokens": 8, "context_tokens": 2048,
        },
        "quick": {
            "seeds": (0, 1, 2), "epochs": 3, "learning_rates": (3e-4, 1e-3, 3e-3), "search_tokens": 20_000, "seq_len": 64,
            "vocab_size": 1000, "embed_dim": 128, "hidden_dim": 256, "context_dim": 128, "n_layers": 4,
            "max_train_tokens": 60_000, "clip": "1", "generate_tokens": 100, "context_tokens": 4096,
        },
        "full": {
            "seeds": (0, 1, 2), "epochs": 50, "learning_rates": (1e-4, 3e-4, 1e-3, 3e-3), "search_tokens": 0, "seq_len": 64,
            "vocab_size": 1000, "embed_dim": 256, "hidden_dim": 512, "context_dim": 256, "n_layers": 6,
            "max_train_tokens": 0, "clip": ORIGINAL_CLIP, "generate_tokens": 1000, "context_tokens": 0,
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {},
        "original": {"seq_len": 63, "learning_rates": (1e-4,), "lowercase": True},
    }

    model: Literal["all", "newllm", "gpt", "resnet_bk", "newllm_advanced"] = setting(
        "all", help="one model, or NewLLM, GPT and ResNetBK of the same size together"
    )
    protocol: Literal["corrected", "original"] = setting(
        "corrected", help="original: its windows of lines, some targets twice, tails dropped"
    )
    validation: Literal["valid", "valid+test"] = setting(
        "valid", help="what is scored; valid+test where a sample has halved the validation split"
    )
    batch_size: int = setting(
        32, low=4, high=512, step=4, help="sequences per optimiser step, over all processes"
    )
    seeds: tuple[int, ...] | None = setting(None, low=0, high=2**31 - 1, help="one training per model and seed")
    epochs: int | None = setting(None, low=1, high=10_000, help="passes over the training text, at most")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="each model is tried with each; one alone is taken without a search"
    )
    search_tokens: int | None = setting(
        None, low=0, high=10**12, help="training tokens of each trial of the search, one pass; 0: all"
    )
    seq_len: int | None = setting(None, low=2, high=65536, help="tokens per sequence")
    max_train_tokens: int | None = setting(None, low=0, high=10**12, help="training tokens used; 0: all")
    vocab_size: int | None = setting(None, low=5, high=1_000_000, help="largest vocabulary, words")
    lowercase: bool = setting(True, help="words in lower case, as the original's")
    embed_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of the token embedding")
    hidden_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of its layers")
    context_dim: int | None = setting(None, low=1, high=8192, help="NewLLM: width of the context vector")
    n_layers: int | None = setting(None, low=1, high=256, help="NewLLM: layers; the others are sized to match")
    dropout: float = setting(0.1, low=0, high=0.99, help="dropout of every model")
    weight_decay: float = setting(
        0.0, low=0, high=10, help="AdamW weight decay; 0 is Adam, as the original had it"
    )
    clip: str | None = setting(None, help="largest gradient norm, or by epoch, such as 0.5@1, 1@11, 2@31")
    schedule: Literal["constant", "cosine"] = setting("constant", help="learning rate over a run")
    warmup: float = setting(0.05, low=0, high=0.9, help="share of the steps that a cosine schedule warms up")
    patience: int = setting(15, low=1, high=10_000, help="epochs without improvement before a run ends")
    min_delta: float = setting(
        1e-3, low=0, high=10, help="fall of the validation loss that counts as improvement"
    )
    accumulate: int = setting(
        1, low=1, high=512, help="parts in which a batch is worked through, to save memory"
    )
    checkpoint_every: int = setting(5, low=1, high=1000, help="epochs between the checkpoints that are kept")
    keep_checkpoints: int = setting(
        2, low=1, high=1000, help="how many of them are kept per run, besides best and newest"
    )
    checkpoint_dir: str | None = setting(
        None, is_path=True, help="folder for checkpoints, such as one on a Drive"
    )
    resume_from: str | None = setting(None, is_path=True, help="a checkpoint that one run goes on from")
    processes: int = setting(1, low=1, high=8, step=1, help="processes that train together, from a notebook")
    generate_tokens: int | None = setting(
        None, low=1, high=100_000, help="tokens generated when generation is timed"
    )
    context_tokens: int | None = setting(
        None, low=0, high=10**12, help="validation tokens for PPL by context length; 0: all"
    )

    def resolved(self) -> BaselineConfig:
        given = {n: v for n in self.names() if (v := getattr(self, n)) is not None}
        filled = {**self.profiles[self.profile], **self.protocols[self.protocol], **given}
        config = type(self)(**with_ambient_folder(filled))
        if config.protocol == "original" and (config.seq_len, config.lowercase) != (63, True):
            raise ValueError(
                f"seq_len, lowercase: got {config.seq_len} and {config.lowercase}; the original's windows hold 63 inputs in "
                "lower case, so leave both as they are or take protocol 'corrected'."
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
        return TrainingSettings(
            self.epochs,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
            clip=parse_clip(self.clip),
            schedule=self.schedule,
            warmup=self.warmup,
            seed=seed,
            patience=self.patience,
            min_delta=self.min_delta,
            accumulate=self.accumulate,
        )

    def checkpoint_folder(self) -> Path:
        """Where the runs' checkpoints go: outside the study's folder, whose zip they would swell."""
        return Path(self.checkpoint_dir or Path(self.output_dir) / "baseline_checkpoints")

    def _check_resume(self) -> None:
        many = [
            f"{name} {value}"
            for name, value in (
                ("model", self.model),
                ("seeds", self.seeds),
                ("learning_rates", self.learning_rates),
            )
            if value == "all" or (isinstance(value, tuple) and len(value) > 1)
        ]
        if many:
            raise ValueError(
                f"resume_from: a checkpoint continues one run, but several are asked for ({'; '.join(many)}); "
                "name one model, one seed and one learning rate."
            )
        if not is_checkpoint(Path(self.resume_from)):
            raise ValueError(
                f"resume_from: {self.resume_from} is no checkpoint; give a folder such as epoch_0005_ppl_36.700 that holds "
                "model.safetensors and state.pt."
            )


def run_baseline(
    config: BaselineConfig, on_figure: Callable[[Path], None] | None = None
) -> BaselineResult | None:
    """Run the comparison and write everything to ``<output_dir>/baseline`` and its zip.

    A run that was stopped goes on where it was; a finished one is read back, not run again. Under torchrun or accelerate
    launch all processes call this together; with ``config.processes`` above 1 it launches them itself.

    Args:
        on_figure: called with the path of training_curves.png, drawn anew each time a training is done.

    Returns:
        The result; None in every process of a launch but the main one.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        require_launch(config.processes, config.device)
        AcceleratorState._reset_state(
            True
        )  # the launcher wants none, and a run before this one has left its own
        notebook_launcher(_train_only, (config,), num_processes=config.processes, use_port=_free_port())
    return _run(config, on_figure)


def _train_only(config: BaselineConfig) -> None:
    """In each launched process: the trainings. The process that launched them reads the results and writes the report."""
    if (
        torch.distributed.is_torchelastic_launched()
    ):  # not where the launcher sees one device and calls this at once
        sys.stdout = (
            sys.__stdout__
        )  # a notebook's own stream belongs to the kernel that this process was forked from
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    _run(config, None, report=False)


def _run(
    config: BaselineConfig, on_figure: Callable[[Path], None] | None, report: bool = True
) -> BaselineResult | None:
    accelerator = make_accelerator(config.device, config.precision)
    main = accelerator.is_main_process
    with study_folder(config) if main else contextlib.nullcontext() as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        with main_first(accelerator):  # the others read the tokens that the main process has cached
            text = prepare_text(config)
        if main:
            claim(folder, config, text.corpus.sha256)
        names = model_names(config.model)
        with Runner(config, text, accelerator, folder, on_figure) as runner:
            rates = runner.search(names)
            runs = runner.train_all(names, rates)
        if not (main and report):
            return None
        measured = measure_models(config, text, runs, folder)
        return write_report(config, text, runner.search_results, runs, runner.diverged, measured, folder)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    cli.main(BaselineConfig, run_baseline, show)
