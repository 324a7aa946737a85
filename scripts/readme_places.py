"""What the places of a study's page.md can name: each a function of a run, or of a study with its runs (`readme.py`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pandas as pd

from bklm.harness.arms import NOT_SHOWN, readable_verdicts
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.studies.baseline import tables
from bklm.studies.baseline.models import TITLES
from bklm.studies.compression import tables as compression
from bklm.studies.compression import timed as compression_timed
from bklm.studies.dialogue import tables as dialogue
from bklm.studies.embedding_freeze.config import INEQUALITY
from bklm.studies.embedding_freeze.tables import REPORTED
from bklm.studies.grad_blend.tables import rates_in_words
from bklm.studies.integration import tables as integration
from bklm.studies.koopman import tables as koopman
from bklm.studies.physics import tables as physics_tables
from bklm.studies.physics.energies import readable_energies
from bklm.studies.precision.claims import readable_claims
from bklm.studies.precision.tables import readable_summary
from bklm.training.context_gain import gain_in_words

# Of GRAD_BLEND's original code on the same text, 3 epochs, batch 32, learning rate 1e-3, while it saw the future: from a
# run of it outside this repository, of which nothing but these three numbers is kept.
ORIGINAL_CODE = {0.0: 361.8, 0.5: 374.9, 1.0: 378.5}
# Training windows an epoch, reported by NewLLM's original.
ORIGINAL_WINDOWS = 51_026
# Findings of the embedding-freeze study on the original's side claims hold one of these.
SIDE = (
    "Phase 1:", "Tokens per", "beat Kneser-Ney", "Context lowers", "trials ended at", "profit from", "A trained embedding",
    "The original's unequal",
)  # fmt: skip
FEW = 3  # claims that are named; more stand in their study's own table
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Row = dict[str, Any]


def ppl(row: Row, key: str = "val_ppl") -> str:
    """A row's perplexity with its interval; "diverged" where every seed did."""
    if row[key] is None:
        return "diverged"
    low = row.get(f"{key}_low")
    # No perplexity lies below 1, whatever the interval of few seeds says.
    return str(Perplexity(row[key], max(1.0, low) if low and key != "ratio" else low, row.get(f"{key}_high")))


def list_scores(rows: list[Row]) -> str:
    """ "NewLLM 38.4, GPT 27.5": perplexities of models or, by their names, of n-gram models."""
    return ", ".join(
        f"{row.get('name') or TITLES[row['model']]} {Perplexity(row['val_ppl'], None, None)}" for row in rows
    )


def exact_directions(run: Any) -> dict[str, dict[str, str]]:
    """Cosine and length of each direction against the exact gradient at the end, over the seeds (mean, 95% interval)."""
    rows = [r for r in run.rows("gradient_directions.csv") if r["weights"] == "at the end"]
    return {
        r["direction"]: {
            "cosine": "{cosine:+.2f} ({cosine_low:+.2f} to {cosine_high:+.2f})".format(**r),
            "ratio": "{norm_ratio:.0f} ({norm_ratio_low:.0f} to {norm_ratio_high:.0f})".format(**r),
        }
        for r in rows
    }


def versus_counting(run: Any) -> str:
    """Whether the best corrected model beats the best count model of the same tokens, in one sentence."""
    finished = [row for row in run.by_alpha.values() if row["val_ppl"] is not None]
    best, count = min(finished, key=lambda row: row["val_ppl"]), run.count_model
    words = "cannot be told from"
    if best["val_ppl_high"] < count["val_ppl"]:
        words = "beats"
    elif best["val_ppl_low"] > count["val_ppl"]:
        words = "does not beat"
    return f"The best corrected model, {ppl(best)}, {words} {count['name']} ({count['val_ppl']:.1f})."


def claims_table(run: Any) -> list[Row]:
    """Announced, measured, verdict."""
    return run.summary["claims"]


