"""The embedding-freeze study: does freezing the embedding help, or having pretrained it, or tying the head to it?

Every arm trains the same ContextTokenLM in two phases on the same tokens: first the context block, without labels, to a
fixed point; then the rest, on contexts that the first phase leaves. Arms differ in where the embedding starts, whether it is
trained in the second phase, and whether the head is tied to it; all else is equal, seed by seed.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_model

from bklm.data import load_corpus
from bklm.data.bpe import gpt2_bpe, train_bpe
from bklm.data.documents import split_documents
from bklm.files.atomic import read_result
from bklm.harness.comparison import Trial, not_beaten_in_short, state_not_beaten
from bklm.harness.report import Report, StudyResult, seeds_in_words
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.studies.embedding_freeze import figures, findings, tables
from bklm.studies.embedding_freeze.config import INEQUALITY, EmbeddingFreezeConfig, arms_of
from bklm.studies.embedding_freeze.estimate import GRADIENT, SWEEPS, about_tokens, seconds_per_token
from bklm.studies.embedding_freeze.tables import ARMS
from bklm.studies.embedding_freeze.text import Embedding, FreezeText, make_text
from bklm.studies.embedding_freeze.train import WEIGHTS, Recipe, Trainer
from bklm.training.checkpoints import read_weights
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.phase1 import FixedPointSettings


@dataclass(frozen=True)
class EmbeddingFreezeResult(StudyResult):
    """What ``run_embedding_freeze`` found.

    ``table`` holds one row per arm and sample, ``best`` the row of the lowest perplexity, ``effects`` one per factor and
    scope, ``phase1`` one per initialisation, sample and seed. ``findings`` begins with the sentence on freezing, pretraining
    and tying. After phase 1 alone table and effects are empty, and ``best`` is None.
    """

    effects: list[dict[str, Any]]
    phase1: list[dict[str, Any]]
    findings: list[str]

    spoken = ("finding", "inequality")

    @property
    def inequality(self) -> str | None:
        """Why the original's two arms cannot be compared; None where they are not among the arms."""
        return INEQUALITY if self.config.original_comparison and self.table else None

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = (
            ("arms", tables.readable_arms, self.table),
            ("effects", tables.readable_effects, self.effects),
            ("phase 1", tables.readable_phase1, self.phase1),
            ("baselines", tables.readable_baselines, self.baselines),
        )
        return {name: partial(make, rows) for name, make, rows in made if rows}

    def load(self) -> ContextTokenLM:
        """The model of the best arm's first seed; on the CPU, in evaluation mode."""
        return load_best_model(self.folder)


def run_embedding_freeze(
    config: EmbeddingFreezeConfig,
    on_figure: Callable[[Path], None] | None = None,
    text: FreezeText | None = None,
) -> EmbeddingFreezeResult | None:
    """Run both phases of every arm and write everything to ``<output_dir>/embedding_freeze`` and its zip.

    Arguments, result and errors as in ``bklm.harness.study.run_study``.
    """
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def prepare_text(config: EmbeddingFreezeConfig) -> FreezeText:
    """Load, split and tokenise the text of a resolved config; errors as in ``bklm.data`` and ``make_text``."""
    kind = "file" if config.embedding_file else config.embedding
    is_used = config.initialisation != "random"
    embedding = Embedding(kind, config.embed_dim, is_used, config.embedding_file)
    # A BPE of the text's own is trained on them too, and so is the same whatever embedding is compared.
    needs_spare = embedding.is_factorised or config.tokenizer == "corpus"
    spare = config.pretraining_documents * needs_spare
    # Room for near-duplicates that are left out.
    fetched = max(config.samples) + spare + config.val_documents
    corpus = load_corpus(config.dataset, config.data_dir, max_documents=fetched)
    split = split_documents(
        corpus, config.samples, config.val_documents, spare=spare, threshold=config.duplicate_threshold
    )
    if embedding.is_factorised and not split.spare:
        raise ValueError(
            f"embedding: 'svd' needs documents that no model is trained or scored on, but all {max(config.samples)} training "
            f"documents of {corpus.name!r} are in the samples; lower samples, or choose embedding 'gpt2'."
        )
    if config.tokenizer == "gpt2":
        bpe = gpt2_bpe(config.gpt2_dir)
    else:
        bpe = train_bpe([*split.train, *split.spare], config.vocab_size)
    return make_text(
        corpus,
        split,
        bpe,
        embedding,
        config.samples,
        config.document_tokens or None,
        config.batch_tokens,
        config.original_comparison,
    )


