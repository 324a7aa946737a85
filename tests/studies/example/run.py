"""The example study: one small recurrent model per (dropout, seed), equal weights, batches and steps for all of a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import NewLLM, NewLLMConfig
from bklm.training.loop import train
from bklm.training.records import EPOCH_KEYS
from bklm.training.schedules import TrainingSettings

from .config import ExampleConfig
from .figures import draw_dropouts
from .tables import DROPOUTS

KEYS = {"val_ppl": float, "seconds": float, "epochs": EPOCH_KEYS}


@dataclass(frozen=True)
class ExampleResult(StudyResult):
    """What `run_example` found: ``table`` holds one row per dropout."""

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        return {"dropouts": lambda: DROPOUTS.readable(self.table)}


def run_example(
    config: ExampleConfig, on_figure: Callable[[Path], None] | None = None, text: StudyText | None = None
) -> ExampleResult | None:
    """Compare dropouts; everything goes to ``<output_dir>/example`` and its zip. See `bklm.harness.study.run_study`."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: ExampleConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    vocabulary, train_tokens, val_tokens = text_size(config.dataset, config.data_dir, config.vocab_size)
    size = _size(config, vocabulary, 0.1)
    epochs = len(config.dropouts) * len(config.seeds) * config.epochs
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    return minutes(config, [Run(size, lambda: NewLLM(size), epochs, used, val_tokens)])


def _size(config: ExampleConfig, vocabulary: int, dropout: float) -> NewLLMConfig:
    return NewLLMConfig(vocabulary, *[config.width] * 3, n_layers=config.n_layers, dropout_p=dropout)


def _train_all(study: Session) -> list[Trial]:
    config, steps = study.config, len(study.text.train_loader(seed=0)) * study.config.epochs
    study.expect(steps * len(config.dropouts) * len(config.seeds))

    def trial(place: str, dropout: float, seed: int) -> dict[str, Any]:
        point = {"dropout": dropout, "seed": seed}
        return study.trial(place, point, steps, lambda folder: _train(study, dropout, seed, folder), KEYS)

    def draw(done: list[Trial]) -> Path:
        return draw_dropouts(
            study.folder / "dropouts.png", DROPOUTS.rows(done), f"{len(done)} trials done", _note(study)
        )

    return study.grid({"dropout": config.dropouts, "seed": config.seeds}, trial, draw=draw)


def _train(study: Session, dropout: float, seed: int, folder: Path) -> dict[str, Any]:
    config, text = study.config, study.text
    torch.manual_seed(seed)
    model = NewLLM(_size(config, text.vocab_size, dropout)).to(study.accelerator.device)
    settings = TrainingSettings(
        config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        seed=seed,
    )
    records = train(
        model,
        text.train_loader(seed=seed),
        text.val_loader(),
        settings,
        accelerator=study.accelerator,
        unk_id=text.unk_id,
        folder=folder / "checkpoints",
        label=f"dropout {dropout:g}, seed {seed}",
        on_step=study.progress.step,
        on_skip=study.progress.skip,
    )
    last = records[-1]
    return {
        "val_ppl": last.val_perplexity,
        "val_ppl_without_unk": last.val_perplexity_without_unk,
        "val_accuracy": last.val_accuracy,
        "seconds": sum(r.seconds for r in records),
        "epochs": [r.to_dict() for r in records],
    }


def _note(study: Session) -> str:
    return small_print(study.text, len(study.config.seeds))


def _report(study: Session, trials: list[Trial]) -> ExampleResult:
    DROPOUTS.require_any(trials)
    report = Report(study)
    report.figure("dropouts.png", draw_dropouts, DROPOUTS.rows(trials), DROPOUTS.headline(trials), _note(study))
    return report.finish(ExampleResult, DROPOUTS, trials)
