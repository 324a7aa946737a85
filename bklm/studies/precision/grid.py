"""The precision grid: two recursions, four ways to mix precisions, any length and Im z.

An ``Arm`` is one way to compute a value and a gradient; its two halves are timed apart. All arms of a problem get the
same inputs: numbers that single precision holds exactly, so that an arm's error is that of its arithmetic.

    complex64   value and gradient in single precision
    complex128  value and gradient in double precision
    mixed       value in double, gradient in single precision. Left/right computes its adjoint anew from the inputs rounded to
                single precision, theta/phi from ratios of its double products: where these are finite they are the better
    adaptive    value in double; gradient row by row: rows whose largest |dL/dG| is below ADAPTIVE_THRESHOLD of the
                largest of the batch in double, the others in single precision. (The original switched on the size of the
                gradient too: small ones in double, large ones in single. A row is the smallest unit that an exact
                gradient can switch on, because it couples all positions of a row.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bklm.bk_core import reference, resolvent_diagonal
from bklm.harness.measure import Arm
from bklm.studies.precision import kernels

ERRORS = ("value_error", "gradient_error", "gradient_error_small_rows")
PRECISIONS = ("complex64", "complex128", "mixed", "adaptive")
VALUE_PRECISION = {p: "complex64" if p == "complex64" else "complex128" for p in PRECISIONS}
ADAPTIVE_THRESHOLD = 1e-3
# Upstream size of every other row, relative to the rest: both branches of "adaptive" run.
SMALL_GRADIENT = 1e-6

RECURSIONS = LEFT_RIGHT, THETA_PHI, THETA_PHI_LOOP = "left/right", "theta/phi", "theta/phi loop"

_DTYPES = {
    "complex64": (torch.complex64, torch.float32, np.complex64),
    "complex128": (torch.complex128, torch.float64, np.complex128),
}


# (G, rows, precision) -> the gradient of those rows in that precision.
Part = Callable[[Tensor, Tensor | slice, str], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one cell: a (rows, N), upstream gbar (rows, N), b = c = 1 and z = i Im z, in both precisions."""

    a: dict[str, Tensor]  # real, by "complex64" and "complex128"
    gbar: dict[str, Tensor]  # complex, likewise
    z: complex

    @classmethod
    def make(cls, rows: int, n: int, im_z: float, seed: int, device: str = "cpu") -> Problem:
        """A white-noise potential v ~ N(0, 1), a = v - 2, and upstream gradients whose rows alternate between size 1 and
        SMALL_GRADIENT; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rows, n, generator=generator, device="cpu") - 2
        gbar = torch.randn(rows, n, dtype=torch.complex64, generator=generator, device="cpu")
        gbar[1::2] *= SMALL_GRADIENT
        return cls(
            {name: a.to(device, real) for name, (_, real, _) in _DTYPES.items()},
            {name: gbar.to(device, complex_) for name, (complex_, _, _) in _DTYPES.items()},
            complex(0, float(np.float32(im_z))),
        )

    def coupling(self, precision: str) -> Tensor:
        a = self.a[precision]
        return a.new_ones(1, a.shape[1] - 1)

    def gradient_parts(self, precision: str) -> Iterator[tuple[Tensor | slice, str]]:
        """Which rows' gradient is computed in which precision."""
        if precision != "adaptive":
            yield slice(None), "complex64" if precision == "mixed" else precision
            return
        size = self.gbar["complex64"].abs().amax(-1)
        small = size < ADAPTIVE_THRESHOLD * size.max()
        for chosen, name in ((small, "complex128"), (~small, "complex64")):
            rows = chosen.nonzero().squeeze(1)
            if len(rows):
                yield rows, name


def arms(problem: Problem, loops: bool = True) -> dict[tuple[str, str], Arm]:
    """Every arm of the grid by (recursion, precision); each returns G (complex) and dL/da (real), both (rows, N).

    theta/phi is compiled for the CPU only; on another device its loop remains.
    """
    made = {(LEFT_RIGHT, p): _left_right(problem, p) for p in PRECISIONS}
    if problem.a["complex64"].device.type == "cpu":
        made |= {(THETA_PHI, p): _theta_phi(problem, p) for p in PRECISIONS}
    if loops:
        made |= {(THETA_PHI_LOOP, p): _theta_phi_loop(problem, p) for p in PRECISIONS}
    return made


def grid(rows: int, n: int, im_z: float, seed: int, device: str = "cpu") -> dict[str, Arm]:
    """The arms of one cell by name, "recursion precision", from plain values."""
    return {" ".join(key): arm for key, arm in arms(Problem.make(rows, n, im_z, seed, device)).items()}


