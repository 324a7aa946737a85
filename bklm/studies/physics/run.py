"""The physics study: energies as a term of the loss, blocks that conserve one, and what either brings in speed, stability
and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bklm.files.atomic import kept_result, read_result
from bklm.harness.arms import WEIGHTS, Arm, readable_verdicts, require_one_process, train_arms, verdicts
from bklm.harness.comparison import Trial, not_beaten_in_short
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.folder import INTERNALS
from bklm.harness.measure import MemoryMeter
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session, place_of
from bklm.harness.study import run_study
from bklm.harness.text import prepare_text as prepare_plain_text
from bklm.models import LanguageModel
from bklm.studies.physics import figures, models, tables
from bklm.studies.physics.config import PhysicsConfig
from bklm.studies.physics.models import PhysicsText
from bklm.studies.physics.tables import BLOCKS, LOSSES
from bklm.training.auxiliary import without_term
from bklm.training.energy_drift import compare_forces
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import load_weights

NEEDED = {"vocabulary": int, "context_gain": float, "embedding_norm": float, "energy": dict}
MEMORY_BATCH, MEMORY_WIDTH, MEMORY_LENGTH = 16, 64, 128
PARTS = {"losses": "loss", "blocks": "blocks"}


@dataclass(frozen=True)
class PhysicsResult(StudyResult):
    """What ``run_physics`` found: ``table`` holds one row per arm; the other parts may be empty."""

    parts: dict[str, list[dict[str, Any]]]
    claims: list[dict[str, str]]

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "arms": lambda: LOSSES.readable(self.table),
            "verdicts": lambda: readable_verdicts(self.parts["verdicts"]),
            "energies": lambda: tables.readable_energies(self.parts["energies"]),
            "steps": lambda: tables.readable_steps(self.parts["steps"]),
            "stability": lambda: tables.readable_stability(self.parts["stability"]),
            "memory": lambda: tables.readable_memory(self.parts["memory"]),
            "claims": lambda: self.claims,
        }
        return {n: make for n, make in made.items() if n in ("arms", "claims") or self.parts[n]}

    def load(self, model: str | None = None) -> LanguageModel:
        """An arm's model of the first seed without its term, the best arm's when none is named; on the CPU, evaluating."""
        return load_model(self.folder, self.config, model or self.best)


def run_physics(
    config: PhysicsConfig, on_figure: Callable[[Path], None] | None = None, text: PhysicsText | None = None
) -> PhysicsResult | None:
    """Run the study; everything goes to ``<output_dir>/physics`` and its zip. See ``bklm.harness.study.run_study``."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def prepare_text(config: PhysicsConfig) -> PhysicsText:
    """The text of a resolved config. Errors as ``bklm.harness.text.prepare_text``, and more pieces than a pass has batches."""
    found = prepare_plain_text(config)
    own = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    text = PhysicsText(**own, pieces=config.pieces)
    for part in (text, text.first(config.stable_tokens)):
        part.train_loader(0)
    return text


