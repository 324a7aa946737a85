"""Arms of one experiment: each trained with every seed at equal budget, and judged in pairs against its controls.

    arms = {"none": Arm(plain), "placebo": Arm(shuffled), "mended": Arm(term, against=("none", "placebo"))}
    trials = train_arms(study, arms, settings)
    rows = verdicts(COMPARISON, trials, arms)
    helps(rows, "mended")

A term added to the loss (``bklm.training.auxiliary``) has two controls: weight 0, and a placebo of the same size on data
without the claimed structure. It helps where it beats the plain model and the placebo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bklm.files.atomic import replacing
from bklm.harness.comparison import Comparison, Trial
from bklm.harness.folder import INTERNALS
from bklm.harness.session import CHECKPOINTS, Session, place_of
from bklm.harness.statistics import Perplexity
from bklm.models import LanguageModel
from bklm.training.auxiliary import without_term
from bklm.training.loop import train
from bklm.training.records import EPOCH_KEYS
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import save_weights

WEIGHTS = "model.safetensors"
FINISHED = "finished"  # the last checkpoint of a trial of a search, until its arm's rate is chosen
KEYS = {"val_ppl": float, "seconds": float, "epochs": EPOCH_KEYS, "parameters": int, "learning_rate": float}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        build: makes the untrained model of ``text.vocab_size`` words. torch's generator is seeded before, by the trial's seed
            (``torch.initial_seed()``), so arms that draw the model first begin with equal weights.
        against: names of the arms that this one must beat to be of use.
        kept: whether the trained model, without its term, stays in the trial's folder (and in the zip) as WEIGHTS.
        seeds: how many of the study's seeds, the first ones; None: all.
        same_as: the arm whose losses it has to the last bit by its construction: that is checked, and no difference judged.
    """

    build: Callable[[int], LanguageModel]
    against: tuple[str, ...] = ()
    kept: bool = True
    seeds: int | None = None
    same_as: str = ""


def train_arms(
    study: Session,
    arms: Mapping[str, Arm],
    settings: TrainingSettings,
    *,
    text: Any = None,
    rates: Sequence[float] = (),
    name: str = "trials",
    measure: Callable[[LanguageModel], dict[str, Any]] | None = None,
    needed: Mapping[str, Any] = {},
    draw: Callable[[list[Trial]], Path | None] | None = None,
) -> list[Trial]:
    """One trial per arm and seed of ``study.config.seeds``: the same batches, steps and number of learning rates for each.

    A trial that diverged is a record without a perplexity.

    Args:
        text: has ``vocab_size``, ``unk_id``, ``train_loader(seed)`` and ``val_loader()``; the study's own by default.
        rates: learning rates tried by every arm with the first seed, whose best trial is not trained again; the settings'
            own where there are none. An arm that diverges with each is trained with the smallest; one that is the same as
            another takes that one's.
        name: folder of the trials; arms of another part of the study need another.
        measure: what else to record of a trained model; ``needed`` names its keys and types, without which a trial is
            trained again.
    """
    text = text or study.text
    steps = len(text.train_loader(seed=0)) * settings.epochs
    first, search = study.config.seeds[0], f"{INTERNALS}/{name}_search"

    def searched(arm: str, learning_rate: float) -> Path:
        return study.folder / search / place_of({"arm": arm, "learning_rate": learning_rate}) / FINISHED

    def trial(place: str, arm: str, learning_rate: float, seed: int, is_search: bool = False) -> dict[str, Any]:
        point = {"arm": arm, "seed": seed, "learning_rate": learning_rate}
        own = dataclasses.replace(settings, learning_rate=learning_rate, seed=seed)
        kept = arms[arm].kept and not is_search

        def work(folder: Path) -> dict[str, Any]:
            checkpoints = folder / (FINISHED if is_search else CHECKPOINTS)
            if not is_search and seed == first and study.is_main and not checkpoints.exists():
                # The same training, to its end: what is left is to measure it.
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    searched(arm, learning_rate).rename(checkpoints)
            study.accelerator.wait_for_everyone()
            model, record = _train(study, text, arms[arm], own, checkpoints, f"{arm}, seed {seed}")
            if study.is_main and kept:
                with replacing(folder / WEIGHTS) as temporary:
                    save_weights(without_term(model), temporary, getattr(text, "vocabulary_sha256", None))
            return record if is_search or measure is None else {**record, **measure(model)}

        return study.trial(
            place, point, steps, work, KEYS if is_search else {**KEYS, **needed}, weights=WEIGHTS * kept
        )

    best = dict.fromkeys(arms, settings.learning_rate)
    if rates:
        searching = [name for name, arm in arms.items() if not arm.same_as]
        best, tried = study.best_rate(
            "arm", searching, rates, lambda place, **point: trial(place, seed=first, is_search=True, **point), name=search,
            may_diverge=True,
        )  # fmt: skip
        for one in (t for t in tried if t["learning_rate"] != best[t["arm"]]):
            shutil.rmtree(searched(one["arm"], one["learning_rate"]), ignore_errors=True)
        best |= {name: best[arm.same_as] for name, arm in arms.items() if arm.same_as}
    return [
        found
        for count in dict.fromkeys(arm.seeds for arm in arms.values())
        for found in study.grid(
            {"arm": [n for n, arm in arms.items() if arm.seeds == count], "seed": study.config.seeds[:count]},
            lambda place, arm, seed: trial(place, arm, best[arm], seed), name=name, draw=draw, across_machines=False,
        )
    ]  # fmt: skip


