"""Documents, tokens, embedding tables and baselines of the embedding-freeze study."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bklm.data import Corpus, KneserNey, Unigram, load_corpus
from bklm.data.bpe import Bpe, gpt2_bpe, train_bpe
from bklm.data.documents import DocumentSplit, split_documents
from bklm.data.embeddings import (
    GPT2_STD,
    embedding_file_shape,
    gpt2_embedding,
    load_embedding,
    random_embedding,
    svd_embedding,
)

if TYPE_CHECKING:
    from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FreezeText:
    """Text ready to train on: every sample is the beginning of the largest one, all are scored on the same documents."""

    config: EmbeddingFreezeConfig = field(repr=False)
    corpus: Corpus
    split: DocumentSplit
    bpe: Bpe
    documents: list[np.ndarray] = field(repr=False)  # ids of each training document, cut to the config's length
    valid: np.ndarray = field(repr=False)  # one stream of ids, as the training samples are
    other_valid: np.ndarray = field(
        repr=False
    )  # of the test split, near-copies included; for the original's unequal arm

    @property
    def vocab_size(self) -> int:
        return len(self.bpe)

    @property
    def unk_id(self) -> int | None:
        return self.bpe.unk_id

    @property
    def is_demonstration(self) -> bool:
        """Whether the text is too small to support a claim."""
        return self.corpus.name == "embedded"

    @property
    def source(self) -> str:
        """Where the pretrained embedding comes from, in words."""
        if self.config.embedding_file:
            return f"the file {Path(self.config.embedding_file).name}"
        if self.config.embedding == "gpt2":
            return "GPT-2"
        return f"PPMI and SVD of {len(self.split.spare)} other documents"

    @cached_property
    def pretraining_tokens(self) -> int | None:
        """Tokens that the pretrained embedding was factorised from; None where it comes from elsewhere."""
        if not uses_svd(self.config):
            return None
        return sum(map(len, self.bpe.encode_documents(self.split.spare)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the study's numbers depend on beside its config: text, tokeniser, embedding file."""
        parts = [self.corpus.sha256, self.bpe.sha256]
        if self.config.embedding_file:
            path = Path(self.config.embedding_file).expanduser()
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def train(self, samples: int, share: float = 1.0) -> np.ndarray:
        """The ids of the first ``samples`` documents as one stream, or the first ``share`` of it."""
        stream = np.concatenate(self.documents[:samples]).astype(np.int64)
        return stream[: max(2, round(share * len(stream)))]

    @cached_property
    def pretrained(self) -> np.ndarray:
        """The pretrained embedding, float32 (vocab_size, embed_dim)."""
        config, size = self.config, (self.vocab_size, self.config.embed_dim)
        if config.embedding_file:
            return load_embedding(config.embedding_file, *size)
        if config.embedding == "gpt2":
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
        std = GPT2_STD if self.config.initialisation == "random" else float(self.pretrained.std())
        return random_embedding(self.vocab_size, self.config.embed_dim, std, seed)

    @cached_property
    def baselines(self) -> list[dict[str, Any]]:
        """Count models of each sample's tokens on the same validation targets."""
        return [row for samples in self.config.samples for row in self._baselines(samples)]

    def _baselines(self, samples: int) -> list[dict[str, Any]]:
        train, rows = self.train(samples), []
        for name, model in (
            ("unigram", Unigram()), ("Kneser-Ney 2-gram", KneserNey(2)), ("Kneser-Ney 3-gram", KneserNey(3)),
        ):  # fmt: skip
            model.fit(train, self.vocab_size)
            row = {"samples": samples, "name": name, "val_ppl": model.perplexity(self.valid)}
            rows.append(row | {"val_ppl_without_unk": model.perplexity(self.valid, exclude=self.unk_id)})
        return rows


