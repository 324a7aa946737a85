"""What the Koopman study measures of its finished models: replaced blocks, a spectrum, times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bklm.data.recall import Recall
from bklm.files.atomic import read_result
from bklm.harness import measure as timing
from bklm.harness.arms import WEIGHTS
from bklm.harness.comparison import Trial
from bklm.harness.session import Session, place_of
from bklm.models import LanguageModel
from bklm.models.koopman import Dictionary, spectrum
from bklm.studies.koopman import models
from bklm.studies.koopman.config import KoopmanConfig
from bklm.studies.koopman.tables import ARMS
from bklm.training.linearise import collect_states, fit_blocks, score_blocks
from bklm.training.recall import models_of_equal_size
from bklm.training.weights import load_weights

RECALL_EPOCHS = 4
ROUNDS, SECONDS = 21, 5.0  # of timing, an arm
SEQUENCES = 32  # that a lifting is described on, and a block is timed on


def load_model(folder: Path, config: KoopmanConfig, arm: str, seed: int) -> LanguageModel:
    """A trained model of the arm "none" or "tied"; on the CPU, in evaluation mode."""
    place = Path(folder) / {"none": "trials", "tied": "tied"}[arm] / place_of({"arm": arm, "seed": seed})
    record = read_result(place / "result.json", {"vocabulary": int})
    if record is None or not (place / WEIGHTS).exists():
        raise FileNotFoundError(f"{place} holds no finished model; run the study (again) to its end first.")
    made = models.tied(config) if arm == "tied" else models.arms_of(config, 1)["none"]
    model = made.build(record["vocabulary"])
    load_weights(model, place / WEIGHTS)
    return model.eval()


def recall_task(config: KoopmanConfig) -> Recall:
    """The recall task of a resolved config."""
    batches = -(-config.recall_steps // RECALL_EPOCHS)
    return Recall(batches * config.batch_size, config.batch_size, config.trained_distance, config.recall_pairs)


def linearise(study: Session, trials: list[Trial]) -> dict[str, Any]:
    """Blocks of every plain model replaced; times of the first one's, and what share of scoring and parameters blocks are."""
    config, text, scores = study.config, study.text, []
    device = study.accelerator.device
    few = -(-config.fit_positions // (text.seq_len * text.batch_size))
    batches = list(itertools.islice(iter(text.train_loader(seed=0)), few))
    held_out, found = text.search_val_loader(config.score_tokens), {}
    for trial in ARMS.groups(trials).get("none", []):
        model = load_model(study.folder, config, "none", trial["seed"]).to(device)
        states = collect_states(model, batches, config.fit_positions)
        fitted = fit_blocks(
            states, units=config.units, taps=config.delays, rank=config.rank or None, seed=trial["seed"]
        )
        scores.append(score_blocks(model, fitted, batches, held_out, config.fit_positions))
        if not found:
            rows = min(SEQUENCES, len(states[0]), len(batches[0][0]))
            x, ids = states[0][:rows], batches[0][0][:rows].to(device)
            stand_ins = {kind: blocks[0] for kind, blocks in fitted.items() if kind != "skip"}
            calls = {name: (block, x) for name, block in ({"original": model.blocks[0]} | stand_ins).items()}
            calls |= {"whole": (model, ids), "blocks": (torch.nn.Sequential(*map(_First, model.blocks)), x)}
            timed = {name: timing.Arm(_call(*given)) for name, given in calls.items()}
            found["times"] = _seconds(timed, device.type)
            outer = sum(p.numel() for p in {*model.embedding.parameters(), model.head()[0]})
            found["outer_share"] = outer / model.num_parameters()
    return found | {"scores": scores}


class _First(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)[0]


def _call(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def _seconds(arms: Mapping[str, timing.Arm], device: str) -> dict[str, list[float]]:
    return {name: cell["total"] for name, cell in timing.time_arms(arms, ROUNDS, SECONDS, device).items()}


def spectrum_of(study: Session) -> dict[str, Any]:
    """The repeated block's eigenvalues, over pairs of states of all depths of the first seed's model."""
    config, text = study.config, study.text
    model = load_model(study.folder, config, "tied", config.seeds[0]).to(study.accelerator.device)
    states = collect_states(model, text.train_loader(seed=0), config.fit_positions)
    sample = torch.cat([x.flatten(0, 1) for x in states[:-1]])
    dictionary = Dictionary(sample, 1, config.units)
    lifted = [dictionary(x).flatten(0, 1) for x in states]
    found = spectrum(torch.cat(lifted[:-1]), torch.cat(lifted[1:]))
    pairs = zip(found.eigenvalues.tolist(), found.residuals.tolist(), strict=True)
    return {"rows": [{"real": v.real, "imaginary": v.imag, "modulus": abs(v), "residual": r} for v, r in pairs]}


def recall_steps(study: Session) -> dict[str, Any]:
    """Seconds of training steps of the recall models, in turns."""
    config, device = study.config, study.accelerator.device
    task = recall_task(config)
    x, y = next(iter(task.train_loader(0)))
    x, y = x.to(device), y.to(device)

    def step(model: LanguageModel) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.to(device).parameters(), fused=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            model.loss(x, y).backward()
            optimizer.step()

        return run

    rivals = models_of_equal_size(task, config.recall_width, config.recall_layers)
    with torch.random.fork_rng():
        arms = {name: timing.Arm(step(build(task.vocab_size))) for name, build in rivals.items()}
        return {"steps": _seconds(arms, device.type)}
