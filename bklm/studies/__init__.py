"""The studies: each a config dataclass and one run function."""

from bklm.studies.grad_blend import GradBlendConfig, GradBlendResult, run_grad_blend

# Which notebook's form belongs to which config.
CONFIGS = {"notebooks/01_grad_blend_sweep.ipynb": GradBlendConfig}

__all__ = ["CONFIGS", "GradBlendConfig", "GradBlendResult", "run_grad_blend"]
