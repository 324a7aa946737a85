"""The arms of the embedding-freeze study: what is pretrained, what is trained, and where the head's weights come from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bklm.studies.embedding_freeze import EmbeddingFreezeConfig

FACTORS = {
    "initialisation": ("pretrained", "random"),
    "freezing": ("frozen", "trained"),
    "head": ("tied", "untied"),
}


@dataclass(frozen=True)
class Arm:
    """One way to treat the embedding. The fields after ``head`` are those of the original's unequal comparison.

    Attributes:
        initialisation: "pretrained" or "random", of the input embedding. An untied head always starts random.
        freezing: "frozen" (the embedding and the LayerNorm after it stay as they are) or "trained".
        head: "tied" (the output weights are the embedding) or "untied".
        original: "" or what the original called the arm: "frozen" or "trained".
    """

    initialisation: str
    freezing: str
    head: str
    original: str = ""

    @property
    def name(self) -> str:
        if self.original:
            return f"original comparison: {self.original}"
        return f"{self.initialisation}, {self.freezing}, {self.head}"

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return self.name.replace(":", "").replace(",", "").replace(" ", "_")

    @property
    def trains_norm(self) -> bool:
        """Whether the LayerNorm after the embedding is trained."""
        return self.freezing == "trained" or self.original == "frozen"

    @property
    def zero_head(self) -> bool:
        return self.original == "trained"

    @property
    def train_share(self) -> float:
        """Share of the sample's tokens that the arm is trained on, from the first on."""
        return 1 / 3 if self.original == "trained" else 1.0

    @property
    def other_validation(self) -> bool:
        """Whether the arm is scored on documents of the test split, not on those that the other arms are scored on."""
        return self.original == "trained"


# What the original compared as "frozen" and "trained", and why the two cannot be compared.
ORIGINAL_ARMS = (
    Arm("pretrained", "frozen", "tied", original="frozen"),
    Arm("pretrained", "frozen", "untied", original="trained"),
)
INEQUALITY = (
    'The original comparison is unequal: its "frozen" arm trains the LayerNorm after the embedding, so that its contexts '
    'drift; its "trained" arm does not train the embedding at all, but an untied head that starts at zero, on a third of '
    "the tokens, and is scored on other documents."
)


def arms_of(config: EmbeddingFreezeConfig) -> list[Arm]:
    """The arms that a resolved config asks for: every combination of the three factors, then the original comparison."""
    chosen = [
        values if getattr(config, factor) == "both" else (getattr(config, factor),)
        for factor, values in FACTORS.items()
    ]
    arms = [Arm(*values) for values in itertools.product(*chosen)]
    return arms + (list(ORIGINAL_ARMS) if config.original_comparison else [])
