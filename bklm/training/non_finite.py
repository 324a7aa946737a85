"""Steps with an infinite or NaN number: they end the run, or a loss scaler skips them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from bklm.moe.analytic import NonFiniteRouterError
from bklm.training.processes import sum_over_processes

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_SKIPPED = 20  # steps in a row; the scaler halves its factor at each, a millionth is then no help any more


class NonFiniteError(RuntimeError):
    """The loss or its gradient became infinite or NaN; the message names the run, the step and the last good checkpoint.

    ``what`` is its first part, the run and the step alone: what remains true when the checkpoint is gone.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what + advice)
        self.what = what


def repeated_once(attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns; where it meets a non-finite number, it is called once more.

    Trainings repeat bit for bit from a checkpoint: a divergence comes back, a fault of the moment does not, and leaves no
    trace in the numbers.

    Raises:
        NonFiniteError: of the second attempt.
    """
    try:
        return attempt()
    except NonFiniteError as error:
        log.warning("%s; it is repeated, to tell a divergence from a fault of the moment.", error.what)
    return attempt()


class FiniteCheck:
    """Looks at the losses and gradient norms of one run.

    With a loss scaler (fp16) an infinite gradient is no failure: the scaler skips that step and takes a smaller factor, as
    it always does in the first steps. Then the loss alone must be finite, and no more than ``MOST_SKIPPED`` steps in a row
    may be skipped.
    """

    def __init__(self, accelerator: Accelerator, label: str) -> None:
        self.accelerator, self.label = accelerator, label
        self.has_scaler = accelerator.scaler is not None
        self.skipped_in_a_row = 0

    def is_skipped(self, norm: Tensor, step: int, good: Path | None) -> bool:
        """Whether the scaler skips ``step``, whose gradient has this unscaled norm; the same in every process.

        Accelerate's ``step_was_skipped`` cannot tell: a fused optimiser skips inside its own kernel.

        Raises:
            NonFiniteError: too many in a row.
        """
        if not self.has_scaler or torch.isfinite(norm):
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MOST_SKIPPED:
            raise NonFiniteError(
                f"{self.label}: the gradient was infinite or NaN in {self.skipped_in_a_row} steps in a row, up to step "
                f"{step}, and no smaller loss scale helped",
                f"; {_where(good)}. {_REMEDIES}",
            )
        return True

    def require_finite(
        self, losses: list[Tensor], norms: list[Tensor], last_step: int, good: Path | None
    ) -> None:
        """Refuse a non-finite loss, without a scaler also a non-finite norm, of the steps that end with ``last_step``.

        Raises:
            NonFiniteError: naming the first bad step.
        """
        # A loss may be bad in one process only; all of them must stop, or the others would wait for it.
        shown = sum_over_processes(self.accelerator, torch.stack(losses).float())
        values = torch.stack([shown, torch.stack(norms).float()])
        bad = (~torch.isfinite(values[:1] if self.has_scaler else values)).any(dim=0)
        if not bool(bad.any()):
            return
        first = int(bad.nonzero()[0])
        loss, norm = (float(v) for v in values[:, first])
        raise NonFiniteError(
            f"{self.label}: at step {last_step - len(losses) + 1 + first} the loss was {loss:g} and the gradient norm "
            f"{norm:g}",
            f"; {_where(good)}. {_REMEDIES}",
        )

    @contextlib.contextmanager
    def in_experts(self, epoch: int, good: Path | None) -> Iterator[None]:
        """A mixture layer notices before the loss does; its refusal then names the run, too."""
        try:
            yield
        except NonFiniteRouterError as error:
            what = f"{self.label}: in epoch {epoch} {error}"
            raise NonFiniteError(what, f"; {_where(good)}.") from error

    def require_finite_score(self, loss: float, epoch: int, good: Path | None) -> None:
        """Refuse a validation loss that is infinite or NaN: no perplexity could be recorded for it.

        Raises:
            NonFiniteError: it is.
        """
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self.label}: the validation loss after epoch {epoch} was {loss:g}",
                f"; {_where(good)}. {_REMEDIES}",
            )


_REMEDIES = "A lower learning rate, a smaller clip or fp32 are the usual remedies."


def _where(good: Path | None) -> str:
    return f"the last good checkpoint is {good if good else 'none: it was the first epoch'}"
