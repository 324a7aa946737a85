"""The compression study's tables: every file with its perplexity, the smallest ones within bounds, speeds, shares."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean
from bklm.harness.statistics import Perplexity
from bklm.studies.compression.models import INT8, MORE, family_of
from bklm.studies.compression.speed import CORE, FLOAT, HIDDEN

# What a file's name says of how it was made; the first that fits.
RETRAINED, SCRATCH, BITS = "retrained", "smaller, from scratch", "fewer bits"
KINDS = (
    ("student", "distilled"),
    (", width", SCRATCH),
    ("training", RETRAINED),
    ("gradual", RETRAINED),
    ("retrained", RETRAINED),
    (MORE, RETRAINED),
    ("zeros", "zeros"),
    ("products", "int8 products"),
    ("rank", "parts removed"),
    ("tied head", "parts removed"),
    ("skipped", "parts removed"),
    ("left", "parts removed"),
)
BOUNDS = (0.01, 0.03, 0.15)  # of the float model's perplexity
MEGA = 1e6
SEEN = 0.01  # a share of time that a busy machine does not hide


def kind_of(arm: str) -> str:
    """The family of methods that a file belongs to."""
    return next((kind for part, kind in KINDS if part in arm), BITS)


def _size(row: Mapping[str, Any], key: str) -> str:
    return "-" if row[key] is None else f"{row[key] / MEGA:.3f} MB"


ARMS = Comparison(
    by="arm",
    title=str,
    other="other file",
    columns=(
        Column("val_ppl_without_unk", geometric_mean("val_ppl_without_unk"), "without <unk>", ".1f"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("file_bytes", "file_bytes", "file", lambda row: _size(row, "file_bytes")),
        Column(
            "packed_file_bytes",
            "packed_file_bytes",
            "packed by zlib",
            lambda row: _size(row, "packed_file_bytes"),
        ),
    ),
)


def flat(trials: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]] = ()) -> list[Trial]:
    """One trial per file and seed: of trained models, of these in int8 ("NAME: int8"), of what methods made of them."""
    found = []
    empty = {"seconds": 0.0, "epochs": []}
    for trial in trials:
        found.append(trial)
        if trial["val_ppl"] is not None and trial["int8"]:
            own = {"arm": f"{trial['arm']}: {INT8}", "seed": trial["seed"], "parameters": trial["parameters"]}
            found.append(own | empty | trial["int8"])
    known = {(t["arm"], t["seed"]) for t in found}
    for record in methods:
        for row in record.get("methods", ()):
            arm = f"{record['arm']}: {row['name']}"
            if (arm, record["seed"]) not in known:
                found.append(
                    {"arm": arm, "seed": record["seed"]} | empty | {k: v for k, v in row.items() if k != "name"}
                )
    return found


def float_of(arm: str, known: Mapping[str, Any]) -> str:
    """The float model that an arm is compared with: of one that was trained further, the one after as many steps more."""
    family = family_of(arm)
    further = f"{family}, {MORE}"
    return further if kind_of(arm) == RETRAINED and further in known else family


def file_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """``ARMS``'s rows, each with its float model: how many times smaller its file is, and its perplexity over that one's."""
    rows = []
    by_arm = {row["arm"]: row for row in ARMS.rows(trials)}
    for arm, row in by_arm.items():
        against = float_of(arm, by_arm)
        ratio, times = ARMS.ratio(trials, arm, against), None
        if row["file_bytes"] and by_arm.get(against, {}).get("file_bytes"):
            times = by_arm[against]["file_bytes"] / row["file_bytes"]
        low, high = (None, None) if ratio is None else ratio.interval
        rows.append(row | {
            "family": family_of(arm), "against": against, "times_smaller": times,
            "ppl_ratio": None if ratio is None else ratio.mean, "ppl_ratio_low": low, "ppl_ratio_high": high,
        })  # fmt: skip
    return rows


def ratio_in_words(row: Mapping[str, Any]) -> str:
    """A row's perplexity over its float model's, with the interval."""
    if row["ppl_ratio"] is None:
        return "-"
    if row["ppl_ratio_low"] is None:
        return f"{row['ppl_ratio']:.4f}"
    return f"{row['ppl_ratio']:.4f} ({row['ppl_ratio_low']:.4f} to {row['ppl_ratio_high']:.4f})"


def readable_files(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        words | {
            "times smaller": "-" if row["times_smaller"] is None else f"{row['times_smaller']:.2f}",
            "of": row["against"], "PPL over its (95%)": ratio_in_words(row),
        }
        for row, words in zip(rows, ARMS.readable(rows), strict=True)
    ]  # fmt: skip


def upper(row: Mapping[str, Any]) -> float | None:
    """By what a row is judged: the upper end of its ratio; with fewer than three seeds its mean."""
    return row["ppl_ratio"] if row["ppl_ratio_high"] is None else row["ppl_ratio_high"]


def is_judged(row: Mapping[str, Any]) -> bool:
    return row["ppl_ratio_high"] is not None


def recommended(rows: Sequence[Mapping[str, Any]], is_kept: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Per model and bound: the smallest file, of those that are kept, whose perplexity's upper end is within it."""
    found = []
    for family in dict.fromkeys(r["family"] for r in rows):
        own = [r for r in rows if r["family"] == family and r["file_bytes"] and upper(r) is not None]
        for bound in BOUNDS:
            within = sorted((r for r in own if upper(r) <= 1 + bound), key=lambda r: r["file_bytes"])
            if best := next((r for r in within if is_kept(r["arm"])), None):
                found.append({"family": family, "within": bound, **{k: best[k] for k in _KEPT}})
    return found


