"""Write the tree of the package's rooms into docs/architecture.md, with captions from the files' own first sentences.

    python scripts/architecture.py

tests/test_architecture.py holds the rules that the functions here measure.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bklm"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->", "<!-- end of tree -->"

# From the bottom to the top. A file may import from its own room and from rooms of lower floors; rooms of one floor share
# nothing.
FLOORS = (
    ("files", "bk_core", "moe", "data", "sharing"),
    ("models",),
    ("training",),
    ("compression",),
    ("harness",),
    ("trained",),
    ("studies",),
    ("notebook",),
    ("batch",),
    ("command",),
)
ALONE = FLOORS[0]


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name below the package -> file, of every file but the package's own ``__init__``, which every file imports."""
    found = sorted(package.rglob("*.py"))
    names = {".".join(p.relative_to(package).with_suffix("").parts): p for p in found}
    return {
        name.removesuffix(".__init__"): p for name, p in names.items() if name not in ("__init__", "__main__")
    }


def floor_of(name: str) -> int:
    """Index of the floor that a dotted name's room is on.

    Raises:
        KeyError: the room stands on no floor.
    """
    room = name.split(".")[0]
    for index, rooms in enumerate(FLOORS):
        if room in rooms:
            return index
    raise KeyError(f"bklm.{name}: on no floor; name {room} in FLOORS of scripts/architecture.py.")


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Dotted names of the package's files that a file imports, those for type checkers and inside functions included."""
    known, found = files(package), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, path, package)
            # What is taken from a package may be a file of it, or a name that its __init__ has.
            found |= {
                f"{source}.{a.name}" if f"{source}.{a.name}".removeprefix("bklm.") in known else source
                for a in node.names
            }
    below = {name.removeprefix("bklm.") for name in found if name.startswith("bklm.")}
    return {name for name in below if name in known}


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """The dotted name of what a file imports from: one dot is its own package, each further one the package above."""
    if node.level == 0:
        return node.module or ""
    here = ("bklm", *path.relative_to(package).parent.parts)
    above = here[: len(here) - (node.level - 1)]
    return ".".join([*above, *([node.module] if node.module else [])])


def upward(package: Path = PACKAGE) -> list[str]:
    """Imports from a floor above the importing file's own, or from another room of its floor."""
    return [
        f"{name} imports {other}"
        for name, path in files(package).items()
        for other in sorted(imports(path, package))
        if floor_of(other) > floor_of(name)
        or (floor_of(other) == floor_of(name) and other.split(".")[0] != name.split(".")[0])
    ]


def circle(package: Path = PACKAGE) -> list[str]:
    """The files of one circle of imports, or []. A package's ``__init__`` is its face and left out."""
    found = {n: p for n, p in files(package).items() if p.name != "__init__.py"}
    try:
        tuple(
            graphlib.TopologicalSorter(
                {n: imports(p, package) & found.keys() for n, p in found.items()}
            ).static_order()
        )
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def across_studies(package: Path = PACKAGE) -> list[str]:
    """Imports of a study by another one, or by the harness."""
    return [
        f"{name} imports {other}"
        for name, path in files(package).items()
        if name.startswith("studies.") or name.split(".")[0] in FLOORS[4]
        for other in sorted(imports(path, package))
        if other.startswith("studies.") and other.split(".")[:2] != name.split(".")[:2]
    ]


def lines(path: Path) -> int:
    """Lines of a file, or of all Python files of a folder."""
    found = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in found)


def functions(path: Path) -> list[tuple[str, int, list[ast.arg]]]:
    """(name, lines, parameters without ``self`` and ``cls``) of every function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [a for a in taken if a.arg not in ("self", "cls")]
            found.append((node.name, node.end_lineno - node.lineno + 1, own))
    return found


def first_sentence(path: Path) -> str:
    """A file's docstring up to its first full stop that ends a sentence."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(text.split())


def tree(folder: Path = PACKAGE) -> str:
    """The package's rooms, floor by floor from the top, and what is in each: folders and files, without a folder's files."""
    parts = ["```text", f"{folder.name}/{'':<22}{first_sentence(folder / '__init__.py')}"]
    for rooms in reversed(FLOORS):
        for room in rooms:
            parts += _room(folder / room)
    return "\n".join([*parts, "```"])


def _room(folder: Path) -> list[str]:
    found = [_leaf(f"  {folder.name}/", folder / "__init__.py")]
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.is_dir() and (path / "__init__.py").exists():
            found.append(_leaf(f"    {path.name}/", path / "__init__.py"))
        elif path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
            found.append(_leaf(f"    {path.name}", path))
    return found


def _leaf(name: str, path: Path) -> str:
    return f"{name:<28}{first_sentence(path)}"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
