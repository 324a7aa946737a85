"""What a corpus is: text in three splits, cut into documents, with a hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

SPLITS = ("train", "valid", "test")
# What hub data sets call the three splits, first match wins.
SPLIT_ALIASES = {
    "train": ("train", "train_sft"),
    "valid": ("validation", "valid", "dev"),
    "test": ("test", "test_sft"),
}
# Made on the spot: they read no folder and need no network.
MADE_HERE = ("embedded", "hmm", "grammar")
UNKNOWN_LICENCE = "unknown; see where the data come from"
LICENCES = {
    "wikitext-2": "CC BY-SA",
    "wikitext-103": "CC BY-SA",
    "c4": "ODC-BY, and Common Crawl's terms of use",
    "dailydialog": "CC BY-NC-SA 4.0: not for commercial use",
    "ultrachat": "MIT",
    "embedded": "that of Python's documentation (PSF License)",
    "hmm": "drawn on the spot; free of any licence",
    "grammar": "drawn on the spot; free of any licence",
}

# WikiText writes a title as `` = Title = `` and a section as `` = = Section = = ``: one ``=`` only on either side.
_TITLE = re.compile(r"\s*= (?!=)(?:.*\S )?= *")


_SECTION_END = re.compile(r"= = *$")


def is_title(line: str) -> bool:
    """Whether ``line`` is a level-1 heading, `` = Title = ``, where a document begins."""
    return bool(_TITLE.fullmatch(line)) and not _SECTION_END.search(line)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in three splits.

    ``train``, ``valid`` and ``test`` are sequences of lines (str, without line end). For dialogues a line is a whole
    dialogue, ``line_is_document`` is true, and the sequence may read from disk as it is indexed. ``source`` says in
    words where the text came from, and ``licence`` what may be done with it; both go into a study's manifest. ``is_own``:
    from a folder or file that the user named.
    """

    name: str
    source: str
    train: Sequence[str] = field(repr=False)
    valid: Sequence[str] = field(repr=False)
    test: Sequence[str] = field(repr=False)
    line_is_document: bool = False
    is_own: bool = False
    licence: str = field(kw_only=True, default=UNKNOWN_LICENCE)

    @property
    def is_made_here(self) -> bool:
        """Whether it is one of ``MADE_HERE``, too small or too artificial to support a claim."""
        return self.name in MADE_HERE and not self.is_own

    @property
    def is_wikitext2(self) -> bool:
        """Whether it is WikiText-2 or a sample of it: from the hub, or from a folder of that name or with its files' names."""
        # WikiText-103 has files of the same names, and 1.8 million lines.
        has_its_files = self.source.startswith("wiki.train.") and len(self.train) < 100_000
        return has_its_files or bool(re.match(r"wikitext-?2(?!\d)", self.name, re.IGNORECASE))

    def split(self, split: str) -> Sequence[str]:
        """The lines of "train", "valid" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; a corpus has {', '.join(SPLITS)}")
        return getattr(self, split)

    def dialogues(self, split: str) -> list[tuple[tuple[str, str], ...]]:
        """A split's dialogues, each a tuple of turns (speaker, text); see ``bklm.data.dialogues``.

        Raises:
            ValueError: this text holds none.
        """
        self.split(split)
        raise ValueError(
            f"{self.source or self.name} holds lines of text and no dialogues; give a .jsonl or .parquet whose rows are "
            '{"turns": [...]} or {"messages": [...]}, or take the corpus "grammar".'
        )

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
