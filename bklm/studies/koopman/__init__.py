"""The Koopman study: an auxiliary loss, blocks replaced by operators, and a linear recurrence that must remember."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(__name__, {"config": ("KoopmanConfig",), "run": ("KoopmanResult", "run_koopman")})
