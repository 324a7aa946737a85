"""What the integration study measures beside trainings: milliseconds of every arm's step, in turns, and the head's share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bklm.compression import baked, file_sizes
from bklm.compression.coded_model import outer_names
from bklm.files.atomic import kept_result
from bklm.harness.arms import Arm
from bklm.harness.folder import INTERNALS
from bklm.harness.measure import Arm as Call
from bklm.harness.session import Session
from bklm.harness.step_times import step_times as time_steps
from bklm.models import LanguageModel, linear_cross_entropy
from bklm.training.auxiliary import without_term
from bklm.training.context_gain import measure_context_gain, short_lengths
from bklm.training.evaluation import evaluate

HEAD = "head alone"


def step_times(study: Session, arms: Mapping[str, Arm], plain: str, name: str = "times") -> dict[str, Any]:
    """By arm, milliseconds of a training step in every round, and of the plain arm's head; its parameters' outer share."""

    def head(made: Mapping[str, LanguageModel], x: torch.Tensor, y: torch.Tensor) -> dict[str, Call]:
        return {HEAD: Call(_head(study, made[plain], x, y))}

    taken = time_steps(study, arms, study.config.repeats, name=name, beside=head)
    with torch.device("meta"):
        model = arms[plain].build(study.text.vocab_size)
    outer = outer_names(model)
    share = sum(p.numel() for n, p in model.named_parameters() if n in outer)
    return {"milliseconds": taken, "outer_parameter_share": share / model.num_parameters()}


def with_later(
    first: dict[str, list[float]], later: dict[str, list[float]], arm: str, plain: str
) -> dict[str, list[float]]:
    """Milliseconds of an arm that was measured later, in the plain arm's of the first time: their ratio is what counts."""
    rounds = zip(first[plain], later[arm], later[plain], strict=False)
    return first | {arm: [before * own / other for before, own, other in rounds]}


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


def first_losses(study: Session, arms: Mapping[str, Arm], name: str) -> dict[str, dict[str, float]]:
    """By arm and seed (as a word), the validation loss before the first step; kept under ``name``."""
    text, device = study.text, study.accelerator.device

    def loss(arm: Arm, seed: int) -> float:
        torch.manual_seed(seed)
        return evaluate(arm.build(text.vocab_size).to(device), text.val_loader(), text.unk_id).loss

    def work() -> dict[str, Any]:
        with torch.random.fork_rng():
            return {
                "losses": {n: {str(s): loss(arm, s) for s in study.config.seeds} for n, arm in arms.items()}
            }

    return kept_result(study.folder / INTERNALS / f"{name}.json", work, {"losses": dict})["losses"]


def of_models(text: Any) -> Any:
    """What is recorded of a trained model: its score on the whole split, its gain from context, its size without its terms,
    and what it takes to build it anew."""
    steps = len(text.train_loader(seed=0))

    def found(model: LanguageModel) -> dict[str, Any]:
        score = evaluate(model, text.whole_val_loader(), text.unk_id)
        gained = measure_context_gain(
            model, text.val_loader(), text.unk_id, windows_of=lambda n: text.context_loader(n, text.scored),
            window=text.seq_len, lengths=short_lengths(text.seq_len),
        )  # fmt: skip
        alone = without_term(baked(model))
        return {
            **score.record(), "vocabulary": text.vocab_size, **gained.record(),
            "logit_parameters": alone.num_parameters(), "bytes": file_sizes(alone)[0], "steps_per_score": steps,
        }  # fmt: skip

    return found
