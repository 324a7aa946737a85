"""Rows of Arrow and Parquet files as they are, for data sets with column types that the installed ``datasets`` does not know.

``datasets`` 5 stores JSON objects of differing keys, such as messages with tool calls, as the type Json; 4.0, which Colab
has, refuses the whole data set for it. In the file such a value is JSON text, marked ``arrow.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_JSON = "arrow.json"


class ArrowRows:
    """Rows of a table with what a ``datasets.Dataset`` has of its rows here: columns' names, length, index, slice, select."""

    def __init__(self, table: pa.Table, numbers: range | None = None) -> None:
        self.column_names: list[str] = table.column_names
        self._table = table
        self._numbers = range(table.num_rows) if numbers is None else numbers
        self._decoders = {field.name: decoder_of(field) for field in table.schema}

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> dict[str, Any]:
        """One row, or of several a list a column."""
        if not isinstance(index, slice):
            number = self._numbers[index]
            return {n: v[0] for n, v in ArrowRows(self._table, range(number, number + 1))[:].items()}
        numbers = self._numbers[index]
        first = min(numbers, default=0)
        part = self._table.slice(first, max(numbers, default=-1) + 1 - first).to_pydict()
        return {name: [self._decoded(name, v[n - first]) for n in numbers] for name, v in part.items()}

    def select(self, numbers: range) -> ArrowRows:
        return ArrowRows(self._table, self._numbers[numbers.start : numbers.stop : numbers.step])

    def _decoded(self, name: str, value: Any) -> Any:
        decoder = self._decoders[name]
        return value if decoder is None else decoder(value)


def decoder_of(field: pa.Field) -> Callable[[Any], Any] | None:
    """What makes of a column's values in Python, in which JSON is text, the values that it stands for; None: nothing to do."""
    import pyarrow as pa

    kind = field.type
    # Newer versions of pyarrow know the type, older ones keep its name beside the text's.
    name = (
        getattr(kind, "extension_name", "") or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    )
    if name == _JSON:
        return lambda value: value if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = decoder_of(kind.value_field)
        return inner and (lambda values: values and [inner(value) for value in values])
    if pa.types.is_struct(kind):
        parts = {part.name: d for part in kind if (d := decoder_of(part)) is not None}
        if parts:
            return lambda value: value and value | {n: d(value[n]) for n, d in parts.items()}
    return None


def read_saved(folder: Path) -> dict[str, ArrowRows]:
    """The splits of ``DatasetDict.save_to_disk``, read from their files alone; OSError, ValueError: not to be read."""
    import pyarrow as pa

    def split(name: str) -> ArrowRows:
        state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
        paths = [folder / name / part["filename"] for part in state["_data_files"]]
        tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths]
        return ArrowRows(pa.concat_tables(tables))

    names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    return {name: split(name) for name in names}


def read_parquet(files: Mapping[str, Sequence[str]]) -> dict[str, ArrowRows]:
    """The splits of Parquet files, read from them alone; OSError, ValueError: not to be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return {
        split: ArrowRows(pa.concat_tables(pq.read_table(path) for path in paths))
        for split, paths in files.items()
    }
