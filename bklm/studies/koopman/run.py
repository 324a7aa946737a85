"""The Koopman study: does an auxiliary Koopman loss help, can blocks be linear operators, and who remembers how far?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm, readable_verdicts, require_one_process, train_arms, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, seeds_in_words, small_print
from bklm.harness.session import Session
from bklm.harness.statistics import FEWEST_SEEDS
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import LanguageModel
from bklm.studies.koopman import figures, models, tables
from bklm.studies.koopman.claims import claims_table, operators_in_words, term_in_words
from bklm.studies.koopman.config import KoopmanConfig
from bklm.studies.koopman.measured import (
    RECALL_EPOCHS,
    SEQUENCES,
    linearise,
    load_model,
    recall_steps,
    recall_task,
    spectrum_of,
)
from bklm.studies.koopman.tables import ARMS, RECALL
from bklm.training.recall import accuracy_by_distance, models_of_equal_size
from bklm.training.schedules import TrainingSettings


@dataclass(frozen=True)
class KoopmanResult(StudyResult):
    """What ``run_koopman`` found: ``table`` holds one row per arm of the auxiliary loss; the other parts may be empty."""

    spoken = ("finding", "shares")

    verdicts: list[dict[str, Any]]
    linearised: list[dict[str, Any]]
    spectrum: list[dict[str, Any]]
    recall: list[dict[str, Any]]
    claims: list[dict[str, str]]
    shares: str | None

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "arms": lambda: ARMS.readable(self.table),
            "verdicts": lambda: readable_verdicts(self.verdicts),
            "linearised": lambda: tables.readable_linearised(self.linearised),
            "recall": lambda: tables.readable_recall(self.recall),
            "claims": lambda: self.claims,
        }
        return {name: make for name, make in made.items() if name == "arms" or getattr(self, name)}

    def load(self, model: str | None = None) -> LanguageModel:
        """The plain model of the first seed; with "tied" the one of a block at every depth."""
        if model not in (None, "none", "tied"):
            raise ValueError(f"model: got {model!r}; kept are 'none', the plain one, and 'tied'.")
        return load_model(self.folder, self.config, model or "none", self.config.seeds[0])


def run_koopman(
    config: KoopmanConfig, on_figure: Callable[[Path], None] | None = None, text: StudyText | None = None
) -> KoopmanResult | None:
    """Run the study; everything goes to ``<output_dir>/koopman`` and its zip. See ``bklm.harness.study.run_study``."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: KoopmanConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    vocabulary, train_tokens, val_tokens = text_size(
        config.dataset, config.data_dir, config.vocab_size, config.tokenizer
    )
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    arms, epochs = models.arms_of(config, 1), len(config.seeds) * config.epochs
    runs = [Run(("koopman none", config), lambda: arms["none"].build(vocabulary), epochs, used, val_tokens)]
    if len(arms) > 1:
        with_term = list(arms)[-1]
        many = (len(arms) - 1) * epochs
        runs.append(Run(("koopman", config), lambda: arms[with_term].build(vocabulary), many, used, val_tokens))
    if config.parts in ("all", "linearise"):
        tied = models.tied(config)
        runs.append(Run(("koopman tied", config), lambda: tied.build(vocabulary), epochs, used, val_tokens))
    if config.parts in ("all", "recall"):
        task = recall_task(config)
        tokens = task.sequences * task.seq_len * RECALL_EPOCHS
        trainings = len(config.seeds) + len(config.recall_rates) * (len(config.recall_rates) > 1)
        for name, build in models_of_equal_size(task, config.recall_width, config.recall_layers).items():
            build = lambda build=build: build(task.vocab_size)  # noqa: E731
            runs.append(Run((name, config), build, trainings, tokens, 0))
    return minutes(config, runs)


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    steps = len(text.train_loader(seed=0))
    arms = models.arms_of(config, steps)
    if config.protocol == "original":
        require_one_process(study, "the published term fits its operator to the batches of one")
    replace, remember = config.parts in ("all", "linearise"), config.parts in ("all", "recall")
    same = {"weight_decay": config.weight_decay, "clip": config.clip, "schedule": config.schedule}
    settings = TrainingSettings(config.epochs, learning_rate=config.learning_rate, **same)
    task, rates = recall_task(config), config.recall_rates
    rivals = {
        n: Arm(b) for n, b in models_of_equal_size(task, config.recall_width, config.recall_layers).items()
    }
    seeds = len(config.seeds)
    expected = steps * config.epochs * seeds * (len(arms) + replace)
    searched = len(rates) if len(rates) > 1 else 0
    study.expect(
        expected + remember * len(rivals) * (seeds + searched) * RECALL_EPOCHS * len(task.train_loader(0))
    )
    ids = text.first_batch(SEQUENCES)[0]
    own = models.measure(text, ids)
    found = {
        "arms": arms,
        "trials": train_arms(
            study, arms, settings, measure=lambda model: {"vocabulary": text.vocab_size, **own(model)},
            needed={"context_gain": float, "lifting": dict, "vocabulary": int}, draw=lambda done: _draw(study, arms, done),
        ),
    }  # fmt: skip
    ARMS.require_any(found["trials"])
    if replace:
        found["tied"] = train_arms(
            study, {"tied": models.tied(config)}, settings, name="tied",
            measure=lambda model: {"vocabulary": text.vocab_size}, needed={"vocabulary": int},
        )  # fmt: skip
    if remember:
        found["recall"] = train_arms(
            study, rivals, TrainingSettings(RECALL_EPOCHS, learning_rate=rates[0], **same | {"weight_decay": 0.0}),
            text=task, rates=rates, name="recall", needed={"recall": dict},
            measure=lambda model: {"recall": accuracy_by_distance(model, task, config.distances)},
        )  # fmt: skip
    return found


