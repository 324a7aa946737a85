"""A run's trained models in use: ``bklm.load`` reads them back to write, to score, to look inside, and to export."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {"model": ("Score", "Trained", "load"), "features": ("Features",), "exporting": ("export", "push")},
)
