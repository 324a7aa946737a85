"""One section of a page between its two comments, for the scripts that write results into the README and docs/results.md."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "results"


def write_digest(name: str, text: str) -> None:
    """Write a section of the README: the finding, one table, one picture, the command."""
    _write_section(ROOT / "README.md", name, text)


def write_details(name: str, text: str) -> None:
    """Write a section of docs/results.md: everything that was measured. Links are those of the README."""
    _write_section(ROOT / "docs" / "results.md", name, text.replace("](docs/", "]("))


def _write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path.name}: needs {begin} and {end} once each.")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table, the keys of the first as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join("" if v is None else str(v) for v in line) + " |" for line in lines)
