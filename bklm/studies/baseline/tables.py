"""The baseline study's numbers: one row per model over its seeds, beside what the original reported and announced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean, same, score_in_words
from bklm.harness.statistics import Perplexity, interval95
from bklm.studies.baseline.models import CONTEXT_LENGTHS, TITLES
from bklm.training.context_gain import BIGRAM_GAIN, gain_in_words

Rows = Sequence[Mapping[str, Any]]

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
GOAL = 0.90  # of GPT's test perplexity
REPORTED_ADVANCED = "36 to 41"  # validation PPL of the advanced model, in the original's later GPU runs
ORIGINAL_CLAIMS = ("validation PPL of the baseline", "validation PPL of the advanced model")
# Of others, on the same text with its whole vocabulary of 33,278 words, ends of lines among them, which are none here:
# context, and no rivals of equal size or search.
PUBLISHED = [
    {"published": name, "parameters": size, "val PPL": valid, "test PPL": test, "source": f"arXiv:{source}"}
    for name, size, valid, test, source in (
        ("AWD-LSTM (Merity et al. 2017)", "33 M", "68.6", "65.8", "1708.02182"),
        ("AWD-LSTM with fraternal dropout (Zolna et al. 2018)", "34 M", "66.8", "64.1", "1711.00066"),
        ("AWD-LSTM, mixture of softmaxes (Yang et al. 2018)", "35 M", "63.9", "61.5", "1711.03953"),
        ("AWD-LSTM, direct output connection (Takase et al. 2018)", "37 M", "60.3", "58.0", "1808.10143"),
    )
]


def _scored(key: str, title: str) -> list[Column]:
    """A further perplexity, and the ends of its interval for files; None where a run has none."""

    def part(group: Sequence[Trial], end: str) -> float | None:
        values = [trial[key] for trial in group]
        return None if None in values else getattr(Perplexity.over_seeds(values), end)

    ends = [Column(f"{key}_{end}", partial(part, end=end)) for end in ("low", "high")]
    return [Column(key, geometric_mean(key), title, partial(_perplexity, key=key)), *ends]


def _by_context(group: Sequence[Trial], length: int) -> float | None:
    # An earlier version scored fewer lengths.
    return geometric_mean("found")([{"found": t["val_ppl_by_context"].get(str(length))} for t in group])


def _mixer_off(group: Sequence[Trial]) -> float | None:
    return geometric_mean("off")([{"off": trial.get("val_ppl_mixer_off")} for trial in group])


def _perplexity(row: Mapping[str, Any], key: str, missing: str = "-") -> str:
    return missing if row[key] is None else str(Perplexity(row[key], None, None))


def _epoch(row: Mapping[str, Any]) -> str:
    """ "2", or "2.33" where the seeds' best epochs differ."""
    return "-" if row["best_epoch"] is None else f"{row['best_epoch']:.3g}"


def _parameters(row: Mapping[str, Any]) -> str:
    total, active = row["parameters"], row["active_parameters"]
    if total is None:
        return "-"
    return f"{total:,}" if total == active else f"{total:,} ({active:,})"


MODELS = Comparison(
    by="model",
    title=TITLES.__getitem__,
    short=TITLES.__getitem__,
    lowest="Lowest validation PPL: {}, {}",
    columns=(
        Column("parameters", same("parameters"), "parameters (active)", _parameters),
        Column("active_parameters", same("active_parameters")),
        # Positions; None: any number.
        Column("n_seq", lambda group: group[0]["model_config"].get("n_seq")),
        Column("learning_rate", same("learning_rate"), "learning rate"),
        Column("dropout", lambda group: group[0]["model_config"].get("dropout_p"), "dropout", "g"),
        Column("steps", same("steps")),
        *_scored("val_ppl_without_unk", "without <unk>"),
        *_scored("test_ppl", "test PPL"),
        Column("accuracy", "val_accuracy", "accuracy", ".1%"),
        Column("best_epoch", "best_epoch", "best epoch", _epoch),
        Column("val_ppl_mixer_off", _mixer_off),
        Column(
            "context_gain",
            "context_gain",
            "gain from context",
            lambda row: gain_in_words(row["context_gain"]),
        ),
        *(
            Column(f"val_ppl_context_{length}", partial(_by_context, length=length))
            for length in CONTEXT_LENGTHS
        ),
        Column(
            "seconds_per_epoch", lambda group: interval95([e["seconds"] for t in group for e in t["epochs"]])[0]
        ),
    ),
)