def estimated_minutes(config: EmbeddingFreezeConfig) -> float:
    """Minutes that a resolved config takes on this machine if no arm stops early, reading and figures left out.

    The first call with a model's shape, batch and device times a few steps (seconds); later ones remember it.

    Raises:
        ValueError, OSError: a device or a text that this machine lacks.
    """
    size = _recipe(config, config.vocab_size).size
    speed = partial(seconds_per_token, size, config.batch_tokens, config.device, config.precision)
    source = (config.dataset, config.data_dir, config.document_tokens or 10**9)
    valid = about_tokens(*source, config.val_documents, "valid")
    arms, seconds, longest = arms_of(config), 0.0, 0.0
    searched = 1 + (len(config.learning_rates) - 1) / (len(config.seeds) * len(config.samples))
    for samples in config.samples:
        train = about_tokens(*source, samples, "train")
        starts = len({arm.start for arm in arms})
        seconds += starts * train * speed() * (SWEEPS + config.iterations * (1 + GRADIENT))
        for arm in arms:
            tokens = arm.train_share * train
            epoch = (tokens + valid / GRADIENT) * speed(arm.freezing, arm.head)
            sweeps = 1 + config.epochs * (arm.trains_norm and config.recompute_contexts)
            trial = config.epochs * epoch + sweeps * SWEEPS * (tokens + valid) * speed()
            seconds, longest = seconds + searched * trial, max(longest, trial)
    # The best arm is trained once more.
    return (seconds * len(config.seeds) + longest) / 60


def load_best_model(folder: Path) -> ContextTokenLM:
    """The model of the best arm's first seed, from a study's folder; on the CPU, in evaluation mode."""
    for path in Path(folder).glob("final/*/result.json"):
        result = read_result(path, {"model_config": dict})
        if result is not None and read_weights(path.with_name(WEIGHTS)) is not None:
            model = ContextTokenLM(ContextTokenConfig(**result["model_config"]))
            load_model(model, str(path.with_name(WEIGHTS)))
            return model.eval()
    raise FileNotFoundError(f"{folder} holds no finished best model; run the study (again) to its end first.")


def write_sample(
    result: EmbeddingFreezeResult, text: FreezeText, prompt: str = "", temperature: float = 0.8
) -> str:
    """60 tokens that the best arm's model writes after ``prompt``, or after the opening of a validation document.

    After phase 1 alone there is no such model, and a sentence says so.
    """
    if result.best is None:
        return "Phase 1 alone trains no model that writes."
    return text.generate(result.load(), prompt or text.prompt(), 60, temperature)


class _Found(NamedTuple):
    phase1: list[dict[str, Any]]
    trials: list[Trial]
    searched: list[Trial]
    final: list[Trial]


def _recipe(config: EmbeddingFreezeConfig, vocab_size: int) -> Recipe:
    return Recipe(
        ContextTokenConfig(vocab_size, config.embed_dim, config.context_dim, config.n_layers, tied=False),
        FixedPointSettings(
            config.iterations, config.context_learning_rate, clip=config.clip, noise=config.noise
        ),
        # AdamW without decay is Adam, the original's.
        TrainingSettings(config.epochs, weight_decay=0.0, clip=config.clip, patience=config.patience),
        config.batch_tokens,
        config.recompute_contexts,
    )


def _train_all(study: Session) -> _Found:
    """Both phases, or the one that is asked for."""
    config = study.config
    recipe = _recipe(config, study.text.vocab_size)
    trainer = Trainer(study, recipe, arms_of(config), config.samples, config.seeds)
    # Accelerate ends each training with a garbage collection, which would walk over all that was ever imported: in small
    # studies that takes longer than the training.
    gc.freeze()
    try:
        phase1 = trainer.run_phase1(is_done=config.phase == "2")
        if config.phase == "1":
            return _Found(phase1, [], [], [])
        trials, searched = trainer.run_phase2(config.learning_rates, lambda done: _draw(study, done))
        if not ARMS.finished(trials):
            raise RuntimeError(
                f"every trial diverged, the first so: {trials[0]['reason']} Take other settings, such as lower "
                "learning_rates, and another output_dir."
            )
        final = trainer.run_again(tables.best_trial(trials))
        trainer.forget_contexts()
        return _Found(phase1, trials, searched, [final])
    finally:
        gc.unfreeze()


def _note(study: Session) -> str:
    """The small print of a figure."""
    config, text = study.config, study.text
    parts = ["Demonstration"] * text.is_demonstration + [
        f"{text.corpus.name}, {text.vocab_size:,} tokens in the vocabulary, "
        f"{len(text.valid):,} validation tokens in {config.val_documents} documents",
        f"pretrained embedding: {text.source}",
        f"{config.n_layers} layers of width {config.context_dim}",
        seeds_in_words(len(config.seeds)),
        f"learning rate {' or '.join(f'{rate:g}' for rate in config.learning_rates)}",
    ]
    return "; ".join(parts) + "."


