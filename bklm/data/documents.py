"""Whole documents to train on, to score on, and to leave alone; what nearly equals a scored document is left out.

Compared are the training split's documents, trained on or spare, with the validation documents: no near-copy of what is
scored is trained on, nor goes into an embedding or a vocabulary. Training and spare documents are not compared with each
other (both are seen before anything is scored), nor are the documents of the test split with anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from bklm.data.checks import require_whole
from bklm.data.corpus import Corpus
from bklm.data.near_duplicates import NearDuplicate, near_duplicates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemovedDocument:
    """A training document that nearly equals a validation document; both by their opening words."""

    opening: str
    resembles: str
    similarity: float  # Jaccard, of 5-word shingles


@dataclass(frozen=True)
class DocumentSplit:
    """``train``: as many documents as the largest sample has, so that a sample of n is the first n of them. ``valid``: the
    documents that every model is scored on. ``spare``: documents that no model trains or is scored on, for embeddings."""

    train: list[str] = field(repr=False)
    valid: list[str] = field(repr=False)
    spare: list[str] = field(repr=False)
    removed: list[RemovedDocument]
    examined: int  # training documents that were compared with the validation documents
    threshold: float


def split_documents(
    corpus: Corpus, samples: Sequence[int], valid: int, *, spare: int = 0, threshold: float = 0.5
) -> DocumentSplit:
    """Take documents in the corpus's order: validation from its validation split, the rest from its training split.

    Training documents whose 5-word shingles overlap a validation document's by ``threshold`` (Jaccard) are removed, and
    the next ones take their place.

    Args:
        samples: numbers of training documents; the largest decides.
        valid: number of validation documents.
        spare: how many documents to keep apart for embeddings, as far as there are any.

    Raises:
        ValueError: fewer documents than asked for.
    """
    needed = max(require_whole("samples", n, 1) for n in samples)
    scored = list(islice(corpus.documents("valid"), require_whole("val_documents", valid, 1)))
    if len(scored) < valid:
        raise ValueError(
            f"val_documents: got {valid}, but the validation split of {corpus.name!r} has {len(scored)} documents; "
            f"ask for at most {len(scored)}"
        )
    available = iter(corpus.documents("train"))
    pool: list[str] = []
    found: list[NearDuplicate] = []
    kept: list[str] = []
    # As many again as are still missing, until nothing is missing or the split ends: any number may be near-copies.
    while missing := list(islice(available, needed + spare - len(kept))):
        copies = near_duplicates(missing, scored, threshold)
        dropped = {duplicate.index for duplicate in copies}
        kept += [text for index, text in enumerate(missing) if index not in dropped]
        found += [replace(duplicate, index=len(pool) + duplicate.index) for duplicate in copies]
        pool += missing
    if len(kept) < needed:
        less = f", {len(found)} of them nearly equal to validation documents" if found else ""
        raise ValueError(
            f"samples: got {needed}, but the training split of {corpus.name!r} has {len(pool)} documents{less}; "
            f"ask for at most {len(kept)}"
        )
    if found:
        log.info(
            "%d of %d training documents nearly equal a validation document; left out", len(found), len(pool)
        )
    removed = [_describe(duplicate, pool, scored) for duplicate in found]
    return DocumentSplit(kept[:needed], scored, kept[needed:], removed, len(pool), threshold)


def _describe(duplicate: NearDuplicate, texts: Sequence[str], others: Sequence[str]) -> RemovedDocument:
    return RemovedDocument(
        " ".join(texts[duplicate.index].split()[:8]),
        " ".join(others[duplicate.of].split()[:8]),
        round(duplicate.similarity, 4),
    )
