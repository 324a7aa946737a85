"""The compression study: how few bytes keep a model's perplexity, against smaller models, counting and text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bklm.compression import load_compressed
from bklm.compression.calibration import first_batches
from bklm.compression.saving import is_compressed_file
from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm, readable_verdicts, train_arms
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session
from bklm.harness.study import run_study
from bklm.harness.text import StudyText, prepare_text
from bklm.models import LanguageModel
from bklm.studies.compression import figures, models, speed, tables
from bklm.studies.compression.claims import claims_table, judged
from bklm.studies.compression.config import CompressionConfig
from bklm.studies.compression.methods import KEYS, TORCH_AO, measure_methods, methods_of
from bklm.studies.compression.models import families
from bklm.studies.compression.tables import ARMS
from bklm.training.schedules import TrainingSettings

METHODS = 1 / 3  # of a training pass over the validation tokens, a method: it is scored


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
            "files": lambda: tables.readable_files(self.table),
            "verdicts": lambda: readable_verdicts(self.verdicts),
            "speed": lambda: tables.readable_speed(self.speed),
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
    runs, seeds = [], len(config.seeds)
    for family in families(config):
        made, count = (
            (lambda family=family: models.build(config, family, vocabulary)),
            len(methods_of(config, family)),
        )
        # A student costs its own step and the teacher's forward; a narrower model up to its width's share.
        sizes = [width for width, _ in models.smaller(config).values()]
        students = len(config.temperatures) + len(sizes) - len(config.widths)
        share = sum(sizes) + students * (config.widths[0] + METHODS)
        epochs = config.epochs * (1 + share * (family != models.EXPERTS))
        epochs += (4 + (family == "NewLLM")) * config.retrain_epochs * (family != models.EXPERTS)
        runs.append(Run((f"compression {family}", config), made, seeds * epochs, used, val_tokens))
        runs.append(Run((f"compression {family}", config), made, seeds * count, 0, val_tokens))
    return minutes(config, runs)


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    steps = len(text.train_loader(seed=0))
    arms = {
        "trials": models.first_arms(config),
        "retrained": models.retrained_arms(config, study.folder, steps * config.retrain_epochs),
        "students": models.student_arms(config, study.folder),
    }
    passes = {"trials": config.epochs, "retrained": config.retrain_epochs, "students": config.epochs}
    study.expect(steps * len(config.seeds) * sum(len(arms[name]) * passes[name] for name in arms))
    found: dict[str, Any] = {"arms": {}}
    for name, some in arms.items():
        settings = TrainingSettings(
            passes[name], learning_rate=config.retrain_rate if name == "retrained" else config.learning_rate,
            weight_decay=config.weight_decay, clip=config.clip, schedule=config.schedule,
        )  # fmt: skip
        found[name] = train_arms(
            study, some, settings, name=name, measure=models.measured(study), needed=models.NEEDED
        )
        if name == "trials":
            # What is left goes on from these; where one is lost, so is what would.
            ARMS.require_any([t for t in found[name] if t["arm"] in families(config)])
        found["arms"] |= some
    found["methods"] = study.grid(
        {"arm": families(config), "seed": config.seeds},
        lambda place, arm, seed: study.trial(
            place, {"arm": arm, "seed": seed}, 0, lambda folder: measure_methods(study, arm, seed), KEYS
        ),
        name="methods",
        across_machines=False,
    )
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
        known = {models.INT8: lambda m, text: models.quantise(m)} | methods_of(
            config, models.family_of(source), seed
        )
        batches = first_batches(study.text.train_loader(seed=0), config.calibration_tokens)
        models.keep(study.folder, arm, known[method](model, batches))
    return True


def _report(study: Session, found: dict[str, Any]) -> CompressionResult:
    config, report = study.config, Report(study)
    files = tables.flat([*found["trials"], *found["retrained"], *found["students"]], found["methods"])
    rows = tables.file_rows(files)
    arms: dict[str, Arm] = found["arms"]
    judged_rows = judged(files, arms)
    made = kept_result(
        study.folder / "speed.json", lambda: speed.speeds(study, found["trials"]), {"models": dict}
    )
    timed = made["models"]
    counted = kept_result(study.folder / "counted.json", lambda: speed.counted(study), {"rows": list})["rows"]
    speeds, shares = tables.speed_rows(timed, rows), tables.shares_of(timed)
    for family in families(config):
        _is_kept(study, f"{family}: {models.INT8}")
    chosen = tables.recommended(rows, lambda arm: _is_kept(study, arm))
    finding = tables.recommended_in_words(chosen)
    claims = claims_table(rows, judged_rows, shares)
    note = small_print(
        study.text, len(config.seeds), f"above {figures.WORST:g} times float's PPL nothing is drawn"
    )
    report.figure("files.png", figures.draw_files, rows, counted, tables.headline(chosen), note)
    rows_at_once = min(speed.SEQUENCES, config.batch_size)
    own = f"One CPU, in turns; one seed's models; batch {rows_at_once} x {study.text.seq_len}."
    report.figure("speed.png", figures.draw_speed, speeds, tables.speed_headline(speeds), own)
    for name, part in (
        ("recommended", chosen), ("verdicts", judged_rows), ("speed", speeds), ("shares", shares), ("counted", counted),
        ("claims", claims),
    ):  # fmt: skip
        report.csv(f"{name}.csv", part)
    for name in ("speed.json", "counted.json"):
        report.path(name)
    told = tables.shares_in_words(shares)
    return report.finish(
        CompressionResult, ARMS, files, also={"methods": found["methods"]}, rows=rows, finding=finding,
        summary={"claims": claims, "verdicts": judged_rows, "recommended": chosen, "speed": speeds, "shares": told,
                 "counted": counted},
        recommended=chosen, verdicts=judged_rows, speed=speeds, claims=claims, counted=counted, shares=told,
    )  # fmt: skip