def held(run: Any) -> str:
    """How many of a run's claims hold, and which, where they are few."""
    rows = claims_table(run)
    names = [c["announced"] for c in rows if c["verdict"] == "holds"]
    told = f"{len(names)} of {len(rows)} claims hold"
    if 0 < len(names) <= FEW:
        told += f": {'; '.join(names)}"
    for said, words in ((NOT_SHOWN, "not shown"), ("no verdict", "without a verdict")):
        if count := sum(c["verdict"] == said for c in rows):
            told += f"; {count} {words}"
    return told + " (a small run)" * (run.config["profile"] != "full")


def verdict(run: Any) -> str:
    """One verdict on all claims of a run."""
    found = {c["verdict"] for c in claims_table(run)}
    return found.pop() if len(found) == 1 else "in part" if "holds" in found else "none is shown to hold"


def float_models(run: Any) -> str:
    """Each whole model of the compression study: perplexity, what context is worth to it, and the count models above it."""
    told, counted = [], run.summary["counted"]
    for row in (r for r in run.summary["table"] if r["arm"] == r["family"]):
        better = [c["arm"] for c in counted if c["val_ppl"] < row["val_ppl"]]
        words = f"{row['arm']} {ppl(row)}, to which context is worth {gain_in_words(row['context_gain'])}"
        told.append(f"{words}, and {len(better) or 'none'} of {len(counted)} count models have a lower one")
    return "; ".join(told)


def first_seed(run: Any) -> str:
    """The float models' perplexity of the first seed, which alone torchao's products were scored on."""
    epochs = pd.DataFrame(run.rows("epochs.csv"))
    first = epochs[(epochs.run == "sweep") & (epochs.seed == epochs.seed.min())]
    families = dict.fromkeys(r["family"] for r in run.summary["speed"])
    return ", ".join(f"{f} {first[first.arm == f].val_perplexity.min():.2f}" for f in families)


# Places of a run with claims.
OF_CLAIMS = {
    "claims_table": claims_table,
    "held": held,
    "verdict": verdict,
    # What is measured of the claims, by the claim.
    "found": lambda run: {c["announced"]: c["measured"] for c in run.summary["claims"]},
}


def physics_table(name: str) -> Callable[[Any], list[dict[str, Any]]]:
    """A part of the physics study for people."""
    made = readable_energies if name == "energies" else getattr(physics_tables, f"readable_{name}")
    return lambda run: made(run.summary["parts"][name])


def alpha_lines(study: Any) -> str:
    """Each alpha: corrected, as published, the original code, what was reported."""
    lines, theirs = [], study.runs["original"].by_alpha
    for alpha, row in study.first.by_alpha.items():
        ours = [ppl(row), ppl(theirs[alpha]) if alpha in theirs else "-"]
        reported = "-" if row.get("original_val_ppl") is None else f"{row['original_val_ppl']:.2f}"
        lines.append(" | ".join([f"{alpha:g}", *ours, f"{ORIGINAL_CODE.get(alpha, '-')}", reported]))
    return "\n".join(f"| {line} |" for line in lines)


def revision(run: Any) -> str:
    commit, _, changes = run.manifest["git_revision"].partition("+")
    return f"{commit[:12]}{' with changes that were committed later' if changes else ''}"


def speeds(run: Any) -> dict[str, Row]:
    """Every claimed speed-up in the words of the first table in docs/findings.md."""
    found = {}
    for name, group in groupby((r for r in run.rows("claims.csv") if r["short"]), key=lambda row: row["claim"]):
        rows = list(group)
        ends = dict.fromkeys(f"{rows[0][key]:g}" for key in ("claimed_low", "claimed_high"))
        measured = ", ".join(f"{row['measured']:.3g}x ({row['short']})" for row in rows)
        verdict = " or ".join(dict.fromkeys(row["verdict"] for row in rows))
        found[name] = {"claimed": f"{' to '.join(ends)}x", "measured": measured, "verdict": verdict}
    return found


def quality(run: Any) -> list[Row]:
    titles = (
        "model", "parameters (active)", "learning rate", "dropout", "val PPL (95%)", "without <unk>", "test PPL", "accuracy",
        "gain from context",
    )  # fmt: skip
    rows = tables.readable_quality(run.summary["table"], run.summary["baselines"])[:-1]
    return [{title.replace("<unk>", "`<unk>`"): row[title] for title in titles if title in row} for row in rows]


