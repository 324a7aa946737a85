"""The integration study: what studies 01 to 07 changed, as switches of one model: all on, each left out, none.

Every arm is trained for equal steps; the full set, and what without a switch loses the one and gains the other, also for the
time that the plain arm takes. A switch stays in what is called integrated where its removal costs loss, time or bytes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bklm.compression import baked
from bklm.files.atomic import read_result
from bklm.harness.arms import WEIGHTS, Arm, readable_verdicts, require_one_process, train_arms
from bklm.harness.comparison import Trial
from bklm.harness.estimate import Run, minutes, text_size
from bklm.harness.report import Report, StudyResult, small_print
from bklm.harness.session import Session, place_of
from bklm.harness.statistics import FEWEST_SEEDS
from bklm.harness.study import run_study
from bklm.models import LanguageModel
from bklm.studies.integration import figures, tables
from bklm.studies.integration.claims import claims_table
from bklm.studies.integration.config import IntegrationConfig
from bklm.studies.integration.judging import (
    judged,
    known_as,
    left_out,
    portions_that_fit,
    steps_that_fit,
    switch_rows,
)
from bklm.studies.integration.measured import HEAD, first_losses, of_models, step_times, with_later
from bklm.studies.integration.switches import (
    OF_PLAIN,
    SWITCHES,
    Training,
    build,
    co_occurrences,
    removed,
)
from bklm.studies.integration.tables import ARMS, FULL, KEPT, NONE, PLACEBO, PLAIN
from bklm.studies.integration.text import IntegrationText, prepare_text
from bklm.training.auxiliary import without_term
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import load_weights

NEEDED = {"vocabulary": int, "context_gain": float, "windows": dict, "bytes": int, "steps_per_score": int}
TERMS = ("koopman", "energy")
SHORT = 9  # scores of a trained model beside those of its training: its gain from context, short windows
TRIALS, TIMED = "trials", "timed"


@dataclass(frozen=True)
class IntegrationResult(StudyResult):
    """What ``run_integration`` found: ``table`` holds one row per arm at equal steps.

    ``switches``: one row each, with what its removal does; ``kept``: those that stay; ``parts``: the other tables' rows.
    """

    spoken = ("finding", "shares")

    switches: list[dict[str, Any]]
    kept: tuple[str, ...]
    parts: dict[str, list[dict[str, Any]]]
    claims: list[dict[str, str]]
    shares: str

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        made = {
            "switches": lambda: tables.readable_switches(self.switches, self.parts["verdicts"]),
            "arms": lambda: ARMS.readable(self.table),
            "verdicts": lambda: readable_verdicts([r for r in self.parts["verdicts"] if r["any_of"] == 1]),
            "timed": lambda: ARMS.readable(self.parts["timed"]),
            "costs": lambda: tables.readable_costs(self.parts["costs"]),
            "claims": lambda: self.claims,
        }
        return {n: make for n, make in made.items() if self.parts.get(n, True)}

    def load(self, model: str | None = None) -> LanguageModel:
        """An arm's model of the first seed, its terms left out and its zeros made; on the CPU, evaluating."""
        name = model or self.best
        trials = _place_of_kept(self.kept) if name == KEPT else TRIALS
        place = self.folder / trials / place_of({"arm": name, "seed": self.config.seeds[0]})
        record = read_result(place / "result.json", {**NEEDED, "val_ppl": float})
        if record is None or not (place / WEIGHTS).exists():
            known = ", ".join(repr(row["arm"]) for row in self.table if not row["arm"].startswith(PLACEBO))
            raise ValueError(f"model: got {name!r}; this study trained {known}, those that diverged excepted.")
        training = Training(None, record["steps_per_score"] * self.config.scores)
        made = _arms(self.config, training, self.kept)[name].build(record["vocabulary"])
        load_weights(without_term(made), place / WEIGHTS)
        return without_term(baked(without_term(made))).eval()


def run_integration(
    config: IntegrationConfig,
    on_figure: Callable[[Path], None] | None = None,
    text: IntegrationText | None = None,
) -> IntegrationResult | None:
    """Run the study; everything goes to ``<output_dir>/integration`` and its zip. See ``bklm.harness.study.run_study``."""
    return run_study(config, _train_all, _report, prepare=prepare_text, on_figure=on_figure, text=text)


def estimated_minutes(config: IntegrationConfig) -> float:
    """Minutes that a resolved config's trainings take here."""
    vocabulary, train_tokens, val_tokens = text_size(
        config.dataset, config.data_dir, config.vocab_size, config.tokenizer
    )
    used = config.epochs * min(train_tokens, config.max_train_tokens or train_tokens)
    scored, seeds = min(config.score_tokens or val_tokens, val_tokens), len(config.seeds)
    arms = _arms(config, Training(None, 1000))
    times = {name: _trainings(config, arm) for name, arm in arms.items()}
    times[FULL] *= 4  # two placebos and the integrated one, which no arm costs more than
    if config.budgets != "steps":
        # At equal time: none, the full set, the integrated one, perhaps two without a switch.
        times[PLAIN] += 5 * seeds
    in_the_end = (val_tokens + SHORT * scored) * seeds / (seeds + len(config.learning_rates) - 1)
    return minutes(config, [
        Run((f"integration {name}", config), lambda name=name: arms[name].build(vocabulary), count, used,
            scored * config.scores + in_the_end)
        for name, count in times.items()
    ])  # fmt: skip


