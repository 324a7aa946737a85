"""The published sparse core, as it was: what it gives at masked positions is not a resolvent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bklm.bk_core import resolvent_diagonal

MASKED = (0.0, 0.25, 0.5, 0.75)
BATCHES, POSITIONS = (1, 32), 128


def published_diagonal(a: Tensor, z: complex, masked: Tensor) -> Tensor:
    """G as the published ``sparse_bk_core.py`` has it, complex128 (B, N), of off-diagonals 1; a (B, N), masked bool (B, N).

    The recursions copy their last value at a position that is masked in any row of the batch, and the backward one reads a_i
    where a_{i+1} belongs, so that its last factor is G_i's own.
    """
    shifted = a.to(torch.complex128) - z
    skipped = masked.any(0).tolist()
    one = torch.ones_like(shifted[:, 0])

    def recursion(order: list[int]) -> dict[int, Tensor]:
        now, last, found = one, torch.zeros_like(one), {}
        for i in order:
            if not skipped[i]:
                now, last = shifted[:, i] * now - last, now
            found[i] = now
        return found

    n = a.shape[1]
    theta, phi = recursion(list(range(n))), recursion(list(reversed(range(n))))
    return torch.stack([(theta[i - 1] if i else one) * phi[i] / theta[n - 1] for i in range(n)], -1)


def published_rows() -> list[dict[str, Any]]:
    """By batch and share of masked positions: what is skipped, how far G is from 1, and from the resolvent's diagonal.

    ``error`` is the mean of |G - G_exact| / |G_exact|; the potentials are N(0, 1), z = i.
    """
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu", "dtype": torch.float64}
    rows = []
    for batch in BATCHES:
        v = torch.randn(batch, POSITIONS, **drawn)
        chance = torch.rand(batch, POSITIONS, **drawn)
        one = torch.ones(POSITIONS - 1, device="cpu", dtype=torch.float64)
        exact = resolvent_diagonal(v - 2, one, one, 1j)
        for share in MASKED:
            masked = chance < share
            found = published_diagonal(v - 2, 1j, masked)
            rows.append({
                "batch": batch, "masked": share, "skipped": float(masked.any(0).double().mean()),
                "from_one": float((found - 1).abs().max()), "error": float(((found - exact).abs() / exact.abs()).mean()),
            })  # fmt: skip
    return rows
