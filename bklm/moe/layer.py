"""A sparse mixture of experts whose router learns, with its whole backward written down.

Forward. Let l = W x + b be a token's logits, n Gumbel noise (in training; 0 in evaluation) and p = softmax((l + n) / tau).
The token selects the set S of its k largest l + n, a sample of k experts without replacement (Kool et al. 2019), and

    y = (1/k) sum over e in S of f_e(x),        f_e(x) = V_e (m * relu(U_e x + a_e)) / q + c_e,

with m the token's dropout mask and q the probability of keeping a unit. With k = E nothing is left to choose:
y = sum_e p_e f_e(x) with p = softmax(l / tau) and no noise, an ordinary dense mixture.

Backward. The gates g_e = [e in S] / k do not depend on l; straight-through, they are given the derivative of p
(Bengio et al. 2013; Jang et al. 2017). With ybar = dL/dy, h_e = m * relu(U_e x + a_e) and u_e = V_e^T ybar, the selected
experts receive, summed over their tokens,

    dL/dV_e = ybar h_e^T / kq,   dL/dc_e = ybar / k,   dL/dU_e = d_e x^T,   dL/da_e = d_e,   d_e = [h_e > 0] * u_e / kq,

where [h_e > 0] is the derivative of ReLU and mask in one. Since dy/dg_e = f_e(x) for every e, the router receives

    dL/dl = p * (gbar - <p, gbar>) / tau,   gbar_e = <ybar, f_e(x)> = <u_e, h_e> / q + <ybar, c_e>,
    dL/dW = dL/dl x^T,   dL/db = dL/dl,     and the input    dL/dx = sum over e in S of U_e^T d_e + W^T dL/dl.

With k = E the same formulas hold with p_e in place of 1/k, and are then the true derivative. gbar_e of experts that were
not selected is what the forward never computed; the backward does, from h_e and u_e, which the selected ones need
anyway. Activations are computed again, block by block, instead of stored: the forward keeps x, p, the order of the
tokens and one byte a hidden unit for the mask.

How others gate. Switch (Fedus et al. 2022) multiplies the one selected output by its p_e, Mixtral (Jiang et al. 2024) the
k selected ones by a softmax over their k logits: the gate scales the forward, the router hears of selected experts
only, and Mixtral's with k = 1 of nothing. Here the gate does not scale the forward, and with router_gradient="exact"
the router hears what every expert would have done; "selected" gives it what Switch's would hear.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bklm.moe.analytic import Settings, mixture_of_few
from bklm.moe.autocast import autocast_dtype
from bklm.moe.ops import draw, in_backward, mixture
from bklm.moe.tracing import is_ordinary, is_transformed

ROUTER_GRADIENTS = ("exact", "selected", "none")
_FEW_TOKENS = 8
_LEAST_TAU = 1e-6


class AnalyticMoE(nn.Module):
    """Mixture of ``num_experts`` networks Linear(D, 2D), ReLU, dropout, Linear(2D, D), of which a token visits ``top_k``.

    Input and output (..., D), in a model (B, N, D). Under autocast the experts run in autocast's dtype, which is also that
    of the output; routing always runs in float32 (float64 for float64 input). One dropout mask per token serves all its
    experts, so that the exact router gradient compares experts under equal conditions; with top_k = 1 this is ordinary
    dropout. Noise and mask come from torch's global generator of the device. torch.compile sees the mixture as opaque
    operators (fullgraph works, and gives the eager numbers). Second derivatives, torch.func's transforms and forward mode are
    right too, at the price of every expert on every token (``bklm.moe.plain``).

    router_gradient: "exact": straight-through over all experts. "selected": cheaper and biased, the outputs of experts
        that were not selected count as zero. "none": the router of the original experiment, the largest logits without
        noise, gates 1/top_k, and no gradient, hence frozen.
    balance: coefficient of Switch's load-balancing loss E sum_e F_e P_e (F_e: expert e's share of the choices, P_e: mean of
        p_e), which is 1 for uniform usage. The product is left in ``balance_loss`` for the model to add to its loss
        (``total_balance_loss``); as a part of the loss it is scaled and accumulated like the rest. Its gradient,
        E F_e / T per token, joins gbar_e in the backward.
    tau: temperature of p, from 1e-6 on; the gradient of the router grows like 1 / tau.
    dropout_p: rounded to a multiple of 2^-16, see ``bklm.moe.ops.draw``.

    After a training forward ``expert_counts``, (E,) int64 on the CPU, holds the tokens of each expert. With one expert there
    is no router: the module is a dense feed-forward network.

    Raises ValueError or TypeError for bad arguments and for an input that is empty or has another last dimension or dtype;
    ValueError for non-finite logits (on a GPU checked in the one device-to-host copy that grouping tokens needs).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        tau: float = 1.0,
        router_gradient: str = "exact",
        balance: float = 0.0,
    ) -> None:
        super().__init__()
        _check_arguments(d_model, num_experts, top_k, dropout_p, tau, router_gradient, balance)
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.dropout_p, self.tau, self.router_gradient, self.balance = dropout_p, tau, router_gradient, balance
        hidden = 2 * d_model
        self.router = nn.Linear(d_model, num_experts) if num_experts > 1 else None
        self.up_weight = nn.Parameter(torch.empty(num_experts, hidden, d_model))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.down_weight = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model))
        if router_gradient == "none" and self.router is not None:
            self.router.requires_grad_(False)
        self.expert_counts: Tensor | None = None
        self.balance_loss: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert starts as two nn.Linear do: weights and biases uniform in +-1/sqrt(fan_in)."""
        if self.router is not None:
            self.router.reset_parameters()
        for weight, bias in ((self.up_weight, self.up_bias), (self.down_weight, self.down_bias)):
            bound = 1.0 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D); see the class for dtypes, side effects and errors."""
        dtype = self._compute_dtype(x)
        tokens = x.reshape(-1, self.d_model)
        router = (None, None) if self.router is None else (self.router.weight, self.router.bias)
        parameters = (*router, self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        if not self.training:
            self.balance_loss = None
            settings = Settings(self.top_k, self.tau, self.router_gradient, 1.0, dtype)
            few = len(tokens) <= _FEW_TOKENS and self.top_k < self.num_experts
            if few and not torch.is_grad_enabled() and is_ordinary(tokens) and not is_transformed(tokens):
                return mixture_of_few(tokens, *parameters, settings).view(x.shape)
            return mixture(tokens, *parameters, None, None, settings)[0].view(x.shape)
        noisy = self.top_k < self.num_experts and self.router_gradient != "none"
        noise, keep, keep_p = draw(tokens, self.num_experts if noisy else 0, 2 * self.d_model, self.dropout_p)
        settings = Settings(self.top_k, self.tau, self.router_gradient, keep_p, dtype)
        y, balance, counts = mixture(tokens, *parameters, noise, keep, settings)
        balance = self.balance * balance if self.balance > 0 else None
        # What activation checkpointing computes again belongs to a forward whose numbers are here already.
        if torch.compiler.is_compiling() or not in_backward():
            self.expert_counts, self.balance_loss = counts, balance
        return y.view(x.shape)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if not x.is_floating_point():
            raise TypeError(
                f"the input's dtype is {x.dtype}; a floating-point tensor (..., {self.d_model}) is needed"
            )
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"the input's shape is {tuple(x.shape)}; its last dimension must be d_model = {self.d_model}"
            )
        if x.numel() == 0:
            raise ValueError(f"the input is empty (shape {tuple(x.shape)}); at least one token is needed")
        dtype = self.up_weight.dtype
        if (product := autocast_dtype(x)) is not None:
            return product
        if x.dtype != dtype:
            raise TypeError(
                f"the input is {x.dtype} and the parameters are {dtype}; convert one, or use autocast"
            )
        return dtype

    def __getstate__(self) -> dict:
        # balance_loss belongs to the graph of one forward; copies and pickles of the module must not drag it along.
        return {**self.__dict__, "balance_loss": None}

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}, dropout_p={self.dropout_p}, "
            f"tau={self.tau}, router_gradient={self.router_gradient!r}, balance={self.balance}"
        )