def below_counting(run: Any) -> str:
    """Which models beat every count model of the same tokens, by their intervals' upper ends, with <unk> and without."""
    best, keys = run.count_model, ("val_ppl", "val_ppl_without_unk")
    bounds = {key: min(row[key] for row in run.summary["baselines"]) for key in keys}
    below = [
        TITLES[r["model"]]
        for r in run.summary["table"]
        if all((r.get(f"{key}_high") or r[key]) < bounds[key] for key in keys)
    ]
    who, verb = ", ".join(below) or "No model", "are" if len(below) > 1 else "is"
    return (
        f"{who} {verb} below every count model of the same tokens (the best, {best['name']}: {best['val_ppl']:.1f}; without "
        f"`<unk>` {bounds['val_ppl_without_unk']:.1f}), by the intervals' upper ends."
    )


def batch_of(run: Any) -> tuple[int, int]:
    """Sequences of a batch and their length, of a run whose manifest may not be kept."""
    return tuple(map(int, re.search(r"batch (\d+) x (\d+)", run.summary["note"]).groups()))


def rank_of_newllm(run: Any) -> str:
    """Its place among the models by mean validation perplexity, and whose intervals overlap its own."""
    rows = sorted((r for r in run.summary["table"] if r["val_ppl"]), key=lambda row: row["val_ppl"])
    own = next(row for row in rows if row["model"] == "newllm")
    place, count = rows.index(own) + 1, len(rows)
    told = f"last of the {NUMBERS[count]}" if place == count else f"place {place} of {count}"
    level = [
        TITLES[row["model"]]
        for row in rows
        if row is not own
        and (own["val_ppl_low"] or own["val_ppl"]) <= (row["val_ppl_high"] or row["val_ppl"])
        and (row["val_ppl_low"] or row["val_ppl"]) <= (own["val_ppl_high"] or own["val_ppl"])
    ]
    return f"{told} by the mean, its interval overlaps that of {', '.join(level)}" if level else told


def rates_at_an_edge(run: Any) -> str:
    """Whose learning rate is the least or the largest that was tried: a better one may lie beyond."""
    tried, chosen = run.config["learning_rates"], {r["model"]: r["learning_rate"] for r in run.summary["table"]}
    found = [f"{TITLES[m]}'s {rate:g}" for m, rate in chosen.items() if rate in (min(tried), max(tried))]
    return f"{' and '.join(found)} at an edge of the list" if found else "none at an edge of the list"


def arms_at_an_edge(run: Any) -> str:
    return integration.rates_in_words(run.summary["table"], run.config["learning_rates"])


# A variant's name and perplexity in what the search of GPT's choices printed.
GPT_ROW = re.compile(r"^  (\S.*?)  +[\d,]+ +([\d.]+) \(epoch \d+\)$", re.MULTILINE)


def gain_of_context(run: Any) -> str:
    """What longer windows bring over windows of 16, at best."""
    found = {}
    for row in run.summary["table"]:
        values = {
            int(k.rpartition("_")[2]): v
            for k, v in row.items()
            if k.startswith("val_ppl_context_") and v is not None
        }
        longer = [v for length, v in values.items() if length >= 16]
        found[TITLES[row["model"]]] = 1 - min(longer) / values[16]
    name = max(found, key=found.get)
    return f"The most that more than 16 words of context bring is {found[name]:.1%}, to {name}."


def in_their_epochs(study: Any) -> dict[str, Any]:
    """The steps as published in epochs of the original's text, and what it reported before and after them."""
    run, reported = study.runs["original"], tables.REPORTED_EPOCHS
    count = run.row["steps"] / math.ceil(ORIGINAL_WINDOWS / batch_of(run)[0])
    before = [epoch for epoch in reported if epoch["epoch"] <= count][-1]
    return {"count": count, "before": before, "after": reported[reported.index(before) + 1]}


