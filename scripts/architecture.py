"""Write the table of modules into docs/architecture.md, layer by layer, from the modules' own first sentences.

python scripts/architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bklm"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules -->", "<!-- end of modules -->"

# From the bottom to the top. A module may import from its own layer and from those below it.
LAYERS = {
    "Foundations: import nothing else of bklm": (
        "bk_core", "data", "config", "checkpoints", "memory", "processes", "schedules",
        "locks", "weights",
    ),
    "Mixture of experts": ("moe", "moe_core", "moe_ops", "moe_plain", "moe_reference"),
    "Models": ("models",),
    "Training": (
        "training", "evaluation", "records", "resuming", "out_of_memory", "non_finite", "quantise", "fixed_point",
        "int8_linear", "int8_model",
        "corpus_contexts", "context_store", "context_cache",
    ),
    "Reports": ("reporting", "figures"),
    "Studies": ("studies",),
    "Users' side": ("notebook", "notebook_controls", "notebook_form", "notebook_run", "selftest", "batch"),
}  # fmt: skip
ALONE = ("bk_core", "data", "config", "weights", "memory", "processes", "schedules", "locks")


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name below bklm -> file, of every file but the package's own __init__, which every module imports."""
    found = sorted(package.rglob("*.py"))
    names = {".".join(p.relative_to(package).with_suffix("").parts): p for p in found}
    return {name: p for name, p in names.items() if name != "__init__"}


def modules() -> dict[str, Path]:
    """Dotted name below bklm -> file, of every module that is not a package's __init__."""
    return {name: p for name, p in files().items() if p.name not in ("__init__.py", "__main__.py")}


def layer_of(module: str) -> int:
    """Index of the layer that a dotted module name belongs to.

    Raises:
        KeyError: its first part stands in no layer.
    """
    first = module.split(".")[0]
    for index, members in enumerate(LAYERS.values()):
        if first in members:
            return index
    raise KeyError(f"bklm.{module}: in no layer; name {first} in LAYERS of scripts/architecture.py.")


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Dotted names below bklm that a file imports when it runs (those for type checkers alone are left out)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, path, package)
            # Of "from bklm import x" x is what is imported; of "from bklm.models import GPT" models is, as far as layers go.
            found |= {f"bklm.{alias.name}" for alias in node.names} if source == "bklm" else {source}
    below = {name.removeprefix("bklm.") for name in found if name.startswith("bklm.")}
    return {name for name in below if _is_module(name.split(".")[0], package)}  # not bklm's own __version__


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """The dotted name of what a file imports from: one dot is its own package, each further one the package above."""
    if node.level == 0:
        return node.module or ""
    here = ("bklm", *path.relative_to(package).parent.parts)
    above = here[: len(here) - (node.level - 1)]
    return ".".join([*above, *([node.module] if node.module else [])])


def _is_module(name: str, package: Path) -> bool:
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def upward(package: Path = PACKAGE) -> list[str]:
    """Imports from a layer above the importing file's own, such as "moe imports training"."""
    return [
        f"{name} imports {other}"
        for name, path in files(package).items()
        for other in sorted(imports(path, package))
        if layer_of(other) > layer_of(name)
    ]


def foreign(package: Path = PACKAGE) -> list[str]:
    """Imports of anything else of bklm by a foundation."""
    return [
        f"{name} imports {other}"
        for name, path in files(package).items()
        for other in sorted(imports(path, package))
        if name.split(".")[0] in ALONE and other.split(".")[0] != name.split(".")[0]
    ]


def first_sentence(path: Path) -> str:
    text = " ".join(
        (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split()
    )
    return text.replace("|", "\\|")


def table() -> str:
    """The layers as Markdown, top layer first."""
    lines = []
    for index, (title, _) in reversed(list(enumerate(LAYERS.items()))):
        lines += [f"### {title}", "", "| module | what it holds |", "|---|---|"]
        lines += [
            f"| `{name}` | {first_sentence(path)} |"
            for name, path in modules().items()
            if layer_of(name) == index
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
