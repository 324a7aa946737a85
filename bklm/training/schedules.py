"""What changes over a run: the learning rate by step, the clipping norm by epoch, and when to stop early."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real

SCHEDULES = ("constant", "cosine")
ClipSchedule = tuple[tuple[int, float], ...]  # (first epoch, largest global gradient norm from there on)

_STAGE = re.compile(r"\s*([0-9.eE+-]+)\s*@\s*(\d+)\s*")


def parse_clip(text: str) -> ClipSchedule:
    """Read a schedule of clipping norms: "0.5@1, 1@11, 2@31" is 0.5 from epoch 1, 1 from epoch 11, 2 from epoch 31.

    A number alone holds for the whole run. "0.5" is the same as "0.5@1".

    Raises:
        ValueError: not of that form, a norm that is not positive, epochs that do not begin with 1 or do not increase.
    """
    stages = []
    for part in str(text).split(","):
        match = _STAGE.fullmatch(part if "@" in part else f"{part}@1")
        try:
            stage = (int(match.group(2)), float(match.group(1))) if match else None
        except ValueError:
            stage = None
        stages.append(stage)
    if None in stages or not _are_stages(stages):
        raise ValueError(
            f"clip: got {text!r}; give one positive norm such as 0.5, or NORM@EPOCH stages that begin at epoch 1 and "
            "go up, such as 0.5@1, 1@11, 2@31."
        )
    return tuple(stages)


def _are_stages(stages: Sequence[tuple[int, float]]) -> bool:
    """Whether epochs begin with 1 and go up, and norms are positive."""
    epochs = [epoch for epoch, _ in stages]
    goes_up = epochs[:1] == [1] and all(a < b for a, b in pairwise(epochs))
    return goes_up and all(isinstance(norm, Real) and 0 < norm < math.inf for _, norm in stages)


@dataclass(frozen=True)
class TrainingSettings:
    """How one model is trained.

    ``clip`` is the largest global gradient norm, one number or a ``ClipSchedule``. ``schedule`` "cosine" decays the learning
    rate to zero after ``warmup`` (a fraction of all steps) of linear warm-up. Training ends early when the validation loss
    has not fallen by more than ``min_delta`` for ``patience`` epochs (None: never). A batch is worked through in
    ``accumulate`` parts, which saves memory and changes nothing but rounding, random draws (dropout, router noise) and, with
    a load-balancing loss, that loss: it is a product of averages over tokens, taken over each part for itself.

    Raises:
        TypeError, ValueError: a field outside what is allowed, named with its value.
    """

    epochs: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float | ClipSchedule = 0.5
    schedule: str = "constant"
    warmup: float = 0.05
    seed: int = 0
    patience: int | None = None
    min_delta: float = 1e-3
    accumulate: int = 1

    def __post_init__(self) -> None:
        _require(self, "epochs", 1, "a run has 1 or more epochs")
        if self.patience is not None:
            _require(self, "patience", 1, "allowed is 1 or more epochs, or None to never stop early")
        _require(self, "accumulate", 1, "a batch is worked through in 1 or more parts")
        _require(self, "seed", -math.inf, "a whole number is needed")
        _require(self, "learning_rate", 0.0, "a finite number of 0 or more is needed", kind=Real)
        _require(self, "weight_decay", 0.0, "a finite number of 0 or more is needed", kind=Real)
        _require(self, "min_delta", -math.inf, "a finite number is needed", kind=Real)
        _require(self, "warmup", 0.0, "a fraction of all steps, 0 to 1, is needed", kind=Real, most=1.0)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}; allowed are 'constant' and 'cosine'.")
        is_schedule = isinstance(self.clip, tuple)
        if is_schedule and not _are_stages(self.clip):
            raise ValueError(
                f"clip: got {self.clip!r}; give one positive norm, or (epoch, norm) stages that begin at epoch 1 and go up."
            )
        if not is_schedule and not (isinstance(self.clip, Real) and self.clip > 0):
            raise ValueError(f"clip: got {self.clip!r}; gradient norms must be positive numbers.")
        last = self.clip[-1][0] if is_schedule else 1
        if last > self.epochs:
            raise ValueError(
                f"clip: the schedule's last stage begins at epoch {last}, but the run has {self.epochs} epochs; "
                "drop that stage or train longer."
            )

    def clip_at(self, epoch: int) -> float:
        """The largest gradient norm in ``epoch`` (from 1)."""
        if not isinstance(self.clip, tuple):
            return self.clip
        return next(norm for first, norm in reversed(self.clip) if epoch >= first)


def _require(
    settings: TrainingSettings,
    name: str,
    least: float,
    what: str,
    *,
    kind: type = Integral,
    most: float = math.inf,
) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: got {value!r}; {what}.")
    if not (least <= value <= most and abs(value) < math.inf):
        raise ValueError(f"{name}: got {value}; {what}.")


def learning_rate_factor(settings: TrainingSettings, total: int) -> Callable[[int], float]:
    """What multiplies the learning rate at each step (from 0) of ``total``."""
    if settings.schedule == "constant":
        return lambda step: 1.0
    warmup = max(1, round(settings.warmup * total))

    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return cosine


def epochs_without_improvement(losses: Sequence[float], min_delta: float) -> int:
    """Epochs since the loss last fell by more than ``min_delta`` below the lowest one before."""
    best, since = math.inf, 0
    for loss in losses:
        if loss < best - min_delta:
            best, since = loss, 0
        else:
            since += 1
    return since
