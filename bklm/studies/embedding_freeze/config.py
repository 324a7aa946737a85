"""Settings of the embedding-freeze study."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import TextStudyConfig, setting

FACTORS = {
    "initialisation": ("pretrained", "random"),
    "freezing": ("frozen", "trained"),
    "head": ("tied", "untied"),
}
# What stands in for phase 1 in arms that are otherwise the first one, or the first that trains embedding and head.
PHASE1_ARMS = {
    "diversity": "phase 1 with diversity only",
    "untrained": "untrained context block",
    "first": "token to the first layer only",
}


@dataclass(frozen=True)
class Arm:
    """One way to treat the embedding. The fields after ``head`` are those of the original's unequal comparison.

    Attributes:
        initialisation: "pretrained" or "random", of the input embedding. An untied head always starts random.
        freezing: "frozen" (the embedding and the LayerNorm after it stay as they are) or "trained".
        head: "tied" (the output weights are the embedding) or "untied".
        original: "" or what the original called the arm: "frozen" or "trained"; or a key of ``PHASE1_ARMS``.
    """

    initialisation: str
    freezing: str
    head: str
    original: str = ""

    @property
    def name(self) -> str:
        if self.original in PHASE1_ARMS:
            return f"{self.initialisation}, {self.freezing}, {self.head}, {PHASE1_ARMS[self.original]}"
        if self.original:
            return f"original comparison: {self.original}"
        return f"{self.initialisation}, {self.freezing}, {self.head}"

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return self.name.replace(":", "").replace(",", "").replace(" ", "_")

    @property
    def start(self) -> str:
        """What its phase 1 starts from, and where that is another one, which: "pretrained", "pretrained-untrained"."""
        return f"{self.initialisation}-{self.original}" if self.original in PHASE1_ARMS else self.initialisation

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


@dataclass(frozen=True, kw_only=True)
class EmbeddingFreezeConfig(TextStudyConfig):
    """Settings of the embedding-freeze study."""

    study: ClassVar[str] = "embedding_freeze"
    notebook: ClassVar[str] = "04_embedding_freeze_study"
    controls: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "batch_tokens", "freezing", "initialisation", "head", "samples", "seeds", "device",
    )  # fmt: skip
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "output_dir", "device", "samples", "seeds", "embedding", "epochs", "phase",
    )  # fmt: skip
    circumstances: ClassVar[frozenset[str]] = TextStudyConfig.circumstances | {"phase"}
    quiet: ClassVar[tuple[str, ...]] = (
        "bklm.training.loop", "bklm.training.two_phase.phase1", "bklm.training.two_phase.phase2",
        "bklm.training.two_phase.contexts",
    )  # fmt: skip
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "dataset": "embedded", "tokenizer": "corpus", "embedding": "svd", "samples": (12,), "seeds": (0, 1),
            "val_documents": 4, "document_tokens": 256, "pretraining_documents": 20, "vocab_size": 400, "embed_dim": 16,
            "context_dim": 16, "n_layers": 2, "epochs": 2, "phase1_arms": False,
        },
        "quick": {
            "dataset": "ultrachat", "tokenizer": "corpus", "embedding": "svd", "samples": (20, 40), "seeds": (0, 1, 2),
            "val_documents": 6, "document_tokens": 1024, "pretraining_documents": 1000, "vocab_size": 2000, "embed_dim": 64,
            "context_dim": 64, "n_layers": 3, "epochs": 6, "phase1_arms": False,
        },
        "full": {
            "dataset": "ultrachat", "tokenizer": "gpt2", "embedding": "gpt2", "samples": (500, 1000), "seeds": (0, 1, 2),
            "val_documents": 50, "document_tokens": 512, "pretraining_documents": 4000, "vocab_size": 50257,
            "embed_dim": 768, "context_dim": 768, "n_layers": 6, "epochs": 10, "phase1_arms": True,
        },
    }  # fmt: skip

    dataset: Literal["ultrachat", "wikitext-2", "embedded"] | None = setting(
        None, help="text to train on; embedded needs no network"
    )
    initialisation: Literal["both", "pretrained", "random"] = setting("both", help="embedding to start from")
    freezing: Literal["both", "frozen", "trained"] = setting("both", help="the embedding in phase 2")
    head: Literal["both", "tied", "untied"] = setting("both", help="tied: the output weights are the embedding")
    phase1_arms: bool | None = setting(
        None, help="add arms that tell whether phase 1 helps: diversity only, none, token to the first layer"
    )
    original_comparison: bool = setting(True, help="add the original's two unequal arms, labelled so")
    batch_tokens: int = setting(512, low=64, high=4096, step=64, help="consecutive tokens per optimiser step")
    samples: tuple[int, ...] | None = setting(None, low=1, high=10**6, help="numbers of training documents")
    embedding: Literal["gpt2", "svd"] | None = setting(
        None, help="the pretrained embedding; svd: factorised from documents that the study does not use"
    )
    embedding_file: str | None = setting(None, is_path=True, help="pretrained embedding, .safetensors or .npy")
    tokenizer: Literal["gpt2", "corpus"] | None = setting(None, help="GPT-2's BPE, or one trained on the text")
    gpt2_dir: str | None = setting(None, is_path=True, help="folder of GPT-2's BPE files; empty: the hub")
    vocab_size: int | None = setting(None, low=258, high=1_000_000, help="largest vocabulary of a trained BPE")
    val_documents: int | None = setting(None, low=1, high=10**6, help="documents that all arms are scored on")
    document_tokens: int | None = setting(None, low=0, high=10**6, help="tokens kept of each document; 0: all")
    pretraining_documents: int | None = setting(None, low=1, high=10**6, help="most documents for the SVD")
    duplicate_threshold: float = setting(
        0.5, above=0, high=1, help="Jaccard similarity of 5-word runs that makes a near-duplicate"
    )
    embed_dim: int | None = setting(None, low=1, high=8192, help="embedding width")
    context_dim: int | None = setting(None, low=1, high=8192, help="width of contexts and token states")
    n_layers: int | None = setting(None, low=0, high=256, help="layers of either block")
    epochs: int | None = setting(None, low=1, high=1000, help="most passes of phase 2")
    patience: int = setting(2, low=1, high=1000, help="epochs without improvement before phase 2 stops")
    learning_rates: tuple[float, ...] = setting(
        (2e-3,), above=0, high=10, help="several: each arm is searched over all with the first seed"
    )
    clip: float = setting(1.0, above=0, high=1e6, help="largest gradient norm, both phases")
    iterations: int = setting(10, low=2, high=10_000, help="most iterations of phase 1, sweep counted")
    context_learning_rate: float = setting(2e-3, above=0, high=10, help="Adam learning rate of phase 1")
    noise: float = setting(0.1, low=0, high=100, help="noise on the contexts in phase 1")
    recompute_contexts: bool = setting(
        True, help="trained embedding: contexts anew after each epoch, as the model itself would see them"
    )
    phase: Literal["both", "1", "2"] = setting(
        "both", help="1: contexts only; 2: go on in a folder with phase 1"
    )

    def resolved(self) -> EmbeddingFreezeConfig:
        if self.dataset is None and self.data_dir:
            # A folder is read whatever text the profile would take.
            return dataclasses.replace(self, dataset="ultrachat").resolved()
        config = super().resolved()
        if config.embedding == "gpt2" and not config.embedding_file and config.initialisation != "random":
            if config.tokenizer != "gpt2":
                raise ValueError(
                    "embedding: got 'gpt2' with tokenizer 'corpus', whose tokens are not GPT-2's; "
                    "choose tokenizer 'gpt2' or embedding 'svd'."
                )
            # torch comes with it, for which a refused value need not wait.
            from bklm.data.embeddings import GPT2_SHAPE

            if config.embed_dim != GPT2_SHAPE[1]:
                raise ValueError(
                    f"embed_dim: got {config.embed_dim}, but GPT-2's embedding has {GPT2_SHAPE[1]} columns; "
                    f"set embed_dim to {GPT2_SHAPE[1]} or choose embedding 'svd'."
                )
        if config.embed_dim != config.context_dim and any(arm.head == "tied" for arm in arms_of(config)):
            raise ValueError(
                f"head: a tied head needs embed_dim and context_dim to be equal, but they are {config.embed_dim} and "
                f"{config.context_dim}; make them equal, or choose head 'untied' and original_comparison False."
            )
        if config.n_layers == 0:
            raise ValueError(
                "n_layers: got 0, which with a frozen embedding and a tied head leaves nothing to train; take at least 1."
            )
        return config


def arms_of(config: EmbeddingFreezeConfig) -> list[Arm]:
    """The arms that a resolved config asks for: every combination of the three factors, then the original comparison."""
    chosen = [
        values if getattr(config, factor) == "both" else (getattr(config, factor),)
        for factor, values in FACTORS.items()
    ]
    arms = [Arm(*values) for values in itertools.product(*chosen)]
    if config.phase1_arms:
        freest = next((arm for arm in arms if (arm.freezing, arm.head) == ("trained", "untied")), arms[0])
        pairs = itertools.product(dict.fromkeys((arms[0], freest)), PHASE1_ARMS)
        arms += [dataclasses.replace(arm, original=name) for arm, name in pairs]
    return arms + (list(ORIGINAL_ARMS) if config.original_comparison else [])
