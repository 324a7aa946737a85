"""A sparse mixture of experts whose router learns (plain autograd; the analytic backward takes its place)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AnalyticMoE"]


class AnalyticMoE(nn.Module):
    """Mixture of `num_experts` two-layer networks, of which each token visits `top_k`; (..., D) -> (..., D).

    Training picks the `top_k` largest of logits + Gumbel noise, with gates 1/k in the forward and the gradient
    of p = softmax((logits + noise) / tau) (straight-through); inference picks the `top_k` largest logits.
    """

    def __init__(self, d_model: int, num_experts: int = 4, top_k: int = 1, dropout_p: float = 0.1,
                 tau: float = 1.0, router_gradient: str = "exact") -> None:  # fmt: skip
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k} is outside 1 ... num_experts = {num_experts}")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.dropout_p, self.tau, self.router_gradient = dropout_p, tau, router_gradient
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
        """Every expert starts as two nn.Linear would: uniform in +-1/sqrt(fan_in), weights and biases."""
        if self.router is not None:
            self.router.reset_parameters()
        for weight, bias in ((self.up_weight, self.up_bias), (self.down_weight, self.down_bias)):
            bound = 1.0 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, self.d_model)
        hidden = torch.einsum("td,ehd->teh", x, self.up_weight) + self.up_bias
        hidden = F.dropout(hidden.relu(), self.dropout_p, self.training)
        outputs = torch.einsum("teh,edh->ted", hidden, self.down_weight) + self.down_bias
        if self.router is None:
            return outputs.squeeze(1).reshape(shape)
        scores = self.router(x)
        hard_choice = self.top_k < self.num_experts
        if self.training and hard_choice and self.router_gradient != "none":
            scores = scores - torch.empty_like(scores).exponential_().log()
        gates = p = torch.softmax(scores / self.tau, -1)
        if hard_choice or self.router_gradient == "none":
            chosen = torch.zeros_like(p).scatter(-1, scores.topk(self.top_k).indices, 1.0)
            gates = chosen / self.top_k
            if self.router_gradient == "exact":
                gates = gates + p - p.detach()
            elif self.router_gradient == "selected":
                gates = gates + chosen * (p - p.detach())
            if self.training:
                self.expert_counts = chosen.detach().sum(0).to(torch.int64)
        return torch.einsum("te,ted->td", gates, outputs).reshape(shape)
