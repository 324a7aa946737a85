"""bklm: O(N) language models around the BK-core, and the studies that measure them.

    import bklm

    # The operator: the diagonal of (T - z I)^-1 of a tridiagonal T, differentiable, in O(N).
    G = bklm.resolvent_diagonal(a, b, c, 1j, causal=True)

    # A study, as its notebook runs it.
    config = bklm.studies.GradBlendConfig(profile="smoke", dataset="embedded")
    result = bklm.studies.run_grad_blend(config)

    # What it trained, in use: from the folder or the zip that it left.
    trained = bklm.load("results/grad_blend.zip")
    print(trained.generate("The statement", 20))

Each name is imported when it is first asked for. ``bklm`` on the command line, or ``python -m bklm``, does the same.
"""

import importlib

__version__ = "0.3.0"
__all__ = ["__version__", "load", "models", "resolvent_diagonal", "studies"]

_HOMES = {"load": "bklm.trained", "resolvent_diagonal": "bklm.bk_core"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("models", "studies"):
        return importlib.import_module(f"bklm.{name}")
    raise AttributeError(f"module 'bklm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
