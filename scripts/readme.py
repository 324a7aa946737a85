"""Write a study's sections of docs/findings.md and docs/results.md from its page.md and the files that docs/results keeps.

    python scripts/readme.py STUDY                        from what is kept
    python scripts/readme.py STUDY FOLDER                 keep a study's results first; FOLDER holds STUDY/
    python scripts/readme.py STUDY RUN=FOLDER ...         the same for a study with several runs, such as its texts
    python scripts/readme.py STUDY ... NAME=TABLE.csv     keep a benchmark's table, too, as docs/results/NAME.csv

    python scripts/readme.py grad_blend corrected=FOLDER original=FOLDER reads=FOLDER weights=FOLDER moe_perplexity=TABLE.csv
    python scripts/readme.py precision FOLDER
    python scripts/readme.py baseline wikitext=FOLDER peps=FOLDER field=FOLDER original=FOLDER
        (wikitext's holds int8.csv, of int8_table)
    python scripts/readme.py embedding_freeze peps=FOLDER wikitext=FOLDER freeze_lm_embedding=TABLE.csv
    python scripts/readme.py koopman corrected=FOLDER original=FOLDER
    python scripts/readme.py physics corrected=FOLDER original=FOLDER
    python scripts/readme.py compression FOLDER
    python scripts/readme.py dialogue grammar=FOLDER real=FOLDER
    python scripts/readme.py integration FOLDER

A page.md is prose with places: ``{finding}`` is a number or a table of `readme_places.py`, of the study's first run where it
has several, ``{peps.finding}`` of its run "peps"; ``{config[seq_len]:,}`` is a setting with a format, ``{table:arm}`` a table
with that title over its first column. The links
``](curves.png)`` and ``](peps/curves.png)`` lead to a run's kept figure. Where lines such as ``<!-- README.md -->`` divide the
page, the part ``README.md``, the short of it, goes to docs/findings.md and ``docs/results.md`` to the page of its name;
``claims`` holds rows of the first table in docs/findings.md, ``first`` those of README.md's, and any other part is a place for
the rest. A page without such lines is a section of docs/findings.md.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from readme_places import OF_RUNS, OF_STUDIES, list_scores, size_in_words

from bklm.harness.comparison import Comparison
from bklm.harness.windows import readable_windows
from bklm.studies import STUDIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "results"
SHORT, FINDINGS, RESULTS = "README.md", "docs/findings.md", "docs/results.md"
# The page on which the rows of a study's part stand together with those of all others.
TABLES = {"claims": FINDINGS, "first": "README.md"}
CLAIMS = "| announced | measured here | verdict |\n| --- | --- | --- |\n"
FIGURE = re.compile(r"\]\((?:([\w-]+)/)?([\w-]+\.png)\)")
PART = re.compile(r"^<!-- (\S+) -->\n", re.MULTILINE)
# A study's runs by name, and what their files in docs/results begin with; one run named as the study where it is not here.
PREFIXES = {
    "grad_blend": {name: f"grad_blend_{name}" for name in ("corrected", "original", "reads", "weights")},
    "baseline": {name: f"baseline_{name}" for name in ("wikitext", "peps", "field", "original")},
    "embedding_freeze": {name: f"freeze_{name}" for name in ("peps", "wikitext")},
    "koopman": {name: f"koopman_{name}" for name in ("corrected", "original", "recall")},
    "physics": {name: f"physics_{name}" for name in ("corrected", "original")},
    "dialogue": {name: f"dialogue_{name}" for name in ("grammar", "real")},
}
# Stands for a place whose numbers come from a file that is not kept.
UNKNOWN = "\0"
# What a study's sections hold until the results of its first run are kept.
NOT_YET = "Not run yet."


def markdown_table(rows: list[dict[str, Any]], first: str = "") -> str:
    """Rows as a Markdown table, the keys of all rows, in the order in which they come up, as its head.

    Args:
        first: the first column's title, instead of its key; "-" makes a rule without blanks.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = [*([first] if first.strip("-") else keys[:1]), *keys[1:]]
    lines = [head, *([_cell(row.get(key)) for key in keys] for row in rows)]
    # Markdown takes a bare <unk> for HTML, and shows nothing.
    lines[0] = [re.sub("(?<!`)<unk>", "`<unk>`", title) for title in head]
    written = [f"| {' | '.join(line)} |" for line in lines]
    written.insert(1, f"|{('---|' if first == '-' else ' --- |') * len(head)}")
    return "\n".join(written)


def _cell(value: Any) -> str:
    """A value in a table's row, where a bare bar would end the cell."""
    return "" if value is None else re.sub(r"(?<!\\)\|", r"\\|", str(value))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A CSV table, None where a cell is empty."""
    table = pd.read_csv(path).astype(object)
    return table.where(table.notna(), None).to_dict("records")


def comparison_of(run: Run) -> Comparison:
    """The first one in its study's tables.py."""
    found = vars(importlib.import_module(f"{run.study.package}.tables")).values()
    return next(value for value in found if isinstance(value, Comparison))


