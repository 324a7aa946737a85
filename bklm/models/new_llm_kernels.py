"""CPU kernels of NewLLM's recurrence: what stands between its matrix products, one pass each.

Formulas and names: ``bklm.models.new_llm_loop``. Row t B + b is position t of sequence b. Matrices are given as addresses
of contiguous numbers (``bklm.bk_core.cpu.scratch``); address 0 stands for what is not there.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import uintp

from bklm.bk_core.cpu.jit import jit, summing
from bklm.bk_core.cpu.scratch import reals_at

LIKE = {torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64)}
_INT16, _INT64 = np.zeros(0, np.int16), np.zeros(0, np.int64)
_0, _1, _2, _3 = np.uintp(0), np.uintp(1), np.uintp(2), np.uintp(3)


@jit
def activate(
    like, z, out, rows, count, width, add, add_stride, noise, noise_stride, noise_at, batch, dropped, scale
):
    """z (count, width) <- dropout(relu(z + add)), also written to ``rows`` of out where out is there.

    Row r gets add[r add_stride ...]: a row of its own, or with stride 0 the same for all. Its unit j is dropped where the
    int16 noise[t noise_stride + noise_at + b width + j] is below ``dropped``, else multiplied by scale.
    """
    count, width, batch = uintp(count), uintp(width), uintp(batch)
    rows_view, z_view = reals_at(rows, count, _INT64), reals_at(z, count * width, like)
    stride, noise_stride, noise_at = uintp(add_stride), uintp(noise_stride), uintp(noise_at)
    zero, scale = like.dtype.type(0), like.dtype.type(scale)
    for i in range(count):
        row, at = uintp(rows_view[i]), i * width
        add_view = reals_at(add, (row + _1) * stride + width, like)
        for j in range(width):
            v = z_view[at + j] + add_view[row * stride + j]
            # NaN is not small: it shows.
            z_view[at + j] = zero if v <= zero else v
        if noise:
            t = row // batch
            from_ = t * noise_stride + noise_at + (row - t * batch) * width
            noise_view = reals_at(noise, from_ + width, _INT16)
            for j in range(width):
                z_view[at + j] *= scale if noise_view[from_ + j] >= dropped else zero
        if out:
            out_view = reals_at(out, (row + _1) * width, like)
            for j in range(width):
                out_view[row * width + j] = z_view[at + j]


@jit
def through_relu(like, g, out, a, rows, count, width, add, scale):
    """g (count, width) <- scale (g + add) where a is not silent, else 0; also written to ``rows`` of out.

    Row r of ``add``, where it is there, of a and of out belong to row r.
    """
    count, width = uintp(count), uintp(width)
    rows_view, g_view = reals_at(rows, count, _INT64), reals_at(g, count * width, like)
    zero, scale = like.dtype.type(0), like.dtype.type(scale)
    for i in range(count):
        at, row = i * width, uintp(rows_view[i]) * width
        a_view, out_view = reals_at(a, row + width, like), reals_at(out, row + width, like)
        if add:
            add_view = reals_at(add, row + width, like)
            for j in range(width):
                g_view[at + j] += add_view[row + j]
        for j in range(width):
            v = zero if a_view[row + j] <= zero else scale * g_view[at + j]
            g_view[at + j] = v
            out_view[row + j] = v


@summing
def _total(x, at, size):
    total = x.dtype.type(0)
    for j in range(size):
        total += x[at + j]
    return total


@summing
def _squares(x, at, size, centre):
    """The sum of (x - centre)^2."""
    total = x.dtype.type(0)
    for j in range(size):
        total += (x[at + j] - centre) * (x[at + j] - centre)
    return total


@summing
def _along(x, y, at, size, centre):
    """The sum of x[j] (y[at + j] - centre)."""
    total = x.dtype.type(0)
    for j in range(size):
        total += x[j] * (y[at + j] - centre)
    return total


@summing
def _is_near(x, y, at, size, tolerance):
    """Whether y[at], ... lies within ``tolerance`` of x[0], ..., relative to x in the 2-norm."""
    moved, norm = 0.0, 0.0
    for j in range(size):
        moved += np.float64(x[j] - y[at + j]) ** 2
        norm += np.float64(x[j]) ** 2
    # NaN is never near.
    return moved <= tolerance * tolerance * norm


@jit
def contexts_of(
    like, first, last, batch, size, gates, contexts, mixed, mean, rstd, gain, shift, eps, limit,
    tolerance, changed,
):  # fmt: skip
    """Contexts c_{first+1} ... c_last from c_first and the gates (f, i, u) of positions first ... last - 1.

    ``contexts`` holds what the gates were computed with. Where c_t is further than ``tolerance`` from it, relative to c_t
    in the 2-norm, it is replaced and its row noted in ``changed``; the last one is always replaced. What the
    LayerNorm was given, its mean and its reciprocal deviation are kept.

    Returns:
        How many rows were noted.
    """
    first, last, batch, size = uintp(first), uintp(last), uintp(batch), uintp(size)
    rows = last * batch
    gates_view, s_view = reals_at(gates, _3 * rows * size, like), reals_at(mixed, rows * size, like)
    contexts_view = reals_at(contexts, (rows + batch) * size, like)
    mean_view, rstd_view = reals_at(mean, rows, like), reals_at(rstd, rows, like)
    gain_view, shift_view = reals_at(gain, size, like), reals_at(shift, size, like)
    changed_view = reals_at(changed, (last - first) * batch, _INT64)
    real = like.dtype.type
    limit, eps = real(limit), real(eps)
    c = np.empty(size, like.dtype)
    count = _0
    for b in range(batch):
        for j in range(size):
            c[j] = contexts_view[(first * batch + b) * size + j]
        for t in range(first, last):
            row = t * batch + b
            at, gate, after = row * size, _3 * row * size, (row + batch) * size
            for j in range(size):
                v = gates_view[gate + j] * c[j] + gates_view[gate + size + j] * gates_view[gate + _2 * size + j]
                s_view[at + j] = v
            m = _total(s_view, at, size) / real(size)
            r = real(1) / np.sqrt(_squares(s_view, at, size, m) / real(size) + eps)
            mean_view[row], rstd_view[row] = m, r
            for j in range(size):
                x = (s_view[at + j] - m) * r * gain_view[j] + shift_view[j]
                x = limit if x > limit else x
                x = -limit if x < -limit else x
                c[j] = x
            if t + _1 == last or not _is_near(c, contexts_view, after, size, tolerance):
                for j in range(size):
                    contexts_view[after + j] = c[j]
                if t + _1 < last:
                    changed_view[count] = row + batch
                    count += _1
    return count


@jit
def gate_gradients(
    like, first, last, batch, size, gates, contexts, mixed, mean, rstd, gain, limit, carry, through, d_mixed,
    d_normed, d_gates, before, tolerance, every, changed,
):  # fmt: skip
    """Gradients of positions last - 1 ... first, from that of c_last (``carry``) and those through the products.

    ``through`` (N B, C) is what reaches c_{t-1} through layers and gates of position t, computed with ``d_mixed``. Where the
    new d_mixed is further than ``tolerance`` from it (everywhere with ``every``), it is replaced, d_gates follow, and the row
    is noted in ``changed``. ``before`` gets the gradient of c_first.

    Returns:
        How many rows were noted.
    """
    first, last, batch, size = uintp(first), uintp(last), uintp(batch), uintp(size)
    rows = last * batch
    gates_view, d_gates_view = (
        reals_at(gates, _3 * rows * size, like),
        reals_at(d_gates, _3 * rows * size, like),
    )
    contexts_view, s_view = reals_at(contexts, (rows + batch) * size, like), reals_at(mixed, rows * size, like)
    through_view, d_mixed_view = reals_at(through, rows * size, like), reals_at(d_mixed, rows * size, like)
    mean_view, rstd_view = reals_at(mean, rows, like), reals_at(rstd, rows, like)
    d_normed_view = reals_at(d_normed, rows * size, like)
    gain_view, carry_view = reals_at(gain, size, like), reals_at(carry, batch * size, like)
    before_view, changed_view = (
        reals_at(before, batch * size, like),
        reals_at(changed, (last - first) * batch, _INT64),
    )
    real = like.dtype.type
    limit, one, zero = real(limit), real(1), real(0)
    d, x = np.empty(size, like.dtype), np.empty(size, like.dtype)
    count = _0
    for b in range(batch):
        for j in range(size):
            d[j] = carry_view[b * size + j]
        for back in range(last - first):
            t = last - _1 - back
            row = t * batch + b
            at, gate, after = row * size, _3 * row * size, (row + batch) * size
            m, r = mean_view[row], rstd_view[row]
            for j in range(size):
                v = d[j] if np.abs(contexts_view[after + j]) < limit else zero
                d_normed_view[at + j] = v
                x[j] = v * gain_view[j]
            level = _total(x, _0, size) / real(size)
            slope = r * _along(x, s_view, at, size, m) / real(size)
            for j in range(size):
                v = r * (x[j] - level - (s_view[at + j] - m) * r * slope)
                x[j] = v
                d[j] = v * gates_view[gate + j] + through_view[at + j]
            if every or not _is_near(x, d_mixed_view, at, size, tolerance):
                changed_view[count] = row
                count += _1
                for j in range(size):
                    f, i, u = (
                        gates_view[gate + j],
                        gates_view[gate + size + j],
                        gates_view[gate + _2 * size + j],
                    )
                    v, c = x[j], contexts_view[at + j]
                    d_mixed_view[at + j] = v
                    d_gates_view[gate + j] = v * c * f * (one - f)
                    d_gates_view[gate + size + j] = v * u * i * (one - i)
                    d_gates_view[gate + _2 * size + j] = v * i
        for j in range(size):
            before_view[b * size + j] = d[j]
    return count
