"""NewLLM's recurrence on a CPU: many positions at a time, by sweeps that end at what one position after the other gives.

A context reaches the next one by two ways: element by element through the forget gate, which is cheap, and through layers
and gates, whose matrix products are not; with one sequence each would read all weights for one row. So a window of
positions is swept: the products for all its rows at once, with the contexts that are known so far (at first the one that
enters the window), then all contexts of the window in turn from the gates that came out. Rows whose context has moved are
swept again, until none has moved by more than TOLERANCE rounding errors. The first context of a window is exact, so after
k sweeps the first k positions are: no model, however chaotic, takes more sweeps than a window has positions. In trained
models the way through the gates is weak, and about six do for a hundred positions.

The backward is the same with gradients, which enter a window from its end. Windows grow while sweeping is cheap and shrink
to single positions, the plain loop, where it is not; with many sequences they begin as that. Formulas and names:
``bklm.models.new_llm_loop``. Row t B + b is position t of sequence b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bklm.models import new_llm_kernels as kernels
from bklm.models.dropout import draws, dropped_from, keep_scale
from bklm.models.new_llm_plain import CONTEXT_LIMIT
from bklm.models.new_llm_steps import Gradients, Trace, Weights
from bklm.moe.products import PreparedLinear, linear

TOLERANCE = 8
"""How far a context may lie from the one that its gates were computed with, in rounding errors of the dtype, relative to
the context in the 2-norm. Products in another order differ by as much."""
FIRST_WINDOW, LONGEST_WINDOW = 16, 256
SWEPT_SEQUENCES = 3
"""With more sequences the loop's products have rows enough, and sweeping them again costs more than it spares."""
SWEEP_ROWS = 32
"""A product of few rows takes as long as one of so many more whose weights are at hand: they must be read."""


