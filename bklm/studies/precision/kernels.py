"""theta/phi in compiled form, and what both recursions share: the yardsticks of the precision study.

The published recursion is a Python loop of torch operations (``bklm.bk_core.reference.theta_phi``): too slow to be measured
at every length, and its slowness would be mistaken for the recursion's. Here is the same arithmetic compiled, so that
the two recursions are compared on equal terms, together with a plain sequential left/right for lengths where 50 digits
would take too long. Notation as in ``bklm.bk_core.operator``: d = a - z, k = b c, all on rows (M, N), k (N - 1,).

None of this is offered to compute with: unscaled products overflow.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np

from bklm.bk_core.cpu.jit import jit

DIGITS = 50


@jit
def _products(d, k, theta, phi):
    """Determinants of leading blocks, theta[i + 1] of d[..i], and of trailing ones, phi[i] of d[i..]."""
    rows, n = d.shape
    one = d.dtype.type(1)
    for m in range(rows):
        theta[m, 0] = one
        theta[m, 1] = d[m, 0]
        for i in range(1, n):
            theta[m, i + 1] = d[m, i] * theta[m, i] - k[i - 1] * theta[m, i - 1]
        phi[m, n] = one
        phi[m, n - 1] = d[m, n - 1]
        for i in range(n - 2, -1, -1):
            phi[m, i] = d[m, i] * phi[m, i + 1] - k[i] * phi[m, i + 2]


@jit
def _sweeps(d, k, left, right):
    """L from the left and R from the right, one position after the other."""
    rows, n = d.shape
    one = d.dtype.type(1)
    for m in range(rows):
        left[m, 0] = one / d[m, 0]
        for i in range(1, n):
            left[m, i] = one / (d[m, i] - k[i - 1] * left[m, i - 1])
        right[m, n - 1] = one / d[m, n - 1]
        for i in range(n - 2, -1, -1):
            right[m, i] = one / (d[m, i] - k[i] * right[m, i + 1])


@jit
def _adjoint(P, k, left, right, grad):
    """grad = Re(P - s - t), the exact gradient of a real ``a`` from P = conj(gbar) G^2."""
    rows, n = P.shape
    for m in range(rows):
        s = P[m, n - 1]
        grad[m, n - 1] = P[m, n - 1].real - s.real
        for i in range(n - 2, -1, -1):
            s = P[m, i] + k[i] * left[m, i] * left[m, i] * s
            grad[m, i] = P[m, i].real - s.real
        t = P[m, 0]
        grad[m, 0] -= t.real
        for i in range(1, n):
            t = P[m, i] + k[i - 1] * right[m, i] * right[m, i] * t
            grad[m, i] -= t.real


def products(d: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G (M, N) with theta and phi (M, N + 1) it was formed from, in the complex type of ``d``; not finite after an
    overflow."""
    theta = np.empty((d.shape[0], d.shape[1] + 1), d.dtype)
    phi = np.empty_like(theta)
    _products(d, k, theta, phi)
    with np.errstate(all="ignore"):
        return theta[:, :-1] * phi[:, 1:] / theta[:, -1:], theta, phi


def ratios(theta: np.ndarray, phi: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """L and R (M, N) as ratios of neighbouring products, rounded to ``dtype`` after the division.

    theta_{i-1} / theta_i and phi_{i+1} / phi_i are of ordinary size, which the products are not.
    """
    with np.errstate(all="ignore"):
        return (theta[:, :-1] / theta[:, 1:]).astype(dtype), (phi[:, 1:] / phi[:, :-1]).astype(dtype)


def adjoint(gbar: np.ndarray, G: np.ndarray, k: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """dL/da (M, N), real, for a real loss with gbar = dL/dRe G + i dL/dIm G, in the precision of its arguments."""
    grad = np.empty(G.shape, G.real.dtype)
    with np.errstate(all="ignore"):
        _for(G, _adjoint)(np.conj(gbar) * G * G, k, left, right, grad)
    return grad


def left_right(d: np.ndarray, k: np.ndarray, gbar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G and dL/da by plain sequential left/right sweeps, in the precision of the arguments."""
    left, right = np.empty_like(d), np.empty_like(d)
    _for(d, _sweeps)(d, k, left, right)
    pivot = d.copy()
    pivot[:, 1:] -= k * left[:, :-1]
    pivot[:, :-1] -= k * right[:, 1:]
    G = 1 / pivot
    return G, adjoint(gbar, G, k, left, right)


def _for(x: np.ndarray, kernel: Callable) -> Callable:
    """A kernel, compiled; for mpmath's numbers as it stands: Python's arithmetic is that of whatever it is given."""
    return kernel.py_func if x.dtype == object else kernel


def fifty_digits(a: np.ndarray, k: np.ndarray, z: complex, gbar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G and dL/da of the given doubles, computed with 50 digits and rounded once; about 0.1 ms a position."""
    to_complex, to_real = np.frompyfunc(mpmath.mpc, 1, 1), np.frompyfunc(mpmath.mpf, 1, 1)
    with mpmath.workdps(DIGITS):
        G, grad = left_right(to_complex(a) - mpmath.mpc(z), to_real(k), to_complex(gbar))
        return G.astype(np.complex128), grad.astype(np.float64)
