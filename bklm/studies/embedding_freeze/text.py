"""Documents, tokens, embedding tables and baselines of the embedding-freeze study."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bklm.data import Corpus
from bklm.data.bpe import Bpe
from bklm.data.documents import DocumentSplit
from bklm.data.embeddings import (
    GPT2_STD,
    embedding_file_shape,
    gpt2_embedding,
    load_embedding,
    random_embedding,
    svd_embedding,
)
from bklm.harness.text import ngram_baselines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedding:
    """Which table counts as the pretrained one.

    ``kind`` is "file", "gpt2", or "svd": factorised from documents that no model is trained or scored on. ``width`` counts its
    columns; ``is_used`` says whether an arm starts from it.
    """

    kind: str
    width: int
    is_used: bool
    file: str | None = None

    @property
    def is_factorised(self) -> bool:
        """Whether spare documents are needed for it."""
        return self.kind == "svd" and self.is_used


@dataclass(frozen=True, eq=False)
class FreezeText:
    """Text ready to train on: every sample is the beginning of the largest one, all are scored on the same documents.

    ``samples`` are numbers of training documents; ``documents`` are the ids of each, cut to a length. ``valid`` is one stream
    of ids, as the samples are; ``other_valid`` is of the test split, near-copies included, for the original's unequal arm.
    """

    embedding: Embedding
    samples: tuple[int, ...]
    corpus: Corpus
    split: DocumentSplit
    bpe: Bpe
    documents: list[np.ndarray] = field(repr=False)
    valid: np.ndarray = field(repr=False)
    other_valid: np.ndarray = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return len(self.bpe)

    @property
    def unk_id(self) -> int | None:
        return self.bpe.unk_id

    @property
    def is_demonstration(self) -> bool:
        """Whether the text is too small to support a claim."""
        return self.corpus.is_made_here

    @property
    def source(self) -> str:
        """Where the pretrained embedding comes from, in words."""
        if self.embedding.kind == "file":
            return f"the file {Path(self.embedding.file).name}"
        if self.embedding.kind == "gpt2":
            return "GPT-2"
        return f"PPMI and SVD of {len(self.split.spare)} other documents"

    @cached_property
    def pretraining_tokens(self) -> int | None:
        """Tokens that the pretrained embedding was factorised from; None where it comes from elsewhere."""
        if not self.embedding.is_factorised:
            return None
        return sum(map(len, self.bpe.encode_documents(self.split.spare)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the study's numbers depend on beside its settings: text, tokeniser, embedding file."""
        parts = [self.corpus.sha256, self.bpe.sha256]
        if self.embedding.file:
            path = Path(self.embedding.file).expanduser()
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def train(self, samples: int, share: float = 1.0) -> np.ndarray:
        """The ids of the first ``samples`` documents as one stream, or the first ``share`` of it."""
        stream = np.concatenate(self.documents[:samples]).astype(np.int64)
        return stream[: max(2, round(share * len(stream)))]

    @cached_property
    def pretrained(self) -> np.ndarray:
        """The pretrained embedding, float32 (vocab_size, width)."""
        size = (self.vocab_size, self.embedding.width)
        if self.embedding.kind == "file":
            return load_embedding(self.embedding.file, *size)
        if self.embedding.kind == "gpt2":
            return gpt2_embedding()
        ids = self.bpe.encode_documents(self.split.spare)
        table, absent = svd_embedding(ids, *size)
        log.info(
            "Embedding: PPMI and SVD of %s tokens in %d documents that no model is trained or scored on; %d of %d tokens do "
            "not occur there and get random rows", f"{sum(map(len, ids)):,}", len(ids), absent, self.vocab_size,
        )  # fmt: skip
        return table

    def table(self, initialisation: str, seed: int) -> np.ndarray:
        """The embedding that a model starts from. A random one has the pretrained one's scale: only its content differs."""
        if initialisation == "pretrained":
            return self.pretrained
        std = float(self.pretrained.std()) if self.embedding.is_used else GPT2_STD
        return random_embedding(self.vocab_size, self.embedding.width, std, seed)

    @cached_property
    def baselines(self) -> list[dict[str, Any]]:
        """Count models of each sample's tokens on the same validation targets."""
        rows = []
        for samples in self.samples:
            own = SimpleNamespace(
                train=self.train(samples), valid=self.valid, vocab_size=self.vocab_size, unk_id=self.unk_id
            )
            # A law restarts at a window's beginning, and no text here has one.
            rows += [{"samples": samples, **row} for row in ngram_baselines(self.corpus, own, 1)]
        return rows

    def prompt(self, words: int = 12) -> str:
        """The opening words of the first validation document, to let a model continue."""
        return " ".join(self.split.valid[0].split()[:words])

    def generate(
        self, model: Any, prompt: str, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Let ``model``, on the CPU, continue ``prompt``; the same seed gives the same text."""
        ids = torch.from_numpy(self.bpe.encode(prompt).astype(np.int64))[None]
        if ids.shape[1] == 0:
            raise ValueError("prompt: got no text; write at least one word.")
        generator = torch.Generator().manual_seed(seed)
        return self.bpe.decode(model.generate(ids, max_new_tokens, temperature, generator)[0])


def make_text(
    corpus: Corpus,
    split: DocumentSplit,
    bpe: Bpe,
    embedding: Embedding,
    samples: tuple[int, ...],
    document_tokens: int | None,
    batch_tokens: int,
    with_other: bool = True,
) -> FreezeText:
    """Tokenise documents and make the pretrained embedding, where an arm starts from it.

    Args:
        document_tokens: tokens kept of each document; None: all.
        batch_tokens: tokens that every text must exceed.
        with_other: whether an arm is scored on documents of the test split.

    Raises:
        ValueError, OSError: fewer tokens than a batch, or an embedding that does not fit.
    """
    if embedding.file and embedding_file_shape(embedding.file) != (len(bpe), embedding.width):
        # Says what does not fit.
        load_embedding(embedding.file, len(bpe), embedding.width)
    other = list(islice(corpus.documents("test"), len(split.valid))) if with_other else []
    text = FreezeText(
        embedding=embedding,
        samples=samples,
        corpus=corpus,
        split=split,
        bpe=bpe,
        documents=bpe.encode_documents(split.train, document_tokens),
        valid=np.concatenate(bpe.encode_documents(split.valid, document_tokens)).astype(np.int64),
        other_valid=np.concatenate(
            [np.zeros(0, np.int64), *bpe.encode_documents(other, document_tokens)]
        ).astype(np.int64),
    )
    if with_other and len(text.other_valid) < 2:
        raise ValueError(
            f"data_dir: the test split of {corpus.name!r} has {len(text.other_valid)} tokens, and the original's comparison "
            "is scored on it; give it documents, or choose original_comparison False."
        )
    for what, stream in (("smallest sample", text.train(min(samples))), ("validation", text.valid)):
        if len(stream) <= batch_tokens:
            raise ValueError(
                f"batch_tokens: got {batch_tokens}, but the {what} of {corpus.name!r} has {len(stream)} tokens; ask for "
                "smaller batches or more documents."
            )
    log.info(
        "Text: %s from %s; %s training tokens, %s validation tokens in %d documents, %d near-duplicates left out; %s",
        corpus.name, corpus.source, " and ".join(f"{len(text.train(n)):,} ({n} documents)" for n in samples),
        f"{len(text.valid):,}", len(split.valid), len(split.removed), bpe.source,
    )  # fmt: skip
    if embedding.is_used:
        # Fetched or factorised now: what is wrong with it is said before any training.
        _ = text.pretrained
    return text


def describe_text(text: FreezeText) -> list[str]:
    """Where a text comes from, its sizes, and which near-duplicates were left out, in sentences for a notebook."""
    return [
        f"{text.corpus.name}, from {text.corpus.source}; {text.bpe.source}",
        *(f"{n:,} training documents: {len(text.train(n)):,} tokens" for n in text.samples),
        f"{len(text.split.valid):,} validation documents: {len(text.valid):,} tokens",
        *describe_duplicates(text.split).splitlines(),
    ]


def describe_duplicates(split: DocumentSplit, shown: int = 5) -> str:
    """How many training documents were left out because they nearly equal a validation document, and which."""
    lines = [
        f"{len(split.removed)} of {split.examined:,} training documents left out as near-duplicates of validation documents "
        f"(Jaccard similarity of {split.threshold:g} or more)"
    ]
    lines += [f"  {r.similarity:.2f}  {r.opening!r} resembles {r.resembles!r}" for r in split.removed[:shown]]
    return "\n".join(lines)
