"""The precision study: which recursion and which precision for the BK-core, and what the speed claims amount to."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__, {"config": ("PrecisionConfig",), "run": ("PrecisionResult", "run_precision")}
)
