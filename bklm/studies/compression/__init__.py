"""The compression study: how few bytes keep a model's perplexity, against smaller models, counting and text alone."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__, {"config": ("CompressionConfig",), "run": ("CompressionResult", "run_compression")}
)
