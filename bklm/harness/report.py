"""What a study leaves behind: the same files for every study, and one result class. ``bundle.py`` makes the zip."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd

from bklm.files.atomic import replacing, write_json, write_text
from bklm.harness.bundle import PAGE, Bundle, zip_study
from bklm.harness.comparison import Comparison, Trial, not_beaten, state_not_beaten
from bklm.harness.machine import environment, git_revision
from bklm.harness.page import moments, write_page
from bklm.harness.session import Session
from bklm.harness.statistics import FEWEST_SEEDS
from bklm.harness.windows import window_rows

Result = TypeVar("Result", bound="StudyResult")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically; numbers with a fraction have six digits."""
    with replacing(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g")


def as_text(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned plain-text table."""
    return pd.DataFrame(rows).fillna("").to_string(index=False)


def command_for(config: Any) -> str:
    """The command line that repeats a run with this (resolved) config."""
    return shlex.join(command_words(config))


def command_words(config: Any) -> list[str]:
    """The words of the command line that runs a study with a config; empty fields are left out."""
    words = ["python", "-m", config.package()]
    for name, value in config.to_dict().items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(v) for v in values)]
    return words


def write_manifest(path: Path, *, config: Any, corpus: Any, seconds: float, **extra: Any) -> dict[str, Any]:
    """Write manifest.json, everything needed to repeat and to judge the run, and return what it holds.

    ``seconds`` is computing time in all; ``corpus`` is None for a study that reads no text.
    """
    begun, finished = moments(path.parent)
    facts = {
        "study": config.study,
        "profile": config.profile,
        "begun": begun,
        "finished": finished,
        "config": config.to_dict(),
        "corpus": corpus and {n: getattr(corpus, n) for n in ("name", "source", "sha256", "licence", "is_own")},
        "git_revision": git_revision(),
        "environment": environment(),
        "seconds": round(seconds, 1),
        "command": command_for(config),
        **extra,
    }
    write_json(path, facts)
    return facts


@dataclass(frozen=True)
class StudyResult:
    """What a study found and wrote. A study's own class adds what only it has.

    Attributes:
        config: as resolved.
        table: one row per arm, plain numbers.
        best: the best arm; best_perplexity: its mean over seeds.
        finding: one sentence or more.
        baselines: rows with name, val_ppl and val_ppl_without_unk of the same targets.
        diverged: records of the trials that diverged.
        folder, paths: where everything is, by file name.
        bundle: the zip.
    """

    # Attributes that say in words what was found.
    spoken: ClassVar[tuple[str, ...]] = ("finding",)
    # Whether the original announced what int8 would bring its model: its numbers stand below those measured.
    int8_was_announced: ClassVar[bool] = False

    config: Any
    table: list[dict[str, Any]]
    best: Any
    best_perplexity: float | None
    finding: str
    baselines: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle

    def tables(self) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        """The tables for people by name, the main one first; each is made when it is called."""
        raise NotImplementedError

    def sentences(self) -> list[str]:
        """What was found, in words, as it stands at the head of report.html: what ``spoken`` names, where it is not empty."""
        return [words for name in self.spoken if (words := getattr(self, name))]

    def renew_page(self) -> None:
        """Write report.html once more, with what was measured since the run ended."""
        facts = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        write_page(self.folder / PAGE, self, facts, self.paths.values())

    def load(self, model: str | None = None) -> Any:
        """A trained model by its arm's name, the best one when none is given; on the CPU, in evaluation mode."""
        raise NotImplementedError

    def show(self, *names: str) -> None:
        """Print what a command line shows: the tables of these names, all where none is given, finding and zip."""
        tables = self.tables()
        for name in names or tables:
            if rows := tables[name]():
                print(as_text(rows))
        print(self.finding)
        print(self.bundle)


class Report:
    """The files of one study. They are written as they are added; ``finish`` adds those that every study has."""

    def __init__(self, study: Session) -> None:
        self.study, self.folder = study, study.folder
        self.paths: dict[str, Path] = {}

    def csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a table; one without rows is no file, and none of an earlier run stays."""
        if rows:
            write_csv(self.path(name), rows)
        else:
            (self.folder / name).unlink(missing_ok=True)

    def json(self, name: str, value: Any) -> None:
        write_json(self.path(name), value)

    def text(self, name: str, words: str) -> None:
        write_text(self.path(name), words)

    def figure(self, name: str, draw: Callable[..., Any], *arguments: Any) -> None:
        """``draw(path, *arguments)``; one that has nothing to draw returns None, and there is no such file then."""
        if draw(self.folder / name, *arguments) is not None:
            self.path(name)

    def path(self, name: str) -> Path:
        """The path of a file of that name, which belongs to the result from now on."""
        self.paths[name] = self.folder / name
        return self.paths[name]

    def finish(
        self,
        result: type[Result],
        comparison: Comparison,
        trials: Sequence[Trial],
        *,
        also: Mapping[str, Sequence[Trial]] = {},
        finding: str | None = None,
        rows: list[dict[str, Any]] | None = None,
        summary: Mapping[str, Any] = {},
        sees_the_future: bool = False,
        manifest: Mapping[str, Any] = {},
        **more: Any,
    ) -> Result:
        """Write table, epochs, summary, vocabulary, manifest and zip; return the study's result.

        Args:
            result: a ``StudyResult`` class; what only it has comes with ``more``.
            trials: the compared ones, at least one of them finished.
            also: other trainings by name, for the epochs and the computing time.
            finding: instead of the comparison's own sentence.
            rows: instead of the comparison's own table.
            summary: what summary.json holds besides; manifest: what manifest.json does.
        """
        text = self.study.text
        table = comparison.rows(trials) if rows is None else rows
        best = comparison.best(trials)
        best_perplexity = comparison.perplexity(comparison.groups(trials)[best]).mean
        finding = comparison.finding(trials) if finding is None else finding
        finding += state_not_beaten(comparison.title(best), best_perplexity, text.baselines)
        lost = [dict(t) for group in comparison.lost(trials).values() for t in group]
        runs = {"sweep": trials, **also}
        self.csv("table.csv", table)
        self.csv("windows.csv", window_rows(comparison, trials))
        self.csv("epochs.csv", epoch_rows(runs, comparison.by))
        self.json(
            "summary.json",
            {
                "finding": finding,
                "sees_the_future": sees_the_future,
                "demonstration": text.is_demonstration,
                f"best_{comparison.by}": best,
                "best_perplexity": best_perplexity,
                "not_beaten": [row["name"] for row in not_beaten(best_perplexity, text.baselines)],
                "diverged": lost,
                **summary,
                "baselines": text.baselines,
                "table": table,
            },
        )
        self.text("vocabulary.json", text.vocabulary_json())
        self.text("tokenizer.json", text.tokenizer_json())
        seconds = sum(t["seconds"] for group in runs.values() for t in group)
        return self.close(
            result, seconds, {"sees_the_future": sees_the_future, **manifest}, table=table, best=best, finding=finding,
            best_perplexity=best_perplexity, baselines=text.baselines, diverged=lost, **more,
        )  # fmt: skip

    def close(
        self, result: type[Result], seconds: float, manifest: Mapping[str, Any] = {}, **found: Any
    ) -> Result:
        """Write manifest, report.html and zip; return the study's result.

        ``finish`` ends so, and a study that compares no trials.

        Args:
            seconds: computing time in all.
            manifest: what manifest.json holds besides.
            found: the result's other attributes.
        """
        text, config = self.study.text, self.study.config
        corpus = text and text.corpus
        path = self.path("manifest.json")
        facts = write_manifest(path, config=config, corpus=corpus, seconds=seconds, **manifest)
        # It describes itself before it is packed: the page is in the zip, and made from the result.
        half = result(config=config, folder=self.folder, paths=self.paths, bundle=None, **found)
        write_page(self.folder / PAGE, half, facts, list(self.paths.values()))
        self.path(PAGE)
        return dataclasses.replace(half, bundle=zip_study(self.folder))


def epoch_rows(runs: Mapping[str, Sequence[Trial]], by: str) -> list[dict[str, Any]]:
    """The training curves of finished trials, one row per run and epoch; experts' counts are in the trials' own files."""
    return [
        {"run": name, by: trial[by], "seed": trial["seed"]}
        | {k: v for k, v in epoch.items() if k != "expert_counts"}
        for name, group in runs.items()
        for trial in group
        if trial["val_ppl"] is not None
        for epoch in trial["epochs"]
    ]


def seeds_in_words(seeds: int, bars: bool = True) -> str:
    """How many seeds a figure shows, and what its bars are, where it has any."""
    if seeds == 1:
        return "1 seed, no interval"
    meaning = "95% interval" if seeds >= FEWEST_SEEDS else "from the lower to the higher"
    return f"{seeds} seeds" + (f", bars: {meaning}" if bars else ", means")


def small_print(text: Any, seeds: int, *more: str, sees_the_future: bool = False, bars: bool = True) -> str:
    """What stands below a figure: data, sizes, how many seeds, and whether the model sees the future.

    Args:
        seeds: those that the figure shows.
        more: parts of the study's own, such as its protocol.
        bars: whether the figure has any.
    """
    parts = ["THIS MODEL SEES THE FUTURE"] * sees_the_future + ["Demonstration"] * text.is_demonstration
    parts += [text.describe(), f"batch {text.batch_size} x {text.seq_len}", seeds_in_words(seeds, bars), *more]
    return "; ".join(parts) + "."
