"""Milliseconds of a training step of arms, in turns: what their trainings cost on an equal machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bklm.files.atomic import kept_result
from bklm.harness import workers
from bklm.harness.arms import Arm
from bklm.harness.comparison import Trial
from bklm.harness.folder import INTERNALS
from bklm.harness.measure import Arm as Call
from bklm.harness.measure import time_arms
from bklm.harness.session import Session
from bklm.harness.statistics import Perplexity, interval95
from bklm.models import LanguageModel
from bklm.training.one_step import training_step
from bklm.training.processes import broadcast

SECONDS = 30.0  # of timing an arm, at most

Beside = Callable[[Mapping[str, LanguageModel], Tensor, Tensor], Mapping[str, Call]]


def step_times(
    study: Session,
    arms: Mapping[str, Arm],
    repeats: int,
    *,
    name: str = "times",
    beside: Beside = lambda *_: {},
) -> dict[str, list[float]]:
    """By arm, milliseconds of a training step on the text's first batch, in every round of ``repeats``.

    A grid of one point: with several workers one of them measures, with the threads that each has while all train, and the
    others rest. What was measured is kept under ``name``.

    Args:
        beside: other calls for the same rounds, made of the arms' models and the batch (x, y).
    """

    def work() -> dict[str, Any]:
        device, text = study.accelerator.device, study.text
        x, y = (t.to(device) for t in text.first_batch(text.batch_size))
        made: dict[str, LanguageModel] = {}
        with torch.random.fork_rng():
            for own, arm in arms.items():
                torch.manual_seed(study.config.seeds[0])
                made[own] = arm.build(text.vocab_size).to(device).train()
            step_of = functools.partial(
                training_step, x=x, y=y, accelerator=study.accelerator, clip=study.config.clip
            )
            calls = {own: Call(step_of(model)) for own, model in made.items()}
            calls |= beside(made, x, y)
            threads = torch.get_num_threads()
            at_once = workers.number(study.config, len(arms) * len(study.config.seeds))
            if study.accelerator.num_processes == 1:
                torch.set_num_threads(max(1, min(threads, workers.cores() // at_once)))
            try:
                taken = time_arms(calls, repeats, SECONDS, device.type)
            finally:
                torch.set_num_threads(threads)
        return {"milliseconds": {own: [1e3 * s for s in cell["total"]] for own, cell in taken.items()}}

    def measure(place: str, measured: str) -> dict[str, Any]:
        path = study.folder / place / "result.json"
        return broadcast(
            study.accelerator, kept_result(path, work, {"milliseconds": dict}) if study.is_main else None
        )

    (found,) = study.grid({"measured": ["steps"]}, measure, name=f"{INTERNALS}/{name}", across_machines=False)
    return found["milliseconds"]


def at_equal_seconds(
    own: Sequence[Trial], others: Sequence[Trial], step: Sequence[float], any_of: int = 1
) -> dict[str, Any]:
    """The validation loss of an arm minus that of its control when both have trained as long, a row of ``verdicts``'s kind
    without its names, with "step_ratio": an earlier moment of its own run, between two evaluations on a line in the logarithm
    of the steps; None before the first one. It is a shorter training only where the learning rate does not fall.

    Args:
        own, others: finished trials of the arm and of its control.
        step: the seconds of the arm's training step over the control's, by round of timing.
    """
    cost = Perplexity.over_seeds(step)
    ends = {t["seed"]: t["epochs"][-1]["val_loss"] for t in others}
    losses = {t["seed"]: _loss_after(t["epochs"], len(t["epochs"]) / cost.mean) for t in own}
    known = bool(ends) and ends.keys() <= losses.keys() and None not in losses.values()
    mean, half = interval95([losses[s] - end for s, end in ends.items()], any_of) if known else (None, None)
    row: dict[str, Any] = {"loss_difference": mean}
    row |= dict.fromkeys(("low", "high")) if half is None else {"low": mean - half, "high": mean + half}
    row |= {"any_of": any_of, "verdict": "" if known else "not scored that early, or a seed diverged"}
    return row | {"step_ratio": cost.mean, "step_ratio_low": cost.low, "step_ratio_high": cost.high}


def _loss_after(epochs: Sequence[Mapping[str, Any]], passes: float) -> float | None:
    whole = min(int(passes), len(epochs))
    if whole == len(epochs) or whole < 1:
        return epochs[-1]["val_loss"] if whole else None
    here, after = (epochs[k]["val_loss"] for k in (whole - 1, whole))
    return here + (after - here) * math.log(passes / whole) / math.log((whole + 1) / whole)
