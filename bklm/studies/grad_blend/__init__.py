"""The GRAD_BLEND sweep: which blend of a theoretical gradient with "hypothesis-7" trains ResNet-BK best?"""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "config": ("GradBlendConfig",), "future": ("future_table",),
        "run": ("GradBlendResult", "run_grad_blend", "write_sample"),
    },
)  # fmt: skip
