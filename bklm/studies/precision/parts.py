"""The measurements of the precision study besides the grid: each part is a function from settings to named arms.

batched       the original's three ways to take a batch's gradients, beside the fused operator
backward      autograd through the recursions, beside the analytic backward
moe           a mixture of experts: plain autograd beside the analytic backward
total         core and mixture together: everything plain beside everything analytic
architecture  one block of ResNet-BK beside one Transformer block of the same width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.bk_core import reference, resolvent_diagonal
from bklm.harness.measure import Arm
from bklm.models import ResNetBKConfig
from bklm.models.resnet_bk import ResNetBKBlock
from bklm.moe.analytic import Settings
from bklm.moe.ops import draw, mixture
from bklm.moe.reference import dense_moe
from bklm.studies.precision.grid import Problem

# The original's model, and its samples at a time in the memory-optimised way.
WIDTH, DROPOUT, CHUNK = 64, 0.1, 8

SEQUENTIAL, VMAP, CHUNKS = "sample by sample", "vmap over the batch", "vmap in chunks"
FUSED, FUSED_SINGLE = "fused", "fused, complex64"
LOOP_AUTOGRAD, LEFT_RIGHT_AUTOGRAD = "theta/phi loop, autograd", "left/right loop, autograd"
ANALYTIC, ANALYTIC_SINGLE = "analytic", "analytic, complex64"
DENSE, EXACT = "autograd, all experts", "analytic, exact router gradient"
SELECTED = "analytic, selected experts"
PLAIN_SEQUENTIAL, PLAIN = "plain, sample by sample", "plain, whole batch"
ALL_ANALYTIC, ALL_ANALYTIC_DOUBLE = "bklm", "bklm, complex128"
RESNET_BK, TRANSFORMER = "ResNet-BK block", "Transformer block"

Arms = dict[str, Arm]


def _published(a: Tensor, gbar: Tensor, z: complex) -> Tensor:
    """theta/phi loop and diagonal-term gradient, for any leading shape."""
    ones = a.new_ones(a.shape[-1] - 1)
    return reference.local_gradient(gbar, reference.theta_phi(a, ones, ones, z))


def batched(batch: int, length: int, seed: int, device: str) -> Arms:
    """Gradients (batch, length) of the diagonal term, the one that the original batched; complex128 but for the last."""
    problem = Problem.make(batch, length, 1.0, seed, device)
    a, gbar, z = problem.a["complex128"], problem.gbar["complex128"], problem.z

    def chunks() -> Tensor:
        over_rows = torch.vmap(lambda x, g: _published(x, g, z))
        return torch.cat([over_rows(x, g) for x, g in zip(a.split(CHUNK), gbar.split(CHUNK), strict=True)])

    return {
        SEQUENTIAL: Arm(lambda: torch.stack([_published(x, g, z) for x, g in zip(a, gbar, strict=True)])),
        VMAP: Arm(lambda: torch.vmap(lambda x, g: _published(x, g, z))(a, gbar)),
        CHUNKS: Arm(chunks),
        FUSED: Arm(lambda: _analytic(problem, "complex128", "local")),
        FUSED_SINGLE: Arm(lambda: _analytic(problem, "complex64", "local")),
    }


def _analytic(problem: Problem, precision: str, gradient: str) -> Tensor:
    leaf = problem.a[precision].detach().requires_grad_()
    G = resolvent_diagonal(leaf, 1.0, 1.0, problem.z, gradient=gradient)
    return torch.autograd.grad(G, leaf, problem.gbar[precision])[0]


def backward(batch: int, length: int, seed: int, device: str) -> Arms:
    """Exact gradients (batch, length); forward and backward timed apart. complex128 but for the last."""
    problem = Problem.make(batch, length, 1.0, seed, device)

    def through(recursion: Callable[[Tensor], Tensor], precision: str) -> Arm:
        def forward() -> tuple[Tensor, Tensor]:
            leaf = problem.a[precision].detach().requires_grad_()
            return leaf, recursion(leaf)

        return Arm(forward, lambda state: torch.autograd.grad(state[1], state[0], problem.gbar[precision])[0])

    ones, z = problem.a["complex128"].new_ones(length - 1), problem.z
    return {
        LOOP_AUTOGRAD: through(lambda a: reference.theta_phi(a, ones, ones, z), "complex128"),
        LEFT_RIGHT_AUTOGRAD: through(lambda a: reference.left_right(a, ones, ones, z), "complex128"),
        ANALYTIC: through(lambda a: resolvent_diagonal(a, 1.0, 1.0, z), "complex128"),
        ANALYTIC_SINGLE: through(lambda a: resolvent_diagonal(a, 1.0, 1.0, z), "complex64"),
    }


class _Mixture:
    """Weights, noise and dropout mask of one mixture; ``forward`` gives its output (tokens, WIDTH), ``backward`` the gradients
    of input and weights."""

    def __init__(self, tokens: int, experts: int, device: str) -> None:
        d = WIDTH
        sizes = [(tokens, d), (experts, d), (experts,), (experts, 2 * d, d), (experts, 2 * d)]
        sizes += [(experts, d, 2 * d), (experts, d)]
        self.inputs = [torch.randn(s, device=device).mul_(s[-1] ** -0.5).requires_grad_() for s in sizes]
        self.ybar = torch.randn(tokens, d, device=device)
        self.noise, self.keep, self.keep_p = draw(self.inputs[0].detach(), experts, 2 * d, DROPOUT)

    def forward(self, analytic: bool, router_gradient: str = "exact") -> Tensor:
        settings = Settings(1, 1.0, router_gradient, self.keep_p, torch.float32)
        arguments = (*self.inputs, self.noise, self.keep, settings)
        return mixture(*arguments)[0] if analytic else dense_moe(*arguments)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.inputs, self.ybar)


def moe(tokens: int, experts: int, seed: int, device: str) -> Arms:
    """Gradients of input and weights of a top-1 mixture of width 64; forward and backward timed apart."""
    torch.manual_seed(seed)
    problem = _Mixture(tokens, experts, device)
    return {
        DENSE: Arm(lambda: problem.forward(analytic=False), problem.backward),
        EXACT: Arm(lambda: problem.forward(analytic=True), problem.backward),
        SELECTED: Arm(lambda: problem.forward(analytic=True, router_gradient="selected"), problem.backward),
    }


def total(batch: int, length: int, seed: int, device: str) -> Arms:
    """Gradient of the core, exact, and of a mixture of 4 experts on the same number of tokens; forward and backward apart.

    The plain core is in complex128, because the theta/phi products overflow in complex64 from N = 56 on; bklm's, which does
    not need that, in complex64, and in complex128 for a comparison like with like. All mixtures are in float32.
    """
    torch.manual_seed(seed)
    problem, experts = Problem.make(batch, length, 1.0, seed, device), _Mixture(batch * length, 4, device)
    z = problem.z

    def leaf_of(precision: str, rows: slice) -> Tensor:
        return problem.a[precision][rows].detach().requires_grad_()

    def theta_phi(leaf: Tensor) -> Tensor:
        ones = leaf.new_ones(length - 1)
        return reference.theta_phi(leaf, ones, ones, z)

    def arm(core: Callable[[Tensor], Tensor], precision: str, slices: list[slice], analytic: bool) -> Arm:
        def forward() -> tuple[list[Tensor], list[Tensor], Tensor]:
            leaves = [leaf_of(precision, rows) for rows in slices]
            return leaves, [core(leaf) for leaf in leaves], experts.forward(analytic=analytic)

        def backward(state: tuple[list[Tensor], list[Tensor], Tensor]) -> tuple[Tensor, ...]:
            leaves, outputs, y = state
            upstream = problem.gbar[precision]
            found = [
                torch.autograd.grad(G, leaf, upstream[rows])[0]
                for G, leaf, rows in zip(outputs, leaves, slices, strict=True)
            ]
            return torch.cat(found), *experts.backward(y)

        return Arm(forward, backward)

    def fused(leaf: Tensor) -> Tensor:
        return resolvent_diagonal(leaf, 1.0, 1.0, z)

    each, whole = [slice(i, i + 1) for i in range(batch)], [slice(None)]
    return {
        PLAIN_SEQUENTIAL: arm(theta_phi, "complex128", each, False),
        PLAIN: arm(theta_phi, "complex128", whole, False),
        ALL_ANALYTIC: arm(fused, "complex64", whole, True),
        ALL_ANALYTIC_DOUBLE: arm(fused, "complex128", whole, True),
    }


class _TransformerBlock(nn.Module):
    """Causal attention and a feed-forward network of the experts' size, pre-norm, (B, N, WIDTH) -> (B, N, WIDTH).

    No dropout on the attention weights: with it torch has no fused kernel for a CPU, and the peer would be slowed down.
    """

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


def architecture(batch: int, length: int, seed: int, device: str) -> Arms:
    """Gradients of input and weights of one causal block of width 64 in training mode, forward included, float32."""
    torch.manual_seed(seed)
    ours = ResNetBKBlock(ResNetBKConfig(3, d_model=WIDTH, dropout_p=DROPOUT)).to(device)
    peer = _TransformerBlock().to(device)
    x = torch.randn(batch, length, WIDTH, device=device, requires_grad=True)
    upstream = torch.randn(batch, length, WIDTH, device=device)

    def gradients(y: Tensor, block: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *block.parameters()], upstream)

    return {
        RESNET_BK: Arm(lambda: ours(x)[0], lambda y: gradients(y, ours)),
        TRANSFORMER: Arm(lambda: peer(x), lambda y: gradients(y, peer)),
    }


def differences(arms: Arms) -> Iterator[tuple[str, float]]:
    """By arm: how far its results are from those of the first one."""
    wanted = next(iter(arms.values()))()
    for name, arm in arms.items():
        found = arm()
        pairs = [(found, wanted)] if isinstance(found, Tensor) else zip(found, wanted, strict=True)
        yield name, max(difference(x, y) for x, y in pairs)


def difference(x: Tensor, y: Tensor) -> float:
    """Largest difference of two results relative to the largest entry of ``y`` in its row, the worst row."""
    scale = y.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return float(((x - y).abs() / scale).max())
