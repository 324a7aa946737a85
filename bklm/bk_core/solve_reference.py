"""Plain forms of the solve: dense and sequential, and the sequential one as the backend named "reference".

For tests and for reading; :func:`bklm.bk_core.resolvent_solve` is the one to compute with. ``T`` as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core.reference import left_right, one_by_one


def dense(x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, causal: bool = False) -> Tensor:
    """``(T - z I)^-1 x`` by a full solve; causal: the last entry of the solution on each leading block. O(N^3), O(N^4).

    ``x`` (..., N, D), ``a`` (..., N), ``b`` and ``c`` broadcast to (..., N - 1), ``z`` to (...). Returns (..., N, D) in
    complex128, differentiable.
    """
    n = a.shape[-1]
    batch = torch.broadcast_shapes(x.shape[:-2], a.shape[:-1])
    a, b, c, z, x = (torch.as_tensor(t).to(torch.complex128) for t in (a, b, c, z, x))
    matrix = torch.diag_embed((a - z[..., None]).expand(*batch, n))
    matrix = matrix + torch.diag_embed(b.expand(*batch, n - 1), offset=1)
    matrix = matrix + torch.diag_embed(c.expand(*batch, n - 1), offset=-1)
    x = x.expand(*batch, *x.shape[-2:])
    if not causal:
        return one_by_one(torch.linalg.solve, matrix, x)
    blocks = range(1, n + 1)
    last = [one_by_one(torch.linalg.solve, matrix[..., :i, :i], x[..., :i, :])[..., -1, :] for i in blocks]
    return torch.stack(last, dim=-2)


def sequential(x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor | complex, causal: bool = False) -> Tensor:
    """The recursions of solve.py, one torch operation at a time. Shapes as in :func:`dense`, without broadcasting of x."""
    left = left_right(a, b, c, z, causal=True)
    c, b = (torch.as_tensor(t).expand(*a.shape[:-1], a.shape[-1] - 1) for t in (c, b))
    return causal_rows(x, left, c, False) if causal else tridiagonal_rows(x, left, b, c)


def causal_rows(x: Tensor, left: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y_i = L_i (x_i - c_{i-1} y_{i-1}); with ``reverse`` y_i = L_i (x_i - c_i y_{i+1}). Contract: solve_backends.py."""
    n = x.shape[-2]
    order = range(n - 1, -1, -1) if reverse else range(n)
    y: list[Tensor] = []
    for i in order:
        source = x[..., i, :]
        if y:
            source = source - c[..., i if reverse else i - 1, None] * y[-1]
        y.append(left[..., i, None] * source)
    return torch.stack(y[::-1] if reverse else y, dim=-2)


def tridiagonal_rows(x: Tensor, left: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Elimination from the left, substitution from the right. Contract: solve_backends.py."""
    w = causal_rows(x, left, c, False)
    y = [w[..., -1, :]]
    for i in range(x.shape[-2] - 2, -1, -1):
        y.append(w[..., i, :] - left[..., i, None] * b[..., i, None] * y[-1])
    return torch.stack(y[::-1], dim=-2)