def study_table(run: Run) -> list[dict[str, Any]]:
    """A study's table for people."""
    return comparison_of(run).readable(run.summary["table"])


# Places of a run of any study.
OF_EVERY_RUN: dict[str, Callable[[Run], Any]] = {
    "summary": lambda run: run.json("summary.json"),
    "manifest": lambda run: run.json("manifest.json"),
    "config": lambda run: run.manifest["config"],
    # Settings as a command line has them.
    "words": lambda run: {
        k: " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in v) if isinstance(v, list) else v
        for k, v in run.config.items()
    },
    "seeds": lambda run: len(run.config["seeds"]),
    "finding": lambda run: run.summary["finding"],
    "table": study_table,
    "windows": lambda run: readable_windows(comparison_of(run), run.rows("windows.csv")),
    "count_model": lambda run: min(run.summary["baselines"], key=lambda row: row["val_ppl"]),
    # Empty for a run of the original's size.
    "size": size_in_words,
    "count_models": lambda run: list_scores(run.summary["baselines"]),
}


class Run:
    """One finished run of a study, as docs/results keeps it: each file under the run's prefix. Its places are attributes."""

    def __init__(self, study: Study, prefix: str) -> None:
        self.study, self.prefix = study, prefix

    def kept(self, name: str) -> Path:
        name = name if name.startswith(f"{self.prefix}_") else f"{self.prefix}_{name}"
        return DOCS / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_rows(self.kept(name))

    def json(self, name: str) -> dict[str, Any]:
        return json.loads(self.kept(name).read_text(encoding="utf-8"))

    def hardware(self, cpu: str) -> str:
        """The GPU, or the processor in the words of ``cpu``."""
        found = self.manifest["environment"]
        plural = "s" if found["torch_threads"] > 1 else ""
        return found["gpu"]["name"] if found["gpu"] else cpu.format(**found, s=plural)

    def __getattr__(self, name: str) -> Any:
        places = OF_EVERY_RUN | OF_RUNS.get(self.study.name, {})
        if name not in places:
            raise AttributeError(f"{self.study.name}/page.md: no place is named {name}.")
        return places[name](self)

    def keep(self, folder: Path, output_dir: str) -> None:
        """Copy tables, summary, the figures that the page links, and the manifest without the folders of its machine, in place
        of what was kept of an earlier run.

        Raises:
            ValueError: the folder lacks one of them; nothing was copied.
        """
        figures = [folder / name for name in self.study.figures(self)]
        files = [*figures, *folder.glob("*.csv"), folder / "summary.json", folder / "manifest.json"]
        if missing := [path.name for path in files if not path.is_file()]:
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}; give the folder of a run that was finished."
            )
        new = {self.kept(path.name) for path in files}
        for path in {*DOCS.glob(f"{self.prefix}_*.csv"), *DOCS.glob(f"{self.prefix}_*.png")} - new:
            path.unlink()
        for path in files[:-1]:
            shutil.copy(path, self.kept(path.name))
        text = files[-1].read_text(encoding="utf-8")
        config = json.loads(text)["config"]
        # A place that is none of a machine stays; one such as "." would be found everywhere.
        places = [value for value in config.values() if isinstance(value, str) and Path(value).is_absolute()]
        # The longest first: a folder of another one is no part of its name.
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, output_dir if place == config["output_dir"] else Path(place).name)
        self.kept("manifest.json").write_text(text, encoding="utf-8")


