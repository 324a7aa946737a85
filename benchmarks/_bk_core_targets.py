"""The targets of bk_core.py's tables, and whether what was measured holds them."""

from __future__ import annotations

from _bk_core_first_use import CPU_BACKEND, NOTEBOOK, SELFTEST
from _timing import target

Row = dict[str, object]

TARGETS: tuple[tuple[str, str, str, dict[str, float]], ...] = (
    ("loop", "32, 128", "autograd / ours", {"least": 150}),
    ("loop", "32, 512", "autograd / ours", {"least": 60}),
    ("copy", "8, 65536", "ours / copy", {"most": 6}),
    ("copy", "1, 1000000", "ours / copy", {"most": 4}),
    ("copy", "8, 65536", "extra B/element", {"most": 20}),
    ("copy", "1, 1000000", "extra B/element", {"most": 20}),
    ("jax", "8, 65536", "jax / ours", {"least": 6}),
    ("jax", "1, 1000000", "jax / ours", {"least": 6}),
    ("jax", "8, 65536", "jax / ours, tensors", {"least": 6}),
    ("jax", "1, 1000000", "jax / ours, tensors", {"least": 6}),
    ("first", "nothing compiled", "import, s", {"most": 0.3}),
    ("first", "kernels in the cache", "import, s", {"most": 0.3}),
    ("compile", CPU_BACKEND, "compilation, s", {"most": 10}),
    ("compile", SELFTEST, "compilation, s", {"most": 10}),
    ("compile", NOTEBOOK, "compilation, s", {"most": 10}),
)
"""Table, first cell of a row, column, and what is wanted there."""


def judge(tables: dict[str, list[Row]]) -> None:
    """Print every target of the tables that were made."""
    for table, which, column, wanted in TARGETS:
        if table not in tables:
            continue
        rows = [row for row in tables[table] if next(iter(row.values())) == which]
        target(f"{column} ({which})", number(rows[0][column]) if rows else None, **wanted)


def number(cell: object) -> float | None:
    """None for a word: "overflows", "not measured"."""
    try:
        return float(str(cell))
    except ValueError:
        return None
