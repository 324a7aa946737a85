"""Write the table of modules into docs/architecture.md, layer by layer, from the modules' own first sentences.

python scripts/architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules -->", "<!-- end of modules -->"

# From the bottom to the top. A module may import from its own layer and from those below it.
LAYERS = {
    "Foundations: import nothing else of bklm": (
        "bk_core", "data", "config", "checkpoints", "memory", "processes", "schedules",
        "locks",
    ),
    "Mixture of experts": ("moe", "moe_core", "moe_ops", "moe_reference"),
    "Models": ("models",),
    "Training": (
        "training", "evaluation", "records", "resuming", "out_of_memory", "non_finite", "quantise", "fixed_point",
        "corpus_contexts", "context_store", "context_cache",
    ),
    "Reports": ("reporting", "figures"),
    "Studies": ("studies",),
    "Users' side": ("notebook", "notebook_controls", "notebook_form", "notebook_run", "selftest", "batch"),
}  # fmt: skip
ALONE = ("bk_core", "data", "config", "checkpoints", "memory", "processes", "schedules", "locks")


def modules() -> dict[str, Path]:
    """Dotted name below bklm -> file, of every module that is not a package's __init__."""
    package = ROOT / "bklm"
    files = sorted(p for p in package.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in files}


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


def imports(path: Path) -> set[str]:
    """Dotted names below bklm that a file imports when it runs (those for type checkers alone are left out)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and node.module
            and node.module.startswith("bklm.")
        ):
            found.add(node.module.removeprefix("bklm."))
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("bklm.") for a in node.names if a.name.startswith("bklm.")}
    return found


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