def _take(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows. Not x[rows], which wakes all threads for a copy of 3,000 numbers."""
    return x if isinstance(rows, slice) else x.index_select(0, rows)


def _gather(problem: Problem, precision: str, part: Part, G: Tensor) -> tuple[Tensor, Tensor]:
    """G and the gradient, put together from the rows that each precision computes."""
    parts = [(rows, part(G, rows, name)) for rows, name in problem.gradient_parts(precision)]
    if len(parts) == 1:
        return G, parts[0][1]
    gradient = torch.empty(G.shape, dtype=torch.float64, device=G.device)
    for rows, values in parts:
        gradient.index_copy_(0, rows, values.double())
    return G, gradient


def _left_right(problem: Problem, precision: str) -> Arm:
    """The package's operator on its default backend."""
    a = problem.a[VALUE_PRECISION[precision]]
    if precision in _DTYPES:

        def forward() -> tuple[Tensor, Tensor]:
            leaf = a.detach().requires_grad_()
            return leaf, resolvent_diagonal(leaf, 1.0, 1.0, problem.z)

        def backward(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            leaf, G = state
            return G.detach(), torch.autograd.grad(G, leaf, problem.gbar[precision])[0]

        return Arm(forward, backward)

    def adjoint(G: Tensor, rows: Tensor | slice, name: str) -> Tensor:
        dtype = _DTYPES[name][0]
        some, gbar = _take(problem.a[name], rows), _take(problem.gbar[name], rows)
        z = torch.full((some.shape[0],), problem.z, dtype=dtype, device=some.device)
        # The registered adjoint: the operator's own backward, in another precision than its forward.
        state = gbar, some, problem.coupling(name), z, _take(G, rows).to(dtype)
        return torch.ops.bklm.resolvent_diagonal_backward(*state, False, "exact", 0.0, "auto", False, False)[0]

    return Arm(
        lambda: resolvent_diagonal(a, 1.0, 1.0, problem.z),
        lambda G: _gather(problem, precision, adjoint, G),
    )


def _theta_phi(problem: Problem, precision: str) -> Arm:
    """The unscaled products, compiled; the exact gradient from their ratios."""
    name = VALUE_PRECISION[precision]
    a = problem.a[name].numpy()

    def forward() -> tuple[np.ndarray, ...]:
        dtype = _DTYPES[name][2]
        return kernels.products(a.astype(dtype) - dtype(problem.z), problem.coupling(name)[0].numpy())

    def backward(state: tuple[np.ndarray, ...]) -> tuple[Tensor, Tensor]:
        G, theta, phi = state

        def part(_: Tensor, rows: Tensor | slice, name: str) -> Tensor:
            rows = rows if isinstance(rows, slice) else rows.numpy()
            gbar, k, dtype = problem.gbar[name].numpy(), problem.coupling(name)[0].numpy(), _DTYPES[name][2]
            left, right = kernels.ratios(theta[rows], phi[rows], dtype)
            # What has overflowed may be cast, too.
            with np.errstate(all="ignore"):
                some = G[rows].astype(dtype)
            return torch.from_numpy(kernels.adjoint(gbar[rows], some, k, left, right))

        return _gather(problem, precision, part, torch.from_numpy(G))

    return Arm(forward, backward)


def _theta_phi_loop(problem: Problem, precision: str) -> Arm:
    """As published: the recursion as a Python loop of torch operations, the diagonal term alone as the gradient."""
    name = VALUE_PRECISION[precision]
    a, ones, dtype = problem.a[name], problem.coupling(name)[0], _DTYPES[name][0]

    def part(G: Tensor, rows: Tensor | slice, name: str) -> Tensor:
        return reference.local_gradient(_take(problem.gbar[name], rows), _take(G, rows).to(_DTYPES[name][0]))

    return Arm(
        lambda: reference.theta_phi(a, ones, ones, problem.z, dtype),
        lambda G: _gather(problem, precision, part, G),
    )


class Truth(NamedTuple):
    """What an arm's result is compared with. ``source`` says how it was computed."""

    G: np.ndarray
    gradient: np.ndarray
    source: str


def truth(problem: Problem, largest_n: int) -> Truth:
    """The exact answer: 50 digits up to ``largest_n`` positions, plain sequential left/right in complex128 beyond."""
    a, gbar = (x["complex128"].cpu().numpy() for x in (problem.a, problem.gbar))
    k = np.ones(a.shape[1] - 1)
    if a.shape[1] <= largest_n:
        return Truth(*kernels.fifty_digits(a, k, problem.z, gbar), f"{kernels.DIGITS} digits")
    d = a.astype(np.complex128) - problem.z
    return Truth(*kernels.left_right(d, k, gbar), "sequential left/right, complex128")


def errors(G: Tensor, gradient: Tensor, exact: Truth) -> dict[str, Any]:
    """How far a result is from the truth.

    Returns:
        status ("finite", "not finite", or "zero" where every value is 0) and, where finite, value_error, gradient_error:
        largest absolute error over the largest modulus of the row, the worst row; and gradient_error_small_rows, the
        same over the rows of small upstream gradient alone.
    """
    G, gradient = G.cpu().numpy(), gradient.cpu().numpy()
    status, found = "finite", (None, None, None)
    if not (np.isfinite(G).all() and np.isfinite(gradient).all()):
        status = "not finite"
    elif not G.any():
        status = "zero"
    else:
        by_row = _worst_of_rows(gradient, exact.gradient)
        small = float(by_row[1::2].max()) if len(by_row) > 1 else None
        found = float(_worst_of_rows(G, exact.G).max()), float(by_row.max()), small
    return {"status": status, **dict(zip(ERRORS, found, strict=True))}


def _worst_of_rows(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(x - exact).max(-1) / np.abs(exact).max(-1)
