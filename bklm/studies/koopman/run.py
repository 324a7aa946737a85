"""The Koopman study: does an auxiliary Koopman loss help, can blocks be linear operators, and who remembers how far?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bklm.data.recall import Recall
from bklm.files.atomic import read_result, write_json
from bklm.harness import measure as timing
from bklm.harness.arms import WEIGHTS, Arm, train_arms, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import LanguageModel
from bklm.models.koopman import Dictionary, spectrum
from bklm.studies.koopman import figures, models, tables
from bklm.studies.koopman.claims import claims_table
from bklm.studies.koopman.config import KoopmanConfig
from bklm.studies.koopman.tables import ARMS, RECALL
from bklm.training.linearise import collect_states, fit_blocks, score_blocks
from bklm.training.recall import accuracy_by_distance, models_of_equal_size
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import load_weights

RECALL_EPOCHS = 4
ROUNDS, SECONDS = 21, 5.0  # of timing, an arm
SEQUENCES = 32  # that a lifting is described on, and a block is timed on


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
            "verdicts": lambda: tables.readable_verdicts(self.verdicts),
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
    vocabulary, train_tokens, val_tokens = text_size(config.dataset, config.data_dir, config.vocab_size)
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    arms, epochs = models.arms_of(config, 1), len(config.seeds) * config.epochs
    runs = [Run(("koopman none", config), lambda: arms["none"].build(vocabulary), epochs, used, val_tokens)]
    if len(arms) > 1:
        with_term = list(arms)[2]
        many = (len(arms) - 1) * epochs
        runs.append(Run(("koopman", config), lambda: arms[with_term].build(vocabulary), many, used, val_tokens))
    if config.parts in ("all", "recall"):
        task = _task(config)
        tokens = task.sequences * task.seq_len * RECALL_EPOCHS
        trainings = len(config.seeds) + len(config.recall_rates) * (len(config.recall_rates) > 1)
        for name, build in models_of_equal_size(task, config.recall_width, config.recall_layers).items():
            build = lambda build=build: build(task.vocab_size)  # noqa: E731
            runs.append(Run((name, config), build, trainings, tokens, 0))
    return minutes(config, runs)


def load_model(folder: Path, config: KoopmanConfig, arm: str, seed: int) -> LanguageModel:
    """A trained model of the arm "none" or "tied"; on the CPU, in evaluation mode."""
    place = Path(folder) / {"none": "trials", "tied": "tied"}[arm] / f"arm_{arm}_seed_{seed}"
    record = read_result(place / "result.json", {"vocabulary": int})
    if record is None or not (place / WEIGHTS).exists():
        raise FileNotFoundError(f"{place} holds no finished model; run the study (again) to its end first.")
    made = models.tied(config) if arm == "tied" else models.arms_of(config, 1)["none"]
    model = made.build(record["vocabulary"])
    load_weights(model, place / WEIGHTS)
    return model.eval()


def _task(config: KoopmanConfig) -> Recall:
    batches = -(-config.recall_steps // RECALL_EPOCHS)
    return Recall(batches * config.batch_size, config.batch_size, config.trained_distance, config.recall_pairs)


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    steps = len(text.train_loader(seed=0))
    arms = models.arms_of(config, steps)
    linearise, remember = config.parts in ("all", "linearise"), config.parts in ("all", "recall")
    same = {"weight_decay": config.weight_decay, "clip": config.clip, "schedule": config.schedule}
    settings = TrainingSettings(config.epochs, learning_rate=config.learning_rate, **same)
    task, rates = _task(config), config.recall_rates
    rivals = {
        n: Arm(b) for n, b in models_of_equal_size(task, config.recall_width, config.recall_layers).items()
    }
    seeds = len(config.seeds)
    expected = steps * config.epochs * seeds * (len(arms) + linearise)
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
    if linearise:
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


def _measured(
    study: Session, name: str, make: Callable[[], dict[str, Any]], keys: Mapping[str, Any]
) -> dict[str, Any]:
    """What an earlier run left in a file of the study's folder, or what is measured now."""
    found = read_result(study.folder / name, keys)
    if found is None:
        found = make()
        write_json(study.folder / name, found)
    return found


