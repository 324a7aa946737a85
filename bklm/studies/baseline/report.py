"""What the baseline study leaves behind: tables, figures, weights, manifest and one zip; samples from its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model

from bklm.files.atomic import write_json, write_text
from bklm.harness.bundle import Bundle, zip_study
from bklm.harness.report import write_csv, write_manifest
from bklm.models import LanguageModel
from bklm.studies.baseline.figures import describe_run, draw_contexts, draw_curves
from bklm.studies.baseline.models import build_model
from bklm.studies.baseline.tables import (
    REPORTED_EPOCHS,
    best_model,
    claims_table,
    describe_diverged,
    headline,
    model_table,
    state_finding,
)
from bklm.studies.baseline.text import BaselineText
from bklm.training.checkpoints import read_weights

if TYPE_CHECKING:
    from bklm.studies.baseline.config import BaselineConfig


@dataclass(frozen=True)
class BaselineResult:
    """What `run_baseline` found and wrote. ``table`` holds one row per model, ``paths`` the files by name."""

    config: BaselineConfig
    table: list[dict[str, Any]]
    best_model: str
    best_perplexity: float
    finding: str
    baselines: list[dict[str, Any]]
    search: list[dict[str, Any]]
    measured: dict[str, dict[str, Any]]
    claims: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle

    def load(self, model: str | None = None) -> LanguageModel:
        """A trained model (the best one when no name is given) of the first seed; on the CPU, in evaluation mode."""
        name = model or self.best_model
        known = [run["model"] for run in self.runs]
        if name not in known:
            raise ValueError(f"model: got {name!r}; this study trained {', '.join(dict.fromkeys(known))}.")
        run = next(run for run in self.runs if run["model"] == name)
        weights = self.folder / "runs" / f"{name}_seed_{run['seed']}" / "best_model.safetensors"
        if read_weights(weights) is None:
            raise FileNotFoundError(f"{weights} is gone or damaged; run the study again, which makes it anew.")
        found = build_model(name, run["model_config"])
        load_model(found, str(weights))
        return found.eval()


def write_report(
    config: BaselineConfig,
    text: BaselineText,
    search: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    diverged: list[dict[str, Any]],
    measured: dict[str, dict[str, Any]],
    folder: Path,
) -> BaselineResult:
    """Write every file of the study and its zip; the same runs always give the same numbers."""
    table, finding = model_table(runs, measured), state_finding(runs) + describe_diverged(diverged)
    best = best_model(runs)
    best_perplexity = next(r["val_ppl"] for r in table if r["model"] == best)
    claims = claims_table(table)
    names = (
        "summary.json", "table.csv", "epochs.csv", "learning_rates.csv", "training_curves.png", "vocabulary.json",
        "manifest.json",
    )  # fmt: skip
    paths = {name: folder / name for name in names}
    write_json(
        paths["summary.json"],
        {
            "finding": finding,
            "demonstration": text.is_demonstration,
            "best_model": best,
            "best_perplexity": best_perplexity,
            "baselines": text.baselines,
            "table": table,
            "learning_rate_search": search,
            "diverged": diverged,
            "measured": measured,
            "claims": claims,
            "reported_by_the_original": REPORTED_EPOCHS,
            "note": describe_run(config, text, search),
            "train_targets": text.train_targets,
            "val_targets": text.val_targets,
        },
    )
    write_csv(paths["table.csv"], table)
    write_csv(paths["epochs.csv"], _epoch_rows(runs))
    write_csv(paths["learning_rates.csv"], search)
    write_text(paths["vocabulary.json"], text.vocabulary_json())
    draw_curves(paths["training_curves.png"], runs, text, config, headline(runs), search)
    contexts = folder / "context_lengths.png"
    if draw_contexts(contexts, table, config, describe_run(config, text, search)) is not None:
        paths[contexts.name] = contexts
    write_manifest(
        paths["manifest.json"],
        config=config,
        corpus=text.corpus,
        seconds=sum(r["seconds"] for r in runs),
    )
    return BaselineResult(
        config=config,
        table=table,
        best_model=best,
        best_perplexity=best_perplexity,
        finding=finding,
        baselines=text.baselines,
        search=search,
        measured=measured,
        claims=claims,
        runs=runs,
        diverged=diverged,
        folder=folder,
        paths=paths,
        bundle=zip_study(folder),
    )


def _epoch_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": run["model"],
            "seed": run["seed"],
            "learning_rate_at_start": run["learning_rate"],
            **{k: v for k, v in epoch.items() if k != "expert_counts"},
        }
        for run in runs
        for epoch in run["epochs"]
    ]
