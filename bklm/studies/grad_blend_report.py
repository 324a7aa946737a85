"""What the GRAD_BLEND sweep leaves behind: the original's files under their names, ours beside them, manifest, zip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bklm.checkpoints import write_json, write_text
from bklm.reporting import Bundle, Perplexity, interval95, write_csv, write_manifest, zip_study
from bklm.studies.grad_blend_figures import draw_analysis, draw_directions, draw_experts, draw_training
from bklm.studies.grad_blend_table import (
    Trials,
    alpha_table,
    best_alpha,
    by_alpha,
    diverged_by_alpha,
    finished,
    headline,
    pooled_directions,
    state_finding,
)
from bklm.studies.text import StudyText

if TYPE_CHECKING:
    from bklm.studies.grad_blend import GradBlendConfig


@dataclass(frozen=True)
class GradBlendResult:
    """What `run_grad_blend` found and wrote. ``table`` holds one row per alpha, ``paths`` the files by name."""

    config: GradBlendConfig
    table: list[dict[str, Any]]
    best_alpha: float
    best_perplexity: float
    finding: str
    baselines: list[dict[str, Any]]
    directions: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    final: dict[str, Any]
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle


def describe_run(config: GradBlendConfig, text: StudyText, seeds: int) -> str:
    """The small print of a figure: data, sizes, the number of seeds shown, and whether the model sees the future."""
    parts = [
        f"{text.corpus.name}, {text.train_tokens:,} training tokens, vocabulary {text.vocab_size:,}",
        f"batch {config.batch_size} x {config.seq_len}",
        f"{seeds} seeds, bars: 95% interval" if seeds > 1 else "1 seed, no interval",
        f"{config.protocol} protocol, theory gradient: {config.gradient}",
    ]
    if text.is_demonstration:
        parts.insert(0, "Demonstration")
    if not config.causal:
        parts.insert(0, "THIS MODEL SEES THE FUTURE")
    return "; ".join(parts) + "."


def write_report(
    config: GradBlendConfig, text: StudyText, trials: Trials, final: dict[str, Any], folder: Path
) -> GradBlendResult:
    """Write every file of the study and its zip; the same trials always give the same numbers.

    Trials that diverged, at least one of them did not, are named and in no number. Where the final training diverged
    there are no curves and no weights of it.
    """
    has_final = bool(finished([final]))
    table, finding, directions = alpha_table(trials), state_finding(trials), pooled_directions(trials)
    best = best_alpha(trials)
    best_perplexity = next(r["val_ppl"] for r in table if r["alpha"] == best)
    note = describe_run(config, text, len(config.seeds))
    note_of_one = describe_run(config, text, 1)
    lost = [t for group in diverged_by_alpha(trials).values() for t in group]
    names = [
        "grad_blend_results.json", "summary.json", "table.csv", "epochs.csv", "gradient_directions.csv",
        "grad_blend_analysis.png", "gradient_directions.png", "vocabulary.json", "manifest.json",
    ]  # fmt: skip
    if has_final:
        names += ["training_curves.png", "experts.png"]
    paths = {name: folder / name for name in names}
    if has_final:
        paths["best_model.safetensors"] = folder / "final" / "best_model.safetensors"

    write_json(paths["grad_blend_results.json"], _original_format(config, trials, table, best, best_perplexity))
    write_json(
        paths["summary.json"],
        {
            "finding": finding,
            "sees_the_future": not config.causal,
            "demonstration": text.is_demonstration,
            "best_alpha": best,
            "best_perplexity": best_perplexity,
            "diverged": lost,
            "final_training": {k: v for k, v in final.items() if k not in ("epochs", "directions")},
            "baselines": text.baselines,
            "table": table,
        },
    )
    write_csv(paths["table.csv"], table)
    write_csv(paths["epochs.csv"], _epoch_rows(trials, final))
    write_csv(paths["gradient_directions.csv"], directions)
    write_text(paths["vocabulary.json"], text.vocabulary_json())
    draw_analysis(paths["grad_blend_analysis.png"], trials, table, headline(trials), note)
    draw_directions(paths["gradient_directions.png"], directions, note)
    if has_final:
        draw_training(paths["training_curves.png"], final, text.baselines, note_of_one)
        draw_experts(paths["experts.png"], final, note_of_one)
    write_manifest(
        paths["manifest.json"],
        config=config,
        corpus=text.corpus,
        module="bklm.studies.grad_blend",
        seconds=sum(t["training_time"] for t in (*trials, final)),
        sees_the_future=not config.causal,
    )
    return GradBlendResult(
        config=config,
        table=table,
        best_alpha=best,
        best_perplexity=best_perplexity,
        finding=finding,
        baselines=text.baselines,
        directions=directions,
        diverged=lost,
        final=final,
        folder=folder,
        paths=paths,
        bundle=zip_study(folder),
    )


def _original_format(
    config: GradBlendConfig, trials: Trials, table: list[dict[str, Any]], best: float, best_perplexity: float
) -> dict[str, Any]:
    """grad_blend_results.json with the original's keys (means over seeds) and, beside them, ours; null where all diverged."""
    results, groups = [], by_alpha(trials)
    for row in table:
        group = groups.get(row["alpha"], [])
        curves = [[e["val_perplexity"] for e in t["epochs"]] for t in group]
        losses = [[e["train_loss"] for e in t["epochs"]] for t in group]
        results.append(
            {
                "alpha": row["alpha"],
                "final_perplexity": row["val_ppl"],
                "convergence_speed": interval95([t["convergence_speed"] for t in group])[0] if group else None,
                "gradient_variance": row["gradient_variance"],
                "training_time": row["seconds"],
                "loss_curve": [interval95(epoch)[0] for epoch in zip(*losses, strict=True)],
                "perplexity_curve": [Perplexity.over_seeds(epoch).mean for epoch in zip(*curves, strict=True)],
                "final_perplexity_95": [row["val_ppl_low"], row["val_ppl_high"]],
                "final_perplexity_by_seed": {
                    str(t["seed"]): t["final_perplexity"] for t in trials if t["alpha"] == row["alpha"]
                },
            }
        )
    return {
        "alpha_values": [row["alpha"] for row in table],
        "epochs_per_trial": config.epochs_per_trial,
        "best_alpha": best,
        "best_perplexity": best_perplexity,
        "results": results,
    }


def _epoch_rows(trials: Trials, final: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "alpha": trial["alpha"],
            "seed": trial["seed"],
            **{k: v for k, v in epoch.items() if k != "expert_counts"},
        }
        for run, group in (("sweep", trials), ("final", [final]))
        for trial in finished(group)
        for epoch in trial["epochs"]
    ]
