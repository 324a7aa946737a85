"""The studies: each a config dataclass and one run function."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "baseline": ("BaselineConfig", "BaselineResult", "run_baseline"),
    "embedding_freeze": ("EmbeddingFreezeConfig", "EmbeddingFreezeResult", "run_embedding_freeze"),
    "grad_blend": ("GradBlendConfig", "GradBlendResult", "run_grad_blend"),
    "precision": ("PrecisionConfig", "PrecisionResult", "run_precision"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BaselineConfig",
    "BaselineResult",
    "EmbeddingFreezeConfig",
    "EmbeddingFreezeResult",
    "GradBlendConfig",
    "GradBlendResult",
    "PrecisionConfig",
    "PrecisionResult",
    "run_baseline",
    "run_embedding_freeze",
    "run_grad_blend",
    "run_precision",
]


def __getattr__(name: str) -> Any:
    """Import a study when it is first asked for, so that ``python -m bklm.studies.NAME`` runs its module only once."""
    if name in _HOME:
        return getattr(importlib.import_module(f"bklm.studies.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bklm.studies' has no attribute {name!r}")