def _draw(study: Session, trials: list[Trial]) -> Path | None:
    if not ARMS.finished(trials):
        return None
    total = len(arms_of(study.config)) * len(study.config.samples) * len(study.config.seeds)
    title = f"{len(trials)} of {total} trials done"
    path = study.folder / "arms.png"
    return figures.draw_arms(path, tables.arm_table(trials), study.text.baselines, title, _note(study))


def _findings(study: Session, found: _Found) -> list[str]:
    config, text, trials = study.config, study.text, found.trials
    said = [findings.state_phase1(tables.whole_phase1(found.phase1))]
    if trials:
        most = len(text.train(max(config.samples)))
        advantages = findings.state_advantages(text.source, text.pretraining_tokens, most)
        said = [
            findings.state_finding(trials),
            findings.state_original(trials),
            findings.state_phase1_arms(trials),
            findings.state_rule(trials),
            findings.state_baselines(trials, text.baselines),
            findings.state_context_gain(trials),
            findings.state_limits(trials, config.epochs, config.learning_rates),
            advantages if text.embedding.is_used else "",
            *said,
            findings.state_drift(trials),
        ]
    return [sentence for sentence in said if sentence]


def _report(study: Session, found: _Found) -> EmbeddingFreezeResult:
    config, text, report, note = study.config, study.text, Report(study), _note(study)
    phase1, trials, searched, final = found
    table, effects, phase1_rows = (
        tables.arm_table(trials),
        tables.effect_table(trials),
        tables.phase1_table(phase1),
    )
    said, lost = _findings(study, found), [dict(t) for t in trials if t["val_ppl"] is None]
    report.text("tokenizer.json", text.bpe.tokenizer.to_str(pretty=False))
    report.csv("phase1.csv", phase1_rows)
    point = ("initialisation", "samples", "seed")
    steps = [{name: run[name] for name in point} | row for run in phase1 for row in run["rows"]]
    report.csv("phase1_iterations.csv", steps)
    report.csv("baselines.csv", text.baselines)
    report.figure("phase1.png", figures.draw_phase1, tables.whole_phase1(phase1), note)
    best = None
    if trials:
        chosen = tables.best_trial(trials)
        best = next(r for r in table if (r["arm"], r["samples"]) == (chosen["arm"], chosen["samples"]))
        own = [b for b in text.baselines if b["samples"] == best["samples"]]
        title = findings.headline(trials) + not_beaten_in_short(best["val_ppl"], own)
        said.append(f"Best is {best['arm']}.{state_not_beaten(best['arm'], best['val_ppl'], own)}")
        report.csv("table.csv", table)
        report.csv("effects.csv", effects)
        report.csv("trials.csv", tables.trial_rows(trials))
        report.csv("epochs.csv", tables.epoch_rows(trials))
        report.figure("arms.png", figures.draw_arms, table, text.baselines, title, note)
        report.figure("curves.png", figures.draw_curves, ARMS.finished(trials), note)
        report.figure("effects.png", figures.draw_effects, effects, note)
        report.figure("budget.png", figures.draw_budget, table, findings.RULE, note)
        for path in study.folder.glob(f"final/*/{WEIGHTS}"):
            report.paths[WEIGHTS] = path
    split, removed = text.split, [dataclasses.asdict(r) for r in text.split.removed]
    sizes = {f"{n} samples": len(text.train(n)) for n in config.samples}
    report.json(
        "summary.json",
        {
            "findings": said, "demonstration": text.is_demonstration,
            "inequality": INEQUALITY if config.original_comparison else None, "embedding": text.source,
            "near_duplicates": {"threshold": split.threshold, "examined": split.examined, "removed": removed},
            "tokens": {"validation": len(text.valid)} | sizes, "baselines": text.baselines, "phase1": phase1_rows,
            "table": table, "effects": effects, "best": best, "diverged": lost,
        },
    )  # fmt: skip
    return report.close(
        EmbeddingFreezeResult,
        sum(part["seconds"] for part in (*phase1, *trials, *searched, *final)),
        {"tokenizer": {"source": text.bpe.source, "sha256": text.bpe.sha256}},
        table=table, baselines=text.baselines, best=best, best_perplexity=best and best["val_ppl"], finding="\n".join(said),
        findings=said, diverged=lost, effects=effects, phase1=phase1_rows,
    )  # fmt: skip
