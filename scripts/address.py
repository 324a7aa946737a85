"""Write the repository's address, which stands in pyproject.toml alone, into badges and first cells.

The code of first cells, further settings and controls is folded away, in Colab and in JupyterLab: people want what it shows.

    python scripts/address.py            write it into notebooks/*.ipynb and into the badges of the documents
    python scripts/address.py --check    change nothing; exit code 1 names what would change

The first cell of every notebook is scripts/first_cell.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FOLDED = {"set-up", "parameters", "controls"}
# The heading of a section that Colab folds away, whose cells' forms would otherwise be seen; it ends at the next heading.
SECTION = "more-settings"
OPENED = re.compile(r"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w.-]+/")
CLONED = re.compile(r"(?<=git clone )https://\S+?(?=\s|`|$)")


def address() -> str:
    """The repository's address, without a slash at its end."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'(?m)^Repository = "(.+?)/?"$', project)[1]


def opens() -> str:
    """What comes before a file's path in an address that opens it in Colab."""
    return (
        f"https://colab.research.google.com/github/{address().removeprefix('https://github.com/')}/blob/main/"
    )


def badge_cell(name: str) -> str:
    """The cell that Colab expects at the head of a notebook on GitHub."""
    image = f'<img src="{BADGE}" alt="Open In Colab"/>'
    return f'<a href="{opens()}notebooks/{name}" target="_parent">{image}</a>'


def first_cell() -> str:
    """Source of the cell that sets a notebook up."""
    source = (ROOT / "scripts" / "first_cell.py").read_text(encoding="utf-8").strip()
    return source.replace('"..."', f'"{address()}"')


def notebook_with_address(path: Path) -> str:
    """The notebook's text with its badge and first cell as they should be."""
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["view-in-github"].source = badge_cell(path.name)
    cells["set-up"].source = first_cell()
    for name in FOLDED & cells.keys():
        cells[name].metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    if SECTION in cells:
        cells[SECTION].metadata["id"] = SECTION
        notebook.metadata.colab["collapsed_sections"] = [SECTION]
    return nbformat.writes(notebook) + "\n"


def document_with_address(path: Path) -> str:
    """The document's text with its badges and clone commands as they should be."""
    return CLONED.sub(address(), OPENED.sub(opens(), path.read_text(encoding="utf-8")))


def wanted() -> dict[Path, str]:
    """Every file that holds the address, and the text it should have."""
    notebooks = {p: notebook_with_address(p) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.md")]
    return notebooks | {p: document_with_address(p) for p in sorted(documents)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 names what would change"
    )
    given = parser.parse_args()
    changed = [p for p, text in wanted().items() if p.read_text(encoding="utf-8") != text]
    if given.check:
        names = ", ".join(str(p.relative_to(ROOT)) for p in changed)
        sys.exit(f"Not as scripts/address.py would write them: {names}." if changed else 0)
    texts = wanted()
    for path in changed:
        path.write_text(texts[path], encoding="utf-8")
        print("wrote", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