class _Windows:
    """The window to take next, by what the last one cost."""

    def __init__(self, length: int, batch: int) -> None:
        self.batch, self.loop_cost = batch, batch + SWEEP_ROWS
        self.size = FIRST_WINDOW if batch <= SWEPT_SEQUENCES else 1
        self.rows = torch.arange(length * batch, device="cpu")
        size = min(length, LONGEST_WINDOW) * batch
        self.changed = torch.empty(size, dtype=torch.int64, device="cpu")

    def sweep(
        self, first: int, last: int, products: Callable[[Tensor, slice | Tensor], None], turn: Callable[[], int]
    ) -> None:
        """Sweep positions first ... last - 1: ``products``, then ``turn``, until no row is noted in ``changed``.

        Args:
            products: is given the rows, and the same as an index: a slice where they lie together.
            turn: returns how many rows it noted.
        """
        where = slice(first * self.batch, last * self.batch)
        rows, cost, positions = self.rows[where], 0, last - first
        for _ in range(positions):
            products(rows, where)
            cost += len(rows) + SWEEP_ROWS
            count = turn()
            if count == 0:
                break
            rows = where = self.changed[:count]
        if cost > self.loop_cost * positions:
            self.size = max(1, self.size // 2)
        elif 2 * cost < self.loop_cost * positions:
            self.size = min(LONGEST_WINDOW, 2 * self.size)


def forward(embedded: Tensor, context: Tensor, weights: Weights, eps: float, dropout_p: float) -> Trace:
    """The trace from embedded (N, B, E) and context (B, C); N at least 1, dropout as in ``new_llm_loop.recurrence``."""
    (length, batch, width), size = embedded.shape, context.shape[1]
    hidden, depth, rows = weights.gate.shape[1], len(weights.layers), length * batch
    new, like = context.new_empty, kernels.LIKE[context.dtype]
    first_layer, *others = weights.layers
    tokens = linear(embedded.reshape(rows, width), first_layer[:, :width], weights.biases[0])
    maps = [PreparedLinear(w, rows=batch) for w in (first_layer[:, width:], *others)]
    to_gates = PreparedLinear(weights.gate, weights.gate_bias, rows=batch)
    trace = Trace(
        new(depth, rows, hidden),
        new(rows, 3 * size),
        new(rows + batch, size),
        new(rows, size),
        new(rows, 1),
        new(rows, 1),
    )
    trace.contexts[:batch] = context
    noise = draws(length, depth * batch * hidden, context.device) if dropout_p > 0 else None
    added = [(tokens.data_ptr(), hidden), *((bias.data_ptr(), 0) for bias in weights.biases[1:])]
    masks = (noise.data_ptr(), noise.shape[1]) if dropout_p > 0 else (0, 0)
    dropped, scale = dropped_from(dropout_p), keep_scale(dropout_p)
    outputs = [layer.data_ptr() for layer in trace.outputs]
    windows = _Windows(length, batch)
    tolerance = TOLERANCE * torch.finfo(context.dtype).eps
    norm = weights.gain.data_ptr(), weights.shift.data_ptr(), eps, CONTEXT_LIMIT, tolerance
    traced = [t.data_ptr() for t in trace[1:]]
    changed = windows.changed.data_ptr()

    def products(rows: Tensor, where: slice | Tensor) -> None:
        h, at = trace.contexts[where], rows.data_ptr()
        for i, product in enumerate(maps):
            h = product(h)
            kernels.activate(
                like, h.data_ptr(), outputs[i], at, len(rows), hidden, *added[i], *masks, i * batch * hidden, batch,
                dropped, scale,
            )  # fmt: skip
        z = to_gates(h)
        z[:, : 2 * size].sigmoid_()
        trace.gates[where] = z

    first = 0
    while first < length:
        last = min(length, first + windows.size)
        # Nothing is known yet: all positions are given the context that enters.
        entering = trace.contexts[first * batch : (first + 1) * batch]
        trace.contexts[(first + 1) * batch : last * batch].view(-1, batch, size).copy_(entering)
        windows.sweep(
            first,
            last,
            products,
            lambda first=first, last=last: kernels.contexts_of(
                like, first, last, batch, size, *traced, *norm, changed
            ),
        )
        first = last
    return trace


def backward(trace: Trace, weights: Weights, d_hidden: Tensor, d_context: Tensor, scale: float) -> Gradients:
    """Gradients from those of the hidden states (N B, H) and of the last context (B, C), contiguous.

    Args:
        scale: what dropout multiplied the units by that it kept.
    """
    (depth, rows, hidden), (batch, size) = trace.outputs.shape, d_context.shape
    length, like = rows // batch, kernels.LIKE[d_context.dtype]
    first_layer, *others = weights.layers
    from_gates = PreparedLinear(weights.gate.t(), rows=batch)
    maps = [PreparedLinear(w.t(), rows=batch) for w in (first_layer[:, -size:], *others)]
    d = torch.empty_like(trace.outputs)
    d_gates, d_normed = torch.empty_like(trace.gates), torch.empty_like(trace.mixed)
    # What reaches the context before through layers and gates, and the gradient of s that it was computed with.
    through, d_mixed = torch.zeros_like(trace.mixed), torch.zeros_like(trace.mixed)
    layers = [(d[i].data_ptr(), trace.outputs[i].data_ptr()) for i in range(depth)]
    arrays = [t.data_ptr() for t in (*trace[1:], weights.gain)]
    found = [t.data_ptr() for t in (through, d_mixed, d_normed, d_gates)]
    carries = d_context.clone(), torch.empty_like(d_context)
    windows = _Windows(length, batch)
    tolerance = TOLERANCE * torch.finfo(d_context.dtype).eps
    changed = windows.changed.data_ptr()

    def products(rows: Tensor, where: slice | Tensor) -> None:
        g, at = from_gates(d_gates[where]), rows.data_ptr()
        added = d_hidden.data_ptr()
        for i in range(depth - 1, -1, -1):
            kernels.through_relu(like, g.data_ptr(), *layers[i], at, len(rows), hidden, added, scale)
            g, added = maps[i](g), 0
        through[where] = g

    def turn(first: int, last: int, every: bool) -> int:
        entering, leaving = (t.data_ptr() for t in carries)
        return kernels.gate_gradients(
            like, first, last, batch, size, *arrays, CONTEXT_LIMIT, entering, *found, leaving, tolerance, every, changed
        )  # fmt: skip

    last = length
    while last > 0:
        first = max(0, last - windows.size)
        # At first only what passes element by element is known.
        turn(first, last, True)
        windows.sweep(first, last, products, lambda first=first, last=last: turn(first, last, False))
        carries, last = carries[::-1], first
    return Gradients(d, d_gates, d_normed, carries[0])
