"""The GRAD_BLEND sweep: which blend of a theoretical gradient with "hypothesis-7" trains ResNet-BK best?

The gradient of the BK-core's potential is (1 - alpha) * theory + alpha * hypothesis-7. The sweep trains one model per
(alpha, seed), all models of a seed from the same weights on the same batches, and compares validation perplexities.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model

from bklm.checkpoints import CheckpointFolder, read_weights, replacing, write_json
from bklm.config import TextStudyConfig, setting
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.non_finite import twice
from bklm.records import EPOCH_KEYS
from bklm.reporting import as_text
from bklm.studies import cli
from bklm.studies.folder import claim, experiment_name, read_result, study_folder
from bklm.studies.grad_blend_figures import draw_analysis
from bklm.studies.grad_blend_report import GradBlendResult, describe_run, write_report
from bklm.studies.grad_blend_table import alpha_table, best_alpha, diverged_in_short, finished, readable
from bklm.studies.gradient_directions import measure_directions
from bklm.studies.progress import Progress
from bklm.studies.sweep import Sweep
from bklm.studies.sweep_storage import check_address
from bklm.studies.text import StudyText, prepare_text
from bklm.training import (
    EpochRecord,
    NonFiniteError,
    TrainingSettings,
    convergence_epoch,
    evaluate,
    gradient_variance,
    make_accelerator,
    train,
)

log = logging.getLogger("bklm.studies.grad_blend")  # __name__ is "__main__" when run with python -m

ORIGINAL_ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
TRIAL_KEYS = {"alpha": float, "seed": int, "final_perplexity": float | None, "training_time": float}
RESULT_KEYS = {"epochs": EPOCH_KEYS, "directions": dict}  # of one that finished
DIVERGED_KEYS = {"reason": str}  # of one that did not: its final_perplexity is None
FULL_GRID = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True, kw_only=True)
class GradBlendConfig(TextStudyConfig):
    """Settings of the sweep. ``protocol="original"`` turns the corrections off: the model then sees the future."""

    study: ClassVar[str] = "grad_blend"
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "alphas": (0.0, 0.5), "seeds": (0, 1), "epochs_per_trial": 2, "final_epochs": 2, "seq_len": 32,
            "vocab_size": 1000, "d_model": 16, "n_layers": 2, "num_experts": 2, "max_train_tokens": 8192,
        },
        "quick": {
            "alphas": ORIGINAL_ALPHAS, "seeds": (0, 1, 2), "epochs_per_trial": 2, "final_epochs": 3, "seq_len": 128,
            "vocab_size": 30000, "d_model": 64, "n_layers": 4, "num_experts": 4, "max_train_tokens": 400_000,
        },
        "full": {
            "alphas": ORIGINAL_ALPHAS, "seeds": (0, 1, 2), "epochs_per_trial": 2, "final_epochs": 3, "seq_len": 128,
            "vocab_size": 30000, "d_model": 64, "n_layers": 4, "num_experts": 4, "max_train_tokens": 0,
        },
    }  # fmt: skip
    protocols: ClassVar[dict[str, dict[str, Any]]] = {
        "corrected": {"gradient": "exact", "causal": True, "router_gradient": "exact"},
        "original": {"gradient": "original", "causal": False, "router_gradient": "none"},
    }

    protocol: Literal["corrected", "original"] = setting(
        "corrected", help="original: as published; it sees the future"
    )
    batch_size: int = setting(32, low=4, high=128, step=4, help="sequences per optimiser step")
    alphas: tuple[float, ...] | Literal["grid"] | None = setting(
        None, low=0, high=1, help="share of hypothesis-7; grid: 0, 0.1 ... 1"
    )
    seeds: tuple[int, ...] | None = setting(None, low=0, high=2**31 - 1, help="one model per alpha and seed")
    epochs_per_trial: int | None = setting(
        None, low=1, high=1000, help="passes over the training text per trial"
    )
    final_epochs: int | None = setting(None, low=1, high=1000, help="passes with the best alpha at the end")
    seq_len: int | None = setting(None, low=2, high=65536, help="tokens per sequence")
    max_train_tokens: int | None = setting(None, low=0, high=10**12, help="training tokens used; 0: all")
    vocab_size: int | None = setting(None, low=3, high=1_000_000, help="largest vocabulary, words")
    d_model: int | None = setting(None, low=1, high=8192, help="model width")
    n_layers: int | None = setting(None, low=1, high=256, help="blocks")
    num_experts: int | None = setting(None, low=1, high=256, help="experts per block")
    top_k: int = setting(1, low=1, high=256, help="experts per token")
    dropout: float = setting(0.1, low=0, high=0.99, help="dropout inside the experts")
    learning_rate: float = setting(1e-3, above=0, high=10, help="AdamW learning rate")
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay")
    clip: float = setting(0.5, above=0, high=1e6, help="largest gradient norm")
    schedule: Literal["constant", "cosine"] = setting("constant", help="learning rate over a run")
    gradient: Literal["exact", "local", "original"] | None = setting(
        None, help="theory part of the blend; empty: the protocol's"
    )
    router_gradient: Literal["exact", "selected", "none"] | None = setting(
        None, help="none: the original's router, which never learns; empty: the protocol's"
    )
    balance: float = setting(0.0, low=0, high=100, help="weight of the experts' load-balancing loss")
    causal: bool | None = setting(None, help="False sees the future; empty: the protocol's")
    storage: str | None = setting(
        None, help="postgresql://user@host/database that several machines share; empty: a file in output_dir"
    )

    def resolved(self) -> GradBlendConfig:
        config = super().resolved()
        values = {
            **self.protocols[config.protocol],
            **{n: v for n, v in config.to_dict().items() if v is not None},
        }
        if values["alphas"] == "grid":
            values["alphas"] = FULL_GRID
        config = type(self)(**values)
        if len({f"{a:g}" for a in config.alphas}) < len(config.alphas):
            raise ValueError(
                f"alphas: got {config.alphas}; they must differ within six digits, which name their files."
            )
        if config.balance and config.router_gradient == "none":
            raise ValueError(
                f"balance: got {config.balance:g} with a router that never learns (router_gradient 'none', protocol "
                f"{config.protocol!r}); set balance to 0, or router_gradient to 'exact' or 'selected'."
            )
        if config.top_k > config.num_experts:
            raise ValueError(
                f"top_k: got {config.top_k} with num_experts {config.num_experts}; at most as many as experts."
            )
        if config.storage:
            check_address(config.storage)
        return config


def run_grad_blend(config: GradBlendConfig, on_figure: Callable[[Path], None] | None = None) -> GradBlendResult:
    """Run the sweep, train with the best alpha, and write everything to ``<output_dir>/grad_blend`` and its zip.

    A run that was stopped goes on where it was; a finished one is read back, not run again.

    Args:
        on_figure: called with the path of grad_blend_analysis.png, drawn anew each time a trial is done.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    accelerator = make_accelerator(config.device, config.precision)
    with study_folder(config) as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        text = prepare_text(config)
        claim(folder, config, text.corpus.sha256)
        with _Runner(config, text, accelerator, folder, on_figure) as runner:
            trials = runner.run_sweep()
            if not finished(trials):
                raise RuntimeError(
                    f"every trial diverged, the first so: {trials[0]['reason']} Take other settings, such as a lower "
                    "learning_rate, and another output_dir."
                )
            final = runner.train_final(best_alpha(trials))
        result = write_report(config, text, trials, final, folder)
    if not finished([final]):
        raise RuntimeError(
            f"the sweep is done, its table and figures are in {result.bundle.path}, but the final training diverged: "
            f"{final['reason']} Delete {folder / 'final'} and start again to repeat it."
        )
    return result