def prepare_text(config: EmbeddingFreezeConfig) -> FreezeText:
    """Load, split and tokenise the text of a resolved config.

    Raises:
        ValueError, OSError: see `bklm.data.load_corpus`, `bklm.data.documents` and `bklm.data.bpe`; fewer tokens than a
            batch; an embedding file that does not fit the tokeniser.
    """
    most = max(config.samples)
    # A BPE of the text's own is trained on them too, and so is the same whatever embedding is compared.
    spare = config.pretraining_documents if uses_svd(config) or config.tokenizer == "corpus" else 0
    # Room for near-duplicates that are left out; the dialogues' validation split is every other held-out dialogue.
    fetched = max(most + spare + config.val_documents, 2 * config.val_documents)
    corpus = load_corpus(config.dataset, config.data_dir, max_documents=fetched)
    split = split_documents(
        corpus, config.samples, config.val_documents, spare=spare, threshold=config.duplicate_threshold
    )
    if uses_svd(config) and not split.spare:
        raise ValueError(
            f"embedding: 'svd' needs documents that no model is trained or scored on, but all {most} training documents of "
            f"{corpus.name!r} are in the samples; lower samples, or choose embedding 'gpt2'."
        )
    if config.tokenizer == "gpt2":
        bpe = gpt2_bpe(config.gpt2_dir)
    else:
        bpe = train_bpe([*split.train, *split.spare], config.vocab_size)
    if config.embedding_file and embedding_file_shape(config.embedding_file) != (len(bpe), config.embed_dim):
        load_embedding(config.embedding_file, len(bpe), config.embed_dim)  # says what does not fit
    cut = config.document_tokens or None
    other = list(islice(corpus.documents("test"), config.val_documents))
    text = FreezeText(
        config=config,
        corpus=corpus,
        split=split,
        bpe=bpe,
        documents=bpe.encode_documents(split.train, cut),
        valid=np.concatenate(bpe.encode_documents(split.valid, cut)).astype(np.int64),
        other_valid=np.concatenate(bpe.encode_documents(other, cut)).astype(np.int64),
    )
    _refuse_short(text, config.batch_tokens)
    log.info(
        "Text: %s from %s; %s training tokens, %s validation tokens in %d documents, %d near-duplicates left out; %s",
        corpus.name, corpus.source, " and ".join(f"{len(text.train(n)):,} ({n} documents)" for n in config.samples),
        f"{len(text.valid):,}", config.val_documents, len(split.removed), bpe.source,
    )  # fmt: skip
    if config.initialisation != "random":
        _ = text.pretrained  # fetched or factorised now: what is wrong with it is said before any training
    return text


def uses_svd(config: EmbeddingFreezeConfig) -> bool:
    """Whether the pretrained embedding of a resolved config is factorised from spare documents."""
    return config.embedding == "svd" and not config.embedding_file and config.initialisation != "random"


def _refuse_short(text: FreezeText, batch_tokens: int) -> None:
    for what, stream in (("smallest sample", text.train(min(text.config.samples))), ("validation", text.valid)):
        if len(stream) <= batch_tokens:
            raise ValueError(
                f"batch_tokens: got {batch_tokens}, but the {what} of {text.corpus.name!r} has {len(stream)} tokens; ask for "
                "smaller batches or more documents."
            )


def describe_duplicates(split: DocumentSplit, shown: int = 5) -> str:
    """How many training documents were left out because they nearly equal a validation document, and which."""
    lines = [
        f"{len(split.removed)} of {split.examined:,} training documents left out as near-duplicates of validation documents "
        f"(Jaccard similarity of {split.threshold:g} or more)"
    ]
    lines += [f"  {r.similarity:.2f}  {r.opening!r} resembles {r.resembles!r}" for r in split.removed[:shown]]
    return "\n".join(lines)


def readable_baselines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The baselines rounded for people."""
    return [
        {
            "samples": r["samples"],
            "baseline": r["name"],
            "val PPL": f"{r['val_ppl']:.1f}",
            "without <unk>": f"{r['val_ppl_without_unk']:.1f}",
        }
        for r in rows
    ]
