"""The page of a batch: every run with its end, its files and its pictures; plain HTML that also works inside the zip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bklm.files.atomic import write_text
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
    varied = _varied(outcomes)
    rows = ""
    for o in outcomes:
        found = read_summary(output_dir / o.name)
        ppl, settings = found.get("best_perplexity"), [str(o.parameters.get(name, "")) for name in varied]
        cells = [*settings, f"{o.seconds:.0f} s", "" if ppl is None else f"{ppl:,.1f}", _first_sentence(found)]
        rows += (
            f'<tr><td><a href="#{quote(o.name)}">{escape(o.name)}</a></td><td>{_status(o)}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    titles = "".join(f"<th>{escape(t)}</th>" for t in ("run", "end", *varied, "time", "best val PPL", "result"))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        + escape(output_dir.name)
        + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{OWN_STYLE}</style></head><body><h1>{escape(output_dir.name)}</h1><p>{head}.</p>"
        f"<table><tr>{titles}</tr>{rows}</table>"
        + "".join(_section(output_dir, o) for o in outcomes)
        + "</body></html>\n"
    )
    path = output_dir / "summary.html"
    write_text(path, page)
    return path


def _varied(outcomes: Sequence[Outcome]) -> list[str]:
    """The parameters that differ between runs of one notebook: what a grid compares."""
    by_notebook: dict[str, list[dict[str, Any]]] = {}
    for o in outcomes:
        by_notebook.setdefault(o.notebook, []).append(o.parameters)
    names = dict.fromkeys(name for o in outcomes for name in o.parameters)
    return [
        name
        for name in names
        if any(len({str(p.get(name)) for p in some}) > 1 for some in by_notebook.values())
    ]


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of the study in a run's folder; {} where there is none that can be read."""
    for path in sorted(folder.glob("*/summary.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def findings_of(summary: Mapping[str, Any]) -> list[str]:
    """The sentences in which a study says what it found, from its summary.json."""
    said = summary.get("findings") or [summary.get("finding") or summary.get("recommendation") or ""]
    return [words for words in said if words]


def _first_sentence(summary: Mapping[str, Any]) -> str:
    return next(iter(findings_of(summary)), "").split("; ")[0].rstrip(".")


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
