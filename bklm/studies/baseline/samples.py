"""Text from the trained models of a baseline study, and a look into its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bklm.models import LanguageModel
from bklm.studies.baseline.models import TITLES, read_model
from bklm.studies.baseline.run import BaselineResult
from bklm.studies.baseline.text import BaselineText
from bklm.training.checkpoints import CheckpointFolder, epoch_of, is_checkpoint, perplexity_of, read_state

SAMPLE_WORDS = 60
# A folder of ``bklm.studies.baseline.train.run_name``.
RUN = re.compile(r"(.*)_seed_(\d+)(?:_dropout_([\d.e-]+))?")


def write_sample(
    result: BaselineResult, text: BaselineText, model: str = "", prompt: str = "", temperature: float = 0.8,
    checkpoint: int | None = None,
) -> str:  # fmt: skip
    """Up to 60 words that one of the trained models writes after ``prompt``, or after the opening of a validation line.

    ``model`` is "newllm", "gpt" ...; the best one when empty. ``checkpoint``: a number in ``checkpoints_table``, instead.
    Words outside the vocabulary become <unk>; a ``temperature`` of 0 takes the likeliest word each time.
    """
    if checkpoint is None:
        return continue_text(result.load(model or None), text, prompt, temperature)
    writer = choose_checkpoint(checkpoints_table(result), checkpoint, text)
    return continue_text(writer, text, prompt, temperature)


def continue_text(model: LanguageModel, text: BaselineText, prompt: str = "", temperature: float = 0.8) -> str:
    """What ``model`` writes after ``prompt``; it stops where the model's positions end."""
    longest = model.n_seq or 10**9
    words = (prompt.split() or text.prompt(12).split())[: longest - 1]
    return text.generate(model, " ".join(words), min(SAMPLE_WORDS, longest - len(words)), temperature)


def checkpoints_table(result: BaselineResult, text: BaselineText | None = None) -> list[dict[str, Any]]:
    """Every checkpoint of a study, one row each, numbered: model, seed, epoch, validation PPL, best or not, size, path."""
    rows = []
    for run in sorted(
        p for p in result.config.checkpoint_folder().glob("*_seed_*") if p.is_dir() and RUN.fullmatch(p.name)
    ):
        folder = CheckpointFolder(run)
        name, seed, dropout = RUN.fullmatch(run.name).groups()
        for place in folder.all():
            best = "best" if place == folder.best() else ""
            size = round(sum(f.stat().st_size for f in place.iterdir()) / 1e6, 1)
            row = {"number": len(rows), "model": TITLES.get(name, name), "seed": int(seed)}
            row |= {"dropout": float(dropout)} if dropout else {}
            row |= {"epoch": epoch_of(place), "val PPL": perplexity_of(place), "kept as": best}
            rows.append({**row, "MB": size, "path": str(place)})
    return rows


def choose_checkpoint(rows: Sequence[dict[str, Any]], number: int, text: BaselineText) -> LanguageModel:
    """The model of row ``number`` of ``checkpoints_table``, to write with the words of ``text``.

    Raises:
        ValueError: there is no such row, or that model was trained with another vocabulary.
    """
    if not rows:
        raise ValueError(
            "number: there are no checkpoints yet; run the study, or set checkpoint_dir to theirs."
        )
    if not 0 <= number < len(rows):
        raise ValueError(f"number: got {number}; the list has 0 to {len(rows) - 1}.")
    place = Path(rows[number]["path"])
    model = load_checkpoint(place)
    vocabulary = read_state(place)["identity"]["vocabulary"]
    if vocabulary != text.vocabulary_name:
        raise ValueError(
            f"checkpoint: {place} was trained with another vocabulary ({vocabulary}) than this text's "
            f"({text.vocabulary_name}); take one of this study's, or the text and vocab_size it was trained with."
        )
    return model


def load_checkpoint(place: Path) -> LanguageModel:
    """The model of a checkpoint, rebuilt from the configuration in the checkpoint; on the CPU, in evaluation mode.

    Raises:
        ValueError: no checkpoint, or not one of this study.
    """
    place = Path(place)
    if not is_checkpoint(place):
        raise ValueError(f"checkpoint: {place} is no checkpoint; take a path from the list.")
    identity = read_state(place)["identity"] or {}
    name = identity.get("model")
    if name not in TITLES:
        raise ValueError(f"checkpoint: {place} does not say which model it holds; take one of this study.")
    prefix = f"{name}."
    settings = {k.removeprefix(prefix): v for k, v in identity.items() if k.startswith(prefix)}
    return read_model(name, settings, place / "model.safetensors")
