"""What a model gains from its context: perplexity with the mixer off, and at short windows of the same targets.

Two ways to take the context away from a trained model, both without training it again:

- mixer off: every mixer's features are replaced by their mean over all positions of the text, so no position hears of
  another (``LanguageModel.without_mixing``). What only the disturbance costs counts as gain here.
- windows of one token: the same targets, each predicted from the token before it alone.

The gain is the smaller of the two: a model that is as good in either way does not need its context. A bigram model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from bklm.models import LanguageModel
from bklm.training.evaluation import evaluate, without_padding

BIGRAM_GAIN = 0.002  # a smaller gain is none
WINDOW_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def short_lengths(window: int) -> list[int]:
    """Lengths of windows for a model trained with ``window``: powers of two below it, up to 64, and that one."""
    return [length for length in WINDOW_LENGTHS if length < min(window, 128)] + [window]


Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ContextGain:
    """Validation perplexities of one model; None where there is no such measurement.

    ``by_window`` is by window length, all over the same targets: those of ``windows_of``, which need not be those of the
    other two. None for a length that the model or the text does not have.
    """

    perplexity: float
    mixer_off: float | None
    by_window: dict[int, float | None]
    window: int  # length trained with

    @property
    def gain(self) -> float | None:
        """Share by which context lowers the perplexity, see ``relative_gain``."""
        return relative_gain(self.perplexity, self.mixer_off, self.by_window, self.window)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with ``gain``."""
        return {**asdict(self), "gain": self.gain}

    def record(self) -> dict[str, Any]:
        """The same under the names that a trial's record has for it."""
        return {"context_gain": self.gain, "windows": self.to_dict()}


def relative_gain(
    perplexity: float, mixer_off: float | None, by_window: dict[int, float | None], window: int
) -> float | None:
    """1 - PPL with context / PPL without, for the better of the two ways to be without; None where neither was measured.

    With context: ``perplexity`` beside ``mixer_off``, and beside windows of one the longest measured window that is no
    longer than ``window``, the length trained with.
    """
    gains = [] if mixer_off is None else [1 - perplexity / mixer_off]
    whole = [n for n, value in by_window.items() if 1 < n <= window and value is not None]
    if by_window.get(1) is not None and whole:
        gains.append(1 - by_window[max(whole)] / by_window[1])
    return min(gains, default=None)


def gain_in_words(gain: float | None) -> str:
    """A gain for people: what it is, and what the model is where it is less than 0.2% either way."""
    if gain is None:
        return "not measured"
    if gain < -BIGRAM_GAIN:
        return f"{gain:.1%}: no gain"
    return f"{gain:.2%}: a bigram model" if gain < BIGRAM_GAIN else f"{gain:.1%}"


def measure_context_gain(
    model: LanguageModel,
    batches: Batches,
    unk_id: int | None,
    *,
    windows_of: Callable[[int], Batches | None],
    window: int,
    lengths: Sequence[int] = WINDOW_LENGTHS,
    accelerator: Accelerator | None = None,
) -> ContextGain:
    """Measure a trained model; it is left as it was.

    Args:
        batches: the split, (x, y) as for ``evaluate``; gone over up to three times.
        windows_of: batches of windows of a length, the same targets for every length; None where there are none.
        window: the length trained with.
        lengths: of windows; one that the model has no positions for is None.
        accelerator: when its processes evaluate together, as for ``evaluate``.

    Raises:
        ValueError: there is no target to score.
    """

    def perplexity(found: Batches) -> float:
        return evaluate(model, found, unk_id, accelerator).perplexity

    off = None
    if model.mixing_points():
        # Each process runs over all rows: the means are then the same bits in each.
        with model.recording_mixing() as recorded:
            evaluate(model, (rows for x, y in batches for rows in without_padding(x, y)), unk_id)
        with model.without_mixing(recorded.means()):
            off = perplexity(batches)
    by_window: dict[int, float | None] = {}
    for length in lengths:
        found = windows_of(length) if model.n_seq is None or length <= model.n_seq else None
        by_window[length] = None if found is None else perplexity(found)
    return ContextGain(perplexity(batches), off, by_window, window)
