"""Corpora in a folder: plain text files, or a data set that Hugging Face ``datasets`` saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bklm.data.arrow_rows import ArrowRows, read_parquet, read_saved
from bklm.data.corpus import LICENCES, SPLIT_ALIASES, SPLITS, UNKNOWN_LICENCE, Corpus
from bklm.data.dialogues import DialogueCorpus
from bklm.data.own_text import KINDS_IN_WORDS, own_corpus
from bklm.data.rows import DIALOGUE_COLUMNS, check_parts, column_of, text_of, text_of_row

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_LAYOUTS = ("{}.txt", "wiki.{}.raw", "wiki.{}.tokens")
LAYOUTS_IN_WORDS = (
    "train.txt, valid.txt and test.txt, or wiki.train.raw, wiki.valid.raw and wiki.test.raw (or .tokens), "
    f"or a saved Hugging Face data set, or a text of your own: {KINDS_IN_WORDS}"
)


def corpus_from_folder(folder: Path, called: str = "data_dir") -> Corpus:
    """The corpus in ``folder``, which errors call ``called``; see ``load_corpus`` for the layouts and the errors."""
    where = f"{called} {str(folder)!r}"
    try:
        is_file = folder.is_file()
        present = set() if is_file else {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} does not exist; give a folder with {LAYOUTS_IN_WORDS}") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{where} is not a folder; give one with {LAYOUTS_IN_WORDS}") from None
    except PermissionError:
        raise PermissionError(f"{where} cannot be read; check its permissions") from None
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        raise OSError(f"{where} cannot be read: {error}") from None
    if is_file:
        return own_corpus(folder, called)
    name = folder.resolve().name
    for layout in TEXT_LAYOUTS:
        files = [layout.format(split) for split in SPLITS]
        if present.issuperset(files):
            texts = [_read_lines(folder / file) for file in files]
            _refuse_empty({str(folder / file): lines for file, lines in zip(files, texts, strict=True)})
            return Corpus(name, f"{', '.join(files)} in {folder.resolve()}", *texts, is_own=True)
    splits = _saved_dataset(folder, where)
    if splits is not None:
        return corpus_from_splits(name, f"saved Hugging Face data set in {folder.resolve()}", splits)
    for layout in TEXT_LAYOUTS:
        files = [layout.format(split) for split in SPLITS]
        if not present.isdisjoint(files):
            missing = " and ".join(file for file in files if file not in present)
            raise FileNotFoundError(f"{where} lacks {missing}; all three splits are needed")
    if (own := own_corpus(folder, called)) is not None:
        return own
    state = "holds no corpus" if present else "is empty"
    raise FileNotFoundError(f"{where} {state}; it should hold {LAYOUTS_IN_WORDS}")


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark, where there is one, is no text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start}); "
            f"save it as UTF-8"
        ) from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} cannot be read; check its permissions") from None
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    # Not str.splitlines, which also cuts at form feeds and Unicode separators: lines end where editors end
    # them.
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _refuse_empty(texts: dict[str, Sequence[str]]) -> None:
    for where, lines in texts.items():
        if not any(line.strip() for line in lines):
            raise ValueError(f"{where!r} holds no text; every split needs some")


def _saved_dataset(folder: Path, where: str) -> dict[str, Dataset] | dict[str, ArrowRows] | None:
    """The splits of a saved data set, None where there is none.

    It was written by ``DatasetDict.save_to_disk``, or is laid out as on the hub: Parquet files named after their split, in
    the folder itself, in data/ or in wikitext-2-raw-v1/. Column types of a newer ``datasets`` are read from the files alone.
    """
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        raise ValueError(
            f"{where} is one split of a data set; save a DatasetDict with train, validation and test"
        )
    saved = (folder / "dataset_dict.json").exists()
    places = (folder / "wikitext-2-raw-v1", folder / "data", folder)
    files = None if saved else next(filter(None, (_parquet_files(p, where) for p in places)), None)
    if not saved and not files:
        return None
    import datasets

    try:
        if saved:
            return dict(datasets.load_from_disk(str(folder)))
        return dict(datasets.load_dataset("parquet", data_files=files))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        if "Feature type" in str(error):
            return _of_newer_types(folder, files, where, error)
        reason = " ".join(str(error.__cause__ or error).split())
        raise OSError(f"the data set saved in {where} cannot be read ({reason}); save it again") from error


def _of_newer_types(
    folder: Path, files: dict[str, list[str]] | None, where: str, refusal: Exception
) -> dict[str, ArrowRows]:
    """The splits of a data set with column types of a newer ``datasets``, from its files alone."""
    try:
        return read_parquet(files) if files else read_saved(folder)
    except (OSError, ValueError, KeyError) as error:
        import datasets

        kind = str(refusal).partition(" not found")[0]
        raise OSError(
            f"the data set saved in {where} was written by a newer version of datasets than the {datasets.__version__} here "
            f"({kind} is unknown to it), and its files alone cannot be read ({error}); upgrade here with 'pip install -U "
            "datasets', or save its rows there with to_json and give the .jsonl files"
        ) from refusal


def _parquet_files(place: Path, where: str) -> dict[str, list[str]]:
    names = sorted(path.name for path in place.glob("*.parquet"))
    found: dict[str, list[str]] = {}
    for alias in (alias for aliases in SPLIT_ALIASES.values() for alias in aliases):
        files = [
            n for n in names if n[: len(alias) + 1] in (f"{alias}-", f"{alias}.", f"{alias} ", f"{alias}(")
        ]
        if files:
            check_parts(files, f"the split {alias} of {where}")
            found[alias] = [str(place / name) for name in files]
    return found


class Dialogues(Sequence[str]):
    """The dialogues of rows, one text each, read as they are indexed: 200,000 cost no memory. ``rows`` is a data set, or a
    list of records; ``column`` is the one of ``DIALOGUE_COLUMNS`` that holds the turns.

    ``where`` names them in errors; of the rows that it means, these are every ``step``-th from ``first``.
    """

    def __init__(
        self, rows: Dataset | ArrowRows | list[dict[str, Any]], column: str, where: str = "a data set", first: int = 0,
        step: int = 1,
    ):  # fmt: skip
        self.rows, self.column, self.where, self.first, self.step = rows, column, where, first, step

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [
                self._text(n, one) for n, one in zip(range(len(self))[index], self._turns(index), strict=True)
            ]
        number = range(len(self))[index]
        return self._text(number, self.rows[number][self.column])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000]

    def placed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row with the words that name it."""
        for start in range(0, len(self), 1000):
            for number, turns in enumerate(self._turns(slice(start, start + 1000)), start):
                yield self._place(number), {self.column: turns}

    def every_second(self, first: int) -> Dialogues:
        """Those with even numbers (``first`` 0) or odd ones (1)."""
        is_list = isinstance(self.rows, list)
        rows = self.rows[first::2] if is_list else self.rows.select(range(first, len(self), 2))
        return Dialogues(rows, self.column, self.where, self.first + first * self.step, 2 * self.step)

    def _turns(self, index: slice) -> list[Any]:
        found = self.rows[index]
        return [row[self.column] for row in found] if isinstance(found, list) else found[self.column]

    def _place(self, number: int) -> str:
        return f"{self.where}, row {self.first + self.step * number}"

    def _text(self, number: int, turns: Any) -> str:
        return text_of_row({self.column: turns}, self._place(number))


