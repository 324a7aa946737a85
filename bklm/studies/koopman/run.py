"""The Koopman study: does an auxiliary Koopman loss help, can blocks be linear operators, and who remembers how far?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm, readable_verdicts, require_one_process, train_arms, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, seeds_in_words, small_print
from bklm.harness.session import Session
from bklm.harness.statistics import FEWEST_SEEDS
from bklm.harness.step_times import step_times
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import LanguageModel
from bklm.studies.koopman import figures, models, tables
from bklm.studies.koopman.claims import TERMS, claims_table, operators_in_words, term_in_words
from bklm.studies.koopman.config import KoopmanConfig
from bklm.studies.koopman.measured import (
    RECALL_EPOCHS,
    ROUNDS,
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

SCORINGS = 5  # of the validation text after a training, those in windows together as much as one or two


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
            "speed": lambda: tables.readable_speed(self.linearised),
            "spectrum": lambda: tables.readable_spectrum(self.spectrum),
            "recall": lambda: tables.readable_recall(self.recall),
            "claims": lambda: self.claims,
        }
        parts = {"arms": "table", "speed": "linearised"}
        return {name: make for name, make in made.items() if getattr(self, parts.get(name, name))}

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
    # Beside every pass, a model is scored without its mixer, in windows, and as it is, in the end.
    scored = val_tokens * (1 + SCORINGS / config.epochs)
    arms, seeds = models.arms_of(config, 1), len(config.seeds)

    def run(name: str, trainings: int, arm: Arm) -> Run:
        return Run(
            (f"koopman {name}", config), lambda: arm.build(vocabulary), trainings * config.epochs, used, scored
        )

    runs = [run("none", _trainings(seeds, config.learning_rates), arms["none"])]
    if others := [arm for name, arm in arms.items() if name != "none"]:
        runs.append(run("term", sum(arm.seeds or seeds for arm in others), others[-1]))
    if config.parts in ("all", "linearise"):
        runs.append(run("tied", 1, models.tied(config)))
    spent = minutes(config, runs)
    if config.parts in ("all", "recall"):
        task, runs = recall_task(config), []
        tokens = task.sequences * task.seq_len * RECALL_EPOCHS
        trainings = _trainings(seeds, config.recall_rates)
        for name, build in models_of_equal_size(task, config.recall_width, config.recall_layers).items():
            build = lambda build=build: build(task.vocab_size)  # noqa: E731
            runs.append(Run((name, config), build, trainings, tokens, 0))
        spent += minutes(replace(config, seq_len=task.seq_len), runs)
    return spent


def _trainings(seeds: int, rates: tuple[float, ...]) -> int:
    """Of an arm whose rate is searched: the first seed's best one is not trained again."""
    return seeds + len(rates) - 1


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    steps = len(text.train_loader(seed=0))
    arms = models.arms_of(config, steps)
    if config.protocol == "original":
        require_one_process(study, "the published term fits its operator to the batches of one")
    whole, remember = config.parts in ("all", "linearise"), config.parts in ("all", "recall")
    task, rates = recall_task(config), config.recall_rates
    rivals = {
        n: Arm(b) for n, b in models_of_equal_size(task, config.recall_width, config.recall_layers).items()
    }
    seeds, tried = len(config.seeds), len(config.learning_rates)
    trials = sum(arm.seeds or seeds for arm in arms.values()) + whole + tried * (tried > 1)
    searched = len(rates) * (len(rates) > 1)
    at_recall = remember * len(rivals) * (seeds + searched) * RECALL_EPOCHS * len(task.train_loader(0))
    study.expect(steps * config.epochs * trials)
    found = {"arms": arms}
    measured = {
        "measure": models.measure(text, text.first_batch(SEQUENCES)[0], config.score_tokens),
        "needed": {"context_gain": float, "lifting": dict, "vocabulary": int, "windows": dict},
    }
    same = {"weight_decay": config.weight_decay, "clip": config.clip, "schedule": config.schedule}
    settings = TrainingSettings(config.epochs, **same)
    plain = train_arms(study, {"none": arms["none"]}, settings, rates=config.learning_rates, **measured)
    # A term is judged at the rate that is best without it.
    settings = replace(settings, learning_rate=plain[0]["learning_rate"])
    others = {name: arm for name, arm in arms.items() if name != "none"}
    found["trials"] = plain + (
        train_arms(study, others, settings, draw=lambda done: _draw(study, arms, plain + done), **measured)
        if others else []
    )  # fmt: skip
    ARMS.require_any(found["trials"])
    # An earlier moment of a run is a shorter training only where its rate does not fall.
    if "detached" in arms and config.schedule == "constant":
        found["steps"] = step_times(study, {name: arms[name] for name in ("none", _last_term(arms))}, ROUNDS)
    if whole:
        found["tied"] = train_arms(
            study, {"tied": models.tied(config)}, settings, name="tied",
            measure=lambda model: {"vocabulary": text.vocab_size}, needed={"vocabulary": int},
        )  # fmt: skip
    if remember:
        # Its steps are several times as short: counted from the start, they would be taken for hours.
        study.expect(study.progress.total + at_recall)
        found["recall"] = train_arms(
            study, rivals, TrainingSettings(RECALL_EPOCHS, learning_rate=rates[0], **same | {"weight_decay": 0.0}),
            text=task, rates=rates, name="recall", needed={"recall": dict},
            measure=lambda model: {"recall": accuracy_by_distance(model, task, config.distances)},
        )  # fmt: skip
    return found


