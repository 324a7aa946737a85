"""Trains the models of one baseline study: the learning-rate search first, then every (model, seed) with the best rate."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.grid import Sweep
from bklm.harness.progress import Progress
from bklm.models import LanguageModel
from bklm.studies.baseline.figures import draw_curves
from bklm.studies.baseline.models import TITLES, active_parameters, build_model, model_names, model_settings
from bklm.studies.baseline.text import BaselineText
from bklm.training.checkpoints import CheckpointFolder, epoch_of, read_weights
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.non_finite import NonFiniteError
from bklm.training.processes import broadcast
from bklm.training.records import EpochRecord
from bklm.training.schedules import TrainingSettings

if TYPE_CHECKING:
    from bklm.studies.baseline.config import BaselineConfig

log = logging.getLogger(__name__)

CONTEXT_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
SEARCH_SEED = 0
RESULT_KEYS = {"model": str, "learning_rate": float, "val_ppl": float | None}
BYTES_PER_PARAMETER = 12  # of a checkpoint: the weight and Adam's two moments, in float32

# Fields that do not change what a single run computes: which runs there are, and what is measured afterwards.
_NOT_OF_A_RUN = {
    "seeds",
    "learning_rates",
    "search_tokens",
    "checkpoint_every",
    "generate_tokens",
    "context_tokens",
}


class Runner:
    """All trainings of one study. With several processes every one of them makes the same calls; the main one writes."""

    def __init__(
        self,
        config: BaselineConfig,
        text: BaselineText,
        accelerator: Accelerator,
        folder: Path | None,
        on_figure: Callable[[Path], None] | None = None,
    ) -> None:
        self.config, self.text, self.accelerator = config, text, accelerator
        self.is_main, self.on_figure = accelerator.is_main_process, on_figure
        self.folder = broadcast(accelerator, folder)
        self.search_results: list[dict[str, Any]] = []
        self.diverged: list[dict[str, Any]] = []
        steps = len(text.train_loader(0)) * config.epochs * len(config.seeds)
        if len(config.learning_rates) > 1:
            steps += len(text.search_loader(0, config.search_tokens)) * len(config.learning_rates)
        names = model_names(config.model)
        self.settings = {name: model_settings(name, config, text.vocab_size) for name in names}
        self._require_disk()
        self.progress = Progress(steps * len(names), shown=self.is_main)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()

    def search(self, names: Sequence[str]) -> dict[str, float]:
        """The best learning rate of each model: one short training per model and rate, judged by validation perplexity."""
        rates = self.config.learning_rates
        if len(rates) == 1:
            return dict.fromkeys(names, rates[0])
        results: dict[tuple[str, float], dict[str, Any]] = {}

        def try_rate(point: dict[str, Any]) -> float:
            result = self._try_rate(**point)
            results[point["model"], point["learning_rate"]] = result
            return math.inf if result["val_ppl"] is None else result["val_ppl"]

        points = self._run_points("search.journal", {"model": names, "learning_rate": rates}, try_rate)
        self.search_results = [results[p["model"], p["learning_rate"]] for p in points]
        best = {}
        for name in names:
            tried = [r for r in self.search_results if r["model"] == name and r["val_ppl"] is not None]
            if not tried:
                raise RuntimeError(
                    f"learning_rates: {TITLES[name]} diverged with each of {', '.join(f'{r:g}' for r in rates)}; "
                    "add smaller ones."
                )
            best[name] = min(tried, key=lambda r: r["val_ppl"])["learning_rate"]
            edge = " (at the edge of those tried)" if best[name] in (min(rates), max(rates)) else ""
            log.info("%s: best learning rate %g%s", TITLES[name], best[name], edge)
        return best

    def train_all(self, names: Sequence[str], rates: dict[str, float]) -> list[dict[str, Any]]:
        """Every (model, seed) trained once; the results of those that did not diverge, in grid order.

        The others are recorded, too: model, seed, learning_rate and reason of each are in ``diverged``.

        Raises:
            RuntimeError: every one diverged.
        """
        results: dict[tuple[str, int], dict[str, Any]] = {}

        def train_one(point: dict[str, Any]) -> float:
            name, seed = point["model"], point["seed"]
            result = self._train_one(name, seed, rates[name])
            results[name, seed] = result
            if result["val_ppl"] is None:
                return math.inf
            log.info(
                "%s, seed %d: validation PPL %.2f at epoch %d%s",
                TITLES[name], seed, result["val_ppl"], result["best_epoch"], self.progress.time_left(),
            )  # fmt: skip
            self._draw([r for r in results.values() if r["val_ppl"] is not None])
            return result["val_ppl"]

        points = self._run_points("runs.journal", {"model": names, "seed": self.config.seeds}, train_one)
        found = [results[p["model"], p["seed"]] for p in points]
        self.diverged = [r for r in found if r["val_ppl"] is None]
        runs = [r for r in found if r["val_ppl"] is not None]
        if not runs:
            raise RuntimeError(
                f"every training diverged, the first so: {found[0]['reason']} Take another output_dir for other settings."
            )
        self._keep_weights(runs)
        return runs

    def _run_points(
        self, journal: str, grid: dict[str, Sequence[Any]], evaluate_point: Callable[[dict[str, Any]], float]
    ) -> Iterable[dict[str, Any]]:
        """Evaluate every point of a grid, in all processes at once: the main one keeps the journal and says which is next."""
        if not self.is_main:
            while (point := broadcast(self.accelerator, None)) is not None:
                evaluate_point(point)
            return broadcast(self.accelerator, None)
        sweep = Sweep(self.folder / journal, grid)

        def announce(point: dict[str, Any]) -> float:
            return evaluate_point(broadcast(self.accelerator, point))

        missing = sweep.missing()
        for point in sweep.points:
            if point not in missing:
                announce(point)
        sweep.run(announce)
        broadcast(self.accelerator, None)
        return broadcast(self.accelerator, sweep.points)

    def _try_rate(self, model: str, learning_rate: float) -> dict[str, Any]:
        folder = self.folder / "search" / f"{model}_lr_{learning_rate:g}"
        finished = self._finished(folder)
        loader = self.text.search_loader(SEARCH_SEED, self.config.search_tokens)
        if finished is not None:
            self.progress.skip(len(loader))
            return finished
        self.progress.describe(f"{TITLES[model]}, learning rate {learning_rate:g}")
        result = {"model": model, "learning_rate": learning_rate, "val_ppl": None, "steps": len(loader)}
        settings = TrainingSettings(
            1,
            learning_rate=learning_rate,
            weight_decay=self.config.weight_decay,
            clip=self.config.training_settings(learning_rate, SEARCH_SEED).clip_at(1),
            schedule=self.config.schedule,
            warmup=self.config.warmup,
            seed=SEARCH_SEED,
            accumulate=self.config.accumulate,
        )
        try:
            records = train(
                self._fresh(model, SEARCH_SEED),
                loader,
                self.text.search_val_loader(self.config.search_tokens),
                settings,
                accelerator=self.accelerator,
                unk_id=self.text.unk_id,
                label=f"search: {TITLES[model]}, learning rate {learning_rate:g}",
                on_step=self.progress.step,
            )
            result["val_ppl"] = records[-1].val_perplexity
        except NonFiniteError as error:  # a rate that diverges is an answer, too
            log.warning("%s", error)
        self._write(folder, result)
        return result

    def _train_one(self, name: str, seed: int, learning_rate: float) -> dict[str, Any]:
        """Train one model, or read what an earlier run of the same model recorded."""
        config, text = self.config, self.text
        run = f"{name}_seed_{seed}"
        folder = self.folder / "runs" / run
        loader = text.train_loader(seed=seed)
        finished = self._finished(folder)
        if finished is not None:
            self.progress.skip(len(loader) * config.epochs)
            return finished
        self.progress.describe(f"{TITLES[name]}, seed {seed}")
        done_before = self.progress.done
        model = self._fresh(name, seed)
        checkpoints = CheckpointFolder(
            config.checkpoint_folder() / run,
            milestone_every=config.checkpoint_every,
            keep_milestones=config.keep_checkpoints,
        )
        try:
            records = train(
                model,
                loader,
                text.val_loader(),
                config.training_settings(learning_rate, seed),
                accelerator=self.accelerator,
                unk_id=text.unk_id,
                folder=checkpoints,
                label=f"{TITLES[name]}, seed {seed}",
                identity=self._identity(name, seed, learning_rate),
                resume_from=next(iter(self._resumed()), None),
                on_step=self.progress.step,
                on_skip=self.progress.skip,
            )
        except NonFiniteError as error:  # the others are worth reporting without it
            self.progress.skip(done_before + len(loader) * config.epochs - self.progress.done)
            reason = str(error)
            log.warning("%s It is recorded as diverged; delete %s to train it again.", reason, folder)
            result = {
                "model": name,
                "seed": seed,
                "learning_rate": learning_rate,
                "val_ppl": None,
                "reason": reason,
            }
            self._write(folder, result)
            return result
        self.progress.skip(len(loader) * (config.epochs - len(records)))
        # Of several epochs the one with the lowest validation loss is the model; the test split has no say in that.
        places = self._places(checkpoints)
        best = min((r for r in records if r.epoch in places), key=lambda r: r.val_loss)
        load_model(model, str(places[best.epoch] / "model.safetensors"))
        result = self._scores(model, records, best) | {
            "model": name,
            "seed": seed,
            "learning_rate": learning_rate,
            "model_config": self.settings[name],
            "steps": len(loader) * len(records),
            "checkpoints": str(checkpoints.path),
        }
        if (
            self.is_main and seed == config.seeds[0]
        ):  # one seed's weights are enough for samples, and for the zip
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "best_model.safetensors") as temporary:
                save_model(model, str(temporary))
        self._write(folder, result)
        return result

    def _places(self, checkpoints: CheckpointFolder) -> dict[int, Path]:
        return {epoch_of(p): p for p in [*self._resumed(), *checkpoints.all()]}

    def _keep_weights(self, runs: list[dict[str, Any]]) -> None:
        """Where the first seed diverged, the weights of the first that did not stand for the model."""
        for run in {run["model"]: run for run in reversed(runs)}.values():
            kept = self.folder / "runs" / f"{run['model']}_seed_{run['seed']}" / "best_model.safetensors"
            if not self.is_main or read_weights(kept) is not None:
                continue
            best = self._places(CheckpointFolder(run["checkpoints"])).get(run["best_epoch"])
            if best is None:
                raise OSError(
                    f"the best checkpoint (epoch {run['best_epoch']}) is gone from {run['checkpoints']}, and no copy of its "
                    f"weights was made yet; delete {kept.parent} to train this one again."
                )
            with replacing(kept) as temporary:
                shutil.copyfile(best / "model.safetensors", temporary)

    def _scores(self, model: LanguageModel, records: list[EpochRecord], best: EpochRecord) -> dict[str, Any]:
        text, tokens = self.text, self.config.context_tokens
        contexts: dict[str, float | None] = {}
        for length in CONTEXT_LENGTHS:
            loader = text.context_loader(length, tokens)
            fits = loader is not None and (model.n_seq is None or length <= model.n_seq)
            contexts[str(length)] = self._evaluate(model, loader).perplexity if fits else None
        return {
            "parameters": model.num_parameters(),
            "active_parameters": active_parameters(model),
            "best_epoch": best.epoch,
            "val_ppl": best.val_perplexity,
            "val_ppl_without_unk": best.val_perplexity_without_unk,
            "val_accuracy": best.val_accuracy,
            "test_ppl": self._evaluate(model, text.test_loader()).perplexity if text.has_test_split else None,
            "val_ppl_by_context": contexts,
            "seconds": sum(r.seconds for r in records),
            "epochs": [r.to_dict() for r in records],
        }

    def _evaluate(self, model: LanguageModel, loader: Any) -> Any:
        return evaluate(model, loader, self.text.unk_id, self.accelerator)

    def _fresh(self, name: str, seed: int) -> LanguageModel:
        torch.manual_seed(seed)
        return build_model(name, self.settings[name]).to(self.accelerator.device)

    def _identity(self, name: str, seed: int, learning_rate: float) -> dict[str, Any]:
        """What a checkpoint must agree with before a run goes on from it: plain values by the names of the settings."""
        config = self.config
        left_out = config.circumstances | _NOT_OF_A_RUN
        fields = {n: v for n, v in config.to_dict().items() if n not in left_out}
        settings = {f"{name}.{field}": value for field, value in self.settings[name].items()}
        return {
            **settings,
            **fields,
            "model": name,
            "seed": seed,
            "learning_rate": learning_rate,
            "vocabulary": self.text.vocabulary_name,
        }

    def _resumed(self) -> list[Path]:
        return [Path(self.config.resume_from)] if self.config.resume_from else []

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        found = read_result(folder / "result.json", RESULT_KEYS) if self.is_main else None
        return broadcast(self.accelerator, found)

    def _write(self, folder: Path, result: dict[str, Any]) -> None:
        if self.is_main:
            write_json(folder / "result.json", result)

    def _draw(self, runs: list[dict[str, Any]]) -> None:
        if not self.is_main:
            return
        total = len(self.settings) * len(self.config.seeds)
        path = self.folder / "training_curves.png"
        title = f"{len(runs)} of {total} trainings done"
        draw_curves(path, runs, self.text, self.config, title, self.search_results)
        if self.on_figure is not None:
            self.on_figure(path)

    def _require_disk(self) -> None:
        """Refuse to start where the checkpoints will not fit."""
        target = self.config.checkpoint_folder()
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"checkpoint_dir: cannot write to {target} ({error.strerror}); choose a folder you may write to."
            ) from error
        parameters = 0
        for name, settings in self.settings.items():
            with torch.device("meta"):
                parameters += build_model(name, settings).num_parameters()
        kept = min(self.config.epochs, self.config.keep_checkpoints + 2) + 1  # one more while it is written
        needed = parameters * BYTES_PER_PARAMETER * kept * len(self.config.seeds)
        free = shutil.disk_usage(target).free
        if free < needed:
            raise OSError(
                f"checkpoint_dir: {target} has {free / 1e6:.0f} MB left; the checkpoints take up to {needed / 1e6:.0f} MB; "
                "free some space, choose another folder, or a smaller keep_checkpoints."
            )
