"""What every language model here can do, on top of two things a model supplies: hidden states and an output
head.

A model that never sees the future also steps: ``init_state`` and ``step`` carry a state of constant size per
layer from token to token, and ``generate`` then costs the same at position 100,000 as at 100. One that does see
it generates by running its whole window again for each token: correct, but slow.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bklm.data.loaders import IGNORED
from bklm.models.checks import values_at_hand
from bklm.models.loss import TokenLosses, linear_cross_entropy, linear_token_losses
from bklm.models.mixing import MixingMeans, MixingPoint, recording, replacing
from bklm.models.modes import evaluating
from bklm.moe.products import linear


class LanguageModel(nn.Module):
    """Base class. Token ids are int64 (B, N) in [0, vocab_size); logits are (B, N, vocab_size).

    A subclass sets ``vocab_size`` and ``n_seq`` (the most positions it has, None for any number), and defines
    ``hidden`` and ``head``. If it streams, it sets ``streams`` and defines ``init_state``, ``prefill`` and
    ``step``. If hidden states depend on later tokens, it sets ``sees_future``: padding is then cut off before scoring.

    Ids are checked for range on a CPU only, and not where torch.func or a compiler is at work: on an accelerator the check
    would wait for the device at every step, and an id out of range stops in the embedding's own device assertion.
    """

    vocab_size: int
    n_seq: int | None = None
    streams: bool = False
    sees_future: bool = False
    # Whether exp of the training loss is a perplexity: not where another model or a further term has a say in it.
    loss_is_likelihood: bool = True

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states (B, N, D), what the head reads."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) or None of the output head; a tied model returns its embedding."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, N, V)."""
        self.check_ids(input_ids)
        return self.logits(self.hidden(input_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return linear(hidden, *self.head())

    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Mean (or "sum") negative log-likelihood in nats of the targets (B, N) that are not -100: a scalar.

        The (B*N, V) logits never exist as a whole, see ``bklm.models.loss``. In training the model's
        ``auxiliary_loss``, if it has one, is added to the mean (times the number of targets: to the sum).

        Raises:
            ValueError, TypeError: ids or targets of a wrong shape, dtype or range; no target left after masking.
        """
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        value = linear_cross_entropy(self.hidden(input_ids), *self.head(), targets, reduction=reduction)
        extra = self.auxiliary_loss() if self.training else None
        if extra is None:
            return value
        return value + (extra if reduction == "mean" else extra * (targets != IGNORED).sum())

    def auxiliary_loss(self) -> Tensor | None:
        """What the last training forward adds to the mean loss per token, such as a load-balancing term; or None."""
        return None

    def parameters_apart(self) -> Sequence[nn.Parameter]:
        """Parameters that no logit depends on, whose gradient is clipped on its own in training."""
        return ()

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        """(nll, correct), each (B, N): the loss of every target in nats and whether it was the likeliest token."""
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        return linear_token_losses(self.hidden(input_ids), *self.head(), targets)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters, a shared one counted once; ``trainable_only``: of those that require a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token, for ``step``."""
        raise TypeError(self._cannot_stream())

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Logits (B, V) after the last token of ``input_ids`` and the state there, all positions at once."""
        raise TypeError(self._cannot_stream())

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One more token (B,): its logits (B, V) and the state after it. The state given is not changed."""
        raise TypeError(self._cannot_stream())

    def state_bytes(self, position: int) -> int:
        """Bytes carried per sequence from ``position`` tokens to the next one, in the model's dtype."""
        raise TypeError(self._cannot_stream())

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt (B, N), N >= 1, by ``max_new_tokens``; returns prompt and continuation, (B, N +
        new).

        Dropout is off while generating. A streaming model reads the prompt once and then spends constant time
        and memory per token; any other runs over everything written so far for each new token.

        Args:
            temperature: divides the logits before sampling; 0 takes the likeliest token.
            generator: source of the draws, on the model's device; torch's global one when None.

        Raises:
            ValueError: an empty prompt, a negative count or temperature, or more than ``n_seq`` positions in
            all. TypeError: a count that is no integer, a temperature that is no number.
        """
        tokens = list(self.stream(input_ids, max_new_tokens, temperature, generator))
        return torch.cat([input_ids, torch.stack(tokens, 1)], 1) if tokens else input_ids.clone()

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of ``generate``, (B,) each, as they are drawn; whoever has seen enough stops asking."""
        self.check_prompt(input_ids)
        batch, length = input_ids.shape
        try:
            max_new_tokens = operator.index(max_new_tokens)
        except TypeError:
            raise TypeError(
                f"max_new_tokens: got {max_new_tokens!r}; it must be an integer, 0 or more."
            ) from None
        if not isinstance(temperature, numbers.Real):
            raise TypeError(f"temperature: got {temperature!r}; it must be 0 (greedy) or a positive number.")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; it must be 0 or more.")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature: got {temperature}; it must be 0 (greedy) or a positive number.")
        if self.n_seq is not None and length + max_new_tokens > self.n_seq:
            raise ValueError(
                f"generate: {length} prompt tokens and {max_new_tokens} new ones make {length + max_new_tokens} positions, "
                f"but this model has n_seq = {self.n_seq}; ask for fewer, or build it with a larger n_seq or with None."
            )
        temperature = float(temperature)
        tokens = input_ids.new_empty(batch, length + max_new_tokens)
        tokens[:, :length] = input_ids
        with evaluating(self):
            state = None
            for position in range(length, length + max_new_tokens):
                if not self.streams:
                    logits = self.logits(self.hidden(tokens[:, :position])[:, -1])
                elif position == length:
                    logits, state = self.prefill(input_ids)
                else:
                    logits, state = self.step(tokens[:, position - 1], state)
                tokens[:, position] = _draw(logits, temperature, generator)
                yield tokens[:, position].clone()

    def mixing_points(self) -> list[MixingPoint]:
        """Where the model's features of other positions pass; none where it has no such place, or does not say."""
        return [module for module in self.modules() if isinstance(module, MixingPoint)]

    @contextlib.contextmanager
    def recording_mixing(self) -> Iterator[MixingMeans]:
        """Within the block, add up every mixer's features over all positions that the model runs over.

        The value's ``means()``, after the block, are what ``without_mixing`` takes. Raises TypeError as that does.
        """
        with recording(self._require_mixing()) as found:
            yield found

    @contextlib.contextmanager
    def without_mixing(self, means: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, every mixer's features are ``means`` at every position: no position hears of another.

        Args:
            means: one vector per mixing point, as ``recording_mixing`` found them.

        Raises:
            TypeError: this model has no features to replace; measure it with windows of one token.
            ValueError: another number of means than mixers.
        """
        with replacing(self._require_mixing(), means):
            yield

    def _require_mixing(self) -> list[MixingPoint]:
        points = self.mixing_points()
        if not points:
            raise TypeError(
                f"without_mixing: {type(self).__name__} has no mixer whose features a mean could replace; its gain from "
                "context is measured with windows of one token."
            )
        return points

    def reset_expert_counts(self, counts: Sequence[Sequence[int]] = ()) -> None:
        """Count tokens per expert anew, from ``counts`` (as ``expert_counts`` gave them); nothing to do without experts."""

    def expert_counts(self) -> list[list[int]]:
        """Tokens each expert has served in training since the last reset, one list per mixture layer."""
        return []

    def check_ids(self, input_ids: Tensor) -> None:
        """Refuse ids of a wrong dtype, rank, length or (on a CPU) range.

        Raises:
            TypeError: not int64. ValueError: the rest.
        """
        if input_ids.dtype != torch.int64:
            raise TypeError(
                f"input_ids: got {input_ids.dtype}; token ids must be int64, for instance ids.long()."
            )
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}; it must be (batch, length).")
        self.check_positions(input_ids.shape[1])
        self._check_range("input_ids", input_ids)

    def check_prompt(self, input_ids: Tensor) -> None:
        """``check_ids``, and refuse a prompt without a token: there is no position whose logits could be given."""
        self.check_ids(input_ids)
        if input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}; a prompt needs at least one token."
            )

    def check_token(self, token: Tensor) -> None:
        """Refuse a step's token that is not (B,), or as ``check_ids`` does."""
        if token.ndim != 1:
            raise ValueError(f"token: got shape {tuple(token.shape)}; it must be (batch,), one id a sequence.")
        self.check_ids(token.unsqueeze(1))

    def check_targets(self, input_ids: Tensor, targets: Tensor) -> None:
        """Refuse targets that do not fit the ids; -100 marks one that is left out."""
        if targets.dtype != torch.int64:
            raise TypeError(
                f"targets: got {targets.dtype}; token ids must be int64, for instance targets.long()."
            )
        if targets.shape != input_ids.shape:
            raise ValueError(
                f"targets: got shape {tuple(targets.shape)}; it must be that of the ids, {tuple(input_ids.shape)}."
            )
        self._check_range("targets", targets, allowed=IGNORED)

    def check_positions(self, length: int) -> None:
        """Refuse more positions than the model has."""
        if self.n_seq is not None and length > self.n_seq:
            raise ValueError(
                f"input_ids: got {length} positions, but this model has n_seq = {self.n_seq}; "
                "cut the text, or build the model with a larger n_seq or with None."
            )

    def _check_range(self, name: str, ids: Tensor, allowed: int | None = None) -> None:
        if ids.numel() == 0 or not values_at_hand(ids):
            return
        bad = (ids < 0) | (ids >= self.vocab_size)
        if allowed is not None:
            bad &= ids != allowed
        if bad.any():
            also = "" if allowed is None else f" (or {allowed} for a target to leave out)"
            raise ValueError(
                f"{name}: got {int(ids[bad][0])}; a vocabulary of {self.vocab_size} has ids "
                f"0 to {self.vocab_size - 1}{also}."
            )

    def _cannot_stream(self) -> str:
        return (
            f"this {type(self).__name__} does not stream: a new token changes what it computed for earlier ones, so it "
            "has no state to carry on; use generate(), or build it causal."
        )


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token (B,) per row of logits (B, V)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float()
    # The maximum is taken off first: a small temperature would divide the logits beyond the range of float32.
    logits = logits - logits.amax(-1, keepdim=True)
    if temperature < torch.finfo(torch.float32).tiny:  # in float32 it would be 0, or nearly
        logits, temperature = logits.double(), max(temperature, torch.finfo(torch.float64).tiny)
    p = torch.softmax(logits / temperature, -1)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)