def _trainings(config: IntegrationConfig, arm: Arm) -> int:
    """Of an arm: the first seed's best trial of the search is not trained again."""
    return arm.seeds or len(config.seeds) + len(config.learning_rates) - 1


def _arms(config: IntegrationConfig, training: Training, kept: Collection[str] = ()) -> dict[str, Arm]:
    """The arms by name; with ``kept`` also the one of these switches."""

    def arm(names: Collection[str], *against: str, **more: Any) -> Arm:
        return Arm(build(config, names, training), against, **more)

    less: dict[str, Arm] = {}
    for name, switch in SWITCHES.items():
        pairs = list(left_out([name]).values())
        own = {"same_as": FULL, "seeds": 1} if switch.same_loss else {}
        against = () if switch.same_loss else (base for _, base in pairs)
        less[pairs[0][0]] = arm(set(SWITCHES) - set(removed(name)), *dict.fromkeys(against), **own)
    made = {NONE: arm(()), PLAIN: arm(OF_PLAIN, NONE), FULL: arm(SWITCHES, PLAIN, NONE), **less}
    return made | ({KEPT: arm(kept, FULL, PLAIN)} if kept else {})


def _train_all(study: Session) -> dict[str, Any]:
    """The trials at equal steps and at equal time, what a step of each arm takes, and the switches with those that stay."""
    config, text = study.config, study.text
    require_one_process(study, "the terms compare sequences of one batch, and have a limit of their own")
    portion = len(text.train_loader(seed=0)) * config.epochs // config.scores
    steps, table = portion * config.scores, co_occurrences(text.tokens.train, text.vocab_size, config.d_model)
    arms, whole = _arms(config, Training(table, steps)), Training(table, steps)
    rates, seeds = config.learning_rates, len(config.seeds)
    searched = rates if len(rates) > 1 else ()
    study.expect(steps * sum(_trainings(config, arm) + (len(searched) > 0) for arm in arms.values()))
    found = {"arms": arms, "portion": portion, "times": step_times(study, arms, PLAIN), "kept": (), "time": []}
    found["milliseconds"] = found["times"]["milliseconds"]
    settings = TrainingSettings(
        config.scores, learning_rate=rates[0], weight_decay=config.weight_decay, clip=config.clip,
        schedule=config.schedule,
    )  # fmt: skip

    def train(
        chosen: dict[str, Arm],
        name: str,
        batches: int,
        rate: float = rates[0],
        scores: int = config.scores,
        **more: Any,
    ) -> list[Trial]:
        own = dataclasses.replace(text, portion=batches)
        with_rate = dataclasses.replace(settings, learning_rate=rate, epochs=scores)
        return train_arms(
            study, chosen, with_rate, text=own, name=name, measure=of_models(own), needed=NEEDED, **more
        )

    def train_more(name: str, arm: Arm, place: str) -> None:
        """An arm that the first ones gave rise to, at equal steps."""
        found["arms"][name] = arm
        study.expect(study.progress.total + steps * (seeds + len(searched)))
        found["steps"] += train({name: arm}, place, portion, rates=searched)

    def train_for_as_long(name: str, place: str = TIMED) -> None:
        fit = steps_that_fit(found["milliseconds"], name, steps)
        batches, scores = portions_that_fit(fit, config.scores)
        study.expect(study.progress.total + batches * scores * seeds)
        arm = _arms(config, Training(table, batches * scores), found["kept"])[name]
        best = next(t["learning_rate"] for t in found["steps"] if t["arm"] == name)
        found["time"] += train(
            {name: dataclasses.replace(arm, kept=False)}, place, batches, best, scores=scores
        )

    found["steps"] = train(arms, TRIALS, portion, rates=searched)
    ARMS.require_any(found["steps"])
    if config.budgets != "steps":
        traded = (n for r in _judged(study, found) if r["trade"] for n in (r["against"], r["arm"]))
        found["time"] = [t for t in found["steps"] if t["arm"] == PLAIN]
        for name in dict.fromkeys([NONE, FULL, *traded]):
            train_for_as_long(name)
    for term in (r["switch"] for r in _judged(study, found) if r["switch"] in TERMS and r["stays"]):
        placebo = Arm(build(config, SWITCHES, whole, placebo=term), (FULL,), kept=False)
        train_more(PLACEBO + term, placebo, f"placebo_{term}")
    found["switches"] = _judged(study, found)
    names = tables.kept_names(found["switches"])
    found["kept"] = tuple(n for n in SWITCHES if n in names)
    # With fewer seeds nothing is judged; a set that was trained under another name is not trained again.
    is_new = bool(found["kept"]) and known_as(found["kept"]) is None
    if seeds >= FEWEST_SEEDS and is_new:
        place, arm = _place_of_kept(found["kept"]), _arms(config, whole, found["kept"])[KEPT]
        later = step_times(study, {PLAIN: arms[PLAIN], KEPT: arm}, PLAIN, f"times_{place}")["milliseconds"]
        found["milliseconds"] = with_later(found["milliseconds"], later, KEPT, PLAIN)
        train_more(KEPT, arm, place)
        if config.budgets != "steps":
            train_for_as_long(KEPT, f"{place}_{TIMED}")
    return found


