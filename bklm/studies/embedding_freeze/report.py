"""What the embedding-freeze study leaves behind: tables, curves, figures, manifest, zip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bklm.files.atomic import write_json, write_text
from bklm.harness.bundle import Bundle, zip_study
from bklm.harness.report import write_csv, write_manifest
from bklm.harness.statistics import interval95
from bklm.studies.embedding_freeze.config import INEQUALITY
from bklm.studies.embedding_freeze.figures import draw_arms, draw_budget, draw_curves, draw_effects, draw_phase1
from bklm.studies.embedding_freeze.tables import (
    Trials,
    arm_table,
    describe_diverged,
    effect_table,
    headline,
    state_finding,
    state_original,
    state_rule,
)
from bklm.studies.embedding_freeze.text import FreezeText

if TYPE_CHECKING:
    from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig


@dataclass(frozen=True)
class EmbeddingFreezeResult:
    """What `run_embedding_freeze` found and wrote.

    ``table`` holds one row per arm and sample, ``effects`` one per factor and scope, ``phase1`` one per initialisation, sample
    and seed, ``diverged`` one per trial without a score, ``paths`` the files by name. ``findings`` begins with the sentence on
    freezing, pretraining and tying. After phase 1 alone table and effects are empty and ``best`` is None.
    """

    config: EmbeddingFreezeConfig
    table: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    phase1: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    best: dict[str, Any] | None
    findings: list[str]
    folder: Path
    paths: dict[str, Path]
    bundle: Bundle


def describe_run(config: EmbeddingFreezeConfig, text: FreezeText) -> str:
    """The small print of a figure."""
    parts = [
        f"{text.corpus.name}, {text.vocab_size:,} tokens in the vocabulary, "
        f"{len(text.valid):,} validation tokens in {config.val_documents} documents",
        f"pretrained embedding: {text.source}",
        f"{config.n_layers} layers of width {config.context_dim}",
        f"{len(config.seeds)} seeds, bars: 95% interval" if len(config.seeds) > 1 else "1 seed, no interval",
        f"learning rate {' or '.join(f'{rate:g}' for rate in config.learning_rates)}",
    ]
    if text.is_demonstration:
        parts.insert(0, "Demonstration")
    return "; ".join(parts) + "."


def write_report(
    config: EmbeddingFreezeConfig,
    text: FreezeText,
    phase1: Sequence[dict[str, Any]],
    trials: Trials,
    diverged: Trials,
    folder: Path,
) -> EmbeddingFreezeResult:
    """Write every file of the study and its zip; the same trials always give the same numbers."""
    note = describe_run(config, text)
    table, effects, phase1_rows = arm_table(trials), effect_table(trials), phase1_table(phase1)
    findings = [state_phase1(phase1)]
    if trials:
        findings = [
            state_finding(trials) + describe_diverged(diverged),
            state_original(trials),
            state_rule(trials),
            state_baselines(trials, text.baselines),
            state_limits(trials, config),
            state_advantages(config, text),
            *findings,
            state_drift(trials),
        ]
        findings = [sentence for sentence in findings if sentence]
    best = min(table, key=lambda row: row["val_ppl"], default=None)
    paths = {"tokenizer.json": folder / "tokenizer.json", "manifest.json": folder / "manifest.json"}
    write_text(paths["tokenizer.json"], text.bpe.tokenizer.to_str(pretty=False))

    def csv(name: str, rows: list[dict[str, Any]]) -> None:
        paths[name] = folder / name
        write_csv(paths[name], rows)

    csv("phase1.csv", phase1_rows)
    csv("phase1_iterations.csv", [_flat(run, row) for run in phase1 for row in run["rows"]])
    csv("baselines.csv", text.baselines)
    paths["phase1.png"] = draw_phase1(folder / "phase1.png", phase1, note)
    if trials:
        csv("table.csv", table)
        csv("effects.csv", effects)
        csv("trials.csv", [{k: v for k, v in t.items() if not isinstance(v, list | dict)} for t in trials])
        csv("epochs.csv", [_epoch(t, e) for t in trials for e in t["epochs"]])
        paths["arms.png"] = draw_arms(folder / "arms.png", table, text.baselines, headline(trials), note)
        paths["curves.png"] = draw_curves(folder / "curves.png", trials, note)
        if effects:
            paths["effects.png"] = draw_effects(folder / "effects.png", effects, note)
        paths["budget.png"] = draw_budget(folder / "budget.png", table, note)
    paths["summary.json"] = folder / "summary.json"
    write_json(
        paths["summary.json"],
        {
            "findings": findings,
            "demonstration": text.is_demonstration,
            "inequality": INEQUALITY if config.original_comparison else None,
            "embedding": text.source,
            "near_duplicates": {
                "threshold": text.split.threshold,
                "examined": text.split.examined,
                "removed": [dataclasses.asdict(r) for r in text.split.removed],
            },
            "tokens": {"validation": len(text.valid)}
            | {f"{n} samples": len(text.train(n)) for n in config.samples},
            "baselines": text.baselines,
            "phase1": phase1_rows,
            "table": table,
            "effects": effects,
            "diverged": diverged,
        },
    )
    write_manifest(
        paths["manifest.json"],
        config=config,
        corpus=text.corpus,
        seconds=sum(run["seconds"] for run in phase1) + sum(t["seconds"] for t in trials),
        tokenizer={"source": text.bpe.source, "sha256": text.bpe.sha256},
    )
    return EmbeddingFreezeResult(
        config=config,
        table=table,
        effects=effects,
        phase1=phase1_rows,
        baselines=text.baselines,
        diverged=list(diverged),
        best=best,
        findings=findings,
        folder=folder,
        paths=paths,
        bundle=zip_study(folder),
    )


def phase1_table(phase1: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run of phase 1, from its last iteration."""
    rows = []
    for run in phase1:
        last = run["rows"][-1]
        row = {name: run[name] for name in ("initialisation", "samples", "seed")}
        row |= {"iterations": last["iteration"], "stopped_early": run["converged"], "seconds": run["seconds"]}
        row |= {name: last[name] for name in ("converged", "effective_rank", "effective_rank_centred")}
        rows.append(row | {"first_contexts": run["sweep"]})
    return rows