def size_in_words(run: Any) -> str:
    """That a run was a small one, and how small; nothing for a run of the original's size."""
    if run.config["profile"] == "full":
        return ""
    used = run.config.get("max_train_tokens")
    return f"**A small run**, profile {run.config['profile']}" + (
        f", on the first {used:,} training tokens." if used else "."
    )


def sizes_in_words(run: Any) -> str:
    tokens = run.summary["tokens"]
    return " and ".join(f"{n} documents, {tokens[f'{n} samples']:,} tokens" for n in run.config["samples"])


def arms_table(study: Any) -> list[Row]:
    """One row per arm: PPL on every text and size, and what the first text's larger sample gives beside it."""
    largest = max(study.first.sizes)
    beside, rows = f"(PEPs, {largest})", []
    for own in (row for (_, samples), row in study.first.arms.items() if samples == largest):
        row = {"arm": own["arm"]}
        for run in study.runs.values():
            row |= {f"{run.name}, {n}": ppl(run.arms[own["arm"], n]) for n in run.sizes}
            last = run.arms[own["arm"], max(run.sizes)]
            if last["val_ppl_without_unk"] != last["val_ppl"]:
                unk = str(Perplexity(last["val_ppl_without_unk"], None, None))
                row[f"{run.name}, {max(run.sizes)}, without `<unk>`"] = unk
        accuracy = with_interval(100 * own["accuracy"], own["accuracy_95"] and 100 * own["accuracy_95"])
        row |= {
            f"accuracy % {beside}": accuracy,
            f"context gain {beside}": f"{own['context_gain']:.1%}",
            f"val - train, nats {beside}": with_interval(own["gap"], own["gap_95"], 2),
            f"best epoch {beside}": with_interval(own["best_epoch"], own["best_epoch_95"]),
            f"seconds {beside}": with_interval(own["seconds"], own["seconds_95"], 0),
            "trained / all parameters": f"{own['trainable_parameters']:,} / {own['parameters']:,}",
            f"tokens per trained {beside}": f"{own['tokens_per_parameter']:.2g}",
        }
        rows.append(row)
    return rows


# "untrained context block (pretrained, frozen, tied, 80 samples)": what stands in for phase 1, of which arm, in which sample.
STAND_IN = re.compile(r"(.*) \((.*), (\d+) samples\)")


def effects(study: Any) -> list[Row]:
    """Every factor's effect over all cells and within the other factors' values, one column a text."""
    rows: dict[tuple[str, str], Row] = {}
    for run in study.runs.values():
        own = (r for r in run.rows("effects.csv") if not STAND_IN.match(r["change"]))
        for row in (r for r in own if "samples" not in r["where"]):
            place = {"change": row["change"], "where": row["where"]}
            rows.setdefault(tuple(place.values()), place)[run.name] = f"x{ppl(row, 'ratio')}: {row['verdict']}"
    return list(rows.values())


def stand_ins(study: Any) -> list[Row]:
    """What stands in for phase 1, over the same arm with it: a row each, one column a text and sample size."""
    rows: dict[str, Row] = {}
    for run in study.runs.values():
        for row in run.rows("effects.csv"):
            if found := STAND_IN.match(row["change"]):
                what, arm, samples = found.groups()
                made = rows.setdefault(f"{what}: {arm}", {"in place of phase 1": what, "arm": arm})
                made[f"{run.name}, {samples}"] = f"x{ppl(row, 'ratio')}: {row['verdict']}"
    return list(rows.values())


def untrained(study: Any) -> str:
    """The ratios of a context block as it was drawn, least and most over arms, texts and sample sizes."""
    found = [
        row["ratio"]
        for run in study.runs.values()
        for row in run.rows("effects.csv")
        if row["change"].startswith("untrained")
    ]
    return f"x{min(found):.3f} to x{max(found):.3f} of its PPL in {len(found)} comparisons"


def phase1_holds(study: Any) -> str:
    """One verdict on phase 1 for all texts."""
    known = {"phase 1 helps": "holds", "no verdict on phase 1": "no verdict"}
    found = {known.get(run.phase1_verdict.split(",")[0], "does not hold") for run in study.runs.values()}
    return found.pop() if len(found) == 1 else "in part" if "holds" in found else "not shown"


