"""The compression study: how few bytes keep a model's perplexity, against smaller models, counting and text alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bklm.compression import load_compressed
from bklm.compression.calibration import first_batches
from bklm.compression.saving import is_compressed_file
from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm, readable_verdicts, train_arms
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.folder import INTERNALS
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import LanguageModel
from bklm.studies.compression import figures, models, speed, tables, timed
from bklm.studies.compression.claims import claims_table, judged
from bklm.studies.compression.config import CompressionConfig
from bklm.studies.compression.methods import KEYS, TORCH_AO, measure, methods_of, sources
from bklm.studies.compression.models import families
from bklm.studies.compression.tables import ARMS
from bklm.training.schedules import TrainingSettings

TEACHER = 1 / 3  # of a training step: a forward pass
SCORING = 1.0  # of a training pass over the validation tokens: forward, softmax, accuracy, and some for the gain from context


@dataclass(frozen=True)
class CompressionResult(StudyResult):
    """What ``run_compression`` found: ``table`` holds one row per file, ``recommended`` the smallest ones within bounds."""

    spoken = ("shares", "finding")

    recommended: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]
    speed: list[dict[str, Any]]
    claims: list[dict[str, str]]
    counted: list[dict[str, Any]]
    shares: str

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "recommended": lambda: tables.readable_recommended(self.recommended),
            "files": lambda: tables.readable_files(self.table, self.counted),
            "verdicts": lambda: readable_verdicts(self.verdicts),
            "speed": lambda: timed.readable_speed(self.speed),
            "claims": lambda: self.claims,
        }
        return {name: make for name, make in made.items() if name in ("files", "claims") or getattr(self, name)}

    def load(self, model: str | None = None) -> LanguageModel:
        """A model of one seed: a trained one by its arm's name, or a kept file's: int8, retrained, recommended."""
        firsts = {
            arm: models.kept_seed(self.folder, self.config, arm) for arm in models.first_arms(self.config)
        }
        trained = {arm: seed for arm, seed in firsts.items() if seed is not None}
        chosen = model or next(f for f in families(self.config) if f in trained)
        if chosen in trained:
            return models.load_model(self.folder, self.config, chosen, trained[chosen])
        place = models.place_of(self.folder, chosen)
        if not place.exists():
            files = {models.place_of(self.folder, r["arm"]): r["arm"] for r in self.table}
            kept = [*trained, *(arm for file, arm in files.items() if file.exists())]
            raise ValueError(f"model: got {model!r}; kept are {', '.join(map(repr, kept))}.")
        return load_compressed(place)


def run_compression(
    config: CompressionConfig, on_figure: Callable[[Path], None] | None = None, text: StudyText | None = None
) -> CompressionResult | None:
    """Run the study; everything goes to ``<output_dir>/compression`` and its zip. See ``bklm.harness.study.run_study``."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: CompressionConfig) -> float:
    """Minutes that a resolved config's trainings and scorings take here."""
    vocabulary, train_tokens, val_tokens = text_size(
        config.dataset, config.data_dir, config.vocab_size, config.tokenizer
    )
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    seeds, runs = len(config.seeds), []
    first, again = seeds + _extra(config.learning_rates), seeds + _extra(config.retrain_rates)
    done = {name: len(methods_of(config, name, Path())) for name in sources(config)}
    for family in families(config):
        made = functools.partial(models.build, config, family, vocabulary)
        # A narrower model costs up to its width's share, a student the teacher's forward as well.
        sizes = {name: size.get("width", 1.0) for name, size in models.smaller(config, family).items()}
        epochs = config.epochs * first * (1 + sum(sizes.values()))
        scored = seeds * (done[family] + sum(w * done[f"{family}, {name}"] for name, w in sizes.items()))
        if family != models.EXPERTS:
            students = len(config.temperatures) + (config.n_layers > 1 and family != "NewLLM")
            epochs += config.epochs * first * students * (config.widths[0] + TEACHER)
            epochs += config.retrain_epochs * again * (5 + config.widths[0] + 2 * (family != "NewLLM"))
        name = (f"compression {family}", config)
        runs += [Run(name, made, epochs, used, val_tokens), Run(name, made, scored, SCORING * val_tokens, 0)]
    return minutes(config, runs)


