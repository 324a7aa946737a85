"""The baseline study's numbers: one row per model over its seeds, beside what the original reported and announced."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness import comparison as verdict
from bklm.harness.statistics import Perplexity, interval95
from bklm.studies.baseline.models import TITLES

Runs = Sequence[Mapping[str, Any]]

# Reported by the original: New-LLM on WikiText-2, its own windows, one run, interrupted after epoch 27. Losses in nats.
REPORTED_EPOCHS = [
    {"epoch": 1, "train_loss": 4.195, "val_loss": 3.884, "train_ppl": 66.3, "val_ppl": 48.6},
    {"epoch": 5, "train_loss": 3.666, "val_loss": 3.603, "train_ppl": 39.1, "val_ppl": 36.7},
    {"epoch": 10, "train_loss": 3.411, "val_loss": 3.385, "train_ppl": 30.3, "val_ppl": 29.5},
    {"epoch": 15, "train_loss": 3.262, "val_loss": 3.259, "train_ppl": 26.1, "val_ppl": 26.0},
    {"epoch": 20, "train_loss": 3.171, "val_loss": 3.201, "train_ppl": 23.8, "val_ppl": 24.6},
    {"epoch": 25, "train_loss": 3.127, "val_loss": 3.165, "train_ppl": 22.8, "val_ppl": 23.7},
    {"epoch": 27, "train_loss": 3.107, "val_loss": 3.150, "train_ppl": 22.36, "val_ppl": 23.34},
]
REPORTED_PPL, REPORTED_PARAMETERS, REPORTED_ACCURACY = 23.34, 2_739_432, 0.31
REPORTED_MINUTES_PER_EPOCH = 60.0  # of the baseline, on a CPU; "about 1 h"
REPORTED_ADVANCED = "36 to 41"  # validation PPL of the advanced model, in the original's later GPU runs


def by_model(runs: Runs) -> dict[str, list[Mapping[str, Any]]]:
    """Runs grouped by model, in the order in which models first appear, seeds ascending."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["model"], []).append(run)
    return {name: sorted(group, key=lambda r: r["seed"]) for name, group in groups.items()}


def over_seeds(group: Runs, key: str) -> Perplexity | None:
    """A perplexity over the seeds of one model; None where it was not measured."""
    values = [run[key] for run in group]
    return None if None in values else Perplexity.over_seeds(values)