def phase1_verdict(run: Any) -> str:
    """ "phase 1 does not help, no verdict on its fixed point"."""
    said = next(s for s in run.summary["findings"] if "in place of phase 1" in s)
    return said.partition("; with phase 1")[0].rpartition(": ")[2]


def count_models_by_size(study: Any) -> str:
    parts = []
    for run in study.runs.values():
        for size in run.sizes:
            own = [row for row in run.summary["baselines"] if row["samples"] == size]
            parts.append(f"{run.name}, {size}: {list_scores(own)}")
    return "; ".join(parts)


def by_pretrained_table(study: Any) -> dict[str, str]:
    """What freezing does with each pretrained table: "+217% with an SVD's table" and the like, and the verdict on it."""
    found = {}
    for row in study.benchmark("freeze_lm_embedding"):
        if measured := row["frozen instead of trained, paired"]:  # "x0.959 (0.933 to 0.986): lower"
            change = float(measured.split()[0].lstrip("x")) - 1
            found[f"{change:+.0%} with {row['pretrained embedding']} table"] = measured.rsplit(": ", 1)[1]
    same = len(set(found.values())) == 1
    return {
        "changes": ", ".join(found),
        "verdict": next(iter(found.values())) if same else "it depends",
        "depends": "does not depend" if same else "depends",
        "with_verdicts": " and ".join(f"{change} ({verdict})" for change, verdict in found.items()),
    }


def side_claims(run: Any) -> str:
    said = run.summary["findings"]
    return "\n\n".join(next(s for s in said if words in s) for words in SIDE if any(words in s for s in said))


Places = dict[str, dict[str, Callable[[Any], Any]]]


def what_is_left(run: Any) -> str:
    """How the switches that stay do together."""
    found = OF_CLAIMS["found"](run).get("those that stay together help, at equal time")
    if found:
        return f"what is left (*integrated*) was trained, too: {found}"
    known = re.search(r"Those that stay are the arm ([^.]+)\.", run.finding)
    return f"what is left is the arm *{known[1]}*, no other" if known else "here nothing was left to train"


def width_in_words(run: Any, seeds: int) -> str:
    """How many standard deviations of paired differences the intervals of losses of all switches at once reach."""
    any_of = integration.at_once(run.summary["parts"]["verdicts"])
    # Of a standard deviation of one.
    standard = [math.sqrt((seeds - 1) / 2), -math.sqrt((seeds - 1) / 2), *[0.0] * (seeds - 2)]
    return f"{interval95(standard, any_of)[1]:.1f}"


def less_gradient(run: Any) -> str:
    """What the full set reaches without the exact gradient, and whether more seeds could tell more of it."""
    by = {row["arm"]: row for row in run.rows("costs.csv")}
    full, less = by["full"], by["less gradient"]
    told = f"The full set reaches the plain model's last loss with {full['reached']} of {full['seeds']} seeds, and without "
    told += f"the exact gradient with {less['reached']} of {less['seeds']}."
    row = next(r for r in run.summary["switches"] if r["switch"] == "gradient")
    open_ended = row["loss_low"] is not None and row["loss_low"] <= 0 <= row["loss_high"]
    return f"{told} More seeds could tell whether its removal costs loss." if open_ended else told


