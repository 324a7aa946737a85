"""Distillation: a student that learns the text and what a teacher makes of it (Hinton et al. 2015).

    loss = a T^2 KL(p_T || p_S) + (1 - a) CE,   p = softmax(logits / T)

a mean over the targets that are scored. The control is the same student from the text alone, at equal steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bklm.compression.coded_model import like, model_of, put
from bklm.models import LanguageModel, TokenLosses
from bklm.models.checks import is_without_numbers
from bklm.models.loss import scored_targets
from bklm.models.wrapped import Wrapped
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings

ROWS_AT_ONCE = 512  # of two vocabularies of logits


class Distilled(Wrapped):
    """A student whose training loss is the one above; it is scored and generates as itself.

    The teacher is no part of it: its weights are in no checkpoint and no count, and it learns nothing. It is used as it is
    and not copied: it is in evaluation mode from then on, and moves to the device of the ids.

    Raises:
        ValueError: a temperature that is not positive, a weight outside 0 to 1, another vocabulary, or one model for both; in
            training, windows that are longer than the teacher reads.
    """

    loss_is_likelihood = False

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel, temperature: float = 2.0, weight: float = 0.7
    ) -> None:
        super().__init__(student)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature: got {temperature}; it must be positive and finite.")
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight: got {weight}; the teacher's share of the loss lies between 0 and 1.")
        if student is teacher:
            raise ValueError(
                "student: it is the teacher itself, which would learn from what it just said; give another model, or a copy."
            )
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"student: it has {student.vocab_size} words and the teacher {teacher.vocab_size}; both must read the same "
                "vocabulary."
            )
        self.temperature, self.weight = temperature, weight
        self._teacher = (teacher.eval(),)

    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        if not self.training:
            return self.model.loss(input_ids, targets, reduction=reduction)
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        (teacher,) = self._teacher
        if teacher.n_seq is not None and input_ids.shape[1] > teacher.n_seq:
            raise ValueError(
                f"input_ids: got {input_ids.shape[1]} positions, but the teacher has n_seq = {teacher.n_seq}; train the "
                "student on windows of that length: it goes on beyond them by itself."
            )
        if is_without_numbers(targets):
            raise RuntimeError(
                "Distilled: this loss takes the rows that are scored by their numbers, and torch.func, torch.export, a tracer "
                "or tensors without values give none; call eval() before, or take the student, model.model."
            )
        scored, count = scored_targets(targets.flatten(), reduction)
        teacher = teacher.to(input_ids.device)
        own = self.model.hidden(input_ids).flatten(0, 1)[scored]
        with torch.no_grad():
            told = teacher.hidden(input_ids).flatten(0, 1)[scored]
        wanted = targets.flatten()[scored]
        parts = zip(*(t.split(ROWS_AT_ONCE) for t in (own, told, wanted)), strict=True)
        # Two vocabularies of logits a target are computed again in the backward rather than kept.
        total = sum(checkpoint(self._part, *part, use_reentrant=False) for part in parts)
        value = total / count if reduction == "mean" else total
        extra = self.model.auxiliary_loss()
        return value if extra is None else value + (extra if reduction == "mean" else extra * count)

    def _part(self, own: Tensor, told: Tensor, wanted: Tensor) -> Tensor:
        """The summed loss of some targets."""
        logits = self.model.logits(own).float()
        with torch.no_grad():
            soft = F.log_softmax(self._teacher[0].logits(told).float() / self.temperature, -1)
        near = F.kl_div(F.log_softmax(logits / self.temperature, -1), soft, reduction="sum", log_target=True)
        hard = F.cross_entropy(logits, wanted, reduction="sum")
        return self.weight * self.temperature**2 * near + (1 - self.weight) * hard

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        return self.model.token_losses(input_ids, targets)


def distil(
    teacher: Any,
    student: LanguageModel,
    train_batches: Any,
    val_batches: Any,
    settings: TrainingSettings,
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
    accelerator: Any = None,
) -> Any:
    """Train a student of a language model, or of a run of ``bklm.load``, and return it: trained in place, in evaluation mode.

    The teacher comes back to its device and stays in evaluation mode.

    Args:
        teacher: the trained model or run; of a run the result is a run with the student as its model.
        student: an untrained model of the same vocabulary, such as one of ``narrower(teacher.config, 0.5)``.
        train_batches, val_batches, settings: as ``bklm.training.train`` takes them; the control is the same call there.
        accelerator: an ``accelerate.Accelerator``; a new one by default.

    Raises:
        TypeError, ValueError: as ``Distilled`` and ``train``.
    """
    from accelerate import Accelerator

    plain, own = model_of(teacher, "distil"), model_of(student, "distil")
    device = next(plain.parameters()).device
    try:
        train(
            Distilled(own, plain, temperature, weight), train_batches, val_batches, settings,
            accelerator=accelerator or Accelerator(), label="student",
        )  # fmt: skip
    finally:
        plain.to(device)
    put(own.cpu().eval(), {})
    return like(teacher, own)
