"""The dialogue study: does pretraining help, are earlier turns used, who replies best, and what is forgotten?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bklm.data.dialogue_windows import count_replies
from bklm.harness.arms import Arm, readable_verdicts, train_arms, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session, place_of
from bklm.harness.study import run_study
from bklm.models import LanguageModel
from bklm.studies.dialogue import figures, models, tables
from bklm.studies.dialogue.config import DialogueConfig
from bklm.studies.dialogue.models import LONGER, NEEDED, PRETRAINING, REPLAY, TUNING
from bklm.studies.dialogue.tables import ARMS
from bklm.studies.dialogue.text import MIXTURE, DialogueText, prepare_text, sizes
from bklm.training.schedules import TrainingSettings

__all__ = ["DialogueResult", "estimated_minutes", "prepare_text", "run_dialogue"]


@dataclass(frozen=True)
class DialogueResult(StudyResult):
    """What ``run_dialogue`` found: ``table`` holds one row per model and way of training; ``facts`` is empty but for the
    grammar."""

    verdicts: list[dict[str, Any]]
    contexts: list[dict[str, Any]]
    facts: list[dict[str, Any]]
    writing: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    claims: list[dict[str, str]]

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "arms": lambda: ARMS.readable(self.table),
            "verdicts": lambda: readable_verdicts(self.verdicts),
            "contexts": lambda: tables.readable_contexts(self.contexts),
            "facts": lambda: tables.readable_facts(self.facts),
            "writing": lambda: tables.readable_writing(self.writing),
            "replies": lambda: self.replies,
            "claims": lambda: self.claims,
        }
        return {n: make for n, make in made.items() if n != "facts" or self.facts}

    def load(self, model: str | None = None) -> LanguageModel:
        """A kept model by its arm's name, such as "GPT tuned", the best of them when none is named; on the CPU, evaluating."""
        return models.load_kept(self.folder, model or _best_kept(self.table))


def run_dialogue(
    config: DialogueConfig, on_figure: Callable[[Path], None] | None = None, text: DialogueText | None = None
) -> DialogueResult | None:
    """Run the study; everything goes to ``<output_dir>/dialogue`` and its zip. See ``bklm.harness.study.run_study``."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: DialogueConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    _, train, valid = text_size(config.pretraining, config.pretraining_dir, config.vocab_size)
    prose = min(train, config.max_pretraining_tokens or train)
    own = sizes(config)
    # The best trial of a search is the first seed's.
    trainings = len(config.seeds) + len(config.learning_rates) - 1
    # "longer" goes on for as many steps, not tokens, as the pretraining has.
    before = config.pretraining_epochs * prose / config.seq_len
    epochs = trainings * (4 * config.epochs + math.ceil(before / own["rows"]))
    runs = []
    for name, build in models.builders(config).items():
        build = lambda build=build: build(config.vocab_size)  # noqa: E731
        key = ("dialogue", name, config.vocab_size, config.width, config.n_layers)
        runs += [
            Run(key, build, trainings * config.pretraining_epochs, prose, min(valid, prose / 4)),
            Run(key, build, epochs, own["train"], own["valid"]),
        ]
    return minutes(config, runs)


def _stages(study: Session) -> tuple[dict[str, dict[str, Arm]], dict[str, int]]:
    """Arms by the folder of their trials, and the passes of each stage: "longer" has the steps of both stages together."""
    config, text = study.config, study.text
    arms: dict[str, dict[str, Arm]] = {PRETRAINING: {}, TUNING: {}, LONGER: {}, REPLAY: {}}
    for name, build in models.builders(config).items():
        begun = models.pretrained(build, name, study.folder, text.vocabulary_sha256)
        arms[PRETRAINING][name] = Arm(build)
        arms[TUNING][f"{name} scratch"] = Arm(build)
        arms[TUNING][f"{name} tuned"] = Arm(begun, (f"{name} scratch", f"{name} longer"))
        arms[LONGER][f"{name} longer"] = Arm(build)
        arms[REPLAY][f"{name} replay"] = Arm(begun, (f"{name} tuned",))
    before = len(text.prose.train_loader(0)) * config.pretraining_epochs
    more = math.ceil(before / len(text.train_loader(0)))
    passes = {PRETRAINING: config.pretraining_epochs, LONGER: config.epochs + more}
    return arms, passes | dict.fromkeys((TUNING, REPLAY), config.epochs)


def _train_all(study: Session) -> dict[str, Any]:
    config, text = study.config, study.text
    arms, passes = _stages(study)
    rates = config.learning_rates
    texts = {PRETRAINING: text.prose, TUNING: text, LONGER: text, REPLAY: text.with_replay(config.replay)}
    trainings = len(config.seeds) + len(rates) * (len(rates) > 1)
    study.expect(sum(len(texts[s].train_loader(0)) * passes[s] * len(arms[s]) for s in arms) * trainings)
    found: dict[str, list[Trial]] = {}
    for stage, own in arms.items():
        settings = TrainingSettings(
            passes[stage], learning_rate=rates[0], weight_decay=config.weight_decay, clip=config.clip,
            schedule=config.schedule,
        )  # fmt: skip
        found[stage] = train_arms(
            study, own, settings, text=texts[stage], rates=rates if len(rates) > 1 else (), name=stage,
            measure=models.measured(text, config), needed=NEEDED,
        )  # fmt: skip
        ARMS.require_any(found[stage])
    return {"arms": {n: arm for own in arms.values() for n, arm in own.items()}, "stages": found}


def _of_dialogue(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The trial of a pretraining, scored on the replies that it was not tuned on."""
    made = {**trial, "arm": f"{trial['arm']} pretrained"}
    if made["val_ppl"] is not None:
        made |= {"val_ppl": made["reply_ppl"], "val_ppl_without_unk": made["reply_ppl_without_unk"]}
    return made


