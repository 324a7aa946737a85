"""Token-weighted evaluation: every target of a split scored once, whatever the batches and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from bklm.models import LanguageModel
from bklm.training.processes import add_up, own_rows

LARGEST_PERPLEXITY = math.exp(700.0)  # 1e304; it stands for anything larger, which a double could not hold


@dataclass(frozen=True)
class Evaluation:
    """Sums over every target of a split; the means follow. ``nll`` in nats."""

    nll: float
    tokens: int
    correct: int
    known_nll: float  # the same over targets that are not <unk>
    known_tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def perplexity_without_unk(self) -> float:
        return _exp(self.known_nll / self.known_tokens)

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def _exp(loss: float) -> float:
    return LARGEST_PERPLEXITY if loss > 700.0 else math.exp(loss)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    unk_id: int | None,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Score every target of ``batches`` (x, y of shape (B, N), y = -100 where masked) once, in evaluation mode.

    Args:
        accelerator: when its processes evaluate together: each scores its rows of every batch, and all get the sums.

    Raises:
        ValueError: there is no target to score, or every one is <unk>.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for x, y in batches:
        if accelerator is not None:
            x, y = own_rows(accelerator, x, y)
        if len(x) == 0:
            continue
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        nll, correct = model.token_losses(x, y)
        valid = y != -100
        known = valid if unk_id is None else valid & (y != unk_id)
        nll = nll.double()
        sums += torch.stack(
            [
                nll[valid].sum(),
                valid.sum().double(),
                (correct & valid).sum().double(),
                nll[known].sum(),
                known.sum().double(),
            ]
        )
    model.train(was_training)
    if accelerator is not None:
        add_up(accelerator, sums)
    nll_sum, tokens, right, known_nll, known_tokens = sums.tolist()
    if tokens == 0:
        raise ValueError("evaluation: no target to score; every one is masked or the split is empty.")
    if known_tokens == 0:
        raise ValueError(
            f"evaluation: each of the {tokens:.0f} targets is <unk>, so there is no perplexity of known words; take a larger "
            "vocabulary or another text."
        )
    return Evaluation(nll_sum, int(tokens), int(right), known_nll, int(known_tokens))
