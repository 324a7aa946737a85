"""The GRAD_BLEND sweep: which blend of a theoretical gradient with "hypothesis-7" trains ResNet-BK best?

The gradient of the BK-core's potential is (1 - alpha) * theory + alpha * hypothesis-7. The sweep trains one model per
(alpha, seed), all models of a seed from the same weights on the same batches, and compares validation perplexities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_model

from bklm.files.atomic import read_result
from bklm.harness.comparison import Trial, not_beaten_in_short
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import INTERNALS, Point, Session, place_of
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.studies.grad_blend import figures
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.tables import (
    ALPHAS,
    beside,
    claims_table,
    original_format,
    pooled_directions,
    rates_in_words,
    readable_alphas,
    trained_for_directions,
)
from bklm.studies.grad_blend.train import KEYS, WEIGHTS, model_config, train_trial
from bklm.training.checkpoints import read_weights

TRIALS = f"{INTERNALS}/trials"


@dataclass(frozen=True)
class GradBlendResult(StudyResult):
    """What ``run_grad_blend`` found: ``table`` holds one row per alpha, ``final`` is the training with the best one."""

    directions: list[dict[str, Any]]
    claims: list[dict[str, str]]
    final: dict[str, Any]

    @property
    def best_alpha(self) -> float:
        return self.best

    @property
    def test_finding(self) -> str:
        """How the training with the best alpha scores on the test split."""
        return f"Test perplexity with alpha {self.best_alpha:g}: {self.final['test_ppl']:.1f}"

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        return {"alphas": lambda: readable_alphas(self.table), "claims": lambda: self.claims}

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
    epochs = _trainings(config) * config.epochs_per_trial + config.final_epochs
    train_tokens = min(train_tokens, config.max_train_tokens or train_tokens)
    return minutes(config, [Run(settings, lambda: ResNetBK(settings), epochs, train_tokens, val_tokens)])


def _trainings(config: GradBlendConfig) -> int:
    """Of the sweep: of an alpha's rates all with the first seed, whose best one is not trained again."""
    return len(config.alphas) * (len(config.seeds) + len(config.learning_rates) - 1)


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


def _train_all(study: Session) -> tuple[list[Trial], list[Trial], Trial]:
    """The sweep's trials, those of its searches, and the training with the best alpha."""
    config, steps = study.config, len(study.text.train_loader(seed=0))
    study.expect(steps * (_trainings(config) * config.epochs_per_trial + config.final_epochs))
    first = config.seeds[:1]

    def trial(place: str, alpha: float, seed: int, learning_rate: float, final: bool = False) -> dict[str, Any]:
        epochs = config.final_epochs if final else config.epochs_per_trial
        point = {"alpha": alpha, "seed": seed, "learning_rate": learning_rate}
        return study.trial(
            place,
            point,
            steps * epochs,
            lambda folder: train_trial(study, **point, epochs=epochs, folder=folder, final=final),
            KEYS,
            weights=WEIGHTS * final,
        )

    def place(point: Point) -> str:
        rate = rates[point["alpha"]] if "seed" in point else point["learning_rate"]
        searched = {"learning_rate": rate} if len(config.learning_rates) > 1 else {}
        return place_of({"alpha": point["alpha"], "seed": point.get("seed", first[0]), **searched})

    # An alpha's best trial of the search is the first of its sweep: both lie in the same folder.
    rates: dict[float, float] = {}
    found, searched = study.best_rate(
        "alpha", config.alphas, config.learning_rates, partial(trial, seed=first[0]), name=TRIALS, place=place,
        may_diverge=True,
    )  # fmt: skip
    rates |= found
    trials = study.grid(
        {"alpha": config.alphas, "seed": config.seeds},
        lambda place, alpha, seed: trial(place, alpha, seed, rates[alpha]),
        name=TRIALS,
        place=place,
        draw=lambda done: _draw(study, done),
    )
    ALPHAS.require_any(trials)
    best = {"alpha": [ALPHAS.best(trials)], "seed": first}
    final = study.grid(
        best,
        lambda place, alpha, seed: trial(place, alpha, seed, rates[alpha], final=True),
        name="final",
        place=lambda point: "",
        across_machines=False,
    )
    return trials, searched, final[0]


def _note(study: Session, seeds: int) -> str:
    config = study.config
    own = f"{config.protocol} protocol, mixer: {config.mixer}, theory gradient: {config.gradient}"
    parts = [own, rates_in_words(config.learning_rates, config.epochs_per_trial)]
    return small_print(study.text, seeds, *parts, sees_the_future=not config.causal)


def _draw(study: Session, trials: list[Trial]) -> Path | None:
    if not ALPHAS.finished(trials):
        return None
    total = len(study.config.alphas) * len(study.config.seeds)
    title = f"{len(trials)} of {total} trials done{ALPHAS.diverged_in_short(trials)}"
    path, note = study.folder / "grad_blend_analysis.png", _note(study, len(study.config.seeds))
    return figures.draw_analysis(path, trials, beside(study.text.is_wikitext2).rows(trials), title, note)


def _report(study: Session, found: tuple[list[Trial], list[Trial], Trial]) -> GradBlendResult:
    trials, searched, final = found
    config, report = study.config, Report(study)
    note, note_of_one = _note(study, len(config.seeds)), _note(study, 1)
    alphas = beside(study.text.is_wikitext2)
    table, claims = alphas.rows(trials), claims_table(trials, config.learning_rates)
    trained_with, measured = trained_for_directions(trials)
    directions = pooled_directions(measured)
    report.json("grad_blend_results.json", original_format(config.epochs_per_trial, trials, table))
    report.csv("gradient_directions.csv", directions)
    report.csv("claims.csv", claims)
    tried = [{k: t[k] for k in ("alpha", "learning_rate", "val_ppl")} for t in searched]
    report.csv("learning_rates.csv", tried)
    title = ALPHAS.headline(trials)
    if ALPHAS.finished(trials):
        best = ALPHAS.perplexity(ALPHAS.groups(trials)[ALPHAS.best(trials)]).mean
        title += not_beaten_in_short(best, study.text.baselines)
    report.figure("grad_blend_analysis.png", figures.draw_analysis, trials, table, title, note)
    of_weights = f"Weights trained with alpha {trained_with:g}. "
    own_note = _note(study, len(measured))
    report.figure("gradient_directions.png", figures.draw_directions, directions, of_weights + own_note)
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
        also={"search": [t for t in searched if t not in trials], "final": [final]},
        summary={"final_training": kept, "claims": claims, "searched": tried},
        sees_the_future=not config.causal,
        directions=directions,
        claims=claims,
        final=dict(final),
    )
    if not ALPHAS.finished([final]):
        raise RuntimeError(
            f"the sweep is done, its table and figures are in {result.bundle.path}, but the final training diverged: "
            f"{final['reason']} Delete {study.folder / 'final'} and start again to repeat it."
        )
    return result