def _best_kept(table: list[dict[str, Any]]) -> str:
    kept = [r for r in table if r["arm"].endswith(" tuned") and r["val_ppl"] is not None]
    return min(kept or table, key=lambda r: r["val_ppl"])["arm"]


def _note(study: Session) -> str:
    config = study.config
    own = f"{len(study.text.dialogues['train']):,} dialogues, {config.epochs} pass{'es' * (config.epochs > 1)}"
    return small_print(study.text, len(config.seeds), own)


def _report(study: Session, found: dict[str, Any]) -> DialogueResult:
    config, report, text, stages = study.config, Report(study), study.text, found["stages"]
    trained = [t for stage in (TUNING, LONGER, REPLAY) for t in stages[stage]]
    trials = sorted(
        [*map(_of_dialogue, stages[PRETRAINING]), *trained],
        key=lambda t: (
            list(models.NAMES.values()).index(t["arm"].split()[0]),
            tables.WAYS.index(t["arm"].split()[1]),
        ),
    )
    tuned = [name for name in found["arms"] if name.endswith(" tuned")]
    among = {a: Arm(found["arms"][a].build, tuple(b for b in tuned if b != a)) for a in tuned}
    judged, note = [*verdicts(ARMS, trials, found["arms"]), *verdicts(ARMS, trials, among)], _note(study)
    contexts, facts = tables.context_rows(trials), tables.fact_rows(trials)
    chance = 1 / text.corpus.grammar.values if facts else None
    mixture = next(row for row in text.baselines if row["name"].startswith(MIXTURE))
    shown = [row for row in text.baselines if row is mixture or row["name"].startswith("true law")]
    told = [tables.contexts_in_words(contexts), *([tables.facts_in_words(facts, chance)] if facts else [])]
    report.figure(
        "arms.png", figures.draw_arms, ARMS.rows(trials), shown, ARMS.headline(tables.rivals(trials)), note
    )
    report.figure("contexts.png", figures.draw_contexts, contexts, told[0], note)
    if facts:
        report.figure("facts.png", figures.draw_facts, facts, chance, told[1], note)
    parts = {
        "verdicts": judged, "contexts": contexts, "facts": facts, "writing": tables.writing_rows(trials),
        "replies": tables.reply_table(trials),
        "claims": tables.claims_table(
            trials, judged, contexts, facts, mixture, chance, count_replies(text.encoded["valid"], config.context_replies)
        ),
    }  # fmt: skip
    for name, rows in parts.items():
        report.csv(f"{name}.csv", rows)
    first = [t for t in stages[TUNING] if t["seed"] == config.seeds[0] and t["val_ppl"] is not None]
    kept = [t for t in first if t["arm"].endswith(" tuned")]
    places = {t["arm"]: f"{TUNING}/{place_of({k: t[k] for k in ('arm', 'seed')})}" for t in kept}
    for path in models.keep(study.folder, kept, places):
        report.path(str(path.relative_to(study.folder)))
    table = ARMS.rows(trials)
    shares = {row["arm"].split()[0]: row["word_share"] for row in table if row["word_share"] is not None}
    if tuned_ones := tables.rivals(trials, " tuned"):
        lowest = replace(ARMS, lowest="Lowest PPL of replies among the tuned: {}, {}").finding(tuned_ones)
    else:
        lowest = ARMS.finding(tables.rivals(trials))
    finding = " ".join([lowest, *(f"{words}." for words in told)])
    return report.finish(
        DialogueResult, ARMS, trials, finding=finding, rows=table,
        summary={"claims": parts["claims"], "verdicts": judged, "best_model": _best_kept(table), "notes": text.notes},
        manifest={"vocabulary_sha256": text.vocabulary_sha256, "embedding_and_head": shares}, **parts,
    )  # fmt: skip