# Places of a run, by study, beside those that every run has (`readme.Run`).
OF_RUNS: Places = {
    "grad_blend": {
        "by_alpha": lambda run: {row["alpha"]: row for row in run.summary["table"]},
        # By names that a place can have: 0, "0.5", 1.
        "ppl": lambda run: {int(a) if a == int(a) else f"{a:g}": ppl(row) for a, row in run.by_alpha.items()},
        "best": lambda run: run.by_alpha[run.summary["best_alpha"]],
        "best_ppl": lambda run: ppl(run.best),
        "reported": lambda run: run.by_alpha[0.0]["original_val_ppl"],
        "above": lambda run: "above" if run.best["val_ppl"] > run.count_model["val_ppl"] else "below",
        "holds": lambda run: run.summary["claims"][0]["verdict"],
        "measured": lambda run: run.summary["claims"][0]["measured"],
        "versus": versus_counting,
        # The worst mean perplexity over that of alpha 0.
        "worst": lambda run: (
            f"{max(r['val_ppl'] for r in run.by_alpha.values()) / run.by_alpha[0.0]['val_ppl']:.2f}"
        ),
        "exact": exact_directions,
        "rates": lambda run: rates_in_words(run.config["learning_rates"], run.config["epochs_per_trial"]),
        "revision": revision,
    },
    "precision": {
        "machine": lambda run: run.hardware("{processor}, {cores} cores, torch {packages[torch]}, no GPU"),
        "speed": speeds,
        "claims_table": lambda run: readable_claims(run.rows("claims.csv")),
        "grid": lambda run: readable_summary(run.rows("grid.csv")),
    },
    "baseline": {
        "row": lambda run: run.summary["table"][0],
        "by_model": lambda run: {row["model"]: row for row in run.summary["table"]},
        "reads": lambda run: run.by_model["resnet_bk"],
        "vocabulary": lambda run: int(
            re.search(r"vocabulary ([\d,]+)", run.summary["note"])[1].replace(",", "")
        ),
        "edges": rates_at_an_edge,
        "epochs": lambda run: f"{run.config['epochs']} epoch{'s' if run.config['epochs'] > 1 else ''}",
        "last_epoch": lambda run: int(max(row["epoch"] for row in run.rows("epochs.csv"))),
        "quality": quality,
        "counting": below_counting,
        "gain": gain_of_context,
        "contexts": lambda run: tables.readable_contexts(run.summary["table"]),
        "searched": lambda run: run.summary["learning_rate_search"],
        "search": lambda run: tables.readable_search(run.searched, run.summary["table"]),
        "cost": lambda run: tables.readable_cost(run.summary["table"], run.summary["measured"]),
        "threads": lambda run: run.hardware("{torch_threads} thread{s} of an {processor}"),
        "worst_first": lambda run: list_scores(sorted(run.summary["table"], key=lambda row: -row["val_ppl"])),
        "rank": rank_of_newllm,
        "rivals": lambda run: [
            {"announced": r["claim"], "measured": r["measured here"]}
            for r in run.summary["claims"]
            if "test PPL" in r["claim"]
        ],
        "int8": lambda run: {row["weights"]: row for row in run.rows("int8.csv") if row["perplexity"]},
        # Changes of perplexity, the smallest first.
        "int8_changes": lambda run: sorted(
            row["perplexity_change"] for n, row in run.int8.items() if n != "float32"
        ),
        "int8_verdict": lambda run: ("does not hold", "only with float products", "holds")[
            sum(change <= 0.03 for change in run.int8_changes)
        ],
    },
    "embedding_freeze": {
        "name": lambda run: "PEPs" if run is run.study.first else "WikiText-2",
        "arms": lambda run: {(row["arm"], row["samples"]): row for row in run.rows("table.csv")},
        "sizes": lambda run: list(dict.fromkeys(samples for _, samples in run.arms)),
        "samples": sizes_in_words,
        "removed": lambda run: len(run.summary["near_duplicates"]["removed"]),
        "finding": lambda run: run.summary["findings"][0],
        "rates": lambda run: ", ".join(f"{rate:g}" for rate in run.config["learning_rates"]),
        "side_claims": side_claims,
        "phase1_verdict": phase1_verdict,
        "gains": lambda run: re.search(
            r"Context lowers the perplexity by ([^(]*) \(", "\n".join(run.summary["findings"])
        )[1],
    },
    "koopman": {
        **OF_CLAIMS,
        "shares": lambda run: run.summary["shares"],
        "verdicts": lambda run: readable_verdicts(run.rows("verdicts.csv")),
        "linearised": lambda run: koopman.readable_linearised(run.rows("linearised.csv")),
        "speed": lambda run: koopman.readable_speed(run.rows("linearised.csv")),
        "recall": lambda run: koopman.readable_recall(run.rows("recall.csv")),
        "spectrum": lambda run: koopman.readable_spectrum(run.rows("spectrum.csv")),
    },
    "physics": {
        **OF_CLAIMS,
        "verdicts": lambda run: readable_verdicts(run.summary["parts"]["verdicts"]),
        "block_verdicts": lambda run: readable_verdicts(run.summary["parts"]["block_verdicts"]),
        **{name: physics_table(name) for name in ("energies", "steps", "stability", "memory")},
    },
    "compression": {
        **OF_CLAIMS,
        "shares": lambda run: run.summary["shares"],
        "counting": lambda run: compression.counting_in_words(run.summary["table"], run.summary["counted"]),
        "reading": lambda run: compression.vacuous_in_words(
            run.summary["table"], run.summary["baselines"][0]["val_ppl"]
        ),
        "recommended": lambda run: compression.readable_recommended(run.summary["recommended"]),
        "verdicts": lambda run: readable_verdicts(run.summary["verdicts"]),
        "speed": lambda run: compression_timed.readable_speed(run.summary["speed"]),
        "float_models": float_models,
        "first_seed": first_seed,
    },
    "dialogue": {
        **OF_CLAIMS,
        "notes": lambda run: " ".join(run.summary["notes"]),
        "edges": arms_at_an_edge,
        "contexts": lambda run: dialogue.readable_contexts(run.rows("contexts.csv")),
        "facts": lambda run: dialogue.readable_facts(run.rows("facts.csv")),
        "helped": lambda run: (
            ", ".join(
                c["announced"].split(":")[0]
                for c in run.summary["claims"]
                if c["announced"].endswith(": pretraining helps dialogue") and c["verdict"] == "holds"
            )
            or "no model"
        ),
        "counting": lambda run: next(
            c["measured"] for c in run.summary["claims"] if c["announced"] == "the best model beats counting"
        ),
        "recalled": lambda run: "Facts recalled" + run.finding.rpartition("Facts recalled")[2].rstrip("."),
        "writing": lambda run: dialogue.readable_writing(run.rows("writing.csv")),
        "replies": lambda run: [r for r in run.rows("replies.csv") if r["arm"].endswith(" tuned")][:6],
    },
    "integration": {
        **OF_CLAIMS,
        "switches": lambda run: integration.readable_switches(
            run.summary["switches"], run.summary["parts"]["verdicts"]
        ),
        "interaction": lambda run: integration.interaction_in_words(run.summary["interaction"]),
        "edges": arms_at_an_edge,
        "shares": lambda run: integration.shares_in_words(run.summary["shares"]),
        "timed": lambda run: integration.ARMS.readable(run.summary["parts"]["timed"]),
        "costs": lambda run: integration.readable_costs(run.summary["parts"]["costs"]),
        "width": lambda run: width_in_words(run, len(run.config["seeds"])),
        "width_of_three": lambda run: width_in_words(run, 3),
        "realised": lambda run: "".join(run.finding.rpartition("Seconds of training at equal time")[1:]),
        "left": what_is_left,
        "less_gradient": less_gradient,
    },
}
# Places of a study, which need several runs or none.
OF_STUDIES: Places = {
    "grad_blend": {
        "alphas": alpha_lines,
        "router": lambda study: study.benchmark("moe_perplexity"),
    },
    "baseline": {
        "their": in_their_epochs,
        "reported_ppl": lambda study: tables.REPORTED_PPL,
        "gpt": lambda study: dict(GPT_ROW.findall(study.output("gpt_search"))),
    },
    "embedding_freeze": {
        "arms_table": arms_table,
        "effects": effects,
        "stand_ins": stand_ins,
        "untrained": untrained,
        "phase1_holds": phase1_holds,
        "main_effects": lambda study: [
            {k: v for k, v in row.items() if k != "where"} for row in effects(study) if row["where"] == "all"
        ],
        "count_models": count_models_by_size,
        "freezing": by_pretrained_table,
        "pretrained_tables": lambda study: study.benchmark("freeze_lm_embedding"),
        "reported": lambda study: "; ".join(
            f'"{arm}", {samples} samples: {row["val_ppl"]}' for (arm, samples), row in REPORTED.items()
        ),
        "inequality": lambda study: INEQUALITY,
    },
}
