"""A text of one's own, in one file or in a folder of files, split 80/10/10 by paragraphs.

Files that are named after the three splits are those splits.

Read are .txt, .jsonl and .parquet, each also packed with gzip (.gz). A paragraph of a text file is what blank lines separate;
of a file that has fewer than ten of those, each line is one. A row of the others is one, with a column "text" or else a
dialogue's ("turns", "dialog" or "messages"); of a file or folder whose rows are all dialogues, these can be had
(``bklm.data.dialogues``).
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bklm.data.arrow_rows import ArrowRows
from bklm.data.corpus import SPLIT_ALIASES, SPLITS, Corpus
from bklm.data.dialogues import DialogueCorpus, Placed
from bklm.data.rows import COLUMNS, column_of, holds_turns, text_of_row

KINDS = (".txt", ".jsonl", ".parquet")
KINDS_IN_WORDS = "one .txt, .jsonl or .parquet file, each also as .gz, or a folder with any of them"
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
FEWEST_PARAGRAPHS = 10


def is_own_text(path: Path) -> bool:
    """Whether a file's name is that of a text."""
    return kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """ ".txt", ".jsonl" or ".parquet", whether packed or not; a bare .gz is taken for text."""
    name = path.name.lower()
    if name.endswith(".gz"):
        inner = Path(name.removesuffix(".gz")).suffix
        return inner if inner in KINDS else ".txt" if not inner else None
    return path.suffix.lower() if path.suffix.lower() in KINDS else None


def own_corpus(place: Path, called: str) -> Corpus | None:
    """The corpus of a file, or of all text files of a folder; None where a folder has none. ``called`` names it in errors.

    Raises:
        ValueError: no text in it, fewer paragraphs than a split needs, or a file of another kind or encoding.
        OSError: a file that cannot be read.
    """
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file() and is_own_text(p))
    if not files:
        return None
    if not is_own_text(files[0]):
        raise ValueError(f"{called} {str(place)!r} is no text that can be read; give {KINDS_IN_WORDS}.")
    if place.is_dir() and (named := _named_splits(files, place, called)):
        read = {name: [p for file in named[name] for p in _paragraphs(file)] for name in SPLITS}
        splits = {name: [p.text for p in found] for name, found in read.items()}
        if empty := [name for name, found in splits.items() if not found]:
            raise ValueError(
                f"{called} {str(place)!r}: the {' and '.join(empty)} split holds no text; give one that does."
            )
        source = f"{', '.join(file.name for name in SPLITS for file in named[name])} in {place.resolve()}"
        return _corpus(_name_of(place), source, splits, [p for found in read.values() for p in found])
    paragraphs = [p for file in files for p in _paragraphs(file)]
    if len(paragraphs) < FEWEST_PARAGRAPHS:
        raise ValueError(
            f"{called} {str(place)!r} holds {len(paragraphs)} paragraph{'s' * (len(paragraphs) != 1)}; a split into training, "
            f"validation and test text needs {FEWEST_PARAGRAPHS}: give more text, or separate its paragraphs by blank lines."
        )
    splits = split_paragraphs([p.text for p in paragraphs])
    counts = " / ".join(f"{len(splits[name]):,}" for name in SPLITS)
    where = files[0].name if len(files) == 1 else f"{len(files)} files"
    source = (
        f"{where} in {place.resolve().parent if place.is_file() else place.resolve()}, split 80/10/10 by paragraphs in their "
        f"order: {counts}"
    )
    return _corpus(_name_of(place), source, splits, paragraphs)


class Paragraph(NamedTuple):
    """A text, and where it was a row of records, that row with the words that name it."""

    text: str
    where: str = ""
    row: Any = None


def _corpus(name: str, source: str, splits: dict[str, list[str]], read: list[Paragraph]) -> Corpus:
    """The corpus of these splits, whose texts stand in ``read`` in the same order; one of dialogues where all are."""
    if not all(holds_turns(p.row) for p in read):
        return Corpus(name, source, **splits, line_is_document=True, is_own=True)
    rows = iter([(p.where, p.row) for p in read])
    placed = {split: Placed(list(islice(rows, len(texts)))) for split, texts in splits.items()}
    return DialogueCorpus(name, source, **splits, line_is_document=True, is_own=True, rows=placed)


def _named_splits(files: list[Path], place: Path, called: str) -> dict[str, list[Path]]:
    """The files of each split where names say so: "train.jsonl", "validation.txt.gz"; {} where none does."""
    found = {
        split: [file for file in files if _name_of(file).lower() in aliases]
        for split, aliases in SPLIT_ALIASES.items()
    }
    named = [file for some in found.values() for file in some]
    if named and (not all(found.values()) or len(named) < len(files)):
        raise ValueError(
            f"{called} {str(place)!r} holds {', '.join(file.name for file in files)}, of which some are named after a split; "
            "give all three of train, valid and test and no others, or other names for a text that is to be split."
        )
    return found if named else {}


def _name_of(place: Path) -> str:
    name = place.resolve().name
    return re.sub(r"(?:\.(?:txt|jsonl|parquet))?(?:\.gz)?$", "", name, flags=re.IGNORECASE) or name


def split_paragraphs(paragraphs: list[str]) -> dict[str, list[str]]:
    """The first 80% of the text to train on, the next 10% to validate, the last 10% to test: by characters, in order."""
    total, seen, place = sum(map(len, paragraphs)), 0, 0
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, paragraph in enumerate(paragraphs):
        ends = seen + len(paragraph) / 2
        share = SHARES["train"] if place == 0 else SHARES["train"] + SHARES["valid"]
        left = len(paragraphs) - number
        if place < 2 and splits[SPLITS[place]] and (ends > share * total or left <= 2 - place):
            place += 1
        splits[SPLITS[place]].append(paragraph)
        seen += len(paragraph)
    return splits


def _paragraphs(path: Path) -> Iterator[Paragraph]:
    """Paragraphs of a file, their lines without white space around them; blank ones are left out."""
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{str(path)!r} cannot be read ({error}); check it, or copy it again.") from error
    found = {".txt": _of_text, ".jsonl": _of_rows, ".parquet": _of_parquet}[kind_of(path)](path, raw)
    for paragraph in found:
        if lines := [line.strip() for line in paragraph.text.split("\n") if line.strip()]:
            yield paragraph._replace(text="\n".join(lines))


def _decoded(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start}); save it as UTF-8"
        ) from None


def _of_text(path: Path, raw: bytes) -> list[Paragraph]:
    text = _decoded(path, raw)
    blocks = [block for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]
    return [*map(Paragraph, blocks if len(blocks) >= FEWEST_PARAGRAPHS else text.split("\n"))]


def _of_rows(path: Path, raw: bytes) -> Iterator[Paragraph]:
    for number, line in enumerate(_decoded(path, raw).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where} is no JSON ({error}); a .jsonl file holds one JSON value a line"
            ) from None
        yield Paragraph(text_of_row(row, where), where, row)


def _of_parquet(path: Path, raw: bytes) -> Iterator[Paragraph]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{str(path)!r} is no Parquet file, or a damaged one ({error}); download it again."
        ) from error
    if (name := column_of(table.column_names)) is None:
        raise ValueError(
            f"{str(path)!r} has the columns {table.column_names}; it needs one called {', '.join(COLUMNS)}"
        )
    rows = ArrowRows(table.select([name]))
    for start in range(0, len(rows), 1000):
        for number, value in enumerate(rows[start : start + 1000][name], start):
            row, where = {name: value}, f"{str(path)!r}, row {number}"
            yield Paragraph(text_of_row(row, where), where, row)