def corpus_from_splits(name: str, source: str, splits: Mapping[str, Dataset | ArrowRows]) -> Corpus:
    """A corpus from the splits of a Hugging Face data set with a column of text or of dialogues."""
    found = {
        split: next((splits[alias] for alias in aliases if alias in splits), None)
        for split, aliases in SPLIT_ALIASES.items()
    }
    train, valid, test = found.values()
    present = [rows for rows in (train, valid, test) if rows is not None]
    kind = column_of(set.intersection(*(set(rows.column_names) for rows in present)) if present else ())
    if train is None or test is None or kind is None or (kind == "text" and valid is None):
        columns = {split: rows.column_names for split, rows in splits.items()}
        raise ValueError(
            f"{source} has the splits and columns {columns}; it needs train, validation and test with a column text, or "
            f"train and test (or train_sft and test_sft) with a column {', '.join(DIALOGUE_COLUMNS)}"
        )
    if kind == "text":
        texts = [
            _lines(
                [text_of(t, f"{split} split of {source}, row {n}: text") for n, t in enumerate(rows[:]["text"])]
            )
            for split, rows in zip(SPLITS, present, strict=True)
        ]
        _refuse_empty({f"{split} split of {source}": lines for split, lines in zip(SPLITS, texts, strict=True)})
        return Corpus(name, source, *texts, licence=LICENCES.get(name, UNKNOWN_LICENCE))
    called = [
        next(a for a in aliases if a in splits)
        for aliases in SPLIT_ALIASES.values()
        if set(aliases) & set(splits)
    ]
    dialogues = (Dialogues(r, kind, f"{n} split of {source}") for n, r in zip(called, present, strict=True))
    return corpus_from_dialogues(name, source, *dialogues)


def corpus_from_dialogues(name: str, source: str, train: Dialogues, *held_out: Dialogues) -> DialogueCorpus:
    """A corpus of dialogues; ``held_out`` is validation and test, or one split that is shared between them.

    Its even rows become the validation split and its odd rows the test split, so that a limit on the number of rows
    moves no dialogue from one to the other.
    """
    if len(held_out) == 1:
        held_out = [held_out[0].every_second(first) for first in (0, 1)]
    splits = dict(zip(SPLITS, (train, *held_out), strict=True))
    for split, texts in splits.items():
        if not len(texts):
            raise ValueError(f"the {split} split of {source} holds no dialogue; every split needs some")
    licence = LICENCES.get(name, UNKNOWN_LICENCE)
    return DialogueCorpus(name, source, **splits, line_is_document=True, rows=splits, licence=licence)


def _lines(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in text.removesuffix("\n").split("\n")]
