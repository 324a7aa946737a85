"""What the Koopman study measures of its finished models: replaced blocks, a spectrum, times."""

from __future__ import annotations

import functools
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
from bklm.models.koopman import Dictionary, replaced, spectrum
from bklm.studies.koopman import models
from bklm.studies.koopman.config import KoopmanConfig
from bklm.studies.koopman.tables import ARMS
from bklm.training.linearise import collect_states, fit_blocks, score_blocks
from bklm.training.recall import models_of_equal_size
from bklm.training.weights import load_weights

RECALL_EPOCHS = 4
ROUNDS, SECONDS = 11, 5.0  # of timing, an arm
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
    """Blocks of every plain model replaced; the first one's times, and what share of its parameters is outside of blocks."""
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
            outer = sum(p.numel() for p in {*model.embedding.parameters(), model.head()[0]})
            found = {
                "times": _times(model, fitted, states[0][:rows], batches[0][0][:rows].to(device)),
                "outer_share": outer / model.num_parameters(),
            }
    return found | {"scores": scores}


def _times(
    model: LanguageModel, fitted: Mapping[str, list[torch.nn.Module]], x: torch.Tensor, ids: torch.Tensor
) -> dict[str, dict[str, list[float]]]:
    """Seconds, in turns: of the first block (all have one shape) and its stand-ins, and, as "forward_", of a forward to
    logits with all blocks replaced; there "all blocks" is what the original's own blocks take of it."""
    blocks = {"original": list(model.blocks)} | {kind: made for kind, made in fitted.items() if kind != "skip"}

    def forward(made: list[torch.nn.Module]) -> None:
        with replaced(model, dict(enumerate(made))):
            model(ids)

    def stack() -> None:
        state = x
        for block in blocks["original"]:
            state = block(state)[0]

    calls = {("", kind): functools.partial(made[0], x) for kind, made in blocks.items()}
    calls |= {("forward_", kind): functools.partial(forward, made) for kind, made in blocks.items()}
    calls["forward_", "all blocks"] = stack
    with torch.no_grad():
        taken = _seconds({name: timing.Arm(call) for name, call in calls.items()}, x.device.type)
    found: dict[str, dict[str, list[float]]] = {"": {}, "forward_": {}}
    for (prefix, kind), seconds in taken.items():
        found[prefix][kind] = seconds
    return found


def _seconds(arms: Mapping[Any, timing.Arm], device: str) -> dict[Any, list[float]]:
    return {name: cell["total"] for name, cell in timing.time_arms(arms, ROUNDS, SECONDS, device).items()}


def spectrum_of(study: Session) -> dict[str, Any]:
    """The repeated block's eigenvalues, fitted to pairs of states of all depths of the first seed's model; the residuals are
    those on validation text."""
    config, text = study.config, study.text
    model = load_model(study.folder, config, "tied", config.seeds[0]).to(study.accelerator.device)
    dictionary, pairs = None, []
    for batches in (text.train_loader(seed=0), text.search_val_loader(config.score_tokens)):
        states = collect_states(model, batches, config.fit_positions)
        if dictionary is None:
            dictionary = Dictionary(torch.cat([x.flatten(0, 1) for x in states[:-1]]), 1, config.units)
        lifted = [dictionary(x).flatten(0, 1) for x in states]
        pairs.append((torch.cat(lifted[:-1]), torch.cat(lifted[1:])))
    found = spectrum(*pairs[0], held_out=pairs[1])
    listed = zip(found.eigenvalues.tolist(), found.residuals.tolist(), strict=True)
    return {
        "rows": [{"real": v.real, "imaginary": v.imag, "modulus": abs(v), "residual": r} for v, r in listed]
    }


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
