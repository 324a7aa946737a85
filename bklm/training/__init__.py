"""Training and token-weighted evaluation of any ``bklm.models.LanguageModel``; loop.py is the place to begin."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "context_gain": ("ContextGain", "measure_context_gain"),
        "evaluation": ("Evaluation", "evaluate"),
        "loop": ("train",),
        "memory": ("OutOfMemoryError",),
        "non_finite": ("NonFiniteError",),
        "processes": ("make_accelerator",),
        "records": ("EpochRecord", "convergence_epoch", "gradient_variance"),
        "schedules": ("TrainingSettings",),
    },
)
