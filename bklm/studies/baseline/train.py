"""Trains one model of the baseline study: a short trial of a learning rate, or a whole run with its checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

from bklm.files.atomic import replacing
from bklm.harness.comparison import Trial
from bklm.harness.session import Session
from bklm.models import LanguageModel
from bklm.studies.baseline.models import CONTEXT_LENGTHS, TITLES, active_parameters, build_model
from bklm.training.checkpoints import CheckpointFolder, epoch_of, perplexity_of, read_weights
from bklm.training.context_gain import measure_context_gain
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.records import EPOCH_KEYS, EpochRecord
from bklm.training.schedules import TrainingSettings

log = logging.getLogger(__name__)

SEARCH_KEYS = {"val_ppl": float, "seconds": float, "epochs": EPOCH_KEYS}
RUN_KEYS = {
    **SEARCH_KEYS,
    "learning_rate": float,
    "best_epoch": int,
    "model_config": dict,
    "val_ppl_by_context": dict,
}
WEIGHTS = "best_model.safetensors"


def train_rate(
    study: Session, name: str, fields: Mapping[str, Any], settings: TrainingSettings, tokens: int
) -> dict[str, Any]:
    """A trial of the search: one pass over the first ``tokens`` training tokens (0: all) with the settings' rate."""
    batches = (study.text.search_loader(settings.seed, tokens), study.text.search_val_loader(tokens))
    label = f"search: {TITLES[name]}, learning rate {settings.learning_rate:g}"
    _, (record,) = _train(study, name, fields, settings, *batches, label=label)
    found = {"val_ppl": record.val_perplexity, "seconds": record.seconds}
    return {"seed": settings.seed, **found, "epochs": _curve([record], settings)}


def train_run(
    study: Session, name: str, fields: Mapping[str, Any], settings: TrainingSettings, checkpoints: CheckpointFolder,
    *, identity: dict[str, Any], resume_from: Path | None, context_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Train one model, and score its best epoch.

    Args:
        fields: of the model's config class.
        identity: what a checkpoint must agree with before the run goes on from it.
        context_tokens: validation tokens that each context length is scored on; 0: all.
    """
    text = study.text
    loader = text.train_loader(seed=settings.seed)
    model, records = _train(
        study, name, fields, settings, loader, text.val_loader(), label=f"{TITLES[name]}, seed {settings.seed}",
        folder=checkpoints, identity=identity, resume_from=resume_from, on_skip=study.progress.skip,
    )  # fmt: skip
    # Of several epochs the one with the lowest validation loss is the model; the test split has no say in that.
    places = _places(checkpoints, resume_from)
    best = min((r for r in records if r.epoch in places), key=lambda r: r.val_loss)
    load_model(model, str(places[best.epoch] / "model.safetensors"))

    def perplexity(batches: Any) -> float:
        return evaluate(model, batches, text.unk_id, study.accelerator).perplexity

    gained = measure_context_gain(
        model, text.val_loader(), text.unk_id, windows_of=lambda n: text.context_loader(n, context_tokens),
        window=text.seq_len, lengths=CONTEXT_LENGTHS, accelerator=study.accelerator,
    )  # fmt: skip
    if not study.config.keep_checkpoints and study.is_main:
        checkpoints.keep_only(best.epoch)
    return {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "best_epoch": best.epoch,
        "val_ppl": best.val_perplexity,
        "val_ppl_without_unk": best.val_perplexity_without_unk,
        "val_accuracy": best.val_accuracy,
        "test_ppl": perplexity(text.test_loader()) if text.has_test_split else None,
        "val_ppl_mixer_off": gained.mixer_off,
        "val_ppl_by_context": {str(length): value for length, value in gained.by_window.items()},
        "context_gain": gained.gain,
        "seconds": sum(r.seconds for r in records),
        "epochs": _curve(records, settings),
        "model_config": dict(fields),
        "steps": len(loader) * len(records),
        "checkpoints": str(checkpoints.path),
    }


def _train(
    study: Session, name: str, fields: Mapping[str, Any], settings: TrainingSettings, *batches: Any, **more: Any
) -> tuple[LanguageModel, list[EpochRecord]]:
    """A fresh model and its training's records."""
    torch.manual_seed(settings.seed)
    model = build_model(name, fields).to(study.accelerator.device)
    more |= {"accelerator": study.accelerator, "unk_id": study.text.unk_id, "on_step": study.progress.step}
    return model, train(model, *batches, settings, **more)


def _curve(records: Sequence[EpochRecord], settings: TrainingSettings) -> list[dict[str, Any]]:
    # A schedule lowers the rate from epoch to epoch.
    return [{"learning_rate_at_start": settings.learning_rate, **r.to_dict()} for r in records]


def _places(checkpoints: CheckpointFolder, resume_from: Path | None) -> dict[int, Path]:
    return {epoch_of(p): p for p in [*([resume_from] if resume_from else []), *checkpoints.all()]}


def run_name(point: Mapping[str, Any]) -> str:
    """The folder of a run, below the study's "runs" and among the checkpoints; ``point`` has "dropout" where it was tried."""
    tried = f"_dropout_{point['dropout']:g}" if "dropout" in point else ""
    return f"{point['model']}_seed_{point['seed']}{tried}"


def kept_weights(folder: Path, runs: Sequence[Trial]) -> Path | None:
    """The weights of the first of some runs that has them in a study's folder, whole."""
    files = (folder / "runs" / run_name(run) / WEIGHTS for run in runs)
    return next((file for file in files if read_weights(file) is not None), None)


def keep_weights(folder: Path, runs: Sequence[Trial], checkpoints: Path, resume_from: Path | None) -> None:
    """Copy one model's best checkpoint into a study's folder: one seed's weights are enough for samples, and for the zip.

    They are of the first run that has them here. With a database other machines share the runs, and a record brings no
    weights; a checkpoint of the same name is that run's where the perplexity in its name is the recorded one.
    """
    for run in runs:
        if kept_weights(folder, [run]) is not None:
            return
        place = _places(CheckpointFolder(checkpoints / run_name(run)), resume_from).get(run["best_epoch"])
        recorded = [float(f"{run['val_ppl']:{form}}") for form in (".3f", ".4g")]
        if place is not None and perplexity_of(place) in (None, *recorded):
            with replacing(folder / "runs" / run_name(run) / WEIGHTS) as temporary:
                shutil.copyfile(place / "model.safetensors", temporary)
            return
    log.warning(
        "%s: no weights of it are here, because another machine trained it or its checkpoints are gone; for samples copy a "
        "run's %s from there into the folder of the same name in %s.", TITLES[runs[0]["model"]], WEIGHTS, folder / "runs",
    )  # fmt: skip


def require_room(target: Path, needed: float) -> None:
    """Refuse to start where ``needed`` bytes of checkpoints will not fit, beside those that lie there already.

    Raises:
        OSError: the folder cannot be made, or its disk is too full.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"checkpoint_dir: cannot write to {target} ({error.strerror}); choose a folder you may write to."
        ) from error
    free, more = shutil.disk_usage(target).free, needed - CheckpointFolder(target).bytes()
    if free < more:
        raise OSError(
            f"checkpoint_dir: {target} has {free / 1e6:.0f} MB left; the checkpoints take up to {more / 1e6:.0f} MB; "
            "free some space, choose another folder, or a smaller keep_checkpoints (0: of a finished run the best alone)."
        )