def _last_term(arms: Mapping[str, Arm]) -> str:
    return [name for name in arms if name.startswith(TERMS)][-1]


def _judged(trials: list[Trial], arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    return verdicts(ARMS, trials, arms, any_of=sum(name.startswith(TERMS) for name in arms) or 1)


def _note(study: Session, trials: list[Trial], seeds: int | None = None, at_once: int = 1) -> str:
    config = study.config
    own = [f"{config.protocol} protocol", tables.rate_in_words(trials, config.learning_rates)]
    if at_once > 1:
        own.append(f"intervals for {at_once} at once")
    return small_print(
        study.text, seeds or len(config.seeds), *own, sees_the_future=config.protocol == "original"
    )


def _draw(study: Session, arms: Mapping[str, Arm], trials: list[Trial]) -> Path | None:
    if not ARMS.finished(trials):
        return None
    count = sum(arm.seeds or len(study.config.seeds) for arm in arms.values())
    title = f"{len(trials)} of {count} trials done{ARMS.diverged_in_short(trials)}"
    judged = _judged(trials, arms)
    note = _note(study, trials, at_once=judged[0]["any_of"] if judged else 1)
    return figures.draw_arms(study.folder / "arms.png", judged, title, note)


def _report(study: Session, found: dict[str, Any]) -> KoopmanResult:
    config, report, trials = study.config, Report(study), found["trials"]
    judged = _judged(trials, found["arms"])
    note = _note(study, trials, at_once=judged[0]["any_of"] if judged else 1)
    recalled, equal, steps, task = [], [], {}, recall_task(config)
    told = [tables.plain_in_words(trials, config.learning_rates)]
    if judged:
        told.append(term_in_words(judged))
        report.figure("arms.png", figures.draw_arms, judged, told[-1] or ARMS.headline(trials), note)
    if "steps" in found:
        ratio = [b / a for a, b in zip(*found["steps"].values(), strict=False)]
        equal = tables.at_equal_seconds(trials, ratio, judged[0]["any_of"])
    linearised, eigenvalues, shares = _operators(study, report, found, told)
    if RECALL.finished(found.get("recall", [])):
        recalled = tables.recall_rows(found["recall"])
        place = study.folder / "recall_steps.json"
        steps = kept_result(place, lambda: recall_steps(study), {"steps": dict})["steps"]
        pairs, seeds = f"{task.pairs} pair{'s' * (task.pairs > 1)}", len(config.seeds)
        small = f"{pairs}, {task.sequences:,} training sequences {RECALL_EPOCHS} times, {task.tested} at each distance; "
        small += f"{seeds_in_words(seeds, bars=seeds >= FEWEST_SEEDS)}, cut at 0 and 1."
        told.append(tables.recall_in_words(recalled, task.chance))
        report.figure("recall.png", figures.draw_recall, recalled, told[-1], task.longest, task.chance, small)
    unigram = study.text.baselines[0]["val_ppl"]
    claims = claims_table(
        judged, equal, trials, linearised, found.get("recall", []), steps, unigram, task.chance
    )
    files = {"verdicts": judged, "equal_seconds": equal, "linearised": linearised, "spectrum": eigenvalues,
             "recall": recalled, "claims": claims}  # fmt: skip
    for name, rows in files.items():
        report.csv(f"{name}.csv", rows)
    also = {name: found[name] for name in ("tied", "recall") if name in found}
    finding = " ".join(f"{words}." for words in told if words) + ARMS.diverged(trials)
    return report.finish(
        KoopmanResult, ARMS, trials, also=also, summary={"claims": claims, "verdicts": judged, "shares": shares},
        finding=finding, sees_the_future=config.protocol == "original", verdicts=judged, linearised=linearised,
        spectrum=eigenvalues, recall=recalled, claims=claims, shares=shares,
    )  # fmt: skip


def _operators(
    study: Session, report: Report, found: dict[str, Any], told: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]:
    """Rows of the replaced blocks, eigenvalues of the repeated one, and the shares that bound both, with their figures."""
    trials, folder = found["trials"], study.folder
    if "tied" not in found or not ARMS.groups(trials).get("none"):
        return [], [], None
    needed = {"scores": list, "times": dict, "outer_share": float}
    made = kept_result(folder / "linearised.json", lambda: linearise(study, trials), needed)
    linearised, eigenvalues = tables.linearised_rows(made["scores"], made["times"]), []
    told.append(operators_in_words(linearised, study.config.score_tokens))
    note = _note(study, trials, at_once=linearised[0]["any_of"])
    report.figure("linearised.png", figures.draw_linearised, linearised, told[-1], note)
    report.path("linearised.json")
    if RECALL.finished(found["tied"]):
        eigenvalues = kept_result(folder / "spectrum.json", lambda: spectrum_of(study), {"rows": list})["rows"]
        note = f"{_note(study, trials, 1)} This model's PPL: {found['tied'][0]['val_ppl']:.1f}. Residuals on held-out text; "
        note += "a conjugate pair counts as one, the constant not at all."
        told.append(tables.spectrum_in_words(eigenvalues))
        report.figure("spectrum.png", figures.draw_spectrum, eigenvalues, note)
    return linearised, eigenvalues, tables.shares_in_words(made["times"]["forward_"], made["outer_share"])
