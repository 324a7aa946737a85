"""The block of a ResNet-BK that reads: values of all positions before, weighted by the last rows of a resolvent.

With u = LN(x), after a short convolution over positions where there is one, per head a potential v_i = w_v . u_i + E, bonds
b_i = sigmoid(w_b . u_i + beta) and values V_i of d / H channels,

    y_i = the last entry of (T_i - i eta)^-1 V_0..i,   T_i = tridiag(b, v, b) on positions 0 ... i
    x_i <- x_i + W_o [silu(g_i) Re y'_i, silu(g_i) Im y'_i],   y' = y / rms(y),   g = W_g u
    x_i <- x_i + W_2 gelu(W_1 LN(x_i)), or a mixture of experts

b_i couples position i to i - 1 and is a function of u_i: a position whose bond closes forgets all that lies before. The
weights of the values are the last row of the resolvent of a Hermitian matrix, at most 1 / eta long: no length overflows.
Their phase turns with the energy E inside the band |v| < 2 b, and their size falls by about eta / sqrt(4 b^2 - v^2) a
position. Both are learned; eta starts spread over the heads, for memories of one position to hundreds, E in the middle
of the band (every second one at its edge with ``edge_energy``). The rms divides out the size of y, which eta sets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.bk_core import SolveState, resolvent_solve
from bklm.bk_core.solve import advance
from bklm.models.dropout import add_dropout
from bklm.models.mixing import MixingPoint
from bklm.models.normalised_gate import gated, normalised, normalised_gate
from bklm.models.resnet_bk_config import ResNetBKConfig
from bklm.models.short_convolution import short_convolution
from bklm.models.solve_features import is_fused, solve_features
from bklm.moe.layer import AnalyticMoE
from bklm.moe.products import Linear

INITIAL_STD = 0.02
OUTPUT_SCALE = 0.1


class MixerState(NamedTuple):
    """What a ``SolveMixer`` carries from one position to the next."""

    solve: SolveState  # left (B, H) and y (B, H, d / H), complex
    recent: Tensor  # (B, convolution - 1, d): inputs of the short convolution; (B, 0, d) without one


class SolveCore(nn.Module):
    """The operator as a module of its own, whose inputs and outputs a hook can see."""

    backend = "auto"
    """Which code computes, see ``bklm.bk_core.available_backends``; set it on a core to compare them within a model."""

    def __init__(self, causal: bool, grad_blend: float) -> None:
        super().__init__()
        self.causal, self.grad_blend = causal, grad_blend

    def forward(
        self, values: Tensor, potential: Tensor, bonds: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """y (B, H, N, w), and L (B, H, N) where causal, of values (B, H, N, w), potential (B, H, N), bonds (B, H, N - 1)."""
        options = {"causal": self.causal, "return_left": self.causal, "grad_blend": self.grad_blend}
        found = resolvent_solve(values, potential, bonds, bonds, z, backend=self.backend, **options)
        return found if self.causal else (found, None)


class SolveMixer(nn.Module):
    """(B, N, d) -> (B, N, d), ``y_i`` above; with ``causal=False`` the whole resolvent, and every position sees the future."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.config, d, heads = config, config.d_model, config.n_heads
        width = config.convolution
        self.convolution = nn.Conv1d(d, d, width, groups=d) if width else None
        # One product: values and gates (d each), potential and bond of each head, whose biases are the energies E and beta.
        self.inputs = Linear(d, 2 * d + 2 * heads)
        self.log_eta = nn.Parameter(torch.empty(heads))
        self.core = SolveCore(config.causal, config.grad_blend)
        self.mixed = MixingPoint()
        # What the convolution brings from other positions reaches the gates past the core.
        self.neighbours = MixingPoint() if width > 1 else None
        self.output = Linear(2 * d, d)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights N(0, 0.02), the output's a tenth of that.

        A normalised head is as loud when it has nothing to say yet. Chosen, like the defaults of the config, by validation
        perplexity after one epoch on a WikiText-2 sample.
        """
        config, heads, d = self.config, self.config.n_heads, self.config.d_model
        for linear in (self.inputs, self.output):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        self.output.weight.mul_(OUTPUT_SCALE)
        energies = torch.linspace(-config.energy_span, config.energy_span, heads)
        energies[::2] += config.edge_energy
        self.inputs.weight[2 * d : 2 * d + heads] *= config.potential_scale
        self.inputs.bias[2 * d : 2 * d + heads] = energies
        self.inputs.bias[2 * d + heads :] = math.log(config.hopping / (1 - config.hopping))
        self.log_eta.copy_(torch.linspace(math.log(config.least_eta), math.log(config.eta), heads))
        if self.convolution is not None:
            # The identity: a convolution that has learned nothing changes nothing.
            nn.init.zeros_(self.convolution.weight)
            nn.init.zeros_(self.convolution.bias)
            self.convolution.weight[..., -1] = 1.0

    def forward(self, u: Tensor) -> tuple[Tensor, MixerState | None]:
        """u (B, N, d) -> output (B, N, d), and the state after the last position (None where it sees the future)."""
        heads, causal = self.config.n_heads, self.config.causal
        read = self._inputs(self._convolved(u))
        if self._is_fused(read):
            features, solve = solve_features(read, self.log_eta)
            return self.output(features.flatten(2)), MixerState(solve, self._recent(u))
        values, gates, potential, bond = self._parts(read)
        values, potential = values.transpose(1, 2), potential.transpose(1, 2)
        bond = bond.transpose(1, 2)[..., 1:]
        z = self._shift().expand(len(u), heads)
        y, left = self.core(values, potential, bond, z)
        state = MixerState(SolveState(left[..., -1], y[..., -1, :]), self._recent(u)) if causal else None
        return self._write(y, gates), state

    def step(self, u: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """One position u (B, 1, d) after the one whose state is given, or the first."""
        past = u.new_zeros(len(u), self._reach, u.shape[-1]) if state is None else state.recent
        window = torch.cat((past, u), 1)
        if self.convolution is not None:
            # Not conv1d, which takes a tenth of a millisecond to prepare itself.
            taps = self.convolution.weight[:, 0].t()
            u = self._heard((window * taps).sum(1, keepdim=True) + self.convolution.bias, u, self._reach)
        read = self._parts(self._inputs(u))
        values, potential, bond = (read[k].squeeze(1) for k in (0, 2, 3))
        # Not solve_step, whose checks of eta take longer than the step.
        solve = advance(values, potential, bond, bond, self._shift(), None if state is None else state.solve)
        return self._write(solve.y.unsqueeze(2), read[1]), MixerState(solve, window[:, 1:])

    @property
    def _reach(self) -> int:
        return max(0, self.config.convolution - 1)

    def _convolved(self, u: Tensor) -> Tensor:
        if self.convolution is None:
            return u
        before = self._reach if self.config.causal else self._reach - self._reach // 2
        return self._heard(
            short_convolution(u, self.convolution.weight, self.convolution.bias, before), u, before
        )

    def _heard(self, convolved: Tensor, u: Tensor, own: int) -> Tensor:
        """The convolution of u, in which what other positions bring can be recorded or replaced; tap ``own`` is u's own."""
        if self.neighbours is None or self.neighbours.idle:
            return convolved
        alone = u * self.convolution.weight[:, 0, own] + self.convolution.bias
        return alone + self.neighbours(convolved - alone)

    def _recent(self, u: Tensor) -> Tensor:
        """The last inputs that the convolution of the next position reads, zeros before the first."""
        short = self._reach - u.shape[1]
        return F.pad(u, (0, 0, short, 0)) if short > 0 else u[:, u.shape[1] - self._reach :]

    def _is_fused(self, read: Tensor) -> bool:
        """Whether one pass computes the features: nobody chose the core's backend, or looks at it or at what was mixed."""
        core = self.core
        plain = (
            self.config.causal
            and not self.config.grad_blend
            and read.shape[1] > 0
            and core.backend == SolveCore.backend
        )
        watched = core._forward_hooks or core._forward_pre_hooks or core._backward_hooks
        return plain and self.mixed.idle and not watched and is_fused(read, self.log_eta)

    def _inputs(self, w: Tensor) -> Tensor:
        """Values and gates (d each), potentials and bonds before their sigmoid (H each) of the mixer's inputs."""
        read = self.inputs(w)
        # Under autocast the products are half precision; the recurrence is not.
        return read.float() if read.dtype.itemsize < 4 else read

    def _parts(self, read: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values (B, N, H, d / H), gates (B, N, d), potentials and bonds (B, N, H)."""
        d, heads = self.config.d_model, self.config.n_heads
        values, gates, potential, bond = read.split((d, d, heads, heads), -1)
        # Not unflatten: torch.compile cannot follow it where a default device is set (torch 2.13).
        return values.view(*read.shape[:-1], heads, -1), gates, potential, torch.sigmoid(bond)

    def _shift(self) -> Tensor:
        """z = i eta (H,)."""
        return torch.complex(torch.zeros_like(self.log_eta), self.log_eta.exp())

    def _write(self, y: Tensor, gates: Tensor) -> Tensor:
        """The output (B, N, d) from y (B, H, N, d / H)."""
        features = normalised_gate(y, gates) if self.mixed.idle else gated(self.mixed(normalised(y)), gates)
        return self.output(features.flatten(2))


class DenseLayer(nn.Module):
    """Linear(d, width), GELU, Linear(width, d)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = Linear(d_model, width)
        self.down = Linear(width, d_model)

    @torch.no_grad()
    def reset_parameters(self, branches: int) -> None:
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        self.down.weight.div_(math.sqrt(branches))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SolveBlock(nn.Module):
    """One residual block, (B, N, d) -> (B, N, d)."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.dropout_p = config.dropout_p
        self.branches = 2 * config.n_layers
        self.mixer_norm = nn.LayerNorm(config.d_model)
        self.mixer = SolveMixer(config)
        self.norm = nn.LayerNorm(config.d_model)
        if config.num_experts == 1:
            self.moe = None
            self.dense = DenseLayer(config.d_model, config.dense_width or 4 * config.d_model)
        else:
            self.moe = AnalyticMoE(
                config.d_model,
                config.num_experts,
                config.top_k,
                config.dropout_p,
                router_gradient=config.router_gradient,
                balance=config.balance,
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for norm in (self.mixer_norm, self.norm):
            norm.reset_parameters()
        self.mixer.reset_parameters()
        if self.moe is None:
            self.dense.reset_parameters(self.branches)
        else:
            self.moe.reset_parameters()
            self.moe.down_weight.mul_(0.1)
            self.moe.down_bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, MixerState | None]:
        mixed, state = self.mixer(self.mixer_norm(x))
        return self._add(x, mixed), state

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        return self._add(x, mixed), state

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        p, training = self.dropout_p, self.training
        x = add_dropout(x, mixed, p, training)
        h = self.norm(x)
        return add_dropout(x, self.dense(h) if self.moe is None else self.moe(h), p, training)
