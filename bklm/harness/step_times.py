"""Milliseconds of a training step of arms, in turns: what their trainings cost on an equal machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm
from bklm.harness.folder import INTERNALS
from bklm.harness.measure import Arm as Call
from bklm.harness.measure import time_arms
from bklm.harness.session import Session
from bklm.models import LanguageModel
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

    A grid of one point: with several workers one of them measures, and the others rest. What was measured is kept under
    ``name``.

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
            calls = {own: Call(_step(study, model, x, y)) for own, model in made.items()}
            taken = time_arms({**calls, **beside(made, x, y)}, repeats, SECONDS, device.type)
        return {"milliseconds": {own: [1e3 * s for s in cell["total"]] for own, cell in taken.items()}}

    def measure(place: str, measured: str) -> dict[str, Any]:
        path = study.folder / place / "result.json"
        return broadcast(
            study.accelerator, kept_result(path, work, {"milliseconds": dict}) if study.is_main else None
        )

    (found,) = study.grid({"measured": ["steps"]}, measure, name=f"{INTERNALS}/{name}", across_machines=False)
    return found["milliseconds"]


def _step(study: Session, model: LanguageModel, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with study.accelerator.autocast():
            loss = model.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), study.config.clip)
        optimizer.step()
        return loss.detach()

    return step