def model_table(trials: Sequence[Trial], measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, plain numbers: the comparison's, and what the model costs."""
    # A model that diverged with all seeds did so with a rate, too.
    rates = {trial["model"]: trial["learning_rate"] for trial in trials}
    rows = []
    for row in MODELS.rows(trials):
        cost = measured.get(row["model"], {})
        row |= {name: cost.get(name) for name in ("tokens_per_second", "training_bytes")}
        for entry in cost.get("generation", ()):
            row[f"state_bytes_{entry['position']}"] = entry["state_bytes"]
            row[f"generate_seconds_{entry['position']}"] = entry["seconds"]
        rows.append(row | {"learning_rate": rates[row["model"]]})
    return rows


def search_rows(searched: Sequence[Trial], steps: int) -> list[dict[str, Any]]:
    """The search of the learning rate, one row per trial of so many steps, and that of dropout, of whole trainings; the
    perplexity is None where it diverged."""
    keys = ("model", "learning_rate", "dropout", "val_ppl")
    # Of a whole training that diverged nobody knows the steps.
    return [
        {**{k: t[k] for k in keys if k in t}, "steps": t.get("steps", None if "dropout" in t else steps)}
        for t in searched
    ]


def readable_quality(rows: Rows, baselines: Rows, is_wikitext2: bool = True) -> list[dict[str, Any]]:
    """Perplexities and accuracy for people, the n-gram baselines below; on WikiText-2 the original's report, too."""
    found = MODELS.readable(rows)
    empty = dict.fromkeys(found[0], "-")
    titles = {"val_ppl": "val PPL (95%)", "val_ppl_without_unk": "without <unk>", "test_ppl": "test PPL"}
    for row in baselines:
        words = {title: _perplexity(row, key) for key, title in titles.items() if row.get(key) is not None}
        found.append({**empty, "model": row["name"], **words})
    if not is_wikitext2:
        return found
    reported = {
        "model": "New-LLM, reported by the original (WikiText-2, its windows)",
        "parameters (active)": f"{REPORTED_PARAMETERS:,}",
        "learning rate": "0.0001",
        "val PPL (95%)": f"{REPORTED_PPL}",
        "accuracy": f"about {REPORTED_ACCURACY:.0%}",
        "best epoch": "27, interrupted",
    }
    return [*found, {**empty, **reported}]


def bigram_models(rows: Rows) -> str:
    """A sentence that names the models that do not need their context, or ""."""
    found = [r for r in rows if r.get("context_gain") is not None and r["context_gain"] < BIGRAM_GAIN]
    names = ", ".join(f"{TITLES[r['model']]} ({r['context_gain']:.2%})" for r in found)
    return names and f" As good without its context, so a bigram model: {names}."


def readable_contexts(rows: Rows) -> list[dict[str, Any]]:
    """Validation perplexity without the mixer and by context length for people: the same targets in every numbered column."""
    name = "val_ppl_context_{}".format
    return [
        {"model": TITLES[r["model"]]}
        | (
            {"mixer off": _perplexity(r, "val_ppl_mixer_off", "not measured")}
            if "val_ppl_mixer_off" in r
            else {}
        )
        | {str(n): _perplexity(r, name(n), _why_missing(r, n)) for n in CONTEXT_LENGTHS if name(n) in r}
        for r in rows
        if r["seeds"]
    ]


def _why_missing(row: Mapping[str, Any], length: int) -> str:
    # A summary that an earlier version wrote has no n_seq, and only windows that did not fit lacked a value in practice.
    longest = row.get("n_seq", 1) or math.inf
    return "not possible" if length > longest else "text too short"


def readable_cost(rows: Rows, measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Speed, memory, state and generation for people; ratios are to the first model, measured in turns."""
    found, rows = [], [r for r in rows if r["seeds"] and r["model"] in measured]
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


def readable_search(results: Rows, table: Rows) -> list[dict[str, Any]]:
    """The search: one row per model, one column per rate and per dropout, the chosen ones marked."""
    rows = []
    for entry in table:
        row, of_model = {"model": TITLES[entry["model"]]}, [r for r in results if r["model"] == entry["model"]]
        rates = {r["learning_rate"]: r["val_ppl"] for r in of_model if "dropout" not in r}
        dropouts = {r["dropout"]: r["val_ppl"] for r in of_model if "dropout" in r}
        if not rates:
            row[f"rate {entry['learning_rate']:g}"] = "taken, no search"
        for name, tried in (("rate", rates), ("dropout", dropouts)):
            best = min((v for v in tried.values() if v is not None), default=None)
            for value, found in sorted(tried.items()):
                edge = ", at the edge" if len(tried) > 1 and value in (min(tried), max(tried)) else ""
                taken = f" (taken{edge})" if best is not None and found == best else ""
                row[f"{name} {value:g}"] = _perplexity({"ppl": found}, "ppl", "diverged") + taken
        rows.append(row)
    return rows


def claims_table(rows: Rows) -> list[dict[str, Any]]:
    """What the original announced for its models beside what was measured here."""
    found = {r["model"]: r for r in rows}
    newllm, advanced = found.get("newllm"), found.get("newllm_advanced")
    claims = []
    if newllm is not None:
        claims.append((ORIGINAL_CLAIMS[0], f"{REPORTED_PPL} (reported)", score_in_words(newllm)))
    if advanced is None:
        perplexity = minutes = speed = "not run: choose model newllm_advanced"
    elif not advanced["seeds"]:
        perplexity = minutes = speed = score_in_words(advanced)
    else:
        per_epoch = advanced["seconds_per_epoch"] / 60
        perplexity, minutes = score_in_words(advanced), f"{per_epoch:.2f} on this machine and text"
        speed = f"x{REPORTED_MINUTES_PER_EPOCH / per_epoch:.1f}, this machine and text against the original's CPU and text"
    announced = f"below 20 (announced); {REPORTED_ADVANCED} (reported later)"
    against = "100x (announced: a GPU against a CPU, another batch size)"
    claims += [
        (ORIGINAL_CLAIMS[1], announced, perplexity),
        ("minutes per epoch of the advanced model", "0.6 (announced, on a GPU)", minutes),
        ("speed against the baseline's hour per epoch", against, speed),
    ]
    return [{"claim": c, "original": o, "measured here": m} for c, o, m in claims]


def is_beside_the_original(claims: Rows) -> bool:
    """Whether claims hold those of the original, which are of WikiText-2."""
    return any(row["claim"] in ORIGINAL_CLAIMS for row in claims)


def rival_claims(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each rival's test perplexity over ResNetBK's of the same seeds, judged for all of them at once; [] without either, or
    without a test split. On validation text, whose ratio stands beside it, rates, dropouts and epochs were chosen, of
    ResNetBK its defaults as well.
    """
    scored = [t for t in trials if t["val_ppl"] is not None and t.get("test_ppl") is not None]
    test, own = dataclasses.replace(MODELS, score="test_ppl"), "resnet_bk"
    rivals = [name for name in test.groups(scored) if name != own]
    lost, rows = {t["model"] for t in trials if t["val_ppl"] is None}, []
    for name in rivals if len(rivals) < len(test.groups(scored)) else []:
        ratio = None if lost & {name, own} else test.ratio(scored, name, own, any_of=len(rivals))
        found = "no verdict"
        if ratio is not None and ratio.is_judged:
            found = "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "no difference"
        announced = "590 against 1288 (validation, of a model that saw the future)" if name == "gpt" else "-"
        measured = f"{TITLES[name]}'s over its own x{ratio or ' (not of the same seeds)'}: {found}"
        if ratio is not None:
            measured += f"; on validation x{MODELS.ratio(scored, name, own, any_of=len(rivals))}"
        rows.append((f"{TITLES[own]} better than {TITLES[name]}, test PPL", announced, measured))
        if name == "gpt" and ratio is not None and ratio.is_judged:
            reached = (
                "reached" if ratio.low >= 1 / GOAL else "not reached" if ratio.high < 1 / GOAL else "not shown"
            )
            needed = f"{reached}: GPT's over its own x{ratio}, at least x{1 / GOAL:.3f} is needed"
            rows.append((f"goal: {TITLES[own]}'s test PPL at most {GOAL:.2f} of GPT's", "-", needed))
    return [{"claim": c, "original": o, "measured here": m} for c, o, m in rows]


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.3g} kB" if count < 999_500 else f"{count / 1e6:,.2f} MB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"
