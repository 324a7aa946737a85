"""Token-weighted evaluation: every target of a split scored once, whatever the batches and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from bklm.data import IGNORED
from bklm.models import LanguageModel
from bklm.models.modes import evaluating
from bklm.training.processes import rows_of_this_process, sum_over_processes

LARGEST_PERPLEXITY = math.exp(700.0)  # 1e304; it stands for anything larger, which a double could not hold


@dataclass(frozen=True)
class Evaluation:
    """Sums over every target of a split; the means follow. ``nll`` in nats.

    A perplexity above ``LARGEST_PERPLEXITY``, e^700, is given as that number.
    """

    nll: float
    tokens: int
    correct: int
    known_nll: float  # the same over targets that are not <unk>
    known_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a target, in nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return _exp(self.loss)

    @property
    def perplexity_without_unk(self) -> float:
        """That of the targets that are not <unk>, which the model still may predict."""
        return _exp(self.known_nll / self.known_tokens)

    @property
    def accuracy(self) -> float:
        """Share of all targets that were the likeliest token."""
        return self.correct / self.tokens

    def record(self) -> dict[str, float]:
        """The means under the names that a trial's record has for its validation split."""
        return {
            "val_ppl": self.perplexity,
            "val_ppl_without_unk": self.perplexity_without_unk,
            "val_accuracy": self.accuracy,
        }


def _exp(loss: float) -> float:
    return LARGEST_PERPLEXITY if loss > 700.0 else math.exp(loss)


def _scores(model: LanguageModel, x: Tensor, y: Tensor, unk_id: int | None) -> Tensor:
    """The fields of ``Evaluation`` for these rows, (5,) float64."""
    nll, correct = model.token_losses(x, y)
    valid = y != IGNORED
    known = valid if unk_id is None else valid & (y != unk_id)
    nll = nll.double()
    return torch.stack(
        [
            nll[valid].sum(),
            valid.sum().double(),
            (correct & valid).sum().double(),
            nll[known].sum(),
            known.sum().double(),
        ]
    )


def without_padding(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows up to their last target, those of one length together: the padding behind it is no text. A model that sees
    the future would read it, and what is counted over positions would count it."""
    places = torch.arange(1, y.shape[1] + 1, device=y.device)
    lengths = torch.where(y != IGNORED, places, 0).amax(1)
    for length in lengths.unique().tolist():
        if length:
            rows = lengths == length
            yield x[rows, :length], y[rows, :length]


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    unk_id: int | None,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Score every target of ``batches`` (x, y of shape (B, N), y = -100 where masked) once, in evaluation mode.

    A model that sees the future is shown each row up to its last target only. Numbers are computed in the weights' dtype:
    there is no autocast here, whatever the precision of the training.

    Args:
        accelerator: when its processes evaluate together: each scores its rows of every batch, and all get the sums.

    Raises:
        ValueError: there is no target to score, or every one is <unk>.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    with evaluating(model):
        for x, y in batches:
            if accelerator is not None:
                x, y = rows_of_this_process(accelerator, x, y)
            if len(x) == 0:
                continue
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            for part_x, part_y in without_padding(x, y) if model.sees_future else [(x, y)]:
                sums += _scores(model, part_x, part_y, unk_id)
    if accelerator is not None:
        sum_over_processes(accelerator, sums)
    nll_sum, tokens, right, known_nll, known_tokens = sums.tolist()
    if tokens == 0:
        raise ValueError("evaluation: no target to score; every one is masked or the split is empty.")
    if known_tokens == 0:
        raise ValueError(
            f"evaluation: each of the {tokens:.0f} targets is <unk>, so there is no perplexity of known words; take a larger "
            "vocabulary or another text."
        )
    return Evaluation(nll_sum, int(tokens), int(right), known_nll, int(known_tokens))
