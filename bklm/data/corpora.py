"""Where text comes from: one `Corpus` with three splits, whatever lies behind it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .checks import require_whole

__all__ = ["CORPUS_NAMES", "SPLITS", "Corpus", "load_corpus"]

SPLITS = ("train", "valid", "test")
CORPUS_NAMES = ("wikitext-2", "ultrachat", "embedded", "hmm")

# WikiText writes a title as ` = Title = ` and a section as ` = = Section = = `: one `=` only on either side.
_TITLE = re.compile(r"\s*= (?!=)(?:.*\S )?= *")
_SECTION_END = re.compile(r"= = *$")


def is_title(line: str) -> bool:
    """Whether `line` is a level-1 heading, ` = Title = `, where a document begins."""
    return bool(_TITLE.fullmatch(line)) and not _SECTION_END.search(line)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in three splits.

    `train`, `valid` and `test` are sequences of lines (str, without line end). For dialogues a line is a whole
    dialogue, `line_is_document` is true, and the sequence may read from disk as it is indexed. `source` says in
    words where the text came from; it goes into a study's manifest.
    """

    name: str
    source: str
    train: Sequence[str] = field(repr=False)
    valid: Sequence[str] = field(repr=False)
    test: Sequence[str] = field(repr=False)
    line_is_document: bool = False

    def split(self, split: str) -> Sequence[str]:
        """The lines of "train", "valid" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; a corpus has {', '.join(SPLITS)}")
        return getattr(self, split)

    def documents(self, split: str) -> Sequence[str]:
        """The texts of a split: cut at level-1 headings, or a line each for dialogues.

        Each text begins with its heading; what stands before the first heading is a text of its own unless blank.
        """
        lines = self.split(split)
        if self.line_is_document:
            return lines
        return ["\n".join(part) for part in _cut_at_titles(lines) if any(line.strip() for line in part)]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the text of all splits (hex). Independent of place and container: white space around lines
        and blank lines do not count."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"\0{split}\0".encode())
            for line in self.split(split):
                if text := line.strip():
                    digest.update(text.encode("utf-8", "surrogatepass"))
                    digest.update(b"\n")
        return digest.hexdigest()

    def entropy_floor(self, split: str, context: int | None = None) -> float | None:
        """Cross-entropy (nats per token) that no model beats where the text's true law is known ("hmm"), else None."""
        self.split(split)
        return None


def _cut_at_titles(lines: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for line in lines:
        if is_title(line):
            yield part
            part = []
        part.append(line)
    yield part


def load_corpus(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, max_documents: int | None = None
) -> Corpus:
    """Load a corpus by name.

    Args:
        name: "wikitext-2" (Hugging Face Salesforce/wikitext, wikitext-2-raw-v1), "ultrachat"
            (HuggingFaceH4/ultrachat_200k), "embedded" (the language reference that comes with Python; for
            demonstrations), or "hmm" (drawn from a hidden Markov model: the best possible perplexity is known).
        data_dir: a folder to read instead of the network: train.txt, valid.txt and test.txt, or
            wiki.{train,valid,test}.{raw,tokens}, or a saved Hugging Face data set. The environment variable
            BKLM_DATA_DIR stands in where it is not given (and does not touch "embedded" and "hmm", which need
            no folder). The corpus is then named after the folder: what it holds is the caller's word.
        max_documents: for dialogues, fetch no more than this many of them a split; other corpora are always whole.

    Raises:
        ValueError: unknown name; data_dir with "embedded" or "hmm"; text that is not UTF-8; an empty split.
        OSError: FileNotFoundError, NotADirectoryError or PermissionError for a folder that cannot be read;
            ConnectionError where the network is needed and cannot be reached.
    """
    if name not in CORPUS_NAMES:
        raise ValueError(f"corpus {name!r} is unknown; choose one of {', '.join(map(repr, CORPUS_NAMES))}")
    if max_documents is not None:
        max_documents = require_whole("max_documents", max_documents, 1, ", or None for all")
    if name in ("embedded", "hmm"):
        if data_dir is not None and str(data_dir):
            raise ValueError(
                f'corpus "{name}" is made on the spot and reads no folder, but data_dir is {str(data_dir)!r}; '
                f'leave data_dir out, or name the corpus "wikitext-2" to read that folder'
            )
        if name == "embedded":
            from .embedded import embedded_corpus

            return embedded_corpus()
        from .hmm import hmm_corpus

        return hmm_corpus()
    ambient = os.environ.get("BKLM_DATA_DIR", "")
    if folder := str(data_dir or "") or ambient:
        from .local import corpus_from_folder

        # A study's config has taken the variable into its data_dir; who set it looks for its name in an error.
        called = "BKLM_DATA_DIR" if folder == ambient else "data_dir"
        return corpus_from_folder(Path(folder).expanduser(), max_documents, called)
    from .hub import corpus_from_hub

    return corpus_from_hub(name, max_documents)