def estimated_minutes(config: PhysicsConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    vocabulary, train_tokens, val_tokens = text_size(
        config.dataset, config.data_dir, config.vocab_size, config.tokenizer
    )
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    seeds, rates = len(config.seeds), len(config.learning_rates)
    both = {"plain": 0.0, "leapfrog": 0.0}
    if config.parts != "blocks":
        decays = len(config.decays) * (config.protocol == "corrected")
        both["plain"] += seeds * config.epochs * (len(models.loss_arms(config, 1)) + decays)
    if config.parts != "loss":
        each = config.epochs * (seeds + (rates if rates > 1 else 0))
        grid = seeds * len(config.stable_rates) * min(1.0, (config.stable_tokens or used) / used)
        both["plain"] += 2 * each + 4 * grid
        both["leapfrog"] += 3 * each + 2 * grid
    builds = {"plain": models.plain(config), "leapfrog": models.conservative(config)}
    pieces = dict.fromkeys(builds, val_tokens * config.pieces)
    return minutes(config, [
        Run((name, config), lambda name=name: builds[name](vocabulary), epochs, used, pieces[name])
        for name, epochs in both.items() if epochs
    ])  # fmt: skip


def load_model(folder: Path, config: PhysicsConfig, arm: str) -> LanguageModel:
    """The arm's model of the first seed, from a study's folder."""
    known = _arms(config, 1)
    if arm.startswith("decay-"):
        known = {arm.replace("-", "_", 1): {arm: Arm(models.plain(config))}}
    for name, arms in known.items():
        place = Path(folder) / name / place_of({"arm": arm, "seed": config.seeds[0]})
        if arm in arms and (record := read_result(place / "result.json", {"vocabulary": int})):
            model = without_term(arms[arm].build(record["vocabulary"]))
            load_weights(model, place / WEIGHTS)
            return model.eval()
    raise FileNotFoundError(
        f"{folder} holds no finished model {arm!r}; run the study (again) to its end first."
    )


def _arms(config: PhysicsConfig, steps: int) -> dict[str, dict[str, Arm]]:
    made = {"losses": models.loss_arms(config, steps), "blocks": models.block_arms(config)}
    return {name: arms for name, arms in made.items() if config.parts in ("all", PARTS[name])}


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    piece, epochs = len(text.train_loader(seed=0)), config.epochs * config.pieces
    few = text.first(config.stable_tokens)
    arms, seeds, rates = _arms(config, piece * epochs), len(config.seeds), config.learning_rates
    if "losses" in arms:
        require_one_process(
            study, "the published energy keeps the batch before, of which each would see its own part"
        )
    decays = config.decays if "losses" in arms and config.protocol == "corrected" else ()
    grid = models.stability_arms(config) if "blocks" in arms else {}
    expected = piece * epochs * seeds * (sum(map(len, arms.values())) + len(decays))
    if "blocks" in arms:
        expected += piece * epochs * len(arms["blocks"]) * (len(rates) if len(rates) > 1 else 0)
        expected += len(few.train_loader(0)) * seeds * len(config.stable_rates) * sum(map(len, grid.values()))
    study.expect(expected)
    settings = TrainingSettings(
        epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay, clip=config.clip,
        schedule=config.schedule,
    )  # fmt: skip
    own = {"measure": models.measured(text), "needed": NEEDED}
    found: dict[str, Any] = {"arms": arms, "piece": piece}
    if "losses" in arms:
        found["losses"] = train_arms(study, arms["losses"], settings, name="losses", **own)
        LOSSES.require_any(found["losses"])
        found["decays"] = [
            {**trial, "decay": decay}
            for decay in decays
            for trial in train_arms(
                study, {f"decay-{decay:g}": Arm(models.plain(config))}, dataclasses.replace(settings, weight_decay=decay),
                name=f"decay_{decay:g}", **own,
            )
        ]  # fmt: skip
    if "blocks" in arms:
        first = dataclasses.replace(settings, learning_rate=rates[0])
        found["blocks"] = train_arms(
            study, arms["blocks"], first, rates=rates if len(rates) > 1 else (), name="blocks", **own
        )
        BLOCKS.require_any(found["blocks"])
        found["stability"] = [
            trial
            for clip, some in grid.items()
            for rate in config.stable_rates
            for trial in train_arms(
                study, some, dataclasses.replace(settings, epochs=1, learning_rate=rate, clip=clip, schedule="constant"),
                text=few, name=f"{INTERNALS}/stability_{rate:g}_clip_{clip:g}",
            )
        ]  # fmt: skip
    return found


def _first_energies(study: Session, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """What ``models.energy_of`` finds before training, per arm that has an energy."""
    x, y = study.text.first_batch(study.text.batch_size)
    made = {}
    for name, arm in arms.items():
        with torch.random.fork_rng():
            torch.manual_seed(study.config.seeds[0])
            found = models.energy_of(arm.build(study.text.vocab_size), x, y)
        made |= {name: found} if found else {}
    return made


def _memory(study: Session) -> dict[str, Any]:
    """Peak bytes of a training step by depth, a row a way."""
    rows: dict[str, dict[str, Any]] = {}
    with MemoryMeter(study.accelerator.device.type) as meter:
        for layers in sorted(study.config.memory_layers):
            settings = {"layers": layers, "width": MEMORY_WIDTH, "batch": MEMORY_BATCH, "length": MEMORY_LENGTH}
            settings["device"] = study.accelerator.device.type
            for way in models.memory_arms(**settings | {"layers": 1}):
                taken, why = meter.measure("bklm.studies.physics.models:memory_arms", settings, way)
                rows.setdefault(way, {"way": way, "why": why})[f"bytes_{layers}"] = taken
    for row in rows.values():
        row["growth"] = tables.growth({int(k[6:]): v for k, v in row.items() if k.startswith("bytes_")})
    return {"rows": list(rows.values())}


def _note(study: Session, *more: str, seeds: int | None = None, bars: bool = True) -> str:
    config = study.config
    future = config.protocol == "original"
    more = (f"{config.protocol} protocol", *more)
    return small_print(study.text, seeds or len(config.seeds), *more, sees_the_future=future, bars=bars)


def _report(study: Session, found: dict[str, Any]) -> PhysicsResult:
    config, report, arms = study.config, Report(study), found["arms"]
    unigram, first_loss = study.text.baselines[0]["val_ppl"], math.log(study.text.vocab_size)
    if (decays := found.get("decays")) and (published := LOSSES.groups(found["losses"]).get("published")):
        size = math.exp(sum(math.log(t["embedding_norm"]) for t in published) / len(published))
        chosen = tables.nearest_decay(decays, size)
        found["losses"] += [t for t in decays if t["decay"] == chosen]
        if chosen is not None:
            arms["losses"][f"decay-{chosen:g}"] = Arm(models.plain(config), ("none",))
    parts: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("verdicts", "energies", "steps", "stability", "memory")
    }
    for name in ("losses", "blocks"):
        trials: list[Trial] = found.get(name, [])
        if not trials:
            continue
        parts["verdicts"] += verdicts(LOSSES, trials, arms[name])
        parts["energies"] += tables.energy_rows(trials, _first_energies(study, arms[name]))
        parts["steps"] += tables.step_rows(trials, arms[name], found["piece"], first_loss)
        note = _note(
            study, f"learning rate {config.learning_rate:g}" if name == "losses" else "learning rates searched"
        )
        comparison = {"losses": LOSSES, "blocks": BLOCKS}[name]
        best = comparison.perplexity(comparison.groups(trials)[comparison.best(trials)]).mean
        title = comparison.headline(trials) + not_beaten_in_short(best, study.text.baselines)
        report.figure(f"{name}.png", figures.draw_arms, comparison.rows(trials), title, note)
        note = _note(study, "means over the seeds", bars=False)
        report.figure(f"{name}_curves.png", figures.draw_curves, trials, found["piece"], note)
    traces = {t["arm"]: t["energy"]["trace"] for t in found.get("losses", [])
              if t["seed"] == config.seeds[0] and t["val_ppl"] is not None and "trace" in t["energy"]}  # fmt: skip
    note = _note(study, "the first one", seeds=1)
    report.figure("energies.png", figures.draw_energies, traces, parts["energies"], note)
    if "blocks" in found:
        parts["stability"] = tables.stability_rows(found["stability"], unigram)
        place = study.folder / "memory.json"
        parts["memory"] = kept_result(place, lambda: _memory(study), {"rows": list})["rows"]
        report.path("memory.json")
        note = f"Batch {MEMORY_BATCH} x {MEMORY_LENGTH}, width {MEMORY_WIDTH}, gradients of the weights not counted."
        report.figure("memory.png", figures.draw_memory, parts["memory"], note)
        report.figure("drift.png", figures.draw_drift, compare_forces())
    for name, rows in parts.items():
        report.csv(f"{name}.csv", rows)
    claims = tables.claims_table(parts)
    report.csv("claims.csv", claims)
    finding = " ".join(
        f"{words} {comparison.finding(found[name])}"
        for name, words, comparison in (("losses", "Terms of the loss.", LOSSES), ("blocks", "Blocks.", BLOCKS))
        if name in found
    )
    losses, blocks = found.get("losses", []), found.get("blocks", [])
    # The rates of blocks are searched, those of terms given: the best is one of blocks where there are any.
    also = {name: found[name] for name in ("losses" * bool(blocks), "stability") if name in found}
    return report.finish(
        PhysicsResult, LOSSES, blocks or losses, also=also, rows=LOSSES.rows([*losses, *blocks]),
        finding=finding + tables.claims_in_words(claims),
        summary={"claims": claims, "parts": parts},
        sees_the_future=config.protocol == "original", parts=parts, claims=claims,
    )  # fmt: skip
