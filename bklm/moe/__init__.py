"""A sparse mixture of experts whose router learns, with its whole backward written down: layer.py has the derivation.

Below it lie what the models' linear maps share with it: products.py, autocast.py and tracing.py.
"""

from bklm.moe import reference
from bklm.moe.layer import AnalyticMoE, total_balance_loss, unused_experts, usage_entropy

__all__ = ["AnalyticMoE", "reference", "total_balance_loss", "unused_experts", "usage_entropy"]