def _linearise(study: Session, trials: list[Trial]) -> dict[str, Any]:
    """Blocks of every plain model replaced; times of the first one's, and what share of scoring and parameters blocks are."""
    config, text, scores = study.config, study.text, []
    device = study.accelerator.device
    few = -(-config.fit_positions // (text.seq_len * text.batch_size))
    batches = list(itertools.islice(iter(text.train_loader(seed=0)), few))
    held_out, found = text.search_val_loader(config.score_tokens), {}
    for trial in ARMS.groups(trials).get("none", []):
        model = load_model(study.folder, config, "none", trial["seed"]).to(device)
        states = collect_states(model, batches, config.fit_positions)
        fitted = fit_blocks(
            states, units=config.units, taps=config.delays, rank=config.rank or None, seed=trial["seed"]
        )
        scores.append(score_blocks(model, fitted, batches, held_out, config.fit_positions))
        if not found:
            x, ids = states[0][:SEQUENCES], batches[0][0][:SEQUENCES].to(device)
            stand_ins = {kind: blocks[0] for kind, blocks in fitted.items() if kind != "skip"}
            calls = {name: (block, x) for name, block in ({"original": model.blocks[0]} | stand_ins).items()}
            calls |= {"whole": (model, ids), "blocks": (torch.nn.Sequential(*map(_First, model.blocks)), x)}
            timed = {name: timing.Arm(_call(*given)) for name, given in calls.items()}
            found["times"] = _seconds(timed, device.type)
            outer = sum(p.numel() for p in {*model.embedding.parameters(), model.head()[0]})
            found["outer_share"] = outer / model.num_parameters()
    return found | {"scores": scores}


class _First(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)[0]


def _call(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def _seconds(arms: Mapping[str, timing.Arm], device: str) -> dict[str, list[float]]:
    return {name: cell["total"] for name, cell in timing.time_arms(arms, ROUNDS, SECONDS, device).items()}


def _spectrum(study: Session) -> dict[str, Any]:
    """The repeated block's eigenvalues, over pairs of states of all depths of the first seed's model."""
    config, text = study.config, study.text
    model = load_model(study.folder, config, "tied", config.seeds[0]).to(study.accelerator.device)
    states = collect_states(model, text.train_loader(seed=0), config.fit_positions)
    sample = torch.cat([x.flatten(0, 1) for x in states[:-1]])
    dictionary = Dictionary(sample, 1, config.units)
    lifted = [dictionary(x).flatten(0, 1) for x in states]
    found = spectrum(torch.cat(lifted[:-1]), torch.cat(lifted[1:]))
    pairs = zip(found.eigenvalues.tolist(), found.residuals.tolist(), strict=True)
    return {"rows": [{"real": v.real, "imaginary": v.imag, "modulus": abs(v), "residual": r} for v, r in pairs]}


def _recall_steps(study: Session) -> dict[str, Any]:
    """Seconds of training steps of the recall models, in turns."""
    config, device = study.config, study.accelerator.device
    task = _task(config)
    x, y = next(iter(task.train_loader(0)))
    x, y = x.to(device), y.to(device)

    def step(model: LanguageModel) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.to(device).parameters(), fused=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            model.loss(x, y).backward()
            optimizer.step()

        return run

    rivals = models_of_equal_size(task, config.recall_width, config.recall_layers)
    with torch.random.fork_rng():
        arms = {name: timing.Arm(step(build(task.vocab_size))) for name, build in rivals.items()}
        return {"steps": _seconds(arms, device.type)}


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
    if judged:
        report.figure("arms.png", figures.draw_arms, judged, ARMS.headline(trials), note)
    linearised, eigenvalues, recalled, shares, steps = [], [], [], None, {}
    if "tied" in found and ARMS.groups(trials).get("none"):
        made = _measured(
            study, "linearised.json", lambda: _linearise(study, trials), {"scores": list, "times": dict}
        )
        linearised = tables.linearised_rows(made["scores"], made["times"])
        shares = tables.shares_in_words(made["times"], made["outer_share"])
        report.figure("linearised.png", figures.draw_linearised, linearised, note)
        report.path("linearised.json")
        if any(t["val_ppl"] is not None and t["seed"] == config.seeds[0] for t in found["tied"]):
            eigenvalues = _measured(study, "spectrum.json", lambda: _spectrum(study), {"rows": list})["rows"]
            reached = next(t["val_ppl"] for t in found["tied"] if t["seed"] == config.seeds[0])
            tied_note = f"{_note(study, 1)} This model's PPL: {reached:.1f}."
            report.figure("spectrum.png", figures.draw_spectrum, eigenvalues, tied_note)
    if RECALL.finished(found.get("recall", [])):
        recalled = tables.recall_rows(found["recall"])
        steps = _measured(study, "recall_steps.json", lambda: _recall_steps(study), {"steps": dict})["steps"]
        task = _task(config)
        small = f"{task.pairs} pairs, {task.sequences * RECALL_EPOCHS:,} training sequences, {task.tested} at each distance"
        seeds = (
            f"{len(config.seeds)} seeds, bars: 95% interval" if len(config.seeds) > 1 else "1 seed, no interval"
        )
        report.figure(
            "recall.png", figures.draw_recall, recalled, task.longest, task.chance, f"{small}; {seeds}."
        )
    for name, rows in (
        ("verdicts", judged),
        ("linearised", linearised),
        ("spectrum", eigenvalues),
        ("recall", recalled),
    ):
        report.csv(f"{name}.csv", rows)
    unigram = study.text.baselines[0]["val_ppl"]
    claims = claims_table(judged, trials, linearised, found.get("recall", []), steps, unigram)
    also = {name: found[name] for name in ("tied", "recall") if name in found}
    return report.finish(
        KoopmanResult, ARMS, trials, also=also, summary={"claims": claims, "verdicts": judged, "shares": shares},
        sees_the_future=config.protocol == "original", verdicts=judged, linearised=linearised, spectrum=eigenvalues,
        recall=recalled, claims=claims, shares=shares,
    )  # fmt: skip
