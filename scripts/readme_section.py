"""One section of the README between its two comments, for the scripts that write results into it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "results"


def write_section(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->`` in the README.

    Raises:
        ValueError: the README has no such section.
    """
    readme = ROOT / "README.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = readme.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"README.md: needs {begin} and {end} once each.")
    before, rest = page.split(begin)
    readme.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table, the keys of the first as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join("" if v is None else str(v) for v in line) + " |" for line in lines)
