"""Trains the models of the embedding-freeze study: phase 1 once per embedding, sample and seed, phase 2 once per arm."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.comparison import Trial
from bklm.harness.folder import INTERNALS
from bklm.harness.session import Session
from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.studies.embedding_freeze.config import FACTORS, Arm
from bklm.studies.embedding_freeze.phase2 import train_phase2
from bklm.training.checkpoints import read_weights
from bklm.training.processes import broadcast
from bklm.training.records import EPOCH_KEYS
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.phase1 import (
    FixedPointSettings,
    Phase1Result,
    train_in_its_place,
)
from bklm.training.weights import save_weights

log = logging.getLogger(__name__)

# What a recorded part must hold to be taken for finished.
PHASE1_KEYS = {"rows": list, "seconds": float, "sweep": str}
TRIAL_KEYS = {
    "arm": str, "val_ppl": float, "val_accuracy": float, "seconds": float, "parameters": int, "epochs": EPOCH_KEYS,
}  # fmt: skip
PHASE1, TRIALS = f"{INTERNALS}/phase1", f"{INTERNALS}/trials"
BLOCK = "context_block.safetensors"
WEIGHTS = "best_model.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How every model of a study is made and trained in phase 1 (``context``) and 2; seed, rate and head are a trial's own."""

    size: ContextTokenConfig
    context: FixedPointSettings
    training: TrainingSettings
    batch_tokens: int
    recompute_contexts: bool

    def steps(self, tokens: int) -> int:
        """Optimiser steps of a phase 2 that uses all its epochs."""
        return self.training.epochs * -(-(tokens - 1) // self.batch_tokens)


class Trainer:
    """Both phases of one study's arms, each part recorded when it is done and read back when it is asked for again."""

    def __init__(
        self, study: Session, recipe: Recipe, arms: Sequence[Arm], samples: Sequence[int], seeds: Sequence[int]
    ) -> None:
        self.study, self.text, self.recipe = study, study.text, recipe
        self.arms = {arm.name: arm for arm in arms}
        self.samples, self.seeds = samples, seeds
        starts = list(dict.fromkeys(arm.start for arm in arms))
        self._starts = {"initialisation": starts, "samples": samples, "seed": seeds}
        self._can_tie = recipe.size.embed_dim == recipe.size.context_dim
        self._keys = list(itertools.product(*self._starts.values()))

    def run_phase1(self, is_done: bool = False) -> list[dict[str, Any]]:
        """Phase 1 of every (initialisation, samples, seed) that an arm needs.

        Raises:
            ValueError: ``is_done`` says that an earlier run left it in the folder, and some of it is missing.
        """
        folder = self.study.folder / PHASE1
        missing = [key for key in self._keys if not (folder / _name(*key) / "result.json").exists()]
        if is_done and missing:
            raise ValueError(
                f"phase: got '2', but {self.study.folder} lacks phase 1 for {len(missing)} of {len(self._keys)} combinations "
                "of embedding, samples and seed; run phase '1' or 'both' in that folder first."
            )
        return self.study.grid(
            self._starts, self._phase1, name=PHASE1, place=lambda point: _name(**point), across_machines=False
        )

    def run_phase2(
        self, rates: Sequence[float], draw: Callable[[list[Trial]], Path | None]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Every (arm, samples, seed) trained once, at its arm's best learning rate.

        Returns:
            those trials in grid order, and what the search for the rates trained beside them.

        Raises:
            RuntimeError: an arm diverged with every learning rate of its search.
        """
        at = {"samples": min(self.samples), "seed": self.seeds[0]}
        searched = sum(self._steps(arm, at["samples"]) for arm in self.arms) * (len(rates) - 1)
        cells = itertools.product(self.arms, self.samples)
        self.study.expect(searched + len(self.seeds) * sum(self._steps(*cell) for cell in cells))
        # The trial of the best rate is one of the study's own, and in its folder.
        best, tried = self.study.best_rate(
            "arm", list(self.arms), rates, lambda place, **point: self.trial(place, **at, **point),
            name=TRIALS, place=lambda point: self._place(**at, **point),
        )  # fmt: skip
        found = self.study.grid(
            {"arm": list(self.arms), "samples": self.samples, "seed": self.seeds},
            lambda place, **point: self.trial(place, **point, learning_rate=best[point["arm"]]),
            name=TRIALS,
            place=lambda point: self._place(**point, learning_rate=best[point["arm"]]),
            draw=draw,
        )
        return found, [t for t in tried if t["learning_rate"] != best[t["arm"]]]

    def run_again(self, chosen: Trial) -> dict[str, Any]:
        """A trial trained once more up to its best epoch, where its weights are kept: below ``final``."""
        point = {name: chosen[name] for name in ("arm", "samples", "seed", "learning_rate")}
        self.study.expect(self.study.progress.total + self._steps(chosen["arm"], chosen["samples"]))
        if self.study.is_main:
            for other in (self.study.folder / "final").glob("*"):
                # Of another trial, which was the best one before some were trained anew.
                if other.name != self._place(**point):
                    shutil.rmtree(other, ignore_errors=True)
        # A grid of one: with several workers each comes here, and one of them does it.
        (record,) = self.study.grid(
            {name: [value] for name, value in point.items()},
            lambda place, **point: self.trial(place, **point, epochs=chosen["best_epoch"]),
            name="final", place=lambda point: self._place(**point), across_machines=False,
        )  # fmt: skip
        return record

    def forget_contexts(self) -> None:
        """Remove the context blocks, which only phase 2 needed."""
        if self.study.is_main:
            for key in self._keys:
                (self.study.folder / PHASE1 / _name(*key) / BLOCK).unlink(missing_ok=True)

    def trial(
        self, place: str, arm: str, samples: int, seed: int, learning_rate: float, epochs: int | None = None
    ) -> dict[str, Any]:
        """Phase 2 of one model, or what an earlier run of it recorded; after ``epochs``, if given, its weights are kept."""
        treated = self.arms[arm]
        factors = dataclasses.asdict(treated)

        def run(folder: Path) -> dict[str, Any]:
            if epochs is not None:
                log.info("The best arm's first seed is trained again up to its best epoch, for its weights.")
            model, trained = self._train_arm(treated, samples, seed, learning_rate, epochs, folder)
            if epochs is None:
                return factors | trained
            if self.study.is_main:
                with replacing(folder / WEIGHTS) as temporary:
                    save_weights(model, temporary, self.text.bpe.sha256)
            return factors | trained | {"model_config": dataclasses.asdict(model.config)}

        point = {"arm": arm, "samples": samples, "seed": seed, "learning_rate": learning_rate}
        weights = "" if epochs is None else WEIGHTS
        # One that diverged is recorded without its factors.
        found = self.study.trial(place, point, self._steps(arm, samples), run, TRIAL_KEYS, weights=weights)
        return factors | found

    def _phase1(
        self, place: str, initialisation: str, samples: int, seed: int, needs_block: bool = False
    ) -> dict[str, Any]:
        """Train the context block, or read what an earlier run recorded. Of several processes the main one does it."""
        record = None
        if self.study.is_main:
            folder = self.study.folder / place
            record = read_result(folder / "result.json", PHASE1_KEYS)
            if record is None or (needs_block and read_weights(folder / BLOCK) is None):
                record = self._train_block(folder, initialisation, samples, seed)
        return broadcast(self.study.accelerator, record)

    def _train_block(self, folder: Path, initialisation: str, samples: int, seed: int) -> dict[str, Any]:
        place = f"{self._keys.index((initialisation, samples, seed)) + 1} of {len(self._keys)}"
        label = f"phase 1 ({place}), {initialisation} embedding, {samples} samples, seed {seed}"
        self.study.progress.describe(label)
        log.info("%s", label)
        began = time.perf_counter()
        model = self._model(initialisation, self._can_tie, seed)
        model.freeze_embedding()
        run = self._train_context(model, samples, seed, initialisation.partition("-")[2])
        seconds = time.perf_counter() - began
        state = {name: value.cpu() for name, value in model.context_block.state_dict().items()}
        with replacing(folder / BLOCK) as temporary:
            save_file(state, temporary)
        unaffected = None
        if (samples, seed) == (min(self.samples), self.seeds[0]) and initialisation in FACTORS[
            "initialisation"
        ]:
            other = self._model(initialisation, self._can_tie, seed)
            self._train_context(other, samples, seed)
            repeated = other.context_block.state_dict()
            unaffected = all(torch.equal(state[name], repeated[name].cpu()) for name in state)
        record = {
            "initialisation": initialisation, "samples": samples, "seed": seed, "rows": run.rows, "converged": run.converged,
            "sweep": run.sweep, "seconds": seconds, "unaffected": unaffected,
        }  # fmt: skip
        write_json(folder / "result.json", record)
        return record

    def _train_context(self, model: ContextTokenLM, samples: int, seed: int, other: str = "") -> Phase1Result:
        settings = dataclasses.replace(self.recipe.context, seed=seed)
        kind = "" if other == "first" else other  # there the model differs, and phase 1 does not
        try:
            return train_in_its_place(model, self.text.train(samples), settings, kind)
        except ArithmeticError as error:
            raise RuntimeError(
                f"{error} It is context_learning_rate here; a smaller one needs another output_dir."
            ) from error

    def _model(self, start: str, tied: bool, seed: int) -> ContextTokenLM:
        """A model before phase 1. Blocks of one seed start equal whatever the embedding and the head are."""
        initialisation, _, other = start.partition("-")
        size = dataclasses.replace(
            self.recipe.size, tied=tied, token_to="first" if other == "first" else "every"
        )
        model = ContextTokenLM(size)
        torch.manual_seed(seed)
        model.reset_parameters()
        with torch.no_grad():
            model.embedding.weight.copy_(torch.from_numpy(self.text.table(initialisation, seed)))
        return model.to(self.study.accelerator.device)

    def _train_arm(
        self, arm: Arm, samples: int, seed: int, rate: float, epochs: int | None, folder: Path
    ) -> tuple[ContextTokenLM, dict[str, Any]]:
        start = (arm.start, samples, seed)
        place = f"{PHASE1}/{_name(*start)}"
        self._phase1(place, *start, needs_block=True)
        model = self._model(arm.start, arm.head == "tied", seed)
        model.context_block.load_state_dict(read_weights(self.study.folder / place / BLOCK))
        model.freeze_context()
        if arm.freezing == "frozen":
            model.freeze_embedding()
        model.norm.requires_grad_(arm.trains_norm)
        if arm.zero_head:
            torch.nn.init.zeros_(model.output.weight)
        validation, training = self.text.valid, self.recipe.training
        if arm.other_validation:
            validation = self.text.other_valid
        trained = train_phase2(
            model,
            self.text.train(samples, arm.train_share),
            validation,
            dataclasses.replace(training, epochs=epochs or training.epochs, learning_rate=rate, seed=seed),
            batch_tokens=self.recipe.batch_tokens,
            recompute_contexts=self.recipe.recompute_contexts,
            accelerator=self.study.accelerator,
            unk_id=self.text.unk_id,
            folder=folder / "checkpoints",
            label=f"{arm.name}, {samples} samples, seed {seed}",
            on_step=self.study.progress.step,
            on_skip=self.study.progress.skip,
        )
        return model, trained

    def _steps(self, arm: str, samples: int) -> int:
        return self.recipe.steps(len(self.text.train(samples, self.arms[arm].train_share)))

    def _place(self, arm: str, samples: int, seed: int, learning_rate: float) -> str:
        return f"{self.arms[arm].slug}_samples_{samples}_seed_{seed}_rate_{learning_rate:g}"


def _name(initialisation: str, samples: int, seed: int) -> str:
    return f"{initialisation}_samples_{samples}_seed_{seed}"
