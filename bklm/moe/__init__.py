"""A sparse mixture of experts whose router learns, with its whole backward written down: layer.py has the derivation."""

from bklm.moe import reference
from bklm.moe.layer import AnalyticMoE, total_balance_loss, unused_experts, usage_entropy

__all__ = ["AnalyticMoE", "reference", "total_balance_loss", "unused_experts", "usage_entropy"]
