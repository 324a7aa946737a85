"""Plain, slow, readable forms of the BK-core and of its gradients: what every backend is tested against.

The operator is ``diag((T - z I)^-1)`` for a tridiagonal ``T`` with diagonal ``a`` (..., N), super-diagonal ``b`` and
sub-diagonal ``c`` (..., N - 1), at a complex shift ``z`` with ``Im z != 0``. Write ``d = a - z`` and ``k = b c``.

These functions are made of ordinary differentiable torch operations, loop over N in Python and check little. They
are for tests, benchmarks and studies; :func:`bklm.bk_core.resolvent_diagonal` is the one to compute with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GRADIENT_CLAMP = 1000.0
"""Bound that the published experiment put on every component of its gradient of the potential."""

HYPOTHESIS7_FLOOR = 1e-3
"""Smallest modulus allowed for G^2 in the denominator of hypothesis-7."""


def _complex(x: Tensor | complex, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` as a complex tensor on ``like``'s device, in ``dtype`` or the complex type of ``like``'s precision."""
    if dtype is None:
        dtype = torch.complex128 if like.dtype in (torch.float64, torch.complex128) else torch.complex64
    return torch.as_tensor(x, device=like.device).to(dtype)


def conjugate(x: Tensor) -> Tensor:
    """The complex conjugate, formed at once.

    ``Tensor.conj`` only sets a flag, and compiled graphs (torch 2.13, aot_eager) have been seen to ignore the flag inside
    a registered op: silently wrong gradients. ``conj_physical`` has no vmap rule.
    """
    return torch.complex(x.real, -x.imag)


