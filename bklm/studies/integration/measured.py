"""What the integration study measures beside trainings: milliseconds of every arm's step, in turns, and the head's share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bklm.compression.coded_model import outer_names
from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm
from bklm.harness.folder import INTERNALS
from bklm.harness.measure import Arm as Call
from bklm.harness.measure import time_arms
from bklm.harness.session import Session
from bklm.models import LanguageModel, linear_cross_entropy
from bklm.training.context_gain import measure_context_gain
from bklm.training.processes import broadcast

SECONDS = 30.0  # of timing an arm, at most
HEAD = "head alone"
KEYS = {"milliseconds": dict, "outer_parameter_share": float}


def step_times(study: Session, arms: Mapping[str, Arm], plain: str, name: str = "times") -> dict[str, Any]:
    """By arm, milliseconds of a training step in every round, and of the plain arm's head alone; its parameters' outer share.

    A grid of one point: with several workers one of them measures, and the others rest. What was measured is kept under
    ``name``.
    """

    def measure(place: str, measured: str) -> dict[str, Any]:
        found = None
        if study.is_main:
            found = kept_result(study.folder / place / "result.json", lambda: _time(study, arms, plain), KEYS)
        return broadcast(study.accelerator, found)

    place = f"{INTERNALS}/{name}"
    (found,) = study.grid({"measured": ["steps"]}, measure, name=place, across_machines=False)
    return found


def with_later(
    first: dict[str, list[float]], later: dict[str, list[float]], arm: str, plain: str
) -> dict[str, list[float]]:
    """Milliseconds of an arm that was measured later, in the plain arm's of the first time: their ratio is what counts."""
    rounds = zip(first[plain], later[arm], later[plain], strict=False)
    return first | {arm: [before * own / other for before, own, other in rounds]}


def _time(study: Session, arms: Mapping[str, Arm], plain: str) -> dict[str, Any]:
    device, text = study.accelerator.device, study.text
    x, y = (t.to(device) for t in text.first_batch(text.batch_size))
    made: dict[str, LanguageModel] = {}
    with torch.random.fork_rng():
        for name, arm in arms.items():
            torch.manual_seed(study.config.seeds[0])
            made[name] = arm.build(text.vocab_size).to(device).train()
        calls = {name: Call(_step(study, model, x, y)) for name, model in made.items()}
        calls[HEAD] = Call(_head(study, made[plain], x, y))
        taken = time_arms(calls, study.config.repeats, SECONDS, device.type)
    outer = outer_names(made[plain])
    share = sum(p.numel() for n, p in made[plain].named_parameters() if n in outer)
    return {
        "milliseconds": {name: [1e3 * s for s in cell["total"]] for name, cell in taken.items()},
        "outer_parameter_share": share / made[plain].num_parameters(),
    }


def _step(study: Session, model: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=min(study.config.learning_rates), fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with study.accelerator.autocast():
            loss = model.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), study.config.clip)
        optimizer.step()
        return loss.detach()

    return step


def _head(study: Session, model: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The product of hidden states and head, its loss, and the gradients of both."""
    with torch.no_grad():
        states = model.hidden(x)

    def head() -> torch.Tensor:
        hidden = states.requires_grad_()
        hidden.grad = None
        with study.accelerator.autocast():
            loss = linear_cross_entropy(hidden, *model.head(), y)
        loss.backward()
        return loss.detach()

    return head


def of_models(text: Any) -> Any:
    """What is recorded of a trained model: its gain from context, and what it takes to build it anew."""
    steps = len(text.train_loader(seed=0))

    def found(model: LanguageModel) -> dict[str, Any]:
        gained = measure_context_gain(
            model, text.val_loader(), text.unk_id, windows_of=lambda n: None, window=text.seq_len, lengths=()
        )
        return {"vocabulary": text.vocab_size, "context_gain": gained.gain, "steps_per_score": steps}

    return found
