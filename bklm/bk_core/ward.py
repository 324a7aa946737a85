"""The Ward identity of a resolvent: a conservation law that the operator obeys whatever is learned, as a check of it.

For a real symmetric T and z = E + i eta, G = (T - z)^-1 has G - G^H = (z - conj z) G^H G, so on the diagonal

    Im G_ii = eta sum_j |G_ij|^2

In scattering theory this is the optical theorem: what position i loses is what arrives at all positions together. The causal
L_i is the last diagonal entry of the leading block's resolvent, so it obeys the same law with that block's last row. Its
residual is zero for every potential: no training loss can be made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core.operator import resolvent_diagonal
from bklm.bk_core.solve import resolvent_solve


@torch.no_grad()
def ward_residual(
    a: Tensor, bonds: Tensor | float, z: Tensor | complex, *, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """Im G_ii - Im z sum_j |G_ij|^2, (..., N), the left side from ``resolvent_diagonal`` and the right one from
    ``resolvent_solve``.

    Args:
        a: (..., N) real. bonds: real, (..., N - 1), on both sides of the diagonal. z: Im z != 0, a number or (...).

    Raises:
        ValueError: complex a or bonds, for which there is no such law; and as both operators do.
    """
    if a.is_complex() or torch.as_tensor(bonds).is_complex():
        raise ValueError(
            "ward_residual: got complex entries; the law holds for a real symmetric T: give real a and bonds."
        )
    bonds = torch.as_tensor(bonds, dtype=a.dtype, device=a.device)
    n = a.shape[-1]
    options = {"causal": causal, "backend": backend}
    left = resolvent_diagonal(a, bonds, bonds, z, **options).imag
    columns = torch.eye(n, dtype=a.dtype, device=a.device)
    rows = resolvent_solve(columns, a, bonds, bonds, z, **options)
    eta = z.imag.unsqueeze(-1) if isinstance(z, Tensor) else z.imag
    return left - eta * rows.abs().square().sum(-1)