def model_table(runs: Runs, measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, plain numbers: means over seeds with 95% intervals (None for one seed)."""
    rows = []
    for name, group in by_model(runs).items():
        cost = measured.get(name, {})
        row: dict[str, Any] = {
            "model": name,
            "parameters": group[0]["parameters"],
            "n_seq": group[0]["model_config"].get("n_seq"),  # positions; None: any number
            "active_parameters": group[0]["active_parameters"],
            "learning_rate": group[0]["learning_rate"],
            "seeds": len(group),
            "steps": group[0]["steps"],
        }
        for key in ("val_ppl", "val_ppl_without_unk", "test_ppl"):
            value = over_seeds(group, key)
            row |= {
                key: value and value.mean,
                f"{key}_low": value and value.low,
                f"{key}_high": value and value.high,
            }
        row["accuracy"] = interval95([r["val_accuracy"] for r in group])[0]
        row["best_epoch"] = interval95([r["best_epoch"] for r in group])[0]
        for length in group[0]["val_ppl_by_context"]:
            values = [r["val_ppl_by_context"][length] for r in group]
            row[f"val_ppl_context_{length}"] = None if None in values else Perplexity.over_seeds(values).mean
        row["tokens_per_second"] = cost.get("tokens_per_second")
        row["training_bytes"] = cost.get("training_bytes")
        for entry in cost.get("generation", ()):
            row[f"state_bytes_{entry['position']}"] = entry["state_bytes"]
            row[f"generate_seconds_{entry['position']}"] = entry["seconds"]
        row["seconds_per_epoch"] = interval95([e["seconds"] for r in group for e in r["epochs"]])[0]
        rows.append(row)
    return rows


def readable_quality(
    rows: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], diverged: Runs = ()
) -> list[dict[str, Any]]:
    """Perplexities and accuracy for people, with the n-gram baselines and the original's report below.

    Models and seeds that diverged are named as such; no mean counts them.
    """
    lost = Counter(r["model"] for r in diverged)
    found = [
        {
            "model": TITLES[r["model"]],
            "parameters (active)": _parameters(r),
            "learning rate": f"{r['learning_rate']:g}",
            "val PPL (95%)": _perplexity(r, "val_ppl")
            + (
                f"; diverged: {lost[r['model']]} of {lost[r['model']] + r['seeds']} seeds"
                if lost[r["model"]]
                else ""
            ),
            "without <unk>": _perplexity(r, "val_ppl_without_unk", interval=False),
            "test PPL": _perplexity(r, "test_ppl", interval=False),
            "accuracy": f"{r['accuracy']:.1%}",
            "best epoch": f"{r['best_epoch']:.1f}",
        }
        for r in rows
    ]
    empty = dict.fromkeys(found[0], "-")
    all_lost = {r["model"]: r for r in diverged if r["model"] not in {row["model"] for row in rows}}
    found += [
        {
            **empty,
            "model": TITLES[name],
            "learning rate": f"{r['learning_rate']:g}",
            "val PPL (95%)": "diverged",
        }
        for name, r in all_lost.items()
    ]
    found += [
        {
            **empty,
            "model": b["name"],
            "val PPL (95%)": str(Perplexity(b["val_ppl"], None, None)),
            "without <unk>": str(Perplexity(b["val_ppl_without_unk"], None, None)),
        }
        for b in baselines
    ]
    reported = {
        "model": "New-LLM, reported by the original (WikiText-2, its windows)",
        "parameters (active)": f"{REPORTED_PARAMETERS:,}",
        "learning rate": "0.0001",
        "val PPL (95%)": f"{REPORTED_PPL}",
        "accuracy": f"about {REPORTED_ACCURACY:.0%}",
        "best epoch": "27, interrupted",
    }
    return [*found, {**empty, **reported}]


def readable_contexts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation perplexity by context length for people: the same targets in every column of a row."""
    lengths = [key.removeprefix("val_ppl_context_") for key in rows[0] if key.startswith("val_ppl_context_")]
    return [
        {"model": TITLES[r["model"]]}
        | {
            n: _perplexity(r, f"val_ppl_context_{n}", interval=False, missing=_why_missing(r, int(n)))
            for n in lengths
        }
        for r in rows
    ]


def _why_missing(row: Mapping[str, Any], length: int) -> str:
    # A summary that an earlier version wrote has no n_seq, and only windows that did not fit lacked a value in practice.
    longest = row.get("n_seq", 1) or math.inf
    return "not possible" if length > longest else "text too short"


def readable_cost(
    rows: Sequence[dict[str, Any]], measured: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Speed, memory, state and generation for people; ratios are to the first model, measured in turns."""
    found = []
    for r in rows:
        cost = measured[r["model"]]
        speed = cost["tokens_per_second"]
        ratio = speed / measured[rows[0]["model"]]["tokens_per_second"]
        memory = cost["training_bytes"]
        row = {
            "model": TITLES[r["model"]],
            "training tokens/s (ratio)": f"{speed:,.0f} (x{ratio:.2f})",
            "training memory": "not measured here" if memory is None else f"{memory / 1e6:.0f} MB",
        }
        for entry in cost["generation"]:
            where = f"{entry['position']:,}"
            ends = entry["reason"] and f"not possible: {entry['reason']}"
            row[f"state at {where}"] = ends or _bytes(entry["state_bytes"])
            longest = r.get("n_seq") or math.inf
            beyond = entry["position"] + entry["tokens"] > longest
            note = " (positions never trained)" if beyond else ""
            row[f"{entry['tokens']:,} tokens from {where}"] = ends or _seconds(entry["seconds"]) + note
        found.append(row)
    return found


def readable_search(results: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The learning-rate search: one row per model, one column per rate, the chosen one marked."""
    if not results:
        return [
            {"model": TITLES[r["model"]], f"rate {r['learning_rate']:g}": "taken, no search"} for r in table
        ]
    rates = sorted({r["learning_rate"] for r in results})
    rows = []
    for name in dict.fromkeys(r["model"] for r in results):
        tried = {r["learning_rate"]: r["val_ppl"] for r in results if r["model"] == name}
        best = min((v for v in tried.values() if v is not None), default=None)
        words = {rate: "diverged" if v is None else str(Perplexity(v, None, None)) for rate, v in tried.items()}
        rows.append(
            {"model": TITLES[name]}
            | {f"rate {rate:g}": words[rate] + (" (taken)" if tried[rate] == best else "") for rate in rates}
        )
    return rows


def claims_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the original announced for its models beside what was measured here."""
    found = {r["model"]: r for r in rows}
    advanced, newllm = found.get("newllm_advanced"), found.get("newllm")
    not_run = "not run: choose model newllm_advanced"
    claims = []
    if newllm is not None:
        claims.append(
            ("validation PPL of the baseline", f"{REPORTED_PPL} (reported)", _perplexity(newllm, "val_ppl"))
        )
    claims.append(
        (
            "validation PPL of the advanced model",
            f"below 20 (announced); {REPORTED_ADVANCED} (reported later)",
            _perplexity(advanced, "val_ppl") if advanced else not_run,
        )
    )
    minutes = advanced and advanced["seconds_per_epoch"] / 60
    claims.append(
        (
            "minutes per epoch of the advanced model",
            "0.6 (announced, on a GPU)",
            f"{minutes:.2f} on this machine and text" if advanced else not_run,
        )
    )
    claims.append(
        (
            "speed against the baseline's hour per epoch",
            "100x (announced: a GPU against a CPU, another batch size)",
            f"x{REPORTED_MINUTES_PER_EPOCH / minutes:.1f}, this machine and text against the original's CPU and text"
            if advanced
            else not_run,
        )
    )
    return [{"claim": c, "original": o, "measured here": m} for c, o, m in claims]


def paired_ratios(runs: Runs) -> dict[str, Perplexity]:
    """Per model other than the best: its validation PPL over the best model's on the same seeds, mean and 95% interval.

    Seeds are those that every model has finished; with none there is no ratio.
    """
    groups, best = by_model(runs), best_model(runs)
    scores = {name: {r["seed"]: r["val_ppl"] for r in group} for name, group in groups.items()}
    seeds = _common_seeds(groups)
    return {
        name: Perplexity.ratio_over_seeds([of_seed[s] for s in seeds], [scores[best][s] for s in seeds])
        for name, of_seed in scores.items()
        if name != best and seeds
    }


def _common_seeds(groups: Mapping[str, Runs]) -> list[int]:
    return sorted(set.intersection(*({r["seed"] for r in group} for group in groups.values())))


def describe_diverged(diverged: Runs) -> str:
    """One sentence, "" when there is nothing to say."""
    if not diverged:
        return ""
    words = [f"{TITLES[r['model']]}, seed {r['seed']} (learning rate {r['learning_rate']:g})" for r in diverged]
    return f" Diverged, and in none of these numbers: {'; '.join(words)}."


def best_model(runs: Runs) -> str:
    """The model of the lowest mean validation perplexity."""
    groups = by_model(runs)
    return min(groups, key=lambda name: over_seeds(groups[name], "val_ppl").mean)


def state_finding(runs: Runs) -> str:
    """One sentence: the best model, and which others differ from it beyond the paired 95% interval over seeds."""
    seeds = len(_common_seeds(by_model(runs)))
    return verdict.state_finding(_best_in_words(runs), _named_ratios(runs), seeds)


def headline(runs: Runs) -> str:
    """The finding in a figure's title: the best model and how many others are worse beyond the interval."""
    return verdict.headline(_best_in_words(runs), _named_ratios(runs), "other")


def _best_in_words(runs: Runs) -> str:
    best = best_model(runs)
    return f"Lowest validation PPL: {TITLES[best]}, {over_seeds(by_model(runs)[best], 'val_ppl')}"


def _named_ratios(runs: Runs) -> dict[str, Perplexity]:
    return {TITLES[name]: ratio for name, ratio in paired_ratios(runs).items()}


def _perplexity(row: Mapping[str, Any], key: str, interval: bool = True, missing: str = "-") -> str:
    if row[key] is None:
        return missing
    ends = (row[f"{key}_low"], row[f"{key}_high"]) if interval else (None, None)
    return str(Perplexity(row[key], *ends))


def _parameters(row: Mapping[str, Any]) -> str:
    total, active = row["parameters"], row["active_parameters"]
    return f"{total:,}" if total == active else f"{total:,} ({active:,})"


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.3g} kB" if count < 999_500 else f"{count / 1e6:,.2f} MB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"
