"""The linear recurrent unit as a block of LinearContext: one map of the state for all positions, and linear with input.

With u = LN(x) and a complex diagonal Lambda (Orvieto et al. 2023; as DMD with control: Proctor, Brunton, Kutz 2016),

    z_i = Lambda z_{i-1} + gamma (B u_i),   y_i = Re(C z_i) + D u_i,
    Lambda = exp(-exp(nu) + i exp(theta)),  gamma = sqrt(1 - |Lambda|^2),
    x_i <- x_i + W_2 (silu(W_g y_i) * W_1 y_i)

|Lambda| < 1 whatever is learned, and gamma keeps z as large as B u at any memory. The eigenvalues begin on a ring, evenly
over its area, with phases of up to PHASE: one that turns several times within the trained length cannot be told from others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.dropout import add_dropout
from bklm.models.linear_scan import linear_scan
from bklm.models.mixing import MixingPoint
from bklm.moe.products import Linear

# Those of the paper's tasks with long memories.
RING = (0.9, 0.999)
PHASE = math.pi / 10


class LRUBlock(nn.Module):
    """One residual block, (B, N, D) -> (B, N, D), with D complex numbers of state."""

    parts = 2  # numbers of a channel's state

    def __init__(self, d: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.mixer_norm = nn.LayerNorm(d)
        # nu, theta and D, in the letters above.
        self.log_rate, self.log_phase, self.direct = (nn.Parameter(torch.empty(d)) for _ in range(3))
        # Complex matrices as real ones: of B the real rows before the imaginary ones, of C the real columns before those of
        # minus the imaginary ones.
        self.inputs = Linear(d, 2 * d, bias=False)
        self.mixed = MixingPoint()
        self.mixer_output = Linear(2 * d, d, bias=False)
        # Gates and values, one after the other.
        self.up = Linear(d, 4 * d)
        self.down = Linear(2 * d, d)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int) -> None:
        d = self.direct.numel()
        low, high = (r * r for r in RING)
        squared = low + (high - low) * torch.rand_like(self.log_rate)
        self.log_rate.copy_(torch.log(-0.5 * torch.log(squared)))
        # Never 0, which has no logarithm.
        self.log_phase.copy_(torch.log(PHASE * (1 - torch.rand_like(self.log_phase))))
        nn.init.normal_(self.direct)
        nn.init.normal_(self.inputs.weight, std=(2 * d) ** -0.5)
        nn.init.normal_(self.mixer_output.weight, std=d**-0.5)
        nn.init.normal_(self.up.weight, std=d**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * d * n_layers) ** -0.5)
        for linear in (self.up, self.down):
            nn.init.zeros_(linear.bias)
        self.mixer_norm.reset_parameters()

    def operator(self) -> tuple[Tensor, Tensor]:
        """Lambda (D,), complex64, or complex128 of a model in double, and gamma (D,)."""
        nu, theta = (t.float() if t.dtype.itemsize < 4 else t for t in (self.log_rate, self.log_phase))
        rate = torch.exp(nu)
        # sqrt(1 - |Lambda|^2) without the loss of digits where |Lambda| is near 1.
        return torch.polar(torch.exp(-rate), torch.exp(theta)), torch.sqrt(-torch.expm1(-2 * rate))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output, and z (B, 2 D) after the last position, real parts before imaginary ones; ``before``: z before the first
        one, zeros if None."""
        u = self.mixer_norm(x)
        eigenvalues, gamma = self.operator()
        # Under autocast the products are half precision; the recurrence is not.
        given = self.inputs(u).to(gamma.dtype).unflatten(-1, (2, -1)) * gamma
        given = torch.complex(*given.unbind(-2))
        if before is not None:
            before = torch.complex(*before.to(gamma.dtype).chunk(2, -1))
        z = linear_scan(eigenvalues, given, before)
        z = torch.cat((z.real, z.imag), -1)
        y = self.mixer_output(self.mixed(z).to(x.dtype)) + self.direct * u
        gates, values = self.up(y).chunk(2, -1)
        return add_dropout(x, self.down(F.silu(gates) * values), self.dropout_p, self.training), z[:, -1]
