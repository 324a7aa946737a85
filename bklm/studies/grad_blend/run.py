"""The GRAD_BLEND sweep: which blend of a theoretical gradient with "hypothesis-7" trains ResNet-BK best?

The gradient of the BK-core's potential is (1 - alpha) * theory + alpha * hypothesis-7. The sweep trains one model per
(alpha, seed), all models of a seed from the same weights on the same batches, and compares validation perplexities.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.comparison import Trial, not_beaten_in_short
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.studies.grad_blend import figures
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.directions import measure_directions
from bklm.studies.grad_blend.tables import ALPHAS, beside, original_format, pooled_directions, readable_alphas
from bklm.training.checkpoints import CheckpointFolder, read_weights
from bklm.training.context_gain import measure_context_gain, short_lengths
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.records import EPOCH_KEYS, convergence_epoch, gradient_variance
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import save_weights

log = logging.getLogger(__name__)

KEYS = {"val_ppl": float, "seconds": float, "epochs": EPOCH_KEYS, "directions": dict, "context_gain": float,
        "windows": dict}  # fmt: skip
HEADS = 8  # of the mixer "solve", or as many as the width has in common with that
WINDOW_TOKENS = 10_000  # of the validation text, for windows shorter than those trained with
EARLY = "directions_after_one_epoch.json"
WEIGHTS = "best_model.safetensors"


@dataclass(frozen=True)
class GradBlendResult(StudyResult):
    """What ``run_grad_blend`` found: ``table`` holds one row per alpha, ``final`` is the training with the best one."""

    directions: list[dict[str, Any]]
    final: dict[str, Any]

    @property
    def best_alpha(self) -> float:
        return self.best

    @property
    def test_finding(self) -> str:
        """How the training with the best alpha scores on the test split."""
        return f"Test perplexity with alpha {self.best_alpha:g}: {self.final['test_ppl']:.1f}"

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        return {"alphas": lambda: readable_alphas(self.table)}

    def sentences(self) -> list[str]:
        return [self.finding, *([self.test_finding] if self.final["val_ppl"] is not None else [])]

    def load(self, model: None = None) -> ResNetBK:
        """The model that was trained with the best alpha; on the CPU, in evaluation mode."""
        return load_final_model(self.folder)


def run_grad_blend(
    config: GradBlendConfig, on_figure: Callable[[Path], None] | None = None, text: StudyText | None = None
) -> GradBlendResult | None:
    """Run the sweep, train with the best alpha, and write everything to ``<output_dir>/grad_blend`` and its zip.

    Arguments, result and errors as in ``bklm.harness.study.run_study``.
    """
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: GradBlendConfig) -> float:
    """Minutes that the whole study of a resolved config takes here; see ``bklm.harness.estimate.minutes``."""
    size = (config.dataset, config.data_dir, config.vocab_size, config.tokenizer)
    vocabulary, train_tokens, val_tokens = text_size(*size)
    settings = model_config(config, vocabulary, 0.5)
    epochs = len(config.alphas) * len(config.seeds) * config.epochs_per_trial + config.final_epochs
    train_tokens = min(train_tokens, config.max_train_tokens or train_tokens)
    return minutes(config, [Run(settings, lambda: ResNetBK(settings), epochs, train_tokens, val_tokens)])


def model_config(config: GradBlendConfig, vocab_size: int, alpha: float) -> ResNetBKConfig:
    """The ResNet-BK of one trial of a resolved config."""
    same = ("d_model", "n_layers", "num_experts", "top_k", "causal", "gradient", "router_gradient", "balance",
            "mixer")  # fmt: skip
    return ResNetBKConfig(
        vocab_size,
        n_seq=config.seq_len,
        dropout_p=config.dropout,
        grad_blend=alpha,
        clamps=config.protocol == "original",
        n_heads=math.gcd(HEADS, config.d_model) if config.mixer == "solve" else 1,
        **{name: getattr(config, name) for name in same},
    )


def load_final_model(folder: Path) -> ResNetBK:
    """The model that was trained with the best alpha, from a study's folder; on the CPU, in evaluation mode."""
    result = read_result(Path(folder) / "final" / "result.json", {"model_config": dict})
    weights = Path(folder) / "final" / WEIGHTS
    if result is None or read_weights(weights) is None:
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
    return text.generate(result.load(), " ".join(words), min(60, n_seq - len(words)), temperature)


def _train_all(study: Session) -> tuple[list[Trial], Trial]:
    """The sweep's trials, and the training with the best alpha."""
    config, steps = study.config, len(study.text.train_loader(seed=0))
    study.expect(
        steps * (len(config.alphas) * len(config.seeds) * config.epochs_per_trial + config.final_epochs)
    )

    def trial(place: str, alpha: float, seed: int, final: bool = False) -> dict[str, Any]:
        epochs = config.final_epochs if final else config.epochs_per_trial
        return study.trial(
            place,
            {"alpha": alpha, "seed": seed},
            steps * epochs,
            lambda folder: _train(study, alpha, seed, epochs, folder, final),
            KEYS,
            weights=WEIGHTS * final,
        )

    trials = study.grid(
        {"alpha": config.alphas, "seed": config.seeds}, trial, draw=lambda done: _draw(study, done)
    )
    ALPHAS.require_any(trials)
    best = {"alpha": [ALPHAS.best(trials)], "seed": config.seeds[:1]}
    final = study.grid(
        best, partial(trial, final=True), name="final", place=lambda point: "", across_machines=False
    )
    return trials, final[0]