def _extra(rates: Sequence[float]) -> int:
    """Trainings of a search that are not gone on with."""
    return len(rates) - 1


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    steps = len(text.train_loader(seed=0))
    # What is done to a model is scored, which counts as so many steps.
    scoring = max(1, round(SCORING * len(text.val_loader())))
    done = {name: list(methods_of(config, name, study.folder)) for name in sources(config)}
    parts = (
        ("trials", models.first_arms(config), config.epochs, config.learning_rates),
        ("retrained", models.retrained_arms(config, study.folder, steps * config.retrain_epochs),
         config.retrain_epochs, config.retrain_rates),
        ("students", models.student_arms(config, study.folder), config.epochs, config.learning_rates),
    )  # fmt: skip
    trained = sum(
        len(arms) * epochs * (len(config.seeds) + len(rates) * (len(rates) > 1))
        for _, arms, epochs, rates in parts
    )
    study.expect(steps * trained + scoring * len(config.seeds) * sum(map(len, done.values())))
    found: dict[str, Any] = {"arms": {}, "methods": []}
    for name, arms, epochs, rates in parts:
        settings = TrainingSettings(
            epochs,
            learning_rate=rates[0],
            weight_decay=config.weight_decay,
            clip=config.clip,
            schedule=config.schedule,
        )
        found[name] = train_arms(
            study, arms, settings, rates=rates if len(rates) > 1 else (), name=name, measure=models.measured(study),
            needed=models.NEEDED,
        )  # fmt: skip
        if name == "trials":
            # What is left goes on from these; where one is lost, so is what would.
            ARMS.require_any([t for t in found[name] if t["arm"] in families(config)])
        found["arms"] |= arms
    lost = {(t["arm"], t["seed"]) for t in found["trials"] if t["val_ppl"] is None}
    for source, names in done.items():
        seeds = [seed for seed in config.seeds if (source, seed) not in lost]
        study.progress.skip(scoring * len(names) * (len(config.seeds) - len(seeds)))

        def trial(place: str, seed: int, method: str, source: str = source) -> dict[str, Any]:
            def work(folder: Path) -> dict[str, Any]:
                made = measure(study, source, method, seed)
                study.progress.step(scoring)
                return made

            return study.trial(place, {"arm": source, "method": method, "seed": seed}, scoring, work, KEYS)

        factors, name = {"seed": seeds, "method": names}, f"{INTERNALS}/methods/{models.in_name(source)}"
        found["methods"] += study.grid(factors, trial, name=name, across_machines=False)
    return found


def _is_kept(study: Session, arm: str) -> bool:
    """Whether a file of an arm is in the results: since it was trained, or made now of one seed's model."""
    config, (source, _, method) = study.config, arm.partition(": ")
    if is_compressed_file(models.place_of(study.folder, arm)):
        return True
    seed = models.kept_seed(study.folder, config, source) if source in models.first_arms(config) else None
    # PyTorch's own int8 copy has a file of another kind, which load_compressed does not read.
    if seed is None or method == TORCH_AO:
        return False
    if method:
        model = models.load_model(study.folder, config, source, seed)
        known = {models.INT8: lambda m, text: models.quantise(m)}
        known |= methods_of(config, source, study.folder, seed) if source in sources(config) else {}
        batches = first_batches(study.text.train_loader(seed=0), config.calibration_tokens)
        models.keep(study.folder, arm, known[method](model, batches))
    return True


def _report(study: Session, found: dict[str, Any]) -> CompressionResult:
    config, report = study.config, Report(study)
    files = tables.flat([*found["trials"], *found["retrained"], *found["students"]], found["methods"])
    unigram = study.text.baselines[0]["val_ppl"]
    rows = tables.file_rows(files, unigram)
    arms: dict[str, Arm] = found["arms"]
    judged_rows = judged(files, arms, unigram)
    made = kept_result(
        study.folder / "speed.json", lambda: speed.speeds(study, found["trials"]), {"models": dict}
    )
    counted = kept_result(study.folder / "counted.json", lambda: speed.counted(study), {"rows": list})["rows"]
    speeds, shares = timed.speed_rows(made["models"], rows), timed.shares_of(made["models"])
    for family in families(config):
        _is_kept(study, f"{family}: {models.INT8}")
    chosen = tables.recommended(rows, lambda arm: _is_kept(study, arm))
    finding = tables.finding_in_words(rows, chosen, counted, unigram)
    claims = claims_table(rows, judged_rows, shares, speeds, counted)
    note = small_print(study.text, len(config.seeds), "what is far above both lines is not drawn")
    title = tables.files_title(chosen, rows, families(config)[0], study.text.baselines)
    report.figure("files.png", figures.draw_files, rows, counted, chosen, unigram, title, note)
    rows_at_once = min(speed.SEQUENCES, config.batch_size)
    own = f"One CPU, in turns; one seed's models; batch {rows_at_once} x {study.text.seq_len}."
    report.figure("speed.png", figures.draw_speed, speeds, timed.speed_headline(speeds), own)
    for name, part in (
        ("recommended", chosen), ("verdicts", judged_rows), ("speed", speeds), ("shares", shares), ("counted", counted),
        ("claims", claims),
    ):  # fmt: skip
        report.csv(f"{name}.csv", part)
    for name in ("speed.json", "counted.json"):
        report.path(name)
    told = timed.shares_in_words(shares)
    return report.finish(
        CompressionResult, ARMS, files, rows=rows, finding=finding,
        summary={"claims": claims, "verdicts": judged_rows, "recommended": chosen, "speed": speeds, "shares": told,
                 "counted": counted},
        recommended=chosen, verdicts=judged_rows, speed=speeds, claims=claims, counted=counted, shares=told,
    )  # fmt: skip