def total_balance_loss(model: nn.Module) -> Tensor | float:
    """Sum of the load-balancing losses that the last training forward left in the model's mixtures; 0.0 without any.

    Raises RuntimeError where a gradient could be asked of it that it does not have, because that forward ran without grad
    mode: reentrant activation checkpointing does so.
    """
    mixtures = [m for m in model.modules() if isinstance(m, AnalyticMoE) and m.balance_loss is not None]
    if torch.is_grad_enabled() and not is_transformed():
        for m in mixtures:
            if m.router.weight.requires_grad and not m.balance_loss.requires_grad:
                raise RuntimeError(
                    "the load-balancing loss has no gradient, because the forward that left it ran without grad mode, as "
                    "reentrant activation checkpointing does: use checkpoint(..., use_reentrant=False), or, for the number "
                    "alone, call total_balance_loss under torch.no_grad()"
                )
    return sum(m.balance_loss for m in mixtures) if mixtures else 0.0


def usage_entropy(counts: Tensor | Sequence[int], normalised: bool = False) -> float:
    """Entropy of the tokens' distribution over experts, in nats (0 ... log E), or in units of log E if ``normalised``.

    Raises:
        ValueError: counts that are negative or all zero.
    """
    counts = _as_counts(counts)
    entropy = float(torch.special.entr(counts / counts.sum()).sum())
    return entropy / math.log(len(counts)) if normalised and len(counts) > 1 else entropy