def model_config(config: GradBlendConfig, vocab_size: int, alpha: float) -> ResNetBKConfig:
    """The ResNet-BK of one trial of a resolved config."""
    return ResNetBKConfig(
        vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_seq=config.seq_len,
        num_experts=config.num_experts,
        top_k=config.top_k,
        dropout_p=config.dropout,
        causal=config.causal,
        gradient=config.gradient,
        grad_blend=alpha,
        router_gradient=config.router_gradient,
        balance=config.balance,
        clamps=config.protocol == "original",
    )


def load_final_model(folder: Path) -> ResNetBK:
    """The model that was trained with the best alpha, from a study's folder; on the CPU, in evaluation mode."""
    result = _read_trial(Path(folder) / "final" / "result.json")
    weights = Path(folder) / "final" / "best_model.safetensors"
    if result is None or "model_config" not in result or read_weights(weights) is None:
        raise FileNotFoundError(
            f"{folder} holds no finished final model; run the study (again) to its end first."
        )
    model = ResNetBK(ResNetBKConfig(**result["model_config"]))
    load_model(model, str(weights))
    return model.eval()


def write_sample(result: GradBlendResult, text: StudyText, prompt: str = "", temperature: float = 0.8) -> str:
    """Up to 60 words that the final model writes after ``prompt``, or after the opening of a validation line.

    Words outside the vocabulary become <unk>. Generation ends at the last position that the model was trained with.
    """
    n_seq = result.config.seq_len
    words = (prompt.split() or text.prompt(n_seq // 4).split())[: n_seq - 1]
    model = load_final_model(result.folder)
    return text.generate(model, " ".join(words), min(60, n_seq - len(words)), temperature)


class _Runner:
    """Trains the models of one study, with one progress bar over all of them."""

    def __init__(
        self,
        config: GradBlendConfig,
        text: StudyText,
        accelerator: Accelerator,
        folder: Path,
        on_figure: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.text, self.accelerator, self.folder = config, text, accelerator, folder
        self.on_figure = on_figure
        grid = {"alpha": config.alphas, "seed": config.seeds}
        if config.storage:
            name = experiment_name(config, text.corpus.sha256)
            self.sweep = Sweep.shared(config.storage, name, grid)
        else:
            self.sweep = Sweep(folder / "study.journal", grid)
        self.steps_per_epoch = len(text.train_loader(seed=0))
        epochs = len(self.sweep.points) * config.epochs_per_trial + config.final_epochs
        self.progress = Progress(self.steps_per_epoch * epochs)

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()

    def run_sweep(self) -> list[dict[str, Any]]:
        """Every (alpha, seed) trained once, here or by a worker that shares the sweep; one result per trial, in grid order."""
        results: dict[tuple[float, int], dict[str, Any]] = {}
        self._adopt_results()

        def evaluate_point(point: dict[str, Any]) -> float:
            result = self._trial(**point)
            results[point["alpha"], point["seed"]] = result
            if result["final_perplexity"] is None:
                return math.inf
            log.info(
                "Trial %d of %d, alpha %g, seed %d: validation PPL %.1f%s",
                len(self.sweep.points) - len(self.sweep.missing()) + 1, len(self.sweep.points),
                point["alpha"], point["seed"], result["final_perplexity"], self.progress.time_left(),
            )  # fmt: skip
            self._draw(list(results.values()))
            return result["final_perplexity"]

        for point in self.sweep.points:
            if point not in self.sweep.missing():
                results[point["alpha"], point["seed"]] = self._trial(**point)
        self.sweep.run(evaluate_point, lambda point: results[point["alpha"], point["seed"]])
        self._adopt_results()
        for point in self.sweep.points:
            if (point["alpha"], point["seed"]) not in results:
                results[point["alpha"], point["seed"]] = self._trial(**point)
        return [results[p["alpha"], p["seed"]] for p in self.sweep.points]

    def _adopt_results(self) -> None:
        """Write down what other workers found, as if it had been found here."""
        if self.sweep.is_shared:
            for point, result in self.sweep.results():
                path = self._trial_folder(**point) / "result.json"
                if not path.exists():
                    write_json(path, result)

    def train_final(self, alpha: float) -> dict[str, Any]:
        """Train ``final_epochs`` with the best alpha from the first seed's weights; keep the weights."""
        self.progress.describe(f"best alpha {alpha:g}")
        epochs, folder = self.config.final_epochs, self.folder / "final"
        return self._train(alpha, self.config.seeds[0], epochs, folder, is_final=True)

    def _trial(self, alpha: float, seed: int) -> dict[str, Any]:
        self.progress.describe(f"alpha {alpha:g}, seed {seed}")
        folder = self._trial_folder(alpha, seed)
        return self._train(alpha, seed, self.config.epochs_per_trial, folder, is_final=False)

    def _trial_folder(self, alpha: float, seed: int) -> Path:
        return self.folder / "trials" / f"alpha_{alpha:g}_seed_{seed}"

    def _train(self, alpha: float, seed: int, epochs: int, folder: Path, is_final: bool) -> dict[str, Any]:
        """Train one model, or read what an earlier run of the same model recorded."""
        recorded = _read_trial(folder / "result.json")
        weights = folder / "best_model.safetensors"
        needs_weights = is_final and recorded is not None and recorded["final_perplexity"] is not None
        if recorded is not None and not (needs_weights and read_weights(weights) is None):
            self.progress.skip(self.steps_per_epoch * epochs)
            return recorded
        config, text = self.config, self.text
        settings = model_config(config, text.vocab_size, alpha)
        early = folder / "directions_after_one_epoch.json"
        if (folder / "checkpoints").exists() and read_result(early, {"directions": list}) is None:
            log.warning("%s is missing or damaged, so this trial starts again from its first epoch.", early)
            CheckpointFolder(folder / "checkpoints").remove()
        started, done_before = time.perf_counter(), self.progress.done

        def attempt() -> tuple[ResNetBK, list[EpochRecord]]:
            """Train from the seed's first weights, or from the last good checkpoint."""
            self.progress.skip(done_before - self.progress.done)
            torch.manual_seed(seed)
            model = ResNetBK(settings).to(self.accelerator.device)

            def measure_early(record: EpochRecord) -> None:
                if record.epoch == 1:
                    write_json(early, {"directions": self._directions(model)})

            return model, train(
                model,
                text.train_loader(seed=seed),
                text.val_loader(),
                TrainingSettings(
                    epochs,
                    learning_rate=config.learning_rate,
                    weight_decay=config.weight_decay,
                    clip=config.clip,
                    schedule=config.schedule,
                    seed=seed,
                ),
                accelerator=self.accelerator,
                unk_id=text.unk_id,
                folder=folder / "checkpoints",
                label=f"{'best ' if is_final else ''}alpha {alpha:g}, seed {seed}",
                on_step=self.progress.step,
                on_skip=self.progress.skip,
                on_epoch=measure_early,
            )

        try:
            model, records = twice(attempt)
        except NonFiniteError as error:  # an answer, too: the others are worth reporting without it
            self.progress.skip(done_before + self.steps_per_epoch * epochs - self.progress.done)
            return self._record_diverged(alpha, seed, error, time.perf_counter() - started, folder)
        perplexities = [r.val_perplexity for r in records]
        result = {
            "alpha": alpha,
            "seed": seed,
            "final_perplexity": perplexities[-1],
            "final_perplexity_without_unk": records[-1].val_perplexity_without_unk,
            "final_accuracy": records[-1].val_accuracy,
            "convergence_speed": convergence_epoch(perplexities),
            "gradient_variance": gradient_variance(records),
            "training_time": sum(r.seconds for r in records),
            "epochs": [r.to_dict() for r in records],
            "directions": {
                "after one epoch": read_result(early)["directions"],
                "at the end": self._directions(model),
            },
        }
        if is_final:
            result["test_perplexity"] = evaluate(model, text.test_loader(), text.unk_id).perplexity
            result["model_config"] = dataclasses.asdict(settings)
            result["parameters"] = model.num_parameters()
            with replacing(weights) as temporary:
                save_model(model, str(temporary))
        self._record(folder, result)
        return result

    def _record_diverged(
        self, alpha: float, seed: int, error: NonFiniteError, seconds: float, folder: Path
    ) -> dict[str, Any]:
        again = "" if self.sweep.is_shared else f"; delete {folder} to train it again"
        log.warning("%s; it is recorded as diverged%s.", error.what, again)
        result = {
            "alpha": alpha,
            "seed": seed,
            "final_perplexity": None,
            "reason": f"{error.what}.",
            "training_time": seconds,
        }
        self._record(folder, result)
        return result

    def _record(self, folder: Path, result: dict[str, Any]) -> None:
        """Write a trial's result; from then on its checkpoints would only swell the zip."""
        write_json(folder / "result.json", result)
        CheckpointFolder(folder / "checkpoints").remove()
        (folder / "directions_after_one_epoch.json").unlink(missing_ok=True)

    def _directions(self, model: ResNetBK) -> list[dict[str, Any]]:
        x, y = self.text.first_batch(sequences=8)
        return measure_directions(model, x, y, self.config.alphas, self.config.gradient)

    def _draw(self, results: list[dict[str, Any]]) -> None:
        path = self.folder / "grad_blend_analysis.png"
        if not finished(results):
            return
        title = f"{len(results)} of {len(self.sweep.points)} trials done{diverged_in_short(results)}"
        draw_analysis(
            path,
            results,
            alpha_table(results),
            title,
            describe_run(self.config, self.text, len(self.config.seeds)),
        )
        if self.on_figure is not None:
            self.on_figure(path)


def _read_trial(path: Path) -> dict[str, Any] | None:
    """What was recorded of a trial, finished or diverged; None where nothing (whole) was."""
    found = read_result(path, TRIAL_KEYS)
    if found is None:
        return None
    return read_result(path, DIVERGED_KEYS if found["final_perplexity"] is None else RESULT_KEYS)


def _show(result: GradBlendResult) -> None:
    print(as_text(readable(result.table)))
    print(result.finding)
    print(result.bundle)


if __name__ == "__main__":
    cli.main(GradBlendConfig, run_grad_blend, _show)
