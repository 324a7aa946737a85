"""Rows of data sets as their writers meant them: text, dialogues, files in parts; what is neither is one sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

DIALOGUE_COLUMNS = ("turns", "dialog", "messages")
# Of the columns of a row, or of a data set, the first one of these is read, whoever asks.
COLUMNS = ("text", *DIALOGUE_COLUMNS)

# "train-00000-of-00002.parquet", the hub's own with a hash behind it.
_PART = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")
# What browsers and desktops call the second file of a name.
_SECOND = re.compile(r"(?:\s*\(\d+\)|\s+-\s+copy(?:\s*\(\d+\))?|\s+copy(?:\s+\d+)?)\.parquet$", re.IGNORECASE)
# Of what a turn is made. What calls a tool may leave its text out.
_SPEAKER, _TEXT, _CALLS = (
    ("speaker", "role", "from"),
    ("text", "content", "value"),
    ("tool_calls", "function_call"),
)


def text_of(value: Any, where: str) -> str:
    """The text of a row's value: a missing one is blank, bytes are UTF-8.

    Raises:
        ValueError: a number, a list, whatever else is no text; the sentence begins with ``where``: split and row.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} holds bytes that are not UTF-8 (at offset {error.start}); save it as text"
            ) from None
    raise ValueError(f"{where} is {kind_of_value(value)}, not text; save the column as text")


def column_of(names: Collection[str]) -> str | None:
    """The column that is read of those that a row or a data set has: the first of ``COLUMNS``, None without any."""
    return next((column for column in COLUMNS if column in names), None)


def holds_turns(row: Any) -> bool:
    """Whether what is read of a row are the turns of a dialogue."""
    return isinstance(row, dict) and column_of(row) in DIALOGUE_COLUMNS


def text_of_row(row: Any, where: str) -> str:
    """The text of a row: the row itself, its "text", or all that is said in its dialogue, joined by spaces.

    Raises:
        ValueError: what has none of ``COLUMNS``, or what ``text_of`` and ``turns_of`` refuse.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and column_of(row) == "text":
        return text_of(row["text"], f"{where}: text")
    return " ".join(text for _, text in turns_of(row, where) if text)


def turns_of(row: Any, where: str) -> list[tuple[str | None, str]]:
    """Who says what in a row's dialogue, a speaker None where none is named.

    A turn is a text, a pair [speaker, text], or a record with a speaker (also "role", "from") and a text (also "content",
    "value"), which null may stand for, and which may be missing where a tool is called.

    Raises:
        ValueError: a row without a dialogue's column, what is no list of turns, half of a surrogate pair; the sentence begins
            with ``where``: split and row.
    """
    if not holds_turns(row):
        held = f"has the keys {sorted(row)}" if isinstance(row, dict) else f"is {kind_of_value(row)}"
        raise ValueError(
            f'{where} {held}; a row needs a text, {{"text": "..."}}, or a dialogue, {{"turns": [...]}} or '
            '{"messages": [...]}.'
        )
    column = column_of(row)
    where = f"{where}: {column}"
    if not isinstance(row[column], list | tuple):
        raise ValueError(f"{where} is {kind_of_value(row[column])}, not a list of turns.")
    found = [_named(turn, f"{where}, turn {n}") for n, turn in enumerate(row[column])]
    for n, (_, text) in enumerate(found):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}, turn {n} holds half of a surrogate pair at character {error.start}, which no file can hold as "
                "text; write the character whole, or leave it out."
            ) from error
    return found


def _named(turn: Any, where: str) -> tuple[str | None, str]:
    """Who speaks, None where that is not said, and what."""
    if turn is None or isinstance(turn, str | bytes):
        return None, text_of(turn, where)
    if isinstance(turn, list | tuple) and len(turn) == 2 and isinstance(turn[0], str):
        return turn[0], content_of(turn[1], where)
    if isinstance(turn, dict):
        speaker = next((turn[k] for k in _SPEAKER if isinstance(turn.get(k), str)), None)
        if speaker is not None and {*_TEXT, *_CALLS} & turn.keys():
            # Where rows differ in their keys, Arrow fills the others with null.
            said = next((turn[k] for k in _TEXT if turn.get(k) is not None), None)
            return speaker, content_of(said, where)
        raise ValueError(
            f"{where} has the keys {sorted(turn)}; a turn needs a speaker (or role) and a text (or content)."
        )
    raise ValueError(f"{where} is {kind_of_value(turn)}; a turn is a text, or has a speaker and a text.")


def content_of(content: Any, where: str) -> str:
    """The text of a turn: text, or a list of parts of the type "text"; "" where there is none.

    Raises:
        ValueError: other parts, or what is no text; the sentence begins with ``where``.
    """
    if isinstance(content, list | tuple):
        content = " ".join(filter(None, (_part(part, f"{where}, part {n}") for n, part in enumerate(content))))
    return text_of(content, where)


def _part(part: Any, where: str) -> str:
    # Where other parts have a type and this one has none, Arrow fills in null.
    if isinstance(part, dict) and (part.get("type") or "text") == "text" and "text" in part:
        return text_of(part["text"], where)
    if isinstance(part, str):
        return part
    kind = f"of the type {part.get('type')!r}" if isinstance(part, dict) else kind_of_value(part)
    raise ValueError(f"{where} is {kind}; only parts of the type 'text' can be read")


def kind_of_value(value: Any) -> str:
    """A value in words, for an error: "null", "a number (3)"."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        str: "text",
    }
    word = names.get(type(value), f"of the type {type(value).__name__}")
    shown = repr(value)
    return word if value is None else f"{word} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def check_parts(names: Sequence[str], where: str) -> None:
    """Refuse the Parquet files of one split where they are not its text, once and whole.

    Raises:
        OSError: a part is missing or there twice: downloads that were interrupted or repeated.
    """
    if second := next((name for name in names if _SECOND.search(name)), None):
        raise OSError(
            f"{where} holds {second!r}, as a second download of a file is called, and its text would count twice; keep one of "
            "them, under its own name"
        )
    parts = {name: found for name in names if (found := _PART.search(name))}
    if not parts:
        return
    totals = {int(found[2]) for found in parts.values()}
    numbers = sorted(int(found[1]) for found in parts.values())
    if len(parts) < len(names) or len(totals) > 1 or len(set(numbers)) < len(numbers):
        raise OSError(
            f"{where} holds {', '.join(names)}, which are parts of more than one copy of the text; keep one copy"
        )
    (total,) = totals
    if missing := sorted(set(range(total)) - set(numbers)):
        stem = _PART.sub("", names[0])
        lacks = ", ".join(f"{stem}-{n:05d}-of-{total:05d}" for n in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise OSError(
            f"{where} holds {len(numbers)} of {total} parts and lacks {lacks}{more}; download what is missing"
        )
