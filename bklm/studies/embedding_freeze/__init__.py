"""The embedding-freeze study: does freezing the embedding help, or having pretrained it, or tying the head to it?"""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "config": ("EmbeddingFreezeConfig",),
        "run": ("EmbeddingFreezeResult", "run_embedding_freeze", "write_sample"),
        "tables": ("readable_baselines",),
        "text": ("describe_text",),
    },
)
