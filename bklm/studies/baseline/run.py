"""The baseline study: NewLLM as published, beside a GPT, an LSTM, two ResNetBK and a LinearContext of its size.

Each model gets the same small search of the learning rate, then one training per seed with the best one, and where several
``dropouts`` are named one of the first seed with each, of which the best by validation goes on: equal parameters, text,
batches and steps. ``protocol="original"`` cuts the text as the original did, so that its perplexities can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from bklm.data import load_corpus
from bklm.harness import workers
from bklm.harness.comparison import Trial, not_beaten_in_short
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.models import LanguageModel
from bklm.studies.baseline import figures, models, tables, train
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.costs import measure_models
from bklm.studies.baseline.tables import MODELS
from bklm.studies.baseline.text import LINES, OFFICIAL_WORDS, BaselineText, make_text
from bklm.training.checkpoints import CheckpointFolder

SEARCH_SEED = 0
# Fields that do not change what a single run computes: which runs there are, and what is measured afterwards.
_NOT_OF_A_RUN = {
    "seeds", "learning_rates", "dropouts", "search_tokens", "checkpoint_every", "generate_tokens", "context_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class BaselineResult(StudyResult):
    """What ``run_baseline`` found: ``table`` holds one row per model, ``runs`` the records of the trainings that finished."""

    int8_was_announced: ClassVar[bool] = True

    search: list[dict[str, Any]]
    measured: dict[str, dict[str, Any]]
    claims: list[dict[str, Any]]
    published: list[dict[str, Any]]
    runs: list[dict[str, Any]]

    @property
    def best_model(self) -> str:
        return self.best

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        """ "contexts" is left out where the text is cut into lines: there is no longer context then."""
        found = {
            "quality": lambda: tables.readable_quality(
                self.table,
                self.baselines,
                tables.is_beside_the_original(self.claims) and self.config.protocol != "field",
            ),
            "search": lambda: tables.readable_search(self.search, self.table),
            "contexts": lambda: tables.readable_contexts(self.table),
            "cost": lambda: tables.readable_cost(self.table, self.measured),
            "claims": lambda: self.claims,
            "published": lambda: self.published,
        }
        if "context_lengths.png" not in self.paths:
            del found["contexts"]
        if not self.published:
            del found["published"]
        return found

    def load(self, model: str | None = None) -> LanguageModel:
        """A trained model (the best one when no name is given); on the CPU, in evaluation mode.

        It is of the first seed that finished; with a database, of the first whose weights are on this machine.

        Raises:
            ValueError: this study trained no such model. FileNotFoundError: its weights are not here.
        """
        name = model or self.best
        runs = [run for run in self.runs if run["model"] == name]
        if not runs:
            known = dict.fromkeys(run["model"] for run in self.runs)
            raise ValueError(f"model: got {name!r}; this study trained {', '.join(known)}.")
        weights = train.kept_weights(self.folder, runs)
        if weights is None:
            raise FileNotFoundError(
                f"model: the weights of {models.TITLES[name]} are gone from {self.folder / 'runs'}, or were never here; run "
                "the study again, which makes them anew from a checkpoint, or put there those of the machine that trained it."
            )
        return models.read_model(name, runs[0]["model_config"], weights)


def run_baseline(
    config: BaselineConfig, on_figure: Callable[[Path], None] | None = None, text: BaselineText | None = None
) -> BaselineResult | None:
    """Run the comparison and write everything to ``<output_dir>/baseline`` and its zip.

    Under torchrun or accelerate launch all processes call this together; with ``config.processes`` above 1 it launches them
    itself. Arguments, result and errors as in ``bklm.harness.study.run_study``.
    """
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def prepare_text(config: BaselineConfig) -> BaselineText:
    """The text of a resolved config; see ``bklm.studies.baseline.text.make_text``.

    Raises:
        ValueError, OSError: see ``bklm.data.load_corpus`` and ``bklm.data.make_loader``.
    """
    same = ("lowercase", "validation", "vocab_size", "max_train_tokens", "seq_len", "batch_size")
    return make_text(
        load_corpus(config.dataset, config.data_dir, max_tokens=config.max_train_tokens or None),
        tokenizer=LINES if config.protocol == "original" else config.tokenizer,
        search_tokens=config.search_tokens if len(config.learning_rates) > 1 else None,
        **{name: getattr(config, name) for name in same},
    )


def estimated_minutes(config: BaselineConfig) -> float:
    """Minutes that the trainings of a resolved config take here, none of which is assumed to end early.

    See ``bklm.harness.estimate.minutes``.
    """
    size = (config.dataset, config.data_dir, config.vocab_size, config.tokenizer)
    vocabulary, train_tokens, val_tokens = text_size(*size)
    train_tokens = min(train_tokens, config.max_train_tokens or train_tokens)
    searched = min(train_tokens, config.search_tokens or train_tokens)
    trials = len(config.learning_rates) if len(config.learning_rates) > 1 else 0
    runs = []
    for name, fields in fields_of_models(config, vocabulary).items():
        shape, build = (name, json.dumps(fields)), partial(models.build_model, name, fields)
        # A search is judged by at most as many validation tokens as it trains on.
        runs.append(Run(shape, build, trials, searched, min(searched, val_tokens)))
        trainings = len(config.seeds) + len(config.dropouts or (0,)) - 1
        runs.append(Run(shape, build, config.epochs * trainings, train_tokens, val_tokens))
    return minutes(config, runs)


def fields_of_models(config: BaselineConfig, vocab_size: int) -> dict[str, dict[str, Any]]:
    """By name, the fields of each model of a resolved config."""
    sizes = {n: getattr(config, n) for n in ("embed_dim", "hidden_dim", "context_dim", "n_layers")}
    sizes["dropout_p"] = config.dropout
    names = models.model_names(config.model, config.protocol)
    return {name: models.model_settings(name, vocab_size, config.seq_len, sizes) for name in names}


def _train_all(study: Session) -> tuple[list[Trial], list[Trial]]:
    """The trials of the search, and the runs."""
    config, text = study.config, study.text
    fields = fields_of_models(config, text.vocab_size)
    trainings = len(config.seeds) + len(config.dropouts or (0,)) - 1
    train.require_room(config.checkpoint_folder(), _checkpoint_bytes(config, fields, trainings))
    steps, search_steps = len(text.train_loader(0)) * config.epochs, _search_steps(study)
    study.expect((steps * trainings + search_steps * len(config.learning_rates)) * len(fields))

    def try_rate(place: str, model: str, learning_rate: float) -> dict[str, Any]:
        point = {"model": model, "learning_rate": learning_rate}
        settings = config.search_settings(learning_rate, SEARCH_SEED)
        work = partial(train.train_rate, study, model, fields[model], settings, config.search_tokens)
        return study.trial(place, point, search_steps, lambda folder: work(), train.SEARCH_KEYS)

    rates, searched = study.best_rate(
        "model", tuple(fields), config.learning_rates, try_rate,
        place=lambda point: f"{point['model']}_lr_{point['learning_rate']:g}",
    )  # fmt: skip

    def train_one(place: str, model: str, seed: int, **dropout: float) -> dict[str, Any]:
        dropout = dropout or taken.get(model, {})
        point = {"model": model, "seed": seed, "learning_rate": rates[model], **dropout}
        of_model = fields[model] | {"dropout_p": dropout.get("dropout", config.dropout)}
        work = partial(_train_one, study, point, of_model)
        return study.trial(place, point, steps, lambda folder: work(), train.RUN_KEYS)

    def place(point: dict[str, Any]) -> str:
        return train.run_name(point | taken.get(point["model"], {}))

    taken: dict[str, dict[str, float]] = {}
    first, seeds = [], config.seeds
    if config.dropouts:
        points = {"model": tuple(fields), "seed": seeds[:1], "dropout": config.dropouts}
        # Not drawn: dropouts are no seeds, whose mean a curve would be.
        tried = study.grid(points, train_one, name="internals/dropouts", place=train.run_name)
        first = [min((t for t in tried if t["model"] == name), key=_or_infinity) for name in fields]
        taken = {trial["model"]: {"dropout": trial["dropout"]} for trial in first}
        # The best one is a run: counted once.
        searched, seeds = [*searched, *(t for t in tried if t not in first)], seeds[1:]
    points = {"model": tuple(fields), "seed": seeds}
    draw = partial(_draw, study, len(fields) * len(config.seeds), before=first)
    trials = first + (study.grid(points, train_one, name="runs", place=place, draw=draw) if seeds else [])
    if not MODELS.finished(trials):
        raise RuntimeError(
            f"every training diverged, the first so: {trials[0]['reason']} Take another output_dir for other settings."
        )
    return searched, trials


def _checkpoint_bytes(config: BaselineConfig, fields: dict[str, dict[str, Any]], trainings: int) -> int:
    """What the checkpoints take at most: those that are kept of every run, and what those under way have besides."""
    sizes = [models.count_parameters(*of_model) for of_model in fields.items()]
    at_work = min(config.epochs, config.keep_checkpoints + 2)
    kept = at_work if config.keep_checkpoints else 1
    # One more than are kept, while it is written.
    besides = max(sizes) * workers.number(config, len(sizes) * trainings) * (at_work + 1 - kept)
    return models.BYTES_PER_PARAMETER * (sum(sizes) * trainings * kept + besides)


def _or_infinity(trial: Trial) -> float:
    """Validation perplexity; of a training that diverged the largest there is."""
    return math.inf if trial["val_ppl"] is None else trial["val_ppl"]


def _search_steps(study: Session) -> int:
    """Optimiser steps of one trial of the search; 0 where a single rate needs none."""
    config = study.config
    searches = len(config.learning_rates) > 1
    return len(study.text.search_loader(SEARCH_SEED, config.search_tokens)) if searches else 0


def _train_one(study: Session, point: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    config = study.config
    left_out = config.circumstances | _NOT_OF_A_RUN
    identity = {f"{point['model']}.{name}": value for name, value in fields.items()}
    identity |= {name: value for name, value in config.to_dict().items() if name not in left_out}
    return train.train_run(
        study,
        point["model"],
        fields,
        config.training_settings(point["learning_rate"], point["seed"]),
        CheckpointFolder(
            config.checkpoint_folder() / train.run_name(point),
            milestone_every=config.checkpoint_every,
            keep_milestones=config.keep_checkpoints,
        ),
        identity={**identity, **point, "vocabulary": study.text.vocabulary_name},
        resume_from=config.resume_from and Path(config.resume_from),
        context_tokens=config.context_tokens,
    )


def _note(study: Session, bars: bool = True) -> str:
    """The small print of a figure: data, sizes, seeds, and the budget of the learning-rate search."""
    config, rates = study.config, study.config.learning_rates
    parts = [f"each model's learning rate: best of {len(rates)} over {_search_steps(study)} steps"]
    if len(rates) == 1:
        parts = [f"learning rate {rates[0]:g} for all"]
    if config.dropouts:
        parts.append(f"its dropout: best of {len(config.dropouts)} over a whole training of the first seed")
    if config.protocol == "original":
        parts.append("as published: the original's windows, an overlap's targets count twice")
    if config.protocol == "field" and study.text.is_wikitext2 and not study.text.is_whole_wikitext2:
        parts.append(
            f"a sample of WikiText-2, {study.text.train_tokens:,} of its {OFFICIAL_WORDS:,} training words"
        )
    if config.validation == "valid+test":
        parts.append(
            "validation holds the test split too, which early stopping and the choice of rate and epoch saw"
        )
    return small_print(study.text, len(config.seeds), *parts, bars=bars)


def _draw(study: Session, total: int, trials: list[Trial], before: Sequence[Trial] = ()) -> Path | None:
    trials = [*before, *trials]
    finished = MODELS.finished(trials)
    if not finished:
        return None
    title = f"{len(finished)} of {total} trainings done{MODELS.diverged_in_short(trials)}"
    path = study.folder / "training_curves.png"
    return figures.draw_curves(path, trials, study.text, title, _note(study))


def _report(study: Session, found: tuple[list[Trial], list[Trial]]) -> BaselineResult:
    searched, trials = found
    config, text, report, note = study.config, study.text, Report(study), _note(study)
    runs = MODELS.finished(trials)
    for name in MODELS.groups(trials):
        of_model = [run for run in runs if run["model"] == name]
        train.keep_weights(
            study.folder, of_model, config.checkpoint_folder(), config.resume_from and Path(config.resume_from)
        )
    measured = measure_models(
        runs, text, study.folder / "internals/measured.json",
        device=config.device, precision=config.precision, generate_tokens=config.generate_tokens,
    )  # fmt: skip
    chosen = [t for t in trials if "dropout" in t and t["seed"] == config.seeds[0]]
    search = tables.search_rows([*searched, *chosen], _search_steps(study))
    table = tables.model_table(trials, measured)
    # What was reported and announced for WikiText-2 stands beside no other text, and what others publish beside no sample.
    claims = tables.claims_table(table) if text.is_the_originals else []
    claims += tables.rival_claims(trials)
    published = tables.PUBLISHED if config.protocol == "field" and text.is_whole_wikitext2 else []
    report.csv("learning_rates.csv", search)
    best = MODELS.perplexity(MODELS.groups(trials)[MODELS.best(trials)]).mean
    title = MODELS.headline(trials) + not_beaten_in_short(best, text.baselines)
    report.figure("training_curves.png", figures.draw_curves, trials, text, title, note)
    report.figure("context_lengths.png", figures.draw_contexts, table, text.seq_len, _note(study, bars=False))
    return report.finish(
        BaselineResult, MODELS, trials, also={"search": searched}, rows=table,
        finding=MODELS.finding(trials) + tables.bigram_models(table),
        summary={
            "learning_rate_search": search, "measured": measured, "claims": claims, "note": note, "published": published,
            "reported_by_the_original": tables.REPORTED_EPOCHS if text.is_the_originals else [],
            "train_targets": text.train_targets, "val_targets": text.val_targets,
        },
        search=search, measured=measured, claims=claims, published=published, runs=[dict(run) for run in runs],
    )  # fmt: skip
