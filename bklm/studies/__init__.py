"""The studies: each a folder with a config dataclass and one run function. A newcomer begins with ``grad_blend``."""

from bklm.files.lazy import lazy

STUDIES = {
    "grad_blend": "GradBlend",
    "precision": "Precision",
    "baseline": "Baseline",
    "embedding_freeze": "EmbeddingFreeze",
    "koopman": "Koopman",
    "physics": "Physics",
    "compression": "Compression",
    "dialogue": "Dialogue",
    "integration": "Integration",
}
"""Folder of a study, and what the names of its config and result begin with; in the order of the notebooks."""

__getattr__, __all__ = lazy(
    __name__, {name: (f"{words}Config", f"{words}Result", f"run_{name}") for name, words in STUDIES.items()}
)


def configs() -> list[type]:
    """The config of every study."""
    return [__getattr__(f"{words}Config") for words in STUDIES.values()]
