"""The arms of bk_core.py: the operator and what it is compared with. Each takes a (M, N) float32 and gbar (M, N) complex64.

An arm is called once to prepare its inputs and returns the function to be timed; those of BATCHED compute at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from bklm.bk_core import ops, reference, resolvent_diagonal

YARDSTICK = 52
"""Bytes per element of the copy that long rows are held against. What a call itself moves stands in the roofline table."""
CHUNK = 8
"""Samples per chunk of the chunked variants."""
Call = Callable[[], object]


def inputs(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A potential of the published model's scale on the diagonal (M, N) float32, and gbar (M, N) complex64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g) - 2, torch.randn(m, n, dtype=torch.complex64, generator=g)


def ours(a: Tensor, gbar: Tensor, rest: tuple[object, object, object] = (1.0, 1.0, 1j), **options) -> Call:
    """Forward + backward through the public function; ``rest``: b, c and z."""
    leaf = a.clone().requires_grad_()

    def call() -> Tensor:
        leaf.grad = None
        resolvent_diagonal(leaf, *rest, **options).backward(gbar)
        return leaf.grad

    return call


def theta_phi_rows(a: Tensor) -> Tensor:
    """The published recursion: a Python loop over positions, vmapped over rows."""
    k = torch.ones(a.shape[-1] - 1, dtype=torch.float64)
    return torch.func.vmap(lambda row: reference.theta_phi(row, k, k, 1j))(a)


def loop_autograd(a: Tensor, gbar: Tensor) -> Call:
    leaf = a.double().requires_grad_()
    wide = gbar.to(torch.complex128)

    def call() -> Tensor:
        return torch.autograd.grad(theta_phi_rows(leaf), leaf, wide)[0]

    return call


def loop_diagonal(a: Tensor, gbar: Tensor) -> Call:
    wide_a, wide = a.double(), gbar.to(torch.complex128)

    def call() -> Tensor:
        with torch.no_grad():
            return reference.original_gradient(wide, theta_phi_rows(wide_a))

    return call


def registered(a: Tensor, gbar: Tensor) -> Call:
    """The registered op with its registered backward, as torch.compile would call them."""
    m, n = a.shape
    leaf, k, z = a.clone().requires_grad_(), torch.ones(1, n - 1), torch.full((m,), 1j)

    def call() -> None:
        leaf.grad = None
        ops.resolvent_diagonal(leaf, k, z, False, "exact", 0.0, "auto").backward(gbar)

    return call


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, G):
        ctx.save_for_backward(a)
        return G.view_as(G)

    @staticmethod
    def backward(ctx, gbar):
        return ctx.saved_tensors[0], None


def nothing(a: Tensor, gbar: Tensor) -> Call:
    """What torch itself takes for a Python autograd.Function that computes nothing."""
    leaf = a.clone().requires_grad_()

    def call() -> None:
        leaf.grad = None
        _Nothing.apply(leaf, gbar).backward(gbar)

    return call


def dense(a: Tensor, gbar: Tensor) -> Call:
    k = torch.ones(a.shape[-1] - 1)
    return lambda: reference.dense(a, k, k, 1j)


def banded(a: Tensor, gbar: Tensor) -> Call:
    """LAPACK's banded solver, one right-hand side per unit vector, for the diagonal of the inverse alone."""
    m, n = a.shape
    bands = np.ones((m, 3, n), np.complex128)
    bands[:, 1] = a.numpy() - 1j
    identity = np.eye(n)
    return lambda: [np.diagonal(solve_banded((1, 1), bands[i], identity)) for i in range(m)]


def _compose(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y after x as 2 x 2 matrices, rescaled."""
    a, b, c, d = x
    e, f, g, h = y
    entries = e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d
    largest = functools.reduce(torch.maximum, (x.abs() for x in entries))
    return tuple(x / largest for x in entries)


def associative_scan(a: Tensor, gbar: Tensor) -> Call:
    """L of the causal operator by torch's own scan over Moebius maps in complex128; forward + backward by autograd."""
    from torch._higher_order_ops import associative_scan as scan

    leaf, wide = a.double().requires_grad_(), gbar.to(torch.complex128)
    coupling = torch.ones(a.shape, dtype=torch.complex128)
    coupling[:, 0] = 0

    def call() -> Tensor:
        d = leaf - 1j
        matrices = torch.zeros_like(d), torch.ones_like(d), -coupling, d
        _, top, _, bottom = scan(_compose, matrices, dim=1, combine_mode="generic")
        return torch.autograd.grad(top / bottom, leaf, wide)[0]

    return call


def core_gradient(a: Tensor, gbar: Tensor) -> Tensor:
    """dL/da of one call on (..., N), in the functional form that torch.func transforms."""
    _, pull_back = torch.func.vjp(lambda x: resolvent_diagonal(x, 1.0, 1.0, 1j), a)
    return pull_back(gbar)[0]


def one_by_one(a: Tensor, gbar: Tensor) -> Tensor:
    return torch.stack([core_gradient(x, g) for x, g in zip(a, gbar, strict=True)])


def mapped(a: Tensor, gbar: Tensor) -> Tensor:
    return torch.func.vmap(core_gradient)(a, gbar)


def mapped_in_chunks(a: Tensor, gbar: Tensor) -> Tensor:
    return torch.func.vmap(core_gradient, chunk_size=CHUNK)(a, gbar)


def loop_mapped(a: Tensor, gbar: Tensor) -> Tensor:
    return loop_autograd(a, gbar)().float()


def loop_in_chunks(a: Tensor, gbar: Tensor) -> Tensor:
    return torch.cat([loop_mapped(x, g) for x, g in zip(a.split(CHUNK), gbar.split(CHUNK), strict=True)])


def loop_one_by_one(a: Tensor, gbar: Tensor) -> Tensor:
    return torch.cat([loop_mapped(x, g) for x, g in zip(a.split(1), gbar.split(1), strict=True)])


def fused(a: Tensor, gbar: Tensor) -> Tensor:
    return ours(a, gbar)()


BATCHED = {
    "fused": fused,
    "one sample at a time": one_by_one,
    "vmap": mapped,
    f"vmap in chunks of {CHUNK}": mapped_in_chunks,
    "loop, one sample at a time": loop_one_by_one,
    "loop, vmap": loop_mapped,
    f"loop, vmap in chunks of {CHUNK}": loop_in_chunks,
}