def readable_phase1(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The phase-1 table rounded for people."""
    return [
        {
            "embedding": r["initialisation"],
            "samples": r["samples"],
            "seed": r["seed"],
            "iterations": r["iterations"],
            "converged": f"{r['converged']:.1%}",
            "effective rank": f"{r['effective_rank']:.1%}",
            "centred": f"{r['effective_rank_centred']:.1%}",
            "seconds": f"{r['seconds']:.1f}",
        }
        for r in rows
    ]


def state_phase1(phase1: Sequence[dict[str, Any]]) -> str:
    """Convergence and rank of phase 1, and why freezing cannot change them."""
    parts = []
    for name in dict.fromkeys(run["initialisation"] for run in phase1):
        runs = [run for run in phase1 if run["initialisation"] == name]
        met = [run["rows"][-1]["iteration"] for run in runs if run["converged"]]
        others = [run["rows"][-1]["converged"] for run in runs if not run["converged"]]
        rank, centred = (
            interval95([run["rows"][-1][key] for run in runs])[0]
            for key in ("effective_rank", "effective_rank_centred")
        )
        words = f"{name} embedding, {len(met)} of {len(runs)} runs met the rule"
        words += f" at iteration {_range(met)}" if met else ""
        words += f", the rest ended with {_range(others, '.1%')} of tokens converged" if others else ""
        parts.append(f"{words}, effective rank {rank:.1%} (centred {centred:.1%})")
    compared = [run["unaffected"] for run in phase1 if run["unaffected"] is not None]
    unaffected = (
        f"run again with the embedding left trainable it gave the same weights bit for bit in {sum(compared)} of "
        f"{len(compared)} cases, because it trains the context block alone"
        if compared
        else "it trains the context block alone, so freezing the embedding cannot change it"
    )
    return f"Phase 1: {'; '.join(parts)}; {unaffected}."


def _range(values: Sequence[float], form: str = "d") -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def state_baselines(trials: Trials, baselines: Sequence[dict[str, Any]]) -> str:
    """How many of the controlled arms are better than count models of the same tokens."""
    rows = arm_table([t for t in trials if not t["original"]])
    if not rows:
        return ""

    def best(samples: int, name: str) -> float:
        return min(b["val_ppl"] for b in baselines if b["samples"] == samples and b["name"].startswith(name))

    beat = sum(row["val_ppl"] < best(row["samples"], "Kneser-Ney") for row in rows)
    worse = sum(row["val_ppl"] > best(row["samples"], "unigram") for row in rows)
    return (
        f"{beat} of {len(rows)} arms (each sample size counted) beat Kneser-Ney on the same tokens, {worse} are worse than "
        "the unigram."
    )


def state_limits(trials: Trials, config: EmbeddingFreezeConfig) -> str:
    """How often the limits of training and of the search may have decided."""
    ended = sum(len(t["epochs"]) >= config.epochs for t in trials)
    text = f"{ended} of {len(trials)} trials ended at the limit of {config.epochs} epochs"
    rates = {t["arm"]: t["learning_rate"] for t in trials}
    if len(config.learning_rates) > 1:
        edges = (min(config.learning_rates), max(config.learning_rates))
        text += (
            f"; the chosen learning rate lay at the edge of the search in {sum(r in edges for r in rates.values())} of "
            f"{len(rates)} arms"
        )
        text += " (a search over two has no inside)" if len(config.learning_rates) == 2 else ""
    return (
        f"{text}. Epoch and learning rate are chosen on the documents that are scored, so every perplexity is a little too "
        "low."
    )


def state_advantages(config: EmbeddingFreezeConfig, text: FreezeText) -> str:
    """What pretrained arms saw that the others did not."""
    if config.initialisation == "random":
        return ""
    if (tokens := text.pretraining_tokens) is None:
        return f"Arms with a pretrained embedding profit from text that the others never saw: that behind {text.source}."
    largest = len(text.train(max(config.samples)))
    return (
        f"Arms with a pretrained embedding profit from {tokens:,} tokens that the others never saw, beside at most "
        f"{largest:,} that all train on."
    )


def state_drift(trials: Trials) -> str:
    """How far the contexts move in phase 2, when the embedding under them is trained."""
    moved = [
        t["context_drift"] for t in trials if t["freezing"] == "trained" and t["context_drift"] is not None
    ]
    if not moved:
        return ""
    ranks = [t["context_rank"] for t in trials if t["freezing"] == "trained" and t["context_drift"] is not None]
    return (
        f"A trained embedding moves the contexts: at the end of phase 2 they differ from phase 1's by "
        f"{interval95(moved)[0]:.0%} of their norm (effective rank then {interval95(ranks)[0]:.1%}); a frozen one leaves them "
        "as they are."
    )


def _flat(run: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in ("initialisation", "samples", "seed")} | row


def _epoch(trial: dict[str, Any], epoch: dict[str, Any]) -> dict[str, Any]:
    named = {name: trial[name] for name in ("arm", "samples", "seed")}
    return named | {k: v for k, v in epoch.items() if k != "expert_counts"}