def _note(study: Session, seeds: int | None = None) -> str:
    config = study.config
    own = (f"{config.protocol} protocol", f"learning rate {config.learning_rate:g} for all")
    return small_print(
        study.text, seeds or len(config.seeds), *own, sees_the_future=config.protocol == "original"
    )


def _draw(study: Session, arms: Mapping[str, Arm], trials: list[Trial]) -> Path | None:
    if not ARMS.finished(trials):
        return None
    title = (
        f"{len(trials)} of {len(arms) * len(study.config.seeds)} trials done{ARMS.diverged_in_short(trials)}"
    )
    return figures.draw_arms(study.folder / "arms.png", verdicts(ARMS, trials, arms), title, _note(study))


def _report(study: Session, found: dict[str, Any]) -> KoopmanResult:
    config, report, trials = study.config, Report(study), found["trials"]
    judged, note = verdicts(ARMS, trials, found["arms"]), _note(study)
    linearised, eigenvalues, recalled, shares, steps, told = [], [], [], None, {}, []
    if judged:
        told.append(term_in_words(judged))
        report.figure("arms.png", figures.draw_arms, judged, told[0] or ARMS.headline(trials), note)
    if "tied" in found and ARMS.groups(trials).get("none"):
        place, needed = study.folder / "linearised.json", {"scores": list, "times": dict, "outer_share": float}
        made = kept_result(place, lambda: linearise(study, trials), needed)
        linearised = tables.linearised_rows(made["scores"], made["times"])
        shares = tables.shares_in_words(made["times"], made["outer_share"])
        told.append(operators_in_words(linearised))
        report.figure("linearised.png", figures.draw_linearised, linearised, told[-1], note)
        report.path("linearised.json")
        if any(t["val_ppl"] is not None and t["seed"] == config.seeds[0] for t in found["tied"]):
            eigenvalues = kept_result(
                study.folder / "spectrum.json", lambda: spectrum_of(study), {"rows": list}
            )["rows"]
            reached = next(t["val_ppl"] for t in found["tied"] if t["seed"] == config.seeds[0])
            tied_note = f"{_note(study, 1)} This model's PPL: {reached:.1f}."
            report.figure("spectrum.png", figures.draw_spectrum, eigenvalues, tied_note)
    if RECALL.finished(found.get("recall", [])):
        recalled = tables.recall_rows(found["recall"])
        place = study.folder / "recall_steps.json"
        steps = kept_result(place, lambda: recall_steps(study), {"steps": dict})["steps"]
        task = recall_task(config)
        pairs, seeds = f"{task.pairs} pair{'s' * (task.pairs > 1)}", len(config.seeds)
        small = f"{pairs}, {task.sequences:,} training sequences {RECALL_EPOCHS} times, {task.tested} at each distance; "
        small += f"{seeds_in_words(seeds, bars=seeds >= FEWEST_SEEDS)}."
        told.append(tables.recall_in_words(recalled))
        report.figure("recall.png", figures.draw_recall, recalled, told[-1], task.longest, task.chance, small)
    files = {"verdicts": judged, "linearised": linearised, "spectrum": eigenvalues, "recall": recalled}
    for name, rows in files.items():
        report.csv(f"{name}.csv", rows)
    unigram = study.text.baselines[0]["val_ppl"]
    claims = claims_table(judged, trials, linearised, found.get("recall", []), steps, unigram)
    also = {name: found[name] for name in ("tied", "recall") if name in found}
    finding = " ".join([ARMS.finding(trials), *(f"{words}." for words in told if words)])
    return report.finish(
        KoopmanResult, ARMS, trials, also=also, summary={"claims": claims, "verdicts": judged, "shares": shares},
        finding=finding, sees_the_future=config.protocol == "original", verdicts=judged, linearised=linearised,
        spectrum=eigenvalues, recall=recalled, claims=claims, shares=shares,
    )  # fmt: skip
