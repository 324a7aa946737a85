"""The page of a batch: every run with its end, its files and its pictures; plain HTML that also works inside the zip."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bklm.files.atomic import read_result, write_text
from bklm.harness.page import STYLE

if TYPE_CHECKING:
    from bklm.batch.plan import Outcome

OWN_STYLE = """
table { width: 100%; } section { margin-top: 2.5rem; } .failed { color: #b00020; font-weight: 600; }
"""


def write_summary(output_dir: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write ``summary.html`` with links relative to ``output_dir``, atomically, and return its path."""
    failed = sum(o.status == "failed" for o in outcomes)
    head = f"{len(outcomes) - failed} of {len(outcomes)} runs done" + (f", {failed} failed" if failed else "")
    rows = "".join(
        f'<tr><td><a href="#{quote(o.name)}">{escape(o.name)}</a></td><td>{_status(o)}</td>'
        f"<td>{o.seconds:.0f} s</td><td>{escape(_finding(output_dir / o.name))}</td></tr>"
        for o in outcomes
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        + escape(output_dir.name)
        + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{OWN_STYLE}</style></head><body><h1>{escape(output_dir.name)}</h1><p>{head}.</p>"
        f"<table><tr><th>run</th><th>end</th><th>time</th><th>result</th></tr>{rows}</table>"
        + "".join(_section(output_dir, o) for o in outcomes)
        + "</body></html>\n"
    )
    path = output_dir / "summary.html"
    write_text(path, page)
    return path


def _finding(folder: Path) -> str:
    """The first sentence of what a run found, from its study's summary.json; "" where there is none."""
    for path in sorted(folder.glob("*/summary.json")):
        found = read_result(path) or {}
        said = (
            found.get("finding") or found.get("recommendation") or next(iter(found.get("findings") or []), "")
        )
        return said.split("; ")[0].rstrip(".")
    return ""


def _section(output_dir: Path, outcome: Outcome) -> str:
    folder = output_dir / outcome.name
    settings = ", ".join(f"{k} = {v}" for k, v in outcome.parameters.items()) or "the notebook's own"
    error = f'<p class="failed">{escape(outcome.error)}</p>' if outcome.error else ""
    files = [*folder.glob("*.html"), *folder.glob("*.ipynb"), folder / "printed.txt", *folder.glob("*/*.csv")]
    links = " · ".join(_link(output_dir, f, folder) for f in files if f.exists() and not f.name.startswith("."))
    pictures = "".join(
        f'<a href="{_address(output_dir, p)}"><img loading="lazy" src="{_address(output_dir, p)}" '
        f'alt="{escape(p.stem.replace("_", " "))}"></a>'
        for p in sorted([*folder.glob("*.png"), *folder.glob("*/*.png")])
    )
    return (
        f'<section id="{escape(outcome.name)}"><h2>{escape(outcome.name)}</h2>'
        f"<p>{escape(outcome.notebook)} with <code>{escape(settings)}</code>: {_status(outcome)}</p>"
        f"{error}<p>{links}</p>{pictures}</section>"
    )


def _status(outcome: Outcome) -> str:
    words: dict[str, Any] = {"done": "done", "kept": "done before, kept", "failed": "failed"}
    return f'<span class="{outcome.status}">{words[outcome.status]}</span>'


def _address(output_dir: Path, file: Path) -> str:
    return escape(quote(file.relative_to(output_dir).as_posix()))


def _link(output_dir: Path, file: Path, folder: Path) -> str:
    return f'<a href="{_address(output_dir, file)}">{escape(file.relative_to(folder).as_posix())}</a>'