def one_by_one(compute: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """compute(*matrices) of a batch (..., N, M) each, one of the batch after the other.

    torch 2.13.0 factorises a batch on a CPU in parallel, and that can be wrong where the number of threads was set in the
    process (docs/compatibility.md).
    """
    batch = matrices[0].shape[:-2]
    if math.prod(batch) == 0 or not batch:
        return compute(*matrices)
    rows = zip(*(m.reshape(-1, *m.shape[-2:]).unbind() for m in matrices), strict=True)
    found = torch.stack([compute(*row) for row in rows])
    return found.reshape(*batch, *found.shape[1:])


def dense(a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex) -> Tensor:
    """Diagonal of the inverse of the full (..., N, N) matrix. O(N^3) time, O(N^2) memory.

    Shapes as in the module's docstring, ``b`` and ``c`` broadcast to (..., N - 1) and ``z`` to (...). Returns (..., N)
    complex. For the causal operator see :func:`dense_causal`.
    """
    n = a.shape[-1]
    shift = _complex(z, a)
    upper = _complex(b, a).expand(*a.shape[:-1], n - 1)
    lower = _complex(c, a).expand(*a.shape[:-1], n - 1)
    matrix = torch.diag_embed(_complex(a, a) - shift[..., None])
    matrix = matrix + torch.diag_embed(upper, offset=1) + torch.diag_embed(lower, offset=-1)
    return torch.diagonal(one_by_one(torch.linalg.inv, matrix), dim1=-2, dim2=-1)


def dense_causal(a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex) -> Tensor:
    """Last diagonal entry of the resolvent of each leading block ``T[0..i, 0..i]``. O(N^4) time; returns (..., N)."""
    n = a.shape[-1]
    b = torch.as_tensor(b, device=a.device).expand(*a.shape[:-1], n - 1)
    c = torch.as_tensor(c, device=a.device).expand(*a.shape[:-1], n - 1)
    blocks = [dense(a[..., : i + 1], b[..., :i], c[..., :i], z)[..., -1] for i in range(n)]
    return torch.stack(blocks, dim=-1)


def theta_phi(
    a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, dtype: torch.dtype = torch.complex128
) -> Tensor:
    """The two unscaled continuant recursions: ``G_ii = theta_{i-1} phi_{i+1} / theta_{N-1}``.

    ``theta_i`` is the determinant of the leading block of ``T - z`` that ends at i and ``phi_i`` that of the trailing
    block that starts at i (Usmani, Linear Algebra Appl. 212/213, 1994, 413-414). The products grow like
    ``prod |d_i|`` and overflow: complex64 somewhere between N = 56 and 124, complex128 between N = 450 and 1000,
    depending on ``a``. Kept only as the thing that the published experiment computed with. Returns (..., N) in ``dtype``.
    """
    n = a.shape[-1]
    d = _complex(a, a, dtype) - _complex(z, a, dtype)[..., None]
    k = _complex(b, a, dtype) * _complex(c, a, dtype)
    k = k.expand(*d.shape[:-1], n - 1)
    one = torch.ones_like(d[..., 0])
    theta = [one, d[..., 0]]  # theta[i + 1] belongs to the block that ends at i
    for i in range(1, n):
        theta.append(d[..., i] * theta[-1] - k[..., i - 1] * theta[-2])
    phi = [one, d[..., n - 1]]  # phi[n - i] belongs to the block that starts at i
    for i in range(n - 2, -1, -1):
        phi.append(d[..., i] * phi[-1] - k[..., i] * phi[-2])
    products = torch.stack(theta[:n], dim=-1) * torch.stack(phi[:n][::-1], dim=-1)
    return products / theta[n][..., None]


def left_right(a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, causal: bool = False) -> Tensor:
    """The scaled recursions that the backends use, one torch operation at a time.

    ``L_i = 1 / (d_i - k_{i-1} L_{i-1})``, ``R_i = 1 / (d_i - k_i R_{i+1})``,
    ``G_ii = 1 / (d_i - k_{i-1} L_{i-1} - k_i R_{i+1})``, or ``G_ii = L_i`` with ``causal=True``. For real ``a`` and
    ``k >= 0`` none of them exceeds ``1 / |Im z|``. Returns (..., N) in the complex type of ``a``'s precision.
    """
    d, k = _matrix(a, b, c, z)
    return _fraction(d, k) if causal else _both_sides(d, k)[2]


def left_right_adjoint(
    gbar: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """``D_i = sum_j conj(gbar_j) dG_jj / da_i`` (..., N) and ``K_i = sum_j conj(gbar_j) dG_jj / dk_i`` (..., N - 1).

    The recursions of :func:`left_right` taken back one position after the other, complex. ``gbar`` as in
    :func:`exact_gradient`; ``sum_j conj(gbar_j) dG_jj / dz`` is ``-sum_i D_i``.
    """
    d, k = _matrix(a, b, c, z)
    gbar = conjugate(gbar)
    if causal:
        left = _fraction(d, k)
        D = -left * left * _walk(gbar.flip(-1), (k * left[..., 1:] ** 2).flip(-1)).flip(-1)
        return D, -D[..., 1:] * left[..., :-1]
    left, right, G = _both_sides(d, k)
    # What each G takes of its own denominator, then of those that L and R were made of.
    own = G * G * gbar
    of_left = F.pad(k * own[..., 1:], (0, 1)).flip(-1)
    of_left = left * left * _walk(of_left, (k * left[..., 1:] ** 2).flip(-1)).flip(-1)
    of_right = right * right * _walk(F.pad(k * own[..., :-1], (1, 0)), k * right[..., :-1] ** 2)
    K = (own + of_left)[..., 1:] * left[..., :-1] + (own + of_right)[..., :-1] * right[..., 1:]
    return -(own + of_left + of_right), K


def _matrix(a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex) -> tuple[Tensor, Tensor]:
    """d (..., N) and k (..., N - 1), complex."""
    d = _complex(a, a) - _complex(z, a)[..., None]
    return d, (_complex(b, a) * _complex(c, a)).expand(*d.shape[:-1], a.shape[-1] - 1)


def _fraction(d: Tensor, k: Tensor) -> Tensor:
    """``y_i = 1 / (d_i - k_{i-1} y_{i-1})``, (..., N): L; R of both turned around."""
    found = [1 / d[..., 0]]
    for i in range(1, d.shape[-1]):
        found.append(1 / (d[..., i] - k[..., i - 1] * found[-1]))
    return torch.stack(found, dim=-1)


def _both_sides(d: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L, R and G, each (..., N)."""
    left, right = _fraction(d, k), _fraction(d.flip(-1), k.flip(-1)).flip(-1)
    return left, right, 1 / (d - F.pad(k * left[..., :-1], (1, 0)) - F.pad(k * right[..., 1:], (0, 1)))


def _walk(source: Tensor, factor: Tensor) -> Tensor:
    """``y_i = source_i + factor_{i-1} y_{i-1}``, (..., N)."""
    found = [source[..., 0]]
    for i in range(1, source.shape[-1]):
        found.append(source[..., i] + factor[..., i - 1] * found[-1])
    return torch.stack(found, dim=-1)


def exact_gradient(
    gbar: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, causal: bool = False
) -> Tensor:
    """dL/da by automatic differentiation through :func:`left_right`. ``gbar = dL/dRe G + i dL/dIm G``, (..., N)."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        out = left_right(leaf, b, c, z, causal)
        return torch.autograd.grad(out, leaf, gbar.detach().to(out.dtype))[0]


def local_gradient(gbar: Tensor, G: Tensor, complex_a: bool = False) -> Tensor:
    """``-Re(conj(gbar) G^2)``: the exact gradient without the terms that couple different positions. (..., N).

    Real; with ``complex_a`` the real part is not taken (the gradient of a complex ``a`` is then the conjugate).
    """
    direction = -conjugate(gbar) * G * G
    return direction if complex_a else direction.real


def _floored_square(G: Tensor) -> Tensor:
    """G^2 with its modulus raised to at least ``HYPOTHESIS7_FLOOR``, phase kept (phase 0 where G = 0)."""
    square = G * G
    modulus = square.abs()
    floor = torch.full_like(modulus, HYPOTHESIS7_FLOOR)
    phase = torch.where(modulus > 0, square / torch.where(modulus > 0, modulus, 1.0), torch.ones_like(square))
    return torch.where(modulus < HYPOTHESIS7_FLOOR, floor * phase, square)


def hypothesis7_gradient(gbar: Tensor, G: Tensor, complex_a: bool = False) -> Tensor:
    """``-Re(conj(gbar) / Q)`` with ``Q = G^2`` floored at modulus 1e-3: a heuristic direction, not a gradient.

    ``complex_a`` as in :func:`local_gradient`.
    """
    direction = -conjugate(gbar) / _floored_square(G)
    return direction if complex_a else direction.real


def original_gradient(gbar: Tensor, G: Tensor, grad_blend: float = 0.0) -> Tensor:
    """The published formula: both directions without the conjugate of ``gbar``, blended, then clamped to +-1000.

    ``(1 - alpha) * -Re(gbar G^2) + alpha * -Re(gbar / Q)``. Leaving the conjugate out flips the sign of the imaginary
    part's contribution, so this is not a gradient of anything; it exists to reproduce the published runs. The other
    clamps of those runs (potential, features, |G|) belong to the model, not to the operator.
    """
    theory = -(gbar * G * G).real
    blended = (
        theory if grad_blend == 0 else (1 - grad_blend) * theory - grad_blend * (gbar / _floored_square(G)).real
    )
    return blended.clamp(-GRADIENT_CLAMP, GRADIENT_CLAMP)
