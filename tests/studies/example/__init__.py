"""An example of a whole study: does dropout help a small recurrent model? Copy this folder to begin one."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(__name__, {"config": ("ExampleConfig",), "run": ("ExampleResult", "run_example")})