def _train(study: Session, alpha: float, seed: int, epochs: int, folder: Path, final: bool) -> dict[str, Any]:
    config, text = study.config, study.text
    settings = model_config(config, text.vocab_size, alpha)
    early = folder / EARLY
    if (folder / "checkpoints").exists() and read_result(early, {"directions": list}) is None:
        log.warning("%s is missing or damaged, so this trial starts again from its first epoch.", early)
        CheckpointFolder(folder / "checkpoints").remove()
    torch.manual_seed(seed)
    model = ResNetBK(settings).to(study.accelerator.device)

    def directions() -> list[dict[str, Any]]:
        return measure_directions(model, *text.first_batch(sequences=8), config.alphas, config.gradient)

    def measure_early(record: Any) -> None:
        if record.epoch == 1 and study.is_main:
            write_json(early, {"directions": directions()})

    own = TrainingSettings(
        epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay, clip=config.clip,
        schedule=config.schedule, seed=seed,
    )  # fmt: skip
    records = train(
        model,
        text.train_loader(seed=seed),
        text.val_loader(),
        own,
        accelerator=study.accelerator,
        unk_id=text.unk_id,
        folder=folder / "checkpoints",
        label=f"{'best ' * final}alpha {alpha:g}, seed {seed}",
        on_step=study.progress.step,
        on_skip=study.progress.skip,
        on_epoch=measure_early,
    )
    last, perplexities = records[-1], [r.val_perplexity for r in records]
    gained = measure_context_gain(
        model, text.val_loader(), text.unk_id, windows_of=lambda n: text.context_loader(n, WINDOW_TOKENS),
        window=text.seq_len, lengths=short_lengths(text.seq_len), accelerator=study.accelerator,
    )  # fmt: skip
    result = {
        "val_ppl": last.val_perplexity,
        "val_ppl_without_unk": last.val_perplexity_without_unk,
        "val_accuracy": last.val_accuracy,
        **gained.record(),
        "convergence_speed": convergence_epoch(perplexities),
        "gradient_variance": gradient_variance(records),
        "seconds": sum(r.seconds for r in records),
        "epochs": [r.to_dict() for r in records],
    }
    if final:
        test = evaluate(model, text.test_loader(), text.unk_id, study.accelerator)
        result |= {"test_ppl": test.perplexity, "parameters": model.num_parameters()}
        result["model_config"] = dataclasses.asdict(settings)
    if study.is_main:
        kept = read_result(early, {"directions": list})["directions"]
        result["directions"] = {"after one epoch": kept, "at the end": directions()}
        early.unlink()
        if final:
            with replacing(folder / WEIGHTS) as temporary:
                save_weights(model, temporary, text.vocabulary_sha256)
    return result


def _note(study: Session, seeds: int) -> str:
    config = study.config
    own = f"{config.protocol} protocol, mixer: {config.mixer}, theory gradient: {config.gradient}"
    return small_print(study.text, seeds, own, sees_the_future=not config.causal)


def _draw(study: Session, trials: list[Trial]) -> Path | None:
    if not ALPHAS.finished(trials):
        return None
    total = len(study.config.alphas) * len(study.config.seeds)
    title = f"{len(trials)} of {total} trials done{ALPHAS.diverged_in_short(trials)}"
    path, note = study.folder / "grad_blend_analysis.png", _note(study, len(study.config.seeds))
    return figures.draw_analysis(path, trials, beside(study.text.is_wikitext2).rows(trials), title, note)


def _report(study: Session, found: tuple[list[Trial], Trial]) -> GradBlendResult:
    trials, final = found
    config, report = study.config, Report(study)
    note, note_of_one = _note(study, len(config.seeds)), _note(study, 1)
    alphas = beside(study.text.is_wikitext2)
    table, directions = alphas.rows(trials), pooled_directions(trials)
    report.json("grad_blend_results.json", original_format(config.epochs_per_trial, trials, table))
    report.csv("gradient_directions.csv", directions)
    title = ALPHAS.headline(trials)
    if ALPHAS.finished(trials):
        best = ALPHAS.perplexity(ALPHAS.groups(trials)[ALPHAS.best(trials)]).mean
        title += not_beaten_in_short(best, study.text.baselines)
    report.figure("grad_blend_analysis.png", figures.draw_analysis, trials, table, title, note)
    report.figure("gradient_directions.png", figures.draw_directions, directions, note)
    if ALPHAS.finished([final]):
        report.figure("training_curves.png", figures.draw_training, final, study.text.baselines, note_of_one)
        if final["epochs"][0]["expert_counts"]:
            report.figure("experts.png", figures.draw_experts, final, note_of_one)
        report.paths[WEIGHTS] = study.folder / "final" / WEIGHTS
    kept = {k: v for k, v in final.items() if k not in ("epochs", "directions")}
    result = report.finish(
        GradBlendResult,
        alphas,
        trials,
        also={"final": [final]},
        summary={"final_training": kept},
        sees_the_future=not config.causal,
        directions=directions,
        final=dict(final),
    )
    if not ALPHAS.finished([final]):
        raise RuntimeError(
            f"the sweep is done, its table and figures are in {result.bundle.path}, but the final training diverged: "
            f"{final['reason']} Delete {study.folder / 'final'} and start again to repeat it."
        )
    return result