def unused_experts(counts: Tensor | Sequence[int], share: float = 0.01) -> int:
    """Number of experts that received less than ``share`` of a uniform expert's tokens (dropped out of the mixture).

    Raises:
        ValueError: counts that are negative or all zero.
    """
    counts = _as_counts(counts)
    return int((counts * len(counts) < share * counts.sum()).sum())


def _as_counts(counts: Tensor | Sequence[int]) -> Tensor:
    counts = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    if counts.ndim != 1 or counts.sum() <= 0 or counts.min() < 0:
        raise ValueError(
            f"counts must be one non-negative number per expert, not all zero; got {counts.tolist()}"
        )
    return counts


def _check_arguments(
    d_model: int,
    num_experts: int,
    top_k: int,
    dropout_p: float,
    tau: float,
    router_gradient: str,
    balance: float,
) -> None:
    for name, value in (("d_model", d_model), ("num_experts", num_experts), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}; a token can visit 1 ... num_experts = {num_experts} experts")
    for name, value in (("dropout_p", dropout_p), ("tau", tau), ("balance", balance)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}; it must be a real number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must lie in [0, 1)")
    if not _LEAST_TAU <= tau < math.inf:
        raise ValueError(f"tau is {tau}; the temperature must be at least {_LEAST_TAU} and finite")
    if router_gradient not in ROUTER_GRADIENTS:
        raise ValueError(
            f"router_gradient is {router_gradient!r}; allowed are {', '.join(map(repr, ROUTER_GRADIENTS))}"
        )
    if not 0 <= balance < math.inf:
        raise ValueError(f"balance is {balance}; the coefficient must be zero or positive, and finite")
    if balance > 0 and router_gradient == "none":
        raise ValueError(
            "balance needs a router that learns; set balance=0 or another router_gradient than 'none'"
        )
    if balance > 0 and num_experts == 1:
        raise ValueError(
            f"balance is {balance}, but one expert has no router to balance; set balance=0 or num_experts=2"
        )
