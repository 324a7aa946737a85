"""The physics study: energies as a term of the loss, blocks that conserve one, and what either brings in speed, stability
and memory."""

from __future__ import annotations

import dataclasses
import functools
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
from bklm.harness.step_times import step_times
from bklm.harness.study import run_study
from bklm.harness.text import prepare_text as prepare_plain_text
from bklm.models import LanguageModel
from bklm.studies.physics import claims, energies, figures, models, tables
from bklm.studies.physics.config import PhysicsConfig
from bklm.studies.physics.models import PLAIN, PhysicsText
from bklm.studies.physics.tables import ARMS, BLOCKS, LOSSES
from bklm.training.energy_drift import compare_forces
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import load_weights

NEEDED = {"vocabulary": int, "context_gain": float, "embedding_norm": float, "energy": dict}
MEMORY_BATCH, MEMORY_WIDTH, MEMORY_LENGTH = 16, 64, 128
TRIALS = "arms"  # their folder
PARTS = {"losses": "loss", "blocks": "blocks"}
PARTS_OF_RESULT = ("verdicts", "block_verdicts", "equal_seconds", "energies", "steps", "stability", "memory")
MANY_STEPS = 10**6  # so many that a share of the gradient is not logged while steps are timed


@dataclass(frozen=True)
class PhysicsResult(StudyResult):
    """What ``run_physics`` found: ``table`` holds one row per arm; the other parts may be empty."""

    parts: dict[str, list[dict[str, Any]]]
    claims: list[dict[str, str]]

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "arms": lambda: ARMS.readable(self.table),
            "verdicts": lambda: readable_verdicts(self.parts["verdicts"]),
            "block_verdicts": lambda: readable_verdicts(self.parts["block_verdicts"]),
            "energies": lambda: energies.readable_energies(self.parts["energies"]),
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
    text = PhysicsText(**own, pieces=config.pieces, scored=config.score_tokens)
    for part in (text, text.first(config.stable_tokens)):
        part.train_loader(0), part.val_loader()
    return text


