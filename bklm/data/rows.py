"""Rows of data sets as their writers meant them: text, dialogues, files in parts; what is neither is one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# "train-00000-of-00002.parquet", the hub's own with a hash behind it.
_PART = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")
# What browsers and desktops call the second file of a name.
_SECOND = re.compile(r"(?:\s*\(\d+\)|\s+-\s+copy(?:\s*\(\d+\))?|\s+copy(?:\s+\d+)?)\.parquet$", re.IGNORECASE)
# A message has one of them: what calls a tool may leave its content out.
_CONTENT = {"content", "tool_calls", "function_call"}


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


def join_messages(messages: Any, where: str = "a dialogue") -> str:
    """The text of a dialogue: its messages in order, joined by a space.

    A message's content is text, or a list of parts of the type "text"; null adds nothing, and may be left out where a tool is
    called.

    Raises:
        ValueError: what is no list of messages with content; the sentence begins with ``where``: split and row.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{where} is {kind_of_value(messages)}, not a list of messages with role and content")
    texts = []
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or not _CONTENT & message.keys():
            what = isinstance(message, dict)
            held = f"has the keys {sorted(message)}" if what else f"is {kind_of_value(message)}"
            raise ValueError(f"{place} {held}; every message needs role and content")
        texts.append(content_of(message.get("content"), f"{place}, content"))
    return " ".join(filter(None, texts))


def content_of(content: Any, where: str) -> str:
    """The text of a message's content: text, or a list of parts of the type "text"; "" where there is none.

    Raises:
        ValueError: other parts, or what is no text; the sentence begins with ``where``.
    """
    if isinstance(content, list | tuple):
        place = where.removesuffix(", content")
        content = " ".join(filter(None, (_part(part, f"{place}, part {n}") for n, part in enumerate(content))))
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
