"""The physics study: does an energy in the loss help, does a conservative block, and is it faster, steadier, smaller?"""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(__name__, {"config": ("PhysicsConfig",), "run": ("PhysicsResult", "run_physics")})
