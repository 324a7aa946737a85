"""The integration study: each change of the other studies as a switch, all together, each left out, none."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__, {"config": ("IntegrationConfig",), "run": ("IntegrationResult", "run_integration")}
)
