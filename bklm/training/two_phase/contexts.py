"""The contexts of a whole corpus, computed in parallel by iterating to the fixed point of "every token follows its
left neighbour".

The final contexts of a text solve c_t = f(c_{t-1}, x_t) for all t at once. The text is cut into chunks that run side
by side, each from a guess of the context before it; after a sweep every chunk knows what its left neighbour really
ended with, and runs again from there, but only until it meets its own former path: f forgets, because the context
block is a contraction on average, so that takes some tens of tokens. What remains are seams, where a path that was
stopped lies within a small distance of the one it met; a difference may grow before it fades, so the result is
verified: the residual |c_t - f(c_{t-1}, x_t)| of every token, and a walk on from the widest seams, as far as their
differences could be felt, which puts right what it finds. Chunks of one token are the plain (Jacobi) iteration, which
evaluates every token in every sweep; Newton's iteration (DEER) would need a D x D Jacobian per token and as many times
the work, while the whole of this costs little more than one evaluation per token, and its verification another
(benchmarks/freeze_phase2.py --sweeps).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.models import ContextTokenLM

log = logging.getLogger(__name__)

# Chunks side by side: enough rows for efficient matrix products, few enough that meeting the former path is cheap.
CPU_ROWS, GPU_ROWS = 256, 2048
SHORTEST_CHUNK = 128
# A chunk has met its former path where they differ by this much less than the tolerance: a difference can grow for
# some tokens before it fades (measured at widths 8 to 768; 100 would ask for more than float32 can hold).
MARGIN = 30
SEGMENT = 1024  # tokens whose input products are held at once by the sequential sweep and the residual
WINDOW = 2 * SHORTEST_CHUNK  # tokens that are walked on from a seam
ROUNDS = 3  # of such walks, until one changes nothing beyond the tolerance


@dataclass(frozen=True)
class CorpusContexts:
    """Final contexts and how they were found.

    Attributes:
        final: (T, D_c), the model's dtype and device.
        tokens: T.
        method: "parallel", or "sequential" where the iteration did not converge or its result failed verification.
        sweeps: sweeps over chunks that the iteration made.
        passes: evaluations of the context block per token, all sweeps together (sequential: with the sequential one);
            those of the verification are not counted.
        residual: largest |c_t - f(c_{t-1}, x_t)| of all tokens; NaN where it was not computed.
        error: largest change made by the last walks on from seams, with what their left neighbours really ended with.
        verified: how many tokens those walks computed again.
        seams: how many seams were walked on from.
        seconds: wall time, verification included.
    """

    final: Tensor
    tokens: int
    method: str
    sweeps: int
    passes: float
    residual: float
    error: float
    verified: int
    seams: int
    seconds: float

    def __str__(self) -> str:
        text = f"{self.tokens} contexts, {self.method}, {self.sweeps} sweeps, {self.passes:.2f} evaluations per token"
        if self.method == "parallel" and self.verified:
            text += (
                f", largest residual {self.residual:.1e}, {self.error:.1e} away from {self.verified} tokens walked on from "
                f"{self.seams} seams"
            )
        elif self.method == "parallel":
            text += ", not verified"
        return f"{text}, {self.seconds:.1f} s"


@torch.no_grad()
def corpus_contexts(
    model: ContextTokenLM,
    token_ids: Any,
    *,
    tolerance: float = 1e-4,
    max_sweeps: int = 8,
    chunk: int | None = None,
    document_starts: Any = None,
    start: Tensor | None = None,
    verify: int = WINDOW,
) -> CorpusContexts:
    """Final contexts of every token of one text, as one sweep from the first token to the last would give them.

    Args:
        token_ids: (T,) integers, a tensor or an array.
        tolerance: largest difference from the sequential sweep that is let pass; where verification keeps finding a larger
            one all tokens are computed sequentially, and the log says so.
        max_sweeps: after so many, what has not converged is computed sequentially, and the log says so.
        chunk: tokens per chunk; chosen by T and device when None. 1 is the plain fixed-point iteration.
        document_starts: positions at which the context starts from zeros again; the state runs on otherwise.
        start: (D_c,), the context before the first token; zeros when None.
        verify: tokens that are walked on from each seam, 0 for no verification at all.

    Raises:
        ValueError: no tokens, ids out of range, or a number outside what is allowed. TypeError: ids not integers.
        ArithmeticError: contexts that are not finite.
    """
    began = time.perf_counter()
    ids, restarts = checked_ids(model, token_ids, document_starts)
    for name, value in (("max_sweeps", max_sweeps), ("chunk", chunk), ("tolerance", tolerance)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: got {value}; it must be greater than 0.")
    walk = _Walk(model, ids, restarts, start)
    rows = CPU_ROWS if ids.device.type == "cpu" else GPU_ROWS
    length = min(len(ids), chunk or max(SHORTEST_CHUNK, -(-len(ids) // rows)))
    final, sweeps, evaluated, settled = _iterate(walk, length, tolerance / MARGIN, max_sweeps)
    if not torch.isfinite(final).all():
        raise ArithmeticError(
            "corpus contexts: some are infinite or NaN, because the model's weights are or have grown too large; "
            "start from a checkpoint or an initialisation that is sound."
        )
    residual, error, verified, seams = math.nan, 0.0, 0, 0
    why = "" if settled == len(ids) else f"not converged after {sweeps} sweeps"
    if not why and verify > 0:
        for _ in range(ROUNDS):
            residual, error, verified, seams = _verify(walk, final, verify, 2 * -(-len(ids) // length))
            if max(residual, error) <= tolerance:
                break
        else:
            why = (
                f"the parallel result changed by {max(residual, error):.1e} (allowed {tolerance:.1e}) when it was walked on "
                f"from its seams in round {ROUNDS}"
            )
    if why:
        log.warning("corpus contexts: %s; all %d tokens computed sequentially.", why, len(ids))
        walk.sequential(final)
        evaluated += len(ids)
    return CorpusContexts(
        final=final, tokens=len(ids), method="sequential" if why else "parallel", sweeps=sweeps,
        passes=evaluated / len(ids), residual=residual, error=error, verified=verified, seams=seams,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


class _Walk:
    """Steps along a text: what follows any set of positions, given the contexts before them."""

    def __init__(self, model: ContextTokenLM, ids: Tensor, restarts: Tensor, start: Tensor | None) -> None:
        self.model, self.block, self.ids, self.restarts = model, model.context_block, ids, restarts
        self.width, self.like = model.config.context_dim, model.embedding.weight
        self.start = self.like.new_zeros(self.width) if start is None else start.to(self.like)
        self.input_weights = self.block.input_weights()
        self.restarted = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.restarted[restarts] = True

    def step(self, positions: Tensor, previous: Tensor) -> Tensor:
        """Final contexts (n, D_c) at ``positions`` (n,) from those before them."""
        if len(self.restarts):
            previous = previous.masked_fill(self.restarted[positions].unsqueeze(1), 0.0)
        inputs = F.linear(self.model.embed(self.ids[positions]), *self.input_weights)
        return self.block.from_inputs(previous, inputs)[-1]

    def before(self, out: Tensor, positions: Tensor) -> Tensor:
        """The contexts (n, D_c) in ``out`` of the left neighbours of ``positions`` (n,)."""
        return torch.where((positions == 0).unsqueeze(1), self.start, out[(positions - 1).clamp_min(0)])

    def sequential(self, out: Tensor) -> None:
        """Fill out token by token."""
        zeros = set(self.restarts.tolist())
        edges = sorted({*range(0, len(out), SEGMENT), *zeros, len(out)})
        for a, b in itertools.pairwise(edges):
            before = torch.zeros_like(self.start) if a in zeros else self.start if a == 0 else out[a - 1]
            x = self.model.embed(self.ids[a:b]).unsqueeze(0)
            for t, layers in enumerate(self.block.steps(x, before.unsqueeze(0)), start=a):
                out[t] = layers[-1][0]


def _iterate(walk: _Walk, length: int, tolerance: float, max_sweeps: int) -> tuple[Tensor, int, int, int]:
    """(final contexts, sweeps, evaluations, number of leading tokens that have converged)."""
    total = len(walk.ids)
    count = -(-total // length)
    out = walk.like.new_empty(total, walk.width)
    firsts = torch.arange(count, device=walk.ids.device) * length
    starts = walk.like.new_zeros(count, walk.width)
    starts[0] = walk.start
    evaluated, sweeps, rows = 0, 0, torch.arange(count, device=walk.ids.device)
    while len(rows) and sweeps < max_sweeps:
        sweeps += 1
        evaluated += _sweep(walk, out, firsts[rows], starts[rows], length, tolerance if sweeps > 1 else None)
        ended = out[firsts[1:] - 1]
        moved = (ended - starts[1:]).abs().amax(1) > tolerance
        rows = moved.nonzero().squeeze(1) + 1
        starts[rows] = ended[rows - 1]
    return out, sweeps, evaluated, int(firsts[rows[0]]) if len(rows) else total


def _sweep(
    walk: _Walk, out: Tensor, positions: Tensor, context: Tensor, length: int, tolerance: float | None
) -> int:
    """Run chunks side by side from their first ``positions``; with a tolerance each stops where it meets its former path."""
    evaluated = 0
    for _ in range(length):
        inside = positions < len(out)
        if not inside.all():  # the last chunk may be shorter
            positions, context = positions[inside], context[inside]
        if len(positions) == 0:
            break
        context = walk.step(positions, context)
        evaluated += len(positions)
        former = out[positions] if tolerance is not None else None
        out[positions] = context
        if former is not None:
            moving = (context - former).abs().amax(1) > tolerance
            positions, context = positions[moving], context[moving]
        positions = positions + 1
    return evaluated


def _verify(walk: _Walk, final: Tensor, window: int, most: int) -> tuple[float, float, int, int]:
    """Walk on from the widest seams, in place: (largest residual before, largest change, tokens walked, seams)."""
    everywhere = torch.arange(len(final), device=final.device)
    residual = torch.cat(
        [(walk.step(t, walk.before(final, t)) - final[t]).abs().amax(1) for t in everywhere.split(SEGMENT)]
    )
    widest, positions = residual.topk(min(most, len(residual)))
    positions = positions[widest > 0]
    context, seams = walk.before(final, positions), len(positions)
    error, walked = residual.new_zeros(()), 0
    for _ in range(window):
        inside = positions < len(final)
        positions, context = positions[inside], context[inside]
        if len(positions) == 0:
            break
        context = walk.step(positions, context)
        error = torch.maximum(error, (context - final[positions]).abs().amax())
        final[positions] = context
        walked, positions = walked + len(positions), positions + 1
    return float(residual.amax()), float(error), walked, seams


def checked_ids(model: ContextTokenLM, token_ids: Any, document_starts: Any) -> tuple[Tensor, Tensor]:
    """Ids and restart positions as int64 on the model's device."""
    device = model.embedding.weight.device
    found = []
    for name, given, least, limit in (
        ("token_ids", token_ids, 1, model.vocab_size),
        ("document_starts", () if document_starts is None else document_starts, 0, None),
    ):
        values = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, ndmin=1))
        if values.numel() == 0:
            values = values.long()
        if values.is_floating_point() or values.dtype == torch.bool:
            raise TypeError(f"{name}: got {values.dtype}; it must be whole numbers.")
        if values.ndim != 1 or len(values) < least:
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}; it must be (T,) with T at least {least}."
            )
        limit = len(found[0]) if limit is None else limit
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(
                f"{name}: got {int(values.min())} to {int(values.max())}; allowed is 0 to {limit - 1}."
            )
        found.append(values.to(device, torch.int64))
    return found[0], found[1]