def _train(
    study: Session, text: Any, arm: Arm, settings: TrainingSettings, checkpoints: Path, label: str
) -> tuple[LanguageModel, dict[str, Any]]:
    torch.manual_seed(settings.seed)
    model = arm.build(text.vocab_size).to(study.accelerator.device)
    records = train(
        model, text.train_loader(seed=settings.seed), text.val_loader(), settings, accelerator=study.accelerator,
        unk_id=text.unk_id, folder=checkpoints, label=label,
        on_step=study.progress.step, on_skip=study.progress.skip,
    )  # fmt: skip
    last = records[-1]
    return model, {
        "val_ppl": last.val_perplexity,
        "val_ppl_without_unk": last.val_perplexity_without_unk,
        "val_accuracy": last.val_accuracy,
        "parameters": model.num_parameters(),
        "seconds": sum(r.seconds for r in records),
        "epochs": [r.to_dict() for r in records],
    }


def require_one_process(study: Session, why: str) -> None:
    """Refuse, by a ValueError, several processes of one training for a term that they could not share."""
    if (count := study.accelerator.num_processes) > 1:
        raise ValueError(f"processes: got {count}; {why}: take one, and workers for several trials at once.")


def verdicts(
    comparison: Comparison, trials: Sequence[Trial], arms: Mapping[str, Arm], any_of: int = 1
) -> list[dict[str, Any]]:
    """One row per arm and control: the paired difference of validation loss in nats, its 95% interval, and a verdict.
    ``any_of``: the number of arms of which any one that helps makes a claim hold; the intervals are as much wider."""
    rows = []
    for name, against in ((name, other) for name, arm in arms.items() for other in arm.against):
        ratio = comparison.ratio(trials, name, against, any_of)
        ends = (None,) * 3 if ratio is None else (ratio.mean, *ratio.interval)
        values = [None if end is None else math.log(end) for end in ends]
        row = dict(zip(("loss_difference", "low", "high"), values, strict=True))
        rows.append({"arm": name, "against": against, **row, "any_of": any_of, "verdict": _verdict(ratio)})
    for name, arm in arms.items():
        if arm.same_as and (own := [t for t in trials if t["arm"] == name and t["val_ppl"] is not None]):
            row = {"arm": name, "against": arm.same_as, "loss_difference": None, "low": None, "high": None}
            found = _identity(own, [t for t in trials if t["arm"] == arm.same_as])
            rows.append(row | {"any_of": any_of, "verdict": found})
    return rows


def _identity(own: Sequence[Trial], others: Sequence[Trial]) -> str:
    """Whether the validation losses of the seeds that both have are equal to the last bit, all along."""
    curves = [
        {t["seed"]: [e["val_loss"] for e in t["epochs"]] for t in group if t["val_ppl"] is not None}
        for group in (own, others)
    ]
    pairs = [(curves[0][seed], curves[1][seed]) for seed in curves[0].keys() & curves[1].keys()]
    if not pairs:
        return "a seed diverged: no verdict"
    if all(one == other for one, other in pairs):
        return "identical by construction, every loss to the last bit"
    if any(len(one) != len(other) for one, other in pairs):
        return "NOT identical, though it ought to be: another number of epochs"
    worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return f"NOT identical, though it ought to be: by up to {worst:.1g} nats"


def _verdict(ratio: Perplexity | None) -> str:
    if ratio is None or not ratio.is_judged:
        return f"{'a seed diverged' if ratio is None else 'no interval'}: no verdict"
    return "lower loss" if ratio.high < 1 else "higher loss" if ratio.low > 1 else "no difference"


def nats_in_words(row: Mapping[str, Any], digits: int = 4) -> str:
    """A verdict's difference with its interval, "-0.0450 (-0.0600 to -0.0300)"; "-" where a seed diverged."""
    if row["loss_difference"] is None:
        return "-"
    ends = "" if row["low"] is None else f" ({row['low']:+.{digits}f} to {row['high']:+.{digits}f})"
    return f"{round(row['loss_difference'], digits) + 0.0:+.{digits}f}{ends}"


def readable_verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Verdicts for people."""
    many = max((int(r.get("any_of") or 1) for r in rows), default=1)
    title = f"loss difference, nats (95%{f' for {many} arms at once' * (many > 1)})"
    return [
        {"arm": r["arm"], "against": r["against"], title: nats_in_words(r), "verdict": r["verdict"]}
        for r in rows
    ]


NOT_SHOWN = "not shown"
# True: shown; False: the opposite is shown; ``NOT_SHOWN``: measured, and neither is; None: not measured well enough to judge.
Holds = bool | str | None


def is_below(low: float | None, high: float | None, bound: float = 0.0) -> Holds:
    """Whether what an interval is of lies below ``bound``; None without an interval."""
    if low is None or high is None:
        return None
    return True if high < bound else False if low > bound else NOT_SHOWN


def all_hold(found: Iterable[Holds]) -> Holds:
    """The verdict on a claim that asks for all of these; None for none of them. Where one is not shown, the claim is not,
    whatever another without a verdict may be."""
    listed = list(found)
    return next((v for v in (False, NOT_SHOWN, None) if any(f is v for f in listed)), True if listed else None)


def any_holds(found: Iterable[Holds]) -> Holds:
    """The verdict on a claim for which any of these would do."""
    listed = list(found)
    return next((v for v in (True, None, NOT_SHOWN) if any(f is v for f in listed)), False)


def helps(rows: Sequence[Mapping[str, Any]], arm: str) -> Holds:
    """Whether an arm's loss is below that of each of its controls beyond the interval; None where one gave no verdict."""
    return all_hold(is_below(row["low"], row["high"]) for row in rows if row["arm"] == arm)


def claim(announced: str, measured: str, holds: Holds) -> dict[str, str]:
    """A row of a study's claims table."""
    verdict = (
        holds if isinstance(holds, str) else {True: "holds", False: "does not hold", None: "no verdict"}[holds]
    )
    return {"announced": announced, "measured": measured, "verdict": verdict}