class Study(string.Formatter):
    """A study's page, and its runs by name, the first of which answers where a place names none.

    Args:
        package: ``bklm.studies.NAME`` where none is given.
        strict: whether a place whose file is not kept is refused; otherwise `UNKNOWN` stands there and ``missing`` names it.
    """

    def __init__(self, name: str, package: str = "", strict: bool = True) -> None:
        self.name, self.package, self.strict = name, package or f"bklm.studies.{name}", strict
        self.missing: set[str] = set()
        self.runs = {run: Run(self, prefix) for run, prefix in PREFIXES.get(name, {"": name}).items()}
        self.first = next(iter(self.runs.values()))
        page = Path(importlib.import_module(self.package).__file__).with_name("page.md")
        before, *parts = PART.split(page.read_text(encoding="utf-8"))
        self.parts = dict(zip(parts[::2], parts[1::2], strict=True)) if parts else {SHORT: before}

    @property
    def is_kept(self) -> bool:
        """Whether docs/results holds anything of the study's first run."""
        return any(DOCS.glob(f"{self.first.prefix}_*"))

    def part(self, name: str) -> str:
        """A part of the page with its places filled, without line ends around it, and without what an empty place leaves."""
        text = self.format(FIGURE.sub(self._figure, self.parts[name].strip()))
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"^ (?=\S)", "", text, flags=re.MULTILINE))

    def sections(self) -> dict[str, str]:
        """What the page gives, by the page of the repository that it stands on.

        Raises:
            FileNotFoundError: a number comes from a file that docs/results does not hold (if strict).
        """
        pages = {FINDINGS: SHORT, RESULTS: RESULTS}
        return {
            page: self.part(part).replace("](docs/", "](") for page, part in pages.items() if part in self.parts
        }

    def benchmark(self, name: str) -> list[dict[str, Any]]:
        """A kept benchmark's table."""
        return read_rows(DOCS / f"{name}.csv")

    def output(self, name: str) -> str:
        """What a script of benchmarks/ printed, as scripts/benchmarks.py keeps it."""
        return (DOCS / "benchmarks" / f"{name}.txt").read_text(encoding="utf-8")

    def keep(self, name: str, path: str) -> None:
        """Keep a run's results, or a benchmark's table.

        Raises:
            ValueError: the study has no run of that name.
        """
        if path.endswith(".csv"):
            shutil.copy(path, DOCS / f"{name}.csv")
        elif name in self.runs:
            self.runs[name].keep(Path(path) / self.name, f"results/{name or self.name}")
        else:
            raise ValueError(
                f"{self.name}: got {name or 'no name'} for {path}; allowed is {', '.join(self.runs)}."
            )

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        if field_name in self.parts:
            return self.part(field_name), field_name
        try:
            return super().get_field(field_name, args, kwargs)
        except FileNotFoundError as error:
            if self.strict:
                raise
            self.missing.add(Path(error.filename).name)
            return UNKNOWN, field_name

    def get_value(self, key: int | str, args: Any, kwargs: Any) -> Any:
        if key in self.runs:
            return self.runs[key]
        own = OF_STUDIES.get(self.name, {})
        return own[key](self) if key in own else getattr(self.first, str(key))

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is UNKNOWN:
            return value
        if isinstance(value, list):
            return markdown_table(value, format_spec)
        return f"{value / 1e6:.1f} MB" if format_spec == "MB" else super().format_field(value, format_spec)

    def figures(self, run: Run) -> list[str]:
        """The figures of a run that the page links."""
        links = FIGURE.findall("\n".join(self.parts.values()))
        return [figure for name, figure in dict.fromkeys(links) if self.runs.get(name, self.first) is run]

    def _figure(self, link: re.Match[str]) -> str:
        run = self.runs[link[1]] if link[1] else self.first
        return f"](docs/results/{run.kept(link[2]).name})"


def claims(part: str = "claims") -> str:
    """The table of what was announced beside what was measured on a page of `TABLES`, from the kept files alone."""
    studies = [study for study in map(Study, STUDIES) if part in study.parts and study.is_kept]
    return CLAIMS + "\n".join(study.part(part) for study in studies)


def kept_runs() -> str:
    """Every kept run: when it ended, at which revision of the repository, and where."""
    rows = [
        {
            "run": f"{list(STUDIES).index(study.name) + 1:02d} {study.name} {name}".strip(),
            "finished": run.manifest["finished"][:10],
            "revision": run.manifest["git_revision"][:12],
            "version": run.manifest["environment"]["bklm"],
            "processor": run.hardware("{processor}, {cores} cores"),
        }
        for study in map(Study, STUDIES)
        for name, run in study.runs.items()
        if run.kept("manifest.json").exists()
    ]
    return markdown_table(sorted(rows, key=lambda row: row["run"]))


def missing_files() -> list[str]:
    """The files that docs/results lacks of what sections of docs/findings.md and docs/results.md name."""
    studies = [study for name in STUDIES if (study := Study(name, strict=False)).is_kept]
    for study in studies:
        study.sections()
    return sorted(set().union(*(study.missing for study in studies)))


def split_page(page: str, name: str) -> tuple[str, str, str]:
    """A page before, between and after ``<!-- name -->`` and ``<!-- end of name -->``, which belong to the outer parts.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    text = (ROOT / page).read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: needs {begin.strip()} and {end.strip()} once each.")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def main(words: list[str]) -> None:
    if not words or words[0] not in STUDIES:
        raise SystemExit(
            f"readme.py: got {' '.join(words) or 'no study'}; allowed is one of {', '.join(STUDIES)}."
        )
    study = Study(words[0])
    try:
        for word in words[1:]:
            study.keep(*word.rpartition("=")[::2])
        written = {(page, study.name): text for page, text in study.sections().items()} | {
            (page, part): claims(part) for part, page in TABLES.items()
        }
        written[RESULTS, "runs"] = kept_runs()
    except ValueError as error:
        raise SystemExit(f"readme.py: {error}") from error
    except LookupError as error:
        raise SystemExit(
            f"readme.py: a place of page.md names {error}, which the kept results lack."
        ) from error
    except FileNotFoundError as error:
        raise SystemExit(
            f"readme.py: {error.filename} is missing, so no page was written; name the folder of a finished run that "
            "holds it, as this script's docstring shows."
        ) from error
    for (page, name), text in written.items():
        before, _, after = split_page(page, name)
        (ROOT / page).write_text(before + text + after, encoding="utf-8")
        print(f"wrote {name} in {page}")


if __name__ == "__main__":
    main(sys.argv[1:])
