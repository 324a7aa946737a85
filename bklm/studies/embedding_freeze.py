"""The embedding-freeze study: does freezing the embedding help, or having pretrained it, or tying the head to it?

Every arm trains the same ContextTokenLM in two phases on the same tokens: first the context block, without labels, to a
fixed point; then the rest, on contexts that the first phase leaves. Arms differ in where the embedding starts, whether it is
trained in the second phase, and whether the head is tied to it; all else is equal, seed by seed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from bklm.config import StudyConfig, TextStudyConfig, setting
from bklm.data.embeddings import GPT2_SHAPE
from bklm.reporting import as_text
from bklm.studies import cli
from bklm.studies.embedding_freeze_arms import arms_of
from bklm.studies.embedding_freeze_report import EmbeddingFreezeResult, write_report
from bklm.studies.embedding_freeze_runner import Runner
from bklm.studies.embedding_freeze_table import readable
from bklm.studies.embedding_freeze_text import FreezeText, prepare_text
from bklm.studies.folder import claim, study_folder
from bklm.training import make_accelerator

log = logging.getLogger("bklm.studies.embedding_freeze")  # __name__ is "__main__" when run with python -m

# Several lines a trial, in the log file but not on the screen.
DETAILS = ("bklm.context_cache", "bklm.corpus_contexts", "bklm.fixed_point", "bklm.training")


@dataclass(frozen=True, kw_only=True)
class EmbeddingFreezeConfig(TextStudyConfig):
    """Settings of the embedding-freeze study."""

    study: ClassVar[str] = "embedding_freeze"
    circumstances: ClassVar[frozenset[str]] = StudyConfig.circumstances | {"phase"}
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "dataset": "embedded", "tokenizer": "corpus", "embedding": "svd", "samples": (12,), "seeds": (0, 1),
            "val_documents": 4, "document_tokens": 256, "pretraining_documents": 20, "vocab_size": 400, "embed_dim": 16,
            "context_dim": 16, "n_layers": 2, "epochs": 2,
        },
        "quick": {
            "dataset": "ultrachat", "tokenizer": "corpus", "embedding": "svd", "samples": (20, 40), "seeds": (0, 1, 2),
            "val_documents": 6, "document_tokens": 1024, "pretraining_documents": 1000, "vocab_size": 2000, "embed_dim": 64,
            "context_dim": 64, "n_layers": 3, "epochs": 6,
        },
        "full": {
            "dataset": "ultrachat", "tokenizer": "gpt2", "embedding": "gpt2", "samples": (500, 1000), "seeds": (0, 1, 2),
            "val_documents": 50, "document_tokens": 512, "pretraining_documents": 4000, "vocab_size": 50257,
            "embed_dim": 768, "context_dim": 768, "n_layers": 6, "epochs": 10,
        },
    }  # fmt: skip

    dataset: Literal["ultrachat", "wikitext-2", "embedded"] | None = setting(
        None, help="text to train on; embedded needs no network"
    )
    initialisation: Literal["both", "pretrained", "random"] = setting(
        "both", help="the embedding to start from"
    )
    freezing: Literal["both", "frozen", "trained"] = setting("both", help="the embedding in phase 2")
    head: Literal["both", "tied", "untied"] = setting("both", help="tied: the output weights are the embedding")
    original_comparison: bool = setting(True, help="add the original's two unequal arms, labelled so")
    batch_tokens: int = setting(512, low=64, high=4096, step=64, help="consecutive tokens per optimiser step")
    samples: tuple[int, ...] | None = setting(None, low=1, high=10**6, help="numbers of training documents")
    seeds: tuple[int, ...] | None = setting(
        None, low=0, high=2**31 - 1, help="one model per arm, sample and seed"
    )
    embedding: Literal["gpt2", "svd"] | None = setting(
        None, help="the pretrained embedding; svd: factorised from documents that the study does not use"
    )
    embedding_file: str | None = setting(
        None, is_path=True, help=".safetensors or .npy table used as pretrained embedding"
    )
    tokenizer: Literal["gpt2", "corpus"] | None = setting(None, help="GPT-2's BPE, or one trained on the text")
    gpt2_dir: str | None = setting(
        None, is_path=True, help="folder with GPT-2's vocab.json and merges.txt; empty: the hub"
    )
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
    iterations: int = setting(
        10, low=2, high=10_000, help="most iterations of phase 1, the first sweep counted"
    )
    context_learning_rate: float = setting(2e-3, above=0, high=10, help="Adam learning rate of phase 1")
    noise: float = setting(0.1, low=0, high=100, help="noise on the contexts in phase 1")
    recompute_contexts: bool = setting(
        True, help="trained embedding: contexts anew after each epoch, as the model itself would see them"
    )
    phase: Literal["both", "1", "2"] = setting(
        "both", help="1: contexts only; 2: go on from a folder with phase 1"
    )

    def resolved(self) -> EmbeddingFreezeConfig:
        if self.dataset is None and self.data_dir:  # a folder is read whatever text the profile would take
            return dataclasses.replace(self, dataset="ultrachat").resolved()
        config = super().resolved()
        if config.embedding == "gpt2" and not config.embedding_file and config.initialisation != "random":
            if config.tokenizer != "gpt2":
                raise ValueError(
                    "embedding: got 'gpt2' with tokenizer 'corpus', whose tokens are not GPT-2's; "
                    "choose tokenizer 'gpt2' or embedding 'svd'."
                )
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


def run_embedding_freeze(
    config: EmbeddingFreezeConfig,
    on_figure: Callable[[Path], None] | None = None,
    text: FreezeText | None = None,
) -> EmbeddingFreezeResult:
    """Run both phases of every arm and write everything to ``<output_dir>/embedding_freeze`` and its zip.

    A run that was stopped goes on where it was; a finished one is read back, not run again.

    Args:
        on_figure: called with the path of arms.png, drawn anew each time a trial is done.
        text: what `prepare_text` gave for this config, where it is at hand already.

    Raises:
        ValueError, OSError, RuntimeError: one sentence each, before time is spent where that is possible.
    """
    config = config.resolved()
    accelerator = make_accelerator(config.device, config.precision)
    with study_folder(config, only_in_file=DETAILS) as folder:
        log.info("Settings: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v is not None))
        text = text or prepare_text(config)
        claim(folder, config, text.fingerprint)
        with Runner(config, text, accelerator, folder, on_figure) as runner:
            phase1 = runner.run_phase1() if config.phase != "2" else runner.read_phase1()
            trials = runner.run_phase2() if config.phase != "1" else []
            diverged = runner.diverged
        log.info("Drawing the figures and writing the tables")
        return write_report(config, text, phase1, trials, diverged, folder)


def _show(result: EmbeddingFreezeResult) -> None:
    if result.table:
        print(as_text(readable(result.table, result.diverged)))
    print("\n".join(result.findings))
    print(result.bundle)


if __name__ == "__main__":
    cli.main(EmbeddingFreezeConfig, run_embedding_freeze, _show)
