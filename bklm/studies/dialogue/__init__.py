"""The dialogue study: does pretraining help, are earlier turns used, who replies best, and what is forgotten?"""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "config": ("DialogueConfig",), "run": ("DialogueResult", "run_dialogue"), "text": ("describe_text",),
        "models": ("write_sample",),
    },
)  # fmt: skip
