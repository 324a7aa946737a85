"""Scalar numba kernels, one row after the other, for any mix of real and complex ``a`` and ``k``.

The state is carried in complex128 whatever the precision of the arrays: a scalar loop gains nothing from 32 bits, and
the square of a modulus then has the range of a double; 64-bit pivots beyond that are scaled. Arithmetic is written out
in real and imaginary parts because numba's complex division tests for zero and raises. NaN and infinities are neither
tested for nor hidden.
"""

from __future__ import annotations

import functools

from numba import njit

from bklm.bk_core.cpu.jit import jit

# These rows are what the tiles are tested against: every product is rounded before it is added.
_jit = functools.partial(jit, fastmath=False)


@njit(inline="always")
def _reciprocal(x):
    n = x.real * x.real + x.imag * x.imag
    factor = 1.0
    if not (1e-290 <= n <= 1e290):  # the square left the range or is about to: again, scaled by a power of two
        factor = 2.0**-530 if max(abs(x.real), abs(x.imag)) > 1 else 2.0**530
        x = complex(x.real * factor, x.imag * factor)
        n = x.real * x.real + x.imag * x.imag
    return complex(x.real / n * factor, -x.imag / n * factor)


@_jit
def forward_rows(a, k, z, causal, G, left, first, last):
    """Rows ``first <= r < last`` of G (M, N). ``left`` (N,) complex128 is scratch, unused when ``causal``."""
    n = a.shape[1]
    for r in range(first, last):
        kr = r if k.shape[0] > 1 else 0
        shift = complex(z[r])
        # L from the first position to the last; it is the causal G.
        state = 0j
        for i in range(n):
            pivot = a[r, i] - shift
            if i > 0:
                pivot -= k[kr, i - 1] * state
            state = _reciprocal(pivot)
            if causal:
                G[r, i] = state
            else:
                left[i] = state
        if causal:
            continue
        # R from the last position to the first, and G from R's pivot and L.
        state = 0j
        for i in range(n - 1, -1, -1):
            pivot = a[r, i] - shift
            if i < n - 1:
                pivot -= k[kr, i] * state
            state = _reciprocal(pivot)
            if i > 0:
                pivot -= k[kr, i - 1] * left[i - 1]
            G[r, i] = _reciprocal(pivot)


@_jit
def backward_causal_rows(gbar, k, G, first, last, D, K, needs_k, Dsum):
    """D (M, N) complex128, K (M, N - 1) where ``needs_k``, Dsum (M,), from L = G. Formulas: see operator.py."""
    n = G.shape[1]
    for r in range(first, last):
        kr = r if k.shape[0] > 1 else 0
        total = 0j
        u = 0j  # L_{i+1}^2 m_{i+1} = -D_{i+1}
        for i in range(n - 1, -1, -1):
            L = complex(G[r, i])
            m = complex(gbar[r, i]).conjugate()
            if i < n - 1:
                if needs_k:
                    K[r, i] = L * u
                m += k[kr, i] * u
            u = L * (L * m)  # L^2 alone may underflow
            D[r, i] = -u
            total -= u
        Dsum[r] = total


@_jit
def backward_rows(gbar, a, k, z, G, first, last, left, right, D, K, needs_k, Dsum):
    """As :func:`backward_causal_rows` for the bidirectional operator; ``left`` and ``right`` (N,) are scratch."""
    n = a.shape[1]
    for r in range(first, last):
        kr = r if k.shape[0] > 1 else 0
        shift = complex(z[r])
        # L again: it costs less than to keep it from the forward.
        state = 0j
        for i in range(n):
            pivot = a[r, i] - shift
            if i > 0:
                pivot -= k[kr, i - 1] * state
            state = _reciprocal(pivot)
            left[i] = state
        # From the end: R, and s_i = P_i + k_i L_i^2 s_{i+1}; D takes P - s, K takes L_i s_{i+1}.
        state = 0j
        s = 0j
        for i in range(n - 1, -1, -1):
            pivot = a[r, i] - shift
            P = complex(gbar[r, i]).conjugate() * complex(G[r, i]) * complex(G[r, i])
            L = left[i]
            if i < n - 1:
                pivot -= k[kr, i] * state
                if needs_k:
                    K[r, i] = L * s
                s = P + k[kr, i] * L * L * s
            else:
                s = P
            state = _reciprocal(pivot)
            right[i] = state
            D[r, i] = P - s
        # From the beginning: t_i = P_i + k_{i-1} R_i^2 t_{i-1}; D loses t, K gains R_{i+1} t_i.
        total = 0j
        t = 0j
        for i in range(n):
            P = complex(gbar[r, i]).conjugate() * complex(G[r, i]) * complex(G[r, i])
            R = right[i]
            if i > 0:
                if needs_k:
                    K[r, i - 1] += R * t
                t = P + k[kr, i - 1] * R * R * t
            else:
                t = P
            D[r, i] -= t
            total += D[r, i]
        Dsum[r] = total
