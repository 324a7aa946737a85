"""Trains the models of the embedding-freeze study: phase 1 once per embedding, sample and seed, phase 2 once per arm."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.grid import Sweep
from bklm.harness.progress import Progress
from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.studies.embedding_freeze.config import Arm, arms_of
from bklm.studies.embedding_freeze.figures import draw_arms
from bklm.studies.embedding_freeze.phase2 import train_phase2
from bklm.studies.embedding_freeze.report import describe_run
from bklm.studies.embedding_freeze.tables import arm_table
from bklm.studies.embedding_freeze.text import FreezeText
from bklm.training.checkpoints import CheckpointFolder, read_weights
from bklm.training.non_finite import NonFiniteError
from bklm.training.records import EPOCH_KEYS
from bklm.training.two_phase.phase1 import FixedPointSettings, train_context

if TYPE_CHECKING:
    from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig

log = logging.getLogger("bklm.studies.embedding_freeze")

SECONDS_BETWEEN_FIGURES = 10.0  # drawing one takes longer than a small trial

# What a recorded part must hold to be taken for finished.
PHASE1_KEYS = {"rows": list, "seconds": float, "sweep": str}
# A trial that diverged has neither perplexity nor accuracy, no epochs, and a reason.
TRIAL_KEYS = {
    "arm": str,
    "val_ppl": float | None,
    "accuracy": float | None,
    "parameters": int,
    "epochs": EPOCH_KEYS,
}

Point = dict[str, Any]  # arm, samples, seed


class Runner:
    """Both phases of one study, each part recorded when it is done and read back when it is asked for again."""

    def __init__(
        self,
        config: EmbeddingFreezeConfig,
        text: FreezeText,
        accelerator: Accelerator,
        folder: Path,
        on_figure: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.text, self.accelerator, self.folder = config, text, accelerator, folder
        self.on_figure = on_figure
        self.arms = {arm.name: arm for arm in arms_of(config)}
        grid = {"arm": list(self.arms), "samples": config.samples, "seed": config.seeds}
        self.sweep = Sweep(folder / "study.journal", grid)
        steps = sum(self._steps(self.arms[p["arm"]], p["samples"]) for p in self.sweep.points)
        if len(config.learning_rates) > 1:  # each arm once more at every rate but the one that it goes on with
            searched = sum(self._steps(arm, min(config.samples)) for arm in self.arms.values())
            steps += (len(config.learning_rates) - 1) * searched
        self.progress = Progress(steps * (config.phase != "1"))
        self.note = describe_run(config, text)
        self.counted: set[Path] = set()  # trials that the progress bar knows of
        self.drawn = -math.inf
        self.diverged: list[dict[str, Any]] = []

    def __enter__(self) -> Runner:
        # Accelerate ends each training with a garbage collection, which would walk over all that was ever imported: in
        # small studies that takes longer than the training.
        gc.freeze()
        return self

    def __exit__(self, *exception: object) -> None:
        gc.unfreeze()
        self.progress.close()

    def run_phase1(self) -> list[dict[str, Any]]:
        """Phase 1 of every (initialisation, samples, seed) that an arm needs."""
        return [self._phase1(*key) for key in self._phase1_keys()]

    def read_phase1(self) -> list[dict[str, Any]]:
        """What an earlier run's phase 1 left in the folder.

        Raises:
            ValueError: some of it is missing.
        """
        keys = list(self._phase1_keys())
        missing = [key for key in keys if not (self._phase1_folder(*key) / "result.json").exists()]
        if missing:
            raise ValueError(
                f"phase: got '2', but {self.folder} lacks phase 1 for {len(missing)} of {len(keys)} combinations of "
                "embedding, samples and seed; run phase '1' or 'both' in that folder first."
            )
        return [self._phase1(*key) for key in keys]

    def run_phase2(self) -> list[dict[str, Any]]:
        """Every (arm, samples, seed) trained once, at its arm's best learning rate; one result per trial, in grid order.

        Those that diverged are in ``diverged`` instead, with the reason of each.

        Raises:
            RuntimeError: every one diverged, or an arm did so with every learning rate of its search.
        """
        rates = self._search_rates()
        results: dict[tuple, dict[str, Any]] = {}

        def evaluate_point(point: Point) -> float:
            result = self._trial(**point, learning_rate=rates[point["arm"]])
            results[tuple(point.values())] = result
            if result["val_ppl"] is None:
                return math.inf
            done = len(self.sweep.points) - len(self.sweep.missing()) + 1
            log.info(
                "Trial %d of %d, %s, %d samples, seed %d: validation PPL %.1f at epoch %d",
                done, len(self.sweep.points), point["arm"], point["samples"], point["seed"], result["val_ppl"],
                result["best_epoch"],
            )  # fmt: skip
            if time.monotonic() - self.drawn > SECONDS_BETWEEN_FIGURES:
                self._draw([r for r in results.values() if r["val_ppl"] is not None])
            return result["val_ppl"]

        for point in self.sweep.points:
            if point not in self.sweep.missing():
                results[tuple(point.values())] = self._trial(**point, learning_rate=rates[point["arm"]])
        self.sweep.run(evaluate_point)
        for key in self._phase1_keys():
            _weights(self._phase1_folder(*key)).unlink(missing_ok=True)  # only phase 2 needed them
        found = [results[tuple(p.values())] for p in self.sweep.points]
        self.diverged = [r for r in found if r["val_ppl"] is None]
        trials = [r for r in found if r["val_ppl"] is not None]
        if not trials:
            raise RuntimeError(
                f"every trial diverged, the first so: {found[0]['reason']} Take another output_dir for other settings."
            )
        return trials

    def _search_rates(self) -> dict[str, float]:
        """Each arm's learning rate: the best of the config's on the smallest sample and the first seed."""
        rates = self.config.learning_rates
        if len(rates) == 1:
            return dict.fromkeys(self.arms, rates[0])
        at = {"samples": min(self.config.samples), "seed": self.config.seeds[0]}
        best = {}
        for arm in self.arms:
            tried = {rate: self._trial(arm, **at, learning_rate=rate)["val_ppl"] for rate in rates}
            scored = {rate: ppl for rate, ppl in tried.items() if ppl is not None}
            if not scored:
                raise RuntimeError(
                    f"learning_rates: {arm} diverged with each of {', '.join(f'{r:g}' for r in rates)}; add smaller ones, "
                    "in another output_dir."
                )
            best[arm] = min(scored, key=scored.__getitem__)
            listed = (f"{r:g}: {'diverged' if p is None else f'{p:.1f}'}" for r, p in tried.items())
            log.info("Learning rate of %s: %g (%s)", arm, best[arm], ", ".join(listed))
        return best

    def _phase1_keys(self) -> itertools.product:
        initialisations = list(dict.fromkeys(arm.initialisation for arm in self.arms.values()))
        return itertools.product(initialisations, self.config.samples, self.config.seeds)

    def _phase1_folder(self, initialisation: str, samples: int, seed: int) -> Path:
        return self.folder / "phase1" / f"{initialisation}_samples_{samples}_seed_{seed}"

    def _phase1(
        self, initialisation: str, samples: int, seed: int, needs_weights: bool = False
    ) -> dict[str, Any]:
        """Train the context block, or read what an earlier run recorded."""
        folder = self._phase1_folder(initialisation, samples, seed)
        finished = read_result(folder / "result.json", PHASE1_KEYS)
        if finished is not None and not (needs_weights and read_weights(_weights(folder)) is None):
            return finished
        keys = list(self._phase1_keys())
        place = f"{keys.index((initialisation, samples, seed)) + 1} of {len(keys)}"
        label = f"phase 1 ({place}), {initialisation} embedding, {samples} samples, seed {seed}"
        self.progress.describe(label)
        log.info("%s", label)
        began = time.perf_counter()
        model = self._model(initialisation, "tied" if self._can_tie else "untied", seed)
        model.freeze_embedding()
        run = self._train_context(model, samples, seed)
        seconds = time.perf_counter() - began
        state = {name: value.cpu() for name, value in model.context_block.state_dict().items()}
        with replacing(_weights(folder)) as temporary:
            save_file(state, temporary)
        unaffected = None
        if (samples, seed) == (min(self.config.samples), self.config.seeds[0]):
            other = self._model(initialisation, "tied" if self._can_tie else "untied", seed)
            self._train_context(other, samples, seed)
            repeated = other.context_block.state_dict()
            unaffected = all(torch.equal(state[name], repeated[name].cpu()) for name in state)
        result = {
            "initialisation": initialisation, "samples": samples, "seed": seed, "rows": run.rows, "converged": run.converged,
            "sweep": run.sweep, "seconds": seconds, "unaffected": unaffected,
        }  # fmt: skip
        write_json(folder / "result.json", result)
        return result

    def _train_context(self, model: ContextTokenLM, samples: int, seed: int) -> Any:
        config = self.config
        settings = FixedPointSettings(
            iterations=config.iterations,
            learning_rate=config.context_learning_rate,
            clip=config.clip,
            noise=config.noise,
            seed=seed,
        )
        return train_context(model, self.text.train(samples), settings)

    @property
    def _can_tie(self) -> bool:
        return self.config.embed_dim == self.config.context_dim

    def _model(self, initialisation: str, head: str, seed: int) -> ContextTokenLM:
        """A model before phase 1. Blocks of one seed start equal whatever the embedding and the head are."""
        config = self.config
        size = ContextTokenConfig(
            self.text.vocab_size,
            embed_dim=config.embed_dim,
            context_dim=config.context_dim,
            n_layers=config.n_layers,
            tied=head == "tied",
        )
        model = ContextTokenLM(size)
        torch.manual_seed(seed)
        model.reset_parameters()
        with torch.no_grad():
            model.embedding.weight.copy_(torch.from_numpy(self.text.table(initialisation, seed)))
        return model.to(self.accelerator.device)

    def _trial(self, arm: str, samples: int, seed: int, learning_rate: float) -> dict[str, Any]:
        """Phase 2 of one model, or what an earlier run of the same model recorded."""
        treated = self.arms[arm]
        folder = self.folder / "trials" / f"{treated.slug}_samples_{samples}_seed_{seed}_rate_{learning_rate:g}"
        finished = read_result(folder / "result.json", TRIAL_KEYS)
        if finished is not None:
            if folder not in self.counted:  # the search's best trial is asked for twice
                self.progress.skip(self._steps(treated, samples))
                self.counted.add(folder)
            return finished
        self.counted.add(folder)
        self._phase1(treated.initialisation, samples, seed, needs_weights=True)
        self.progress.describe(f"{arm}, {samples} samples, seed {seed}")
        result = self._train_arm(treated, samples, seed, learning_rate, folder)
        write_json(folder / "result.json", result)
        CheckpointFolder(folder / "checkpoints").remove()
        return result

    def _train_arm(self, arm: Arm, samples: int, seed: int, rate: float, folder: Path) -> dict[str, Any]:
        model = self._model(arm.initialisation, arm.head, seed)
        phase1 = self._phase1_folder(arm.initialisation, samples, seed)
        model.context_block.load_state_dict(read_weights(_weights(phase1)))
        model.freeze_context()
        if arm.freezing == "frozen":
            model.freeze_embedding()
        model.norm.requires_grad_(arm.trains_norm)
        if arm.zero_head:
            torch.nn.init.zeros_(model.output.weight)
        done = self.progress.done
        try:
            trained = train_phase2(
                model,
                self.text.train(samples, arm.train_share),
                self.text.other_valid if arm.other_validation else self.text.valid,
                self.config,
                rate,
                seed,
                accelerator=self.accelerator,
                unk_id=self.text.unk_id,
                folder=folder / "checkpoints",
                label=f"{arm.name}, {samples} samples, seed {seed}",
                on_step=self.progress.step,
                on_skip=self.progress.skip,
            )
        except NonFiniteError as error:
            # In the search an answer, too; after it the others are worth reporting without it.
            log.warning("%s It is recorded as diverged; delete %s to train it again.", error, folder)
            trained = {"val_ppl": None, "accuracy": None, "parameters": model.num_parameters(), "epochs": []}
            trained["reason"] = str(error)
        self.progress.skip(self._steps(arm, samples) - (self.progress.done - done))  # stopped early
        factors = {name: getattr(arm, name) for name in ("initialisation", "freezing", "head", "original")}
        return {"arm": arm.name, **factors, "samples": samples, "seed": seed, "learning_rate": rate, **trained}

    def _steps(self, arm: Arm, samples: int) -> int:
        """Optimiser steps of a trial that uses all its epochs."""
        targets = len(self.text.train(samples, arm.train_share)) - 1
        return self.config.epochs * -(-targets // self.config.batch_tokens)

    def _draw(self, results: list[dict[str, Any]]) -> None:
        path = self.folder / "arms.png"
        draw_arms(
            path,
            arm_table(results),
            self.text.baselines,
            f"{len(results)} of {len(self.sweep.points)} trials done",
            self.note,
        )
        self.drawn = time.monotonic()
        if self.on_figure is not None:
            self.on_figure(path)


def _weights(folder: Path) -> Path:
    return folder / "context_block.safetensors"