_KEPT = (
    "arm", "file_bytes", "packed_file_bytes", "times_smaller", "val_ppl", "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high",
)  # fmt: skip


def readable_recommended(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": r["family"], "within": f"+{r['within']:.0%}", "smallest file": r["arm"], "size": _size(r, "file_bytes"),
            "times smaller": f"{r['times_smaller']:.2f}", "val PPL": f"{r['val_ppl']:.1f}",
            "PPL over float's (95%)": ratio_in_words(r) + ("" if is_judged(r) else ", no interval"),
        }
        for r in rows
    ]  # fmt: skip


def recommended_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: what to take within each bound."""
    told = [
        f"{r['arm']} within {r['within']:.0%} ({r['times_smaller']:.1f} times smaller, PPL x{ratio_in_words(r)})"
        for r in rows
    ]
    few = "" if all(is_judged(r) for r in rows) else " Fewer than three seeds: by the means, and no verdict."
    return f"Smallest files by perplexity's upper end: {'; '.join(told)}.{few}" if told else ""


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Perplexity:
    """How many times faster, with its interval over rounds that both were timed in."""
    return Perplexity.over_seeds([a / b for a, b in zip(slow, fast, strict=False)])


def speed_rows(
    models: Mapping[str, Mapping[str, Any]], files: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Per model and arm: tokens a second, and over float32's in the same rounds; perplexity where a file of it is known."""
    known = {r["arm"]: r["val_ppl"] for r in files}
    rows = []
    for family, found in models.items():
        for arm, seconds in found["generated"].items():
            scored, written = found["scored"], found["generated"]
            faster, written_faster = ratio(scored[FLOAT], scored[arm]), ratio(written[FLOAT], seconds)
            rows.append({
                "family": family, "arm": arm, "val_ppl": found["val_ppl"].get(arm) or known.get(_file_of(family, arm)),
                "scored_tokens_per_second": found["tokens"] / statistics.median(scored[arm]),
                "generated_tokens_per_second": found["written"] / statistics.median(seconds),
                "times_faster": faster.mean, "times_faster_low": faster.low, "times_faster_high": faster.high,
                "written_times_faster": written_faster.mean, "written_times_faster_low": written_faster.low,
                "written_times_faster_high": written_faster.high,
            })  # fmt: skip
    return rows


def _file_of(family: str, arm: str) -> str:
    if arm == FLOAT:
        return family
    return f"{family}, {arm}" if arm.startswith("width") else f"{family}: {arm}"


def readable_speed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": r["family"], "products": r["arm"], "val PPL": "-" if r["val_ppl"] is None else f"{r['val_ppl']:.2f}",
            "scored tokens/s": f"{r['scored_tokens_per_second']:,.0f}",
            "times float's (95%)": str(Perplexity(r["times_faster"], r["times_faster_low"], r["times_faster_high"])),
            "generated tokens/s": f"{r['generated_tokens_per_second']:,.0f}",
            "times float's, generated (95%)": str(Perplexity(
                r["written_times_faster"], r["written_times_faster_low"], r["written_times_faster_high"]
            )),
        }
        for r in rows
    ]  # fmt: skip


def shares_of(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model: what embedding and head are of the parameters and of the time of scoring, and the core of that time.

    Of the fastest calls: what disturbs a call makes it slower and never faster.
    """
    rows = []
    for family, found in models.items():
        fastest = {name: min(seconds) for name, seconds in found["scored"].items()}
        parts = {name: min(1.0, fastest[name] / fastest[FLOAT]) for name in (HIDDEN, CORE) if name in fastest}
        rows.append({
            "family": family, "outer_parameter_share": found["outer_share"], "head_time_share": 1 - parts[HIDDEN],
            "core_time_share": parts.get(CORE),
        })  # fmt: skip
    return rows


def shares_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Amdahl's two shares, and the bounds that follow."""
    told = []
    for r in rows:
        outer, head = r["outer_parameter_share"], r["head_time_share"]
        faster = (
            f"{1 / head:.2f} times faster at most"
            if head >= SEEN
            else "faster by an amount that was not seen here"
        )
        told.append(
            f"{r['family']}: embedding and head hold {outer:.0%} of the parameters, and the head takes {head:.0%} of the time "
            f"of scoring; compressing the blocks alone makes its file {1 / outer:.2f} times smaller at most, and its scoring "
            f"{faster}."
        )
    return " ".join(told)


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure's title: what the first model's smallest files within the tightest and the widest bound are."""
    if not rows:
        return "No file is within 15% of its float model"
    first = [r for r in rows if r["family"] == rows[0]["family"]]
    told = [f"{r['times_smaller']:.1f} times smaller within {r['within']:.0%}" for r in (first[0], first[-1])]
    few = "" if all(is_judged(r) for r in first) else " (no interval, no verdict)"
    return f"{first[0]['family']}: {', '.join(dict.fromkeys(told))}{few}"


def speed_headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure's title: the fastest int8 products of the first model."""
    if not rows:
        return "No model was timed"
    own = [r for r in rows if r["family"] == rows[0]["family"] and "products" in r["arm"]]
    best = max(own, key=lambda r: r["times_faster"])
    return f"{best['family']}: the fastest int8 products ({best['arm'].partition(', ')[2]}) score x{best['times_faster']:.2f}"
