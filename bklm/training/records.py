"""What a training run leaves behind, epoch by epoch, and the original's measures of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bklm.moe.layer import unused_experts, usage_entropy


@dataclass(frozen=True)
class EpochRecord:
    """One row of a training curve. Losses in nats per token, time in seconds, norms before clipping."""

    epoch: int
    train_loss: float
    train_perplexity: float | None  # None where the loss is not of the text alone
    val_loss: float
    val_perplexity: float
    val_perplexity_without_unk: float
    val_accuracy: float
    gradient_norm_mean: float
    gradient_norm_variance: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    expert_counts: list[list[int]] = field(default_factory=list)  # tokens per expert, one list a layer
    batch_parts: int = 1  # parts that a batch was worked through in at the epoch's end
    gradient_norm_99: float = 0.0  # the norm that 99 of 100 steps stay below

    @property
    def trained_in_words(self) -> str:
        """ "PPL 5.9", or "loss 1.775 (no perplexity)"."""
        if self.train_perplexity is None:
            return f"loss {self.train_loss:.3f} (no perplexity)"
        return f"PPL {self.train_perplexity:.1f}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


EPOCH_KEYS = frozenset(f.name for f in fields(EpochRecord))


def gradient_variance(records: list[EpochRecord]) -> float:
    """The original's measure: variance over steps of the pre-clip global gradient norm, averaged over epochs."""
    return sum(r.gradient_norm_variance for r in records) / len(records)


def convergence_epoch(perplexities: list[float], fraction: float = 0.9) -> int:
    """The original's "convergence speed": the first epoch (from 1) that has made 90% of the total improvement."""
    first, best = perplexities[0], min(perplexities)
    threshold = first - fraction * (first - best)
    return next(i for i, p in enumerate(perplexities, start=1) if p <= threshold)


def describe_experts(counts: list[list[int]]) -> str:
    """Least even layer's usage entropy (1: even, 0: one expert has all) and the number of experts that dropped out."""
    layers = [layer for layer in counts if len(layer) > 1]
    if not layers:
        return ""
    entropy = min(usage_entropy(layer, normalised=True) for layer in layers)
    unused = sum(unused_experts(layer) for layer in layers)
    return f", expert usage entropy {entropy:.2f}, {unused} dropped out"
