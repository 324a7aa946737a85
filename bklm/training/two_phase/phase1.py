"""Phase 1 of the context-token model: the context block learns, without labels, to reach a fixed point.

Every token's context is recomputed in parallel from its left neighbour's context of the iteration before, plus noise:

    c_t' = f(c_{t-1} + noise, x_t),   noise ~ N(0, 0.1)
    loss = 0.5 mean_t MSE(c_t', c_t) - 0.5 ||C' - mean(C')||_F / T

The first term asks that an iteration changes nothing, the second that contexts differ from token to token. One Adam
step an iteration, on the gradient of all tokens; iteration 1 is the sweep along the text that gives the first contexts.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bklm.models import ContextTokenLM
from bklm.training.memory import free_bytes
from bklm.training.two_phase.contexts import checked_ids, corpus_contexts

log = logging.getLogger(__name__)

CHUNK = 2048  # tokens whose activations are held for the gradient at once; noise is drawn chunk by chunk
STAND_INS = ("diversity", "untrained")


@dataclass(frozen=True)
class FixedPointSettings:
    """How the context block is trained; the defaults are the original's.

    Attributes:
        iterations: at most so many, the first sweep counted; at least 2.
        clip: largest global gradient norm.
        noise: standard deviation of what is added to the left neighbour's context.
        threshold, fraction: converged when this fraction of tokens has an MSE below ``threshold``.
        min_iterations: not before this many.
        diversity: weight of the diversity term; the MSE has the rest, 1 - diversity.
        group: tokens over which the diversity is taken; it falls with the square root of their number, which shifts the
            balance of the two terms. None: all tokens at once.
    """

    iterations: int = 10
    learning_rate: float = 2e-3
    clip: float = 1.0
    noise: float = 0.1
    threshold: float = 0.03
    fraction: float = 0.95
    min_iterations: int = 3
    diversity: float = 0.5
    group: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # The first iteration only sweeps: fewer than two would train nothing.
        for name, least in (("iterations", 2), ("min_iterations", 1), ("group", 1)):
            value = getattr(self, name)
            if not (name == "group" and value is None) and not (type(value) is int and value >= least):
                raise ValueError(f"{name}: got {value!r}; it must be a whole number of at least {least}.")
        for name in ("learning_rate", "clip", "threshold"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; it must be a positive, finite number.")
        for name, most in (("noise", math.inf), ("fraction", 1.0), ("diversity", 1.0)):
            if not 0.0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}; it must lie between 0 and {most:g}.")


@dataclass(frozen=True)
class Phase1Result:
    """What phase 1 did.

    Attributes:
        rows: one dict an iteration: iteration, converged (fraction of tokens), loss, mse, diversity (None in the first,
            which only sweeps), effective_rank, effective_rank_centred (fractions of the width), gradient_norm, seconds.
        converged: whether the stopping rule was met.
        steps: Adam steps taken.
        sweep: how the first contexts were found, in words.
    """

    rows: list[dict[str, Any]]
    converged: bool
    steps: int
    sweep: str


def train_context(
    model: ContextTokenLM,
    token_ids: Any,
    settings: FixedPointSettings | None = None,
    *,
    document_starts: Any = None,
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
) -> Phase1Result:
    """Train ``model.context_block`` in place on one text; no other parameter changes or receives a gradient.

    The gradient is that of the loss over all tokens, exactly, whatever fits into memory: contexts are computed once without
    a graph, which gives the loss and its gradient with respect to each of them, and again, chunk by chunk, to carry
    that gradient into the weights.

    Args:
        token_ids: (T,) integers, the training tokens.
        settings: ``FixedPointSettings``; the original's when None.
        document_starts: positions at which the left neighbour's context is zero; the state runs on otherwise.
        on_iteration: called with each row of the result.

    Raises:
        ValueError: the block is frozen, ids out of range, or too little memory for the contexts.
        ArithmeticError: the loss became infinite or NaN.
    """
    settings = settings or FixedPointSettings()
    block = model.context_block
    parameters = list(block.parameters())
    if not all(p.requires_grad for p in parameters):
        raise ValueError(
            "model: its context block is frozen, and phase 1 trains just that; call train_context before freeze_context(), "
            "or model.context_block.requires_grad_(True) first."
        )
    ids, restarts = checked_ids(model, token_ids, document_starts)
    _refuse_if_too_large(model, len(ids))
    began = time.perf_counter()
    first = corpus_contexts(model, ids, document_starts=restarts)
    log.info("phase 1: %s", first)
    contexts, rows, steps, sweep = first.final, [], 0, str(first)
    del first  # it would hold a third (T, D) beside the contexts of two iterations
    rows.append(_row(1, contexts, began))
    if on_iteration is not None:
        on_iteration(rows[0])
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    converged = False
    while not converged and len(rows) < settings.iterations:
        began = time.perf_counter()
        iteration = _Iteration(
            model, ids, restarts, contexts, settings, seed=settings.seed * 1_000_003 + len(rows)
        )
        update = iteration.contexts()
        losses = iteration.losses(update)
        if not math.isfinite(losses["loss"]):
            raise ArithmeticError(
                f"phase 1: in iteration {len(rows) + 1} the loss was {losses['loss']}; "
                "a lower learning rate is the usual remedy."
            )
        optimizer.zero_grad(set_to_none=True)
        iteration.backward(update, parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        optimizer.step()
        steps, contexts = steps + 1, update
        rows.append(_row(len(rows) + 1, contexts, began, **losses, gradient_norm=norm))
        converged = losses["converged"] >= settings.fraction and len(rows) >= settings.min_iterations
        if on_iteration is not None:
            on_iteration(rows[-1])
    optimizer.zero_grad(set_to_none=True)
    block.fixed_point_iterations += len(rows)
    log.info(
        "phase 1: %s after %d iterations, %.1f%% of tokens within the threshold, effective rank %.1f%% (centred %.1f%%)",
        "converged" if converged else "not converged", len(rows), 100 * rows[-1]["converged"],
        100 * rows[-1]["effective_rank"], 100 * rows[-1]["effective_rank_centred"],
    )  # fmt: skip
    return Phase1Result(rows, converged, steps, sweep)


def train_in_its_place(
    model: ContextTokenLM, token_ids: Any, settings: FixedPointSettings, kind: str = ""
) -> Phase1Result:
    """Phase 1 (""), or one of ``STAND_INS`` for it: its second term alone, or nothing but the first sweep, so that phase 2
    takes the block as it was drawn. ValueError: another ``kind``.
    """
    if kind not in ("", *STAND_INS):
        raise ValueError(
            f"kind: got {kind!r}; allowed are '' (phase 1) and {' and '.join(map(repr, STAND_INS))}."
        )
    if kind == "diversity":
        settings = dataclasses.replace(settings, diversity=1.0)
    if kind != "untrained":
        return train_context(model, token_ids, settings)
    began = time.perf_counter()
    first = corpus_contexts(model, checked_ids(model, token_ids, None)[0])
    model.context_block.fixed_point_iterations += 1
    return Phase1Result([_row(1, first.final, began)], False, 0, str(first))


@torch.no_grad()
def effective_rank(contexts: Tensor, centred: bool = False, rows: int = 10_000) -> float:
    """exp(entropy of the singular values normalised to sum 1) / D of contexts (T, D): 1 / D to 1 (Roy and Vetterli 2007).

    Args:
        centred: with the mean context taken off first. Without, one direction shared by all contexts lowers the rank.
        rows: at most so many contexts, evenly spaced.

    Raises:
        ValueError: not a matrix with rows, or contexts that are all zero (when centred: all equal).
    """
    if contexts.ndim != 2 or len(contexts) == 0:
        raise ValueError(f"contexts: got shape {tuple(contexts.shape)}; it must be (T, D) with T at least 1.")
    if len(contexts) > rows:
        contexts = contexts[torch.linspace(0, len(contexts) - 1, rows, device=contexts.device).long()]
    # In double, the eigenvalues of the D x D Gram matrix give the singular values to about 1e-8 of the largest.
    matrix = contexts.double()
    if centred:
        matrix = matrix - matrix.mean(0)
    values = torch.linalg.eigvalsh(matrix.t() @ matrix).clamp_min(0).sqrt()
    total = values.sum()
    if total <= 1e-6 * contexts.abs().max():
        raise ValueError(
            f"contexts: all {len(contexts)} are {'equal' if centred else 'zero'}; they have no effective rank."
        )
    return float(torch.special.entr(values / total).sum().exp()) / contexts.shape[1]


class _Iteration:
    """One parallel iteration over all tokens: contexts, the loss, and its gradient with respect to the weights."""

    def __init__(
        self,
        model: ContextTokenLM,
        ids: Tensor,
        restarts: Tensor,
        former: Tensor,
        settings: FixedPointSettings,
        seed: int,
    ) -> None:
        self.model, self.ids, self.former, self.settings, self.seed = model, ids, former, settings, seed
        # Tokens without left neighbour.
        self.alone = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        self.alone[0] = True
        self.alone[restarts] = True
        size = settings.group or CHUNK
        self.chunks = [slice(i, min(i + size, len(ids))) for i in range(0, len(ids), size)]

    @torch.no_grad()
    def contexts(self) -> Tensor:
        update = torch.empty_like(self.former)
        for chunk, previous, x in self._inputs():
            update[chunk] = self.model.context_block.final(previous, x)
        return update

    def losses(self, update: Tensor) -> dict[str, float]:
        """The loss and its parts, and the fraction of tokens that have converged."""
        mse = torch.cat([(update[c] - self.former[c]).square().mean(1) for c in self.chunks])
        spreads = [(norm / count).double() for _, norm, count in self._groups(update)]
        weight, diversity = self.settings.diversity, -float(torch.stack(spreads).mean())
        mean = float(mse.double().mean())
        return {
            "converged": float((mse < self.settings.threshold).double().mean()),
            "loss": (1 - weight) * mean + weight * diversity,
            "mse": mean,
            "diversity": diversity,
        }

    def backward(self, update: Tensor, parameters: list[Tensor]) -> None:
        """Accumulate the gradient of the loss at ``update``, which ``contexts`` gave, in ``parameters``."""
        groups = self._groups(update)
        weight, share = self.settings.diversity, 1.0 / len(groups)
        if self.settings.group is None:
            groups = groups * len(self.chunks)
        for (chunk, previous, x), (mean, norm, count) in zip(self._inputs(), groups, strict=True):
            now = update[chunk]
            # ||C - mean||_F pulls at row i with (c_i - mean) / norm; what goes through the mean sums to zero.
            gradient = (1 - weight) * 2 / update.numel() * (now - self.former[chunk])
            gradient -= weight * share / count * (now - mean) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            final = self.model.context_block.final(previous, x)
            torch.autograd.backward(final, gradient, inputs=parameters)

    @torch.no_grad()
    def _inputs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per chunk: where it is, its left neighbours' contexts with noise, its x. The same at every call."""
        for index, chunk in enumerate(self.chunks):
            before = self.former[max(chunk.start - 1, 0) : chunk.stop - 1]
            if chunk.start == 0:
                before = torch.cat([torch.zeros_like(self.former[:1]), before])
            before = before.masked_fill(self.alone[chunk], 0.0)
            if self.settings.noise > 0:
                generator = torch.Generator(before.device).manual_seed((self.seed * 1_000_003 + index) % 2**63)
                noise = torch.empty_like(before).normal_(0.0, self.settings.noise, generator=generator)
                before = before + noise
            with torch.no_grad():
                x = self.model.embed(self.ids[chunk])
            yield chunk, before, x

    def _groups(self, update: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """(mean, ||C - mean||_F, tokens) of all contexts, or of every group of them."""
        if self.settings.group is None:
            mean = update.mean(0)
            squares = torch.stack([(update[c] - mean).square().sum() for c in self.chunks])
            return [(mean, squares.sum().sqrt(), len(update))]
        means = [update[c].mean(0) for c in self.chunks]
        return [
            (mean, (update[c] - mean).norm(), c.stop - c.start)
            for c, mean in zip(self.chunks, means, strict=True)
        ]


def _row(iteration: int, contexts: Tensor, began: float, **measured: float) -> dict[str, Any]:
    empty = {"converged": 0.0, "loss": None, "mse": None, "diversity": None, "gradient_norm": None}
    ranks = {
        "effective_rank": effective_rank(contexts),
        "effective_rank_centred": effective_rank(contexts, centred=True),
    }
    return {"iteration": iteration, **empty, **measured, **ranks, "seconds": time.perf_counter() - began}


def _refuse_if_too_large(model: ContextTokenLM, tokens: int) -> None:
    weight = model.embedding.weight
    width, layers = model.config.context_dim, model.config.n_layers
    # The contexts of this iteration and of the one before, and the activations of a chunk.
    needed = weight.element_size() * (2 * tokens * width + 8 * CHUNK * width * layers)
    free = free_bytes(weight.device)
    if needed > free:
        raise ValueError(
            f"token_ids: phase 1 over {tokens} tokens of width {width} needs about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free on {weight.device}; give fewer tokens."
        )