def _place_of_kept(kept: Collection[str]) -> str:
    """Folder of the integrated arm's trials, which another choice of switches does not find."""
    return f"{KEPT}_{'_'.join(kept)}"


def _judged(study: Session, found: dict[str, Any]) -> list[dict[str, Any]]:
    unigram = study.text.baselines[0]["val_ppl"]
    rows = (judged(found[budget], found["arms"], unigram) for budget in ("steps", "time"))
    return switch_rows(SWITCHES, *rows, found["milliseconds"], ARMS.rows(found["steps"]))


def _note(study: Session, bars: bool = True) -> str:
    rates, alpha = study.config.learning_rates, study.config.blend
    rate = (
        f"each arm's rate the best of {len(rates)}" if len(rates) > 1 else f"learning rate {rates[0]:g} for all"
    )
    plain = f"{NONE}: the published operator, causal, alpha {alpha:g}; {PLAIN}: alpha 0, fused kernel"
    return small_print(study.text, len(study.config.seeds), rate, plain, bars=bars)


def _report(study: Session, found: dict[str, Any]) -> IntegrationResult:
    report, trials, timed = Report(study), found["steps"], found["time"]
    milliseconds, unigram = found["milliseconds"], study.text.baselines[0]["val_ppl"]
    parts: dict[str, list[dict[str, Any]]] = {
        "verdicts": judged(trials, found["arms"], unigram), "timed": ARMS.rows(timed) if timed else [],
        "timed_verdicts": judged(timed, found["arms"], unigram),
    }  # fmt: skip
    first = first_losses(
        study, found["arms"], f"first_losses_of_{len(found['arms'])}_{_place_of_kept(found['kept'])}"
    )
    parts["costs"] = tables.cost_rows(trials, milliseconds, found["portion"], first)
    head = tables.time_ratio(milliseconds, HEAD, PLAIN).mean
    shares = {"outer_parameter_share": found["times"]["outer_parameter_share"], "head_time_share": head}
    table = ARMS.rows(trials)
    claims = claims_table(parts["verdicts"], parts["timed_verdicts"], parts["costs"], table, unigram)
    adds = tables.interaction(trials, SWITCHES)
    kept = tables.kept_in_words(found["switches"])
    report.figure("switches.png", figures.draw_switches, found["switches"], kept, _note(study))
    seconds = {arm: found["portion"] * statistics.median(ms) / 1e3 for arm, ms in milliseconds.items()}
    title = tables.costs_in_words(parts["costs"], (PLAIN, FULL, KEPT))
    report.figure("curves.png", figures.draw_curves, trials, seconds, title, _note(study, bars=False))
    files = {"switches": found["switches"], **parts}
    for name, rows in files.items():
        report.csv(f"{name}.csv", rows)
    report.csv("claims.csv", claims)
    # A placebo is a control, and is not kept.
    own = [t for t in trials if not t["arm"].startswith(PLACEBO)]
    best = ARMS.best(own)
    reached = ARMS.perplexity(ARMS.groups(trials)[best])
    # With fewer seeds nothing is judged, so that what stays is not known.
    is_judged, known = len(study.config.seeds) >= FEWEST_SEEDS, known_as(found["kept"])
    told = [
        f"Lowest validation PPL: {best}, {reached}.{ARMS.diverged(trials)}",
        kept,
        f"Those that stay are the arm {known}." if is_judged and known else "",
        tables.interaction_in_words(adds),
    ]
    told += [tables.rates_in_words(table, study.config.learning_rates), tables.realised_in_words(timed)]
    again = {"timed": [t for t in timed if t["arm"] != PLAIN]} if timed else {}
    again |= {"placebos": placebos} if (placebos := [t for t in trials if t not in own]) else {}
    return report.finish(
        IntegrationResult, ARMS, own, also=again, rows=table,
        finding=" ".join(words for words in told if words),
        summary={"claims": claims, "parts": parts, "switches": found["switches"], "interaction": adds, "shares": shares},
        switches=found["switches"], kept=found["kept"], parts=parts, claims=claims, shares=tables.shares_in_words(shares),
    )  # fmt: skip