def estimated_minutes(config: PhysicsConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    vocabulary, train_tokens, val_tokens = text_size(
        config.dataset, config.data_dir, config.vocab_size, config.tokenizer
    )
    used = min(train_tokens, config.max_train_tokens or train_tokens)
    scored = min(config.score_tokens or val_tokens, val_tokens)
    seeds = len(config.seeds)
    # The winner of a search is one of its arm's seeds.
    each = seeds + len(config.learning_rates) - 1
    parts, blocks = _arms(config, 1), models.block_arms(config)
    trainings, passes = dict.fromkeys(("plain", "conservative", "free-force"), 0), {}
    for name, arm in {n: arm for some in parts.values() for n, arm in some.items()}.items():
        kind = "conservative" if name == "every-second" else name if name in trainings else "plain"
        trainings[kind] += 1 if arm.same_as else each
    if "losses" in parts and config.protocol == "corrected":
        trainings["plain"] += seeds + len(config.decays) + seeds - 1
    if "blocks" in parts:
        grid = seeds * len(config.stable_rates) * min(1.0, (config.stable_tokens or used) / used)
        passes = {"plain": 3 * grid, "conservative": grid}
    # Scores within a pass; at the end one of the whole split, and eight for the gain from context.
    seen = config.pieces * scored + (val_tokens + 8 * scored) / config.epochs
    return minutes(config, [
        Run((name, config), functools.partial(blocks[name].build, vocabulary), epochs, used, val)
        for name, count in trainings.items()
        for epochs, val in ((count * config.epochs, seen), (passes.get(name, 0), scored))
        if epochs
    ])  # fmt: skip


def load_model(folder: Path, config: PhysicsConfig, arm: str) -> LanguageModel:
    """The arm's model of the first seed, from a study's folder."""
    blocks = models.block_arms(config)
    build = blocks[arm].build if arm in blocks else models.plain(config)
    place = Path(folder) / TRIALS / place_of({"arm": arm, "seed": config.seeds[0]})
    if (record := read_result(place / "result.json", {"vocabulary": int})) and (place / WEIGHTS).exists():
        model = build(record["vocabulary"])
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
    steps, few = piece * epochs, text.first(config.stable_tokens)
    parts, seeds, rates = _arms(config, steps), len(config.seeds), config.learning_rates
    if "losses" in parts:
        require_one_process(
            study, "the published energy keeps the batch before, of which each would see its own part"
        )
    arms = {name: arm for some in parts.values() for name, arm in some.items()}
    has_more = "losses" in parts and config.protocol == "corrected"
    grid = models.stability_arms(config) if "blocks" in parts else {}
    searched = sum(not arm.same_as for arm in arms.values())
    trainings = searched * (seeds + len(rates) * (len(rates) > 1)) + len(arms) - searched
    # Detached, and the decays: all with the first seed, one with the others.
    trainings += (seeds + len(config.decays) + seeds - 1) * has_more
    grid_steps = len(few.train_loader(0)) * seeds * len(config.stable_rates) * len(grid) if grid else 0
    study.expect(steps * trainings + grid_steps)
    settings = TrainingSettings(
        epochs, learning_rate=rates[0], weight_decay=config.weight_decay, clip=config.clip, schedule=config.schedule
    )  # fmt: skip
    train = functools.partial(train_arms, study, name=TRIALS, measure=models.measured(text), needed=NEEDED)
    trials = train(arms, settings, rates=rates if len(rates) > 1 else ())
    ARMS.require_any(trials)
    if has_more:
        trials += _train_unsearched(study, train, settings, trials, parts["losses"])
    found: dict[str, Any] = {"arms": parts, "piece": piece, "grid": grid, "stability": []}
    found["trials"] = [
        {**t, "at_edge": len(rates) > 1 and t["learning_rate"] in (min(rates), max(rates))} for t in trials
    ]
    for rate in config.stable_rates if grid else ():
        own = dataclasses.replace(settings, epochs=1, learning_rate=rate, schedule="constant")
        found["stability"] += train_arms(study, grid, own, text=few, name=f"{INTERNALS}/stability_{rate:g}")
    # What equals the plain model, or has another decay, claims no speed.
    timed = _arms(dataclasses.replace(config, start=0.0), MANY_STEPS)
    timed = {name: arm for some in timed.values() for name, arm in some.items() if not arm.same_as}
    # Timed as if it ran from the first step on; until it sets in, its arms' steps are the plain model's.
    late = dict.fromkeys(models.LATE, int(config.start * steps))
    return found | {"times": step_times(study, timed, tables.ROUNDS), "late": late}


def _train_unsearched(
    study: Session,
    train: Callable[..., list[Trial]],
    settings: TrainingSettings,
    trials: list[Trial],
    arms: dict[str, Arm],
) -> list[Trial]:
    """The arms that take another one's rate: the detached energy, and the plain model of another weight decay. They are added
    to ``arms``."""
    config = study.config
    rates = {t["arm"]: t["learning_rate"] for t in trials}
    steps = len(study.text.train_loader(seed=0)) * settings.epochs
    arms["detached"] = models.detached_arm(config, steps, rates["mended"] == rates[PLAIN])
    found = train({"detached": arms["detached"]}, dataclasses.replace(settings, learning_rate=rates["mended"]))
    if rates["mended"] != rates[PLAIN]:
        # The plain model at the mended one's rate: where the searches ended apart, it is the fairer control.
        arms["mended"] = dataclasses.replace(arms["mended"], against=(*arms["mended"].against, "detached"))
    published = [
        t["embedding_norm"] for t in ARMS.groups(trials).get("published", ()) if t["seed"] == config.seeds[0]
    ]

    def decayed(decay: float, seeds: int | None) -> list[Trial]:
        arm = Arm(models.plain(config), (PLAIN,), seeds=seeds)
        own = dataclasses.replace(settings, learning_rate=rates[PLAIN], weight_decay=decay)
        return [{**t, "decay": decay} for t in train({f"decay-{decay:g}": arm}, own)]

    # The first seed alone decides which one is trained with the others.
    tried = [t for decay in config.decays for t in decayed(decay, 1)] if published else []
    chosen = tables.nearest_decay(tried, published[0]) if published else None
    if chosen is not None:
        found += decayed(chosen, None)
        name = f"decay-{chosen:g}"
        arms[name] = Arm(models.plain(config), (PLAIN,))
        # What the term does to the embedding alone, without an energy.
        arms["published"] = dataclasses.replace(arms["published"], against=(*arms["published"].against, name))
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
    trials, searched = found["trials"], {n: arm for some in arms.values() for n, arm in some.items()}
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS_OF_RESULT}
    sentences = []
    for name, comparison, words in (("losses", LOSSES, "Terms of the loss"), ("blocks", BLOCKS, "Blocks")):
        own = [t for t in trials if t["arm"] in arms.get(name, {})]
        if not comparison.finished(own):
            continue
        any_of = len({*claims.CLAIMED} & {*arms[name]}) if name == "losses" else 1
        key = {"losses": "verdicts", "blocks": "block_verdicts"}[name]
        parts[key] = verdicts(comparison, *tables.with_detached(name, own, arms, trials), any_of=any_of)
        own = [t for t in own if not arms[name][t["arm"]].same_as]
        searching = (
            "every arm's learning rate searched" if len(config.learning_rates) > 1 else "one learning rate"
        )
        best = comparison.perplexity(comparison.groups(own)[comparison.best(own)]).mean
        headline = comparison.headline(own)
        sentences.append(f"{words}: {headline[0].lower()}{headline[1:]}.")
        title = headline + not_beaten_in_short(best, study.text.baselines)
        report.figure(f"{name}.png", figures.draw_arms, comparison.rows(own), title, _note(study, searching))
        note = _note(
            study,
            f"scored on {study.text.val_loader().dataset.num_targets:,} validation targets",
            bars=False,
        )
        report.figure(f"{name}_curves.png", figures.draw_curves, own, found["piece"], note)
    parts["energies"] = energies.energy_rows(
        trials, _first_energies(study, {n: arm for n, arm in searched.items() if not arm.seeds})
    )
    timed = {name: arm for name, arm in searched.items() if name in found["times"]}
    parts["steps"] = tables.step_rows(
        trials, timed, found["piece"], math.log(study.text.vocab_size), found["times"], found["late"]
    )
    parts["equal_seconds"] = tables.equal_seconds_rows(
        trials, arms.get("blocks", {}), found["times"], config.schedule
    )
    report.csv("trace.csv", energies.trace_rows(trials))
    first = [t for t in ARMS.finished(trials) if t["seed"] == config.seeds[0] and "trace" in t["energy"]]
    logged = {t["arm"]: t["energy"] for t in first if not searched[t["arm"]].seeds}
    note = _note(study, "the first one", seeds=1)
    report.figure("energies.png", figures.draw_energies, logged, parts["energies"], note)
    if found["grid"]:
        few, place = study.text.first(config.stable_tokens), study.folder / INTERNALS / "untrained.json"
        untrained = kept_result(
            place, lambda: models.untrained_losses(few, found["grid"], config.seeds), {PLAIN: dict}
        )
        parts["stability"] = tables.stability_rows(found["stability"], untrained)
        parts["memory"] = kept_result(study.folder / "memory.json", lambda: _memory(study), {"rows": list})[
            "rows"
        ]
        report.path("memory.json")
        note = f"Batch {MEMORY_BATCH} x {MEMORY_LENGTH}, width {MEMORY_WIDTH}, gradients of the weights not counted."
        report.figure("memory.png", figures.draw_memory, parts["memory"], note)
        report.figure("drift.png", figures.draw_drift, compare_forces())
    for name, rows in parts.items():
        report.csv(f"{name}.csv", rows)
    table = ARMS.rows(trials)
    edges = {t["arm"] for t in trials if t["at_edge"]}
    announced = claims.claims_table(parts, {row["arm"]: row["context_gain"] for row in table}, edges)
    sentences.append(tables.size_in_words(trials, config.decays))
    report.csv("claims.csv", announced)
    return report.finish(
        PhysicsResult, ARMS, trials, also={"stability": found["stability"]} if found["stability"] else {}, rows=table,
        finding=" ".join(filter(None, sentences)) + claims.claims_in_words(announced),
        summary={"claims": announced, "parts": parts}, sees_the_future=config.protocol == "original", parts=parts,
        claims=announced,
    )  # fmt: skip
