"""``BKCore``: the operator as a layer that turns a potential into features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bklm.bk_core.arguments import real_number
from bklm.bk_core.operator import check_options, resolvent_diagonal
from bklm.bk_core.pivots import LARGEST_32_BIT_SHIFT

LEAST_ETA, MOST_ETA = 1e-18, 1e18
"""The gradient of a feature, up to 1 / eta^2, is still a 32-bit number."""


class BKCore(nn.Module):
    """Potential v (B, N, n_heads) -> features (B, N, 2 n_heads) of ``H = tridiag(1, v - 2, 1)`` at ``z = i eta``.

    Channels: first Re G of all heads, then Im G of all heads. The features are bounded by 1 / eta. Each head is one row
    of :func:`~bklm.bk_core.resolvent_diagonal`, whose docstring defines ``causal``, ``gradient`` and ``grad_blend``.
    Output: float32, or float64 for a float64 potential (16-bit potentials are computed in float32, also under
    autocast). The layer has no parameters. The clamps of the published model on the potential and on the features are
    the model's, not this layer's.

    Raises TypeError for settings of another type, ValueError for n_heads < 1, eta outside [1e-18, 1e18], an unknown
    gradient, grad_blend outside [0, 1], or a potential that is not (B, N, n_heads).
    """

    backend = "auto"
    """Which code computes, see ``available_backends``; set it on a core to compare them within a model."""

    def __init__(
        self,
        n_heads: int = 1,
        causal: bool = True,
        gradient: str = "exact",
        grad_blend: float = 0.0,
        eta: float = 1.0,
    ):
        super().__init__()
        if isinstance(n_heads, bool) or not isinstance(n_heads, int):
            raise TypeError(f"n_heads={n_heads!r}: a whole number of heads is needed.")
        if n_heads < 1:
            raise ValueError(f"n_heads={n_heads}: at least one head is needed.")
        eta = real_number("eta", eta)
        if not LEAST_ETA <= eta <= MOST_ETA:
            raise ValueError(
                f"eta={eta}: the imaginary part of the shift must lie between {LEAST_ETA} and {MOST_ETA}, "
                f"where features, up to 1 / eta, and their gradients, up to 1 / eta^2, fit in 32 bits."
            )
        check_options(causal, gradient, grad_blend)
        self.n_heads = n_heads
        self.causal = causal
        self.gradient = gradient
        self.grad_blend = grad_blend
        self.eta = eta

    def forward(self, potential: Tensor) -> Tensor:
        """(B, N, n_heads) real -> (B, N, 2 n_heads) real."""
        if potential.dim() != 3 or potential.shape[-1] != self.n_heads:
            raise ValueError(
                f"the potential has shape {tuple(potential.shape)}: (batch, positions, n_heads={self.n_heads}) is needed."
            )
        potential = _at_least_32_bits(potential)
        G = resolvent_diagonal(
            (potential - 2).transpose(1, 2),
            1.0,
            1.0,
            self._shift(potential),
            causal=self.causal,
            gradient=self.gradient,
            grad_blend=self.grad_blend,
            backend=self.backend,
        )
        if self.n_heads == 1:
            # torch 2.6 takes the stride of the single head in the gradient for one that complex numbers cannot have.
            return torch.view_as_real(G.squeeze(1))
        # (B, heads, N) complex -> (B, N, Re/Im, heads)
        return torch.view_as_real(G).permute(0, 2, 3, 1).flatten(2)

    def _shift(self, like: Tensor) -> complex | Tensor:
        """z = i eta; for a compiler a tensor, so that one graph serves every eta that needs no 64 bits."""
        if torch.compiler.is_compiling() and 1 / LARGEST_32_BIT_SHIFT <= self.eta <= LARGEST_32_BIT_SHIFT:
            eta = torch.full((), self.eta, dtype=torch.float64, device=like.device)
            return torch.complex(torch.zeros_like(eta), eta)
        return complex(0, self.eta)

    @torch.no_grad()
    def step(self, potential: Tensor, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One position of the causal layer, for generation with a constant state.

        Args:
            potential: v of this position, (B, n_heads).
            left: the state that the previous position returned, (B, n_heads) complex; None at the first position.

        Returns the features (B, 2 n_heads) of this position, equal to those of :meth:`forward` on the whole sequence to
        rounding, and the new state. No gradient. Raises ValueError for a bidirectional layer, which cannot stream.
        """
        if not self.causal:
            raise ValueError(
                "step() needs causal=True: the bidirectional core depends on positions not yet seen."
            )
        if potential.dim() != 2 or potential.shape[-1] != self.n_heads:
            raise ValueError(
                f"the potential has shape {tuple(potential.shape)}: (batch, n_heads={self.n_heads}) is needed."
            )
        potential = _at_least_32_bits(potential)
        pivot = torch.complex(potential - 2, torch.full_like(potential, -self.eta))
        if left is not None:
            pivot = pivot - left
        left = pivot.reciprocal()
        return torch.cat([left.real, left.imag], dim=-1), left

    def extra_repr(self) -> str:
        return (
            f"n_heads={self.n_heads}, causal={self.causal}, gradient={self.gradient!r}, "
            f"grad_blend={self.grad_blend}, eta={self.eta}"
        )


def _at_least_32_bits(potential: Tensor) -> Tensor:
    """16-bit potentials widened before any arithmetic: v - 2 would lose bits that the features show."""
    return potential.float() if potential.dtype in (torch.float16, torch.bfloat16) else potential
