"""The compression study's tables: every file with its perplexity, the smallest ones within bounds, and counting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bklm.harness.arms import NOT_SHOWN, Holds
from bklm.harness.comparison import (
    Column,
    Comparison,
    Trial,
    geometric_mean,
    not_beaten_in_short,
    score_in_words,
)
from bklm.harness.statistics import FEWEST_SEEDS, widened
from bklm.studies.compression.models import INT8, MORE, SCRATCH, family_of
from bklm.training.context_gain import BIGRAM_GAIN, gain_in_words

Rows = Sequence[Mapping[str, Any]]

# What a file's name says of how it was made; the first that fits.
RETRAINED, SMALLER, BITS = "retrained", "smaller, from scratch", "fewer bits"
KINDS = (
    ("student", "distilled"),
    (", width", SMALLER),
    (SCRATCH, SMALLER),
    ("training", RETRAINED),
    ("gradual", RETRAINED),
    ("retrained", RETRAINED),
    ("positions", RETRAINED),
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
WORDS = 0.9  # of the unigram model's perplexity: who read more than single words stays below it


def kind_of(arm: str) -> str:
    """The family of methods that a file belongs to."""
    return next((kind for part, kind in KINDS if part in arm), BITS)


def megabytes(count: float | None) -> str:
    """Bytes as people read them, "-" for None."""
    return "-" if count is None or count != count else f"{count / MEGA:.3f} MB"


def _size(row: Mapping[str, Any], key: str) -> str:
    return megabytes(row[key])


ARMS = Comparison(
    by="arm",
    title=str,
    other="other file",
    columns=(
        Column("val_ppl_without_unk", geometric_mean("val_ppl_without_unk"), "without <unk>", ".1f"),
        Column(
            "context_gain", lambda group: _known("context_gain", group), "context gain",
            lambda r: gain_in_words(r["context_gain"]),
        ),
        Column("kept_share", lambda group: _known("kept_share", group)),
        Column("parameters", "parameters"),
        Column("file_bytes", "file_bytes", "file", lambda row: _size(row, "file_bytes")),
        Column("packed_file_bytes", "packed_file_bytes", "packed by zlib", lambda r: _size(r, "packed_file_bytes")),
    ),
)  # fmt: skip


def _known(key: str, group: Sequence[Trial]) -> float | None:
    known = [value for t in group if (value := t.get(key)) is not None]
    return sum(known) / len(known) if known else None


def flat(trials: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]] = ()) -> list[Trial]:
    """One trial per file and seed: of trained models, of these in int8 ("NAME: int8"), of what methods made of them."""
    found = []
    empty = {"seconds": 0.0, "epochs": []}
    for trial in trials:
        found.append(trial)
        if trial["val_ppl"] is not None and trial["int8"]:
            own = {"arm": f"{trial['arm']}: {INT8}", "seed": trial["seed"], "parameters": trial["parameters"]}
            found.append(own | empty | trial["int8"])
    for record in methods:
        own = {k: v for k, v in record.items() if k != "method"}
        found.append(own | {"arm": f"{record['arm']}: {record['method']}"})
    return found


def float_of(arm: str, known: Mapping[str, Any]) -> str:
    """The float model that an arm is compared with: of one that was trained further, a narrow one too, or the one after as
    many steps more, the better of these two."""
    family = family_of(arm)
    further = f"{family}, {MORE}"
    rivals = [n for n in (family, further) if n in known and known[n]["val_ppl"] is not None]
    trained_further = kind_of(arm) == RETRAINED or MORE in arm
    if not trained_further or arm == further or not rivals:
        return family
    return min(rivals, key=lambda name: known[name]["val_ppl"])


def knows_words(row: Mapping[str, Any], unigram: float) -> bool:
    """Whether a model is clearly below the unigram model."""
    upper = row["val_ppl"] if row["val_ppl_high"] is None else row["val_ppl_high"]
    return upper is not None and upper < WORDS * unigram


def reads(row: Mapping[str, Any], unigram: float) -> bool:
    """Whether a model learned more than how often words are, and uses its context."""
    gain = row.get("context_gain")
    return knows_words(row, unigram) and (gain is None or gain >= BIGRAM_GAIN)


def vacuous_in_words(rows: Sequence[Mapping[str, Any]], unigram: float) -> str:
    """How many trained models read no better than single words, how many others use no context, and the largest of either;
    "" where all read."""
    trained = [r for r in rows if ":" not in r["arm"] and r["seeds"]]
    idle = [r for r in trained if not reads(r, unigram)]
    no_words, no_context = (
        sorted((r["arm"] for r in idle if knows_words(r, unigram) is known), key=len) for known in (False, True)
    )
    told = ""
    for found, words in (
        (no_words, f"No better than counting single words (unigram: {unigram:.1f})"),
        (no_context, f"Bigram models, which gain less than {BIGRAM_GAIN:.1%} from context"),
    ):
        if found:
            more = f"; and {len(found) - 3} more of {len(trained)} trained models" * (len(found) > 3)
            told += f" {words}, so that nothing follows from them: {'; '.join(found[:3])}{more}."
    return told.strip()


def file_rows(trials: Sequence[Trial], unigram: float = math.inf) -> list[dict[str, Any]]:
    """``ARMS``'s rows, each with its float model: how many times smaller its file is, its perplexity over that one's, and
    whether that one reads, without which a ratio says nothing."""
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
            "float_reads": against in by_arm and reads(by_arm[against], unigram),
        })  # fmt: skip
    return rows


def ratio_in_words(row: Mapping[str, Any]) -> str:
    """A row's perplexity over its float model's, with the interval."""
    if row["ppl_ratio"] is None:
        return "-"
    if row["ppl_ratio_low"] is None:
        return f"{row['ppl_ratio']:.4f}"
    return f"{row['ppl_ratio']:.4f} ({row['ppl_ratio_low']:.4f} to {row['ppl_ratio_high']:.4f})"


def readable_files(
    rows: Sequence[dict[str, Any]], counted: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Every file for people, those of count models first; what a method could not make did not diverge."""
    told = [
        {"arm": r["arm"], "val PPL (95%)": f"{r['val_ppl']:.1f}", "file": _size(r, "file_bytes"),
         "packed by zlib": _size(r, "packed_file_bytes")}
        for r in counted
    ]  # fmt: skip
    for row, words in zip(rows, ARMS.readable(rows), strict=True):
        if ":" in row["arm"]:
            words["val PPL (95%)"] = score_in_words(row).replace("diverged", "not made")
        times = "-" if row["times_smaller"] is None else f"{row['times_smaller']:.2f}"
        other = f" ({row['against']})" if row["against"] != row["family"] else ""
        told.append(words | {"times smaller": times + other, "PPL over float's (95%)": ratio_in_words(row)})
    return told


def upper(row: Mapping[str, Any]) -> float | None:
    """By what a row is judged: the upper end of its ratio; with fewer than three seeds its mean."""
    return row["ppl_ratio"] if row["ppl_ratio_high"] is None else row["ppl_ratio_high"]


def is_judged(row: Mapping[str, Any]) -> bool:
    """With three seeds, and a float model that reads; rows of an earlier version do not say."""
    return row["ppl_ratio_high"] is not None and row.get("float_reads", True)


def recommended(rows: Sequence[Mapping[str, Any]], is_kept: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Per model and bound: the smallest file, of those that are kept, whose perplexity's upper end is within it.

    There is none for a model that reads no more than single words.
    """
    found = []
    for family in dict.fromkeys(r["family"] for r in rows):
        own = [
            r
            for r in rows
            if r["family"] == family and r["file_bytes"] and upper(r) is not None and r["float_reads"]
        ]
        for bound in BOUNDS:
            within = sorted((r for r in own if upper(r) <= 1 + bound), key=lambda r: r["file_bytes"])
            if best := next((r for r in within if is_kept(r["arm"])), None):
                found.append({"family": family, "within": bound, **{k: best[k] for k in _KEPT}})
    return found


_KEPT = (
    "arm", "against", "float_reads", "file_bytes", "packed_file_bytes", "times_smaller", "val_ppl",
    "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high",
)  # fmt: skip


def readable_recommended(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": r["family"], "within": f"+{r['within']:.0%}", "smallest file": r["arm"], "size": _size(r, "file_bytes"),
            "times smaller": f"{r['times_smaller']:.2f}", "val PPL": f"{r['val_ppl']:.1f}",
            "PPL over float's (95%)": ratio_in_words(r) + beside_in_words(r) + ("" if is_judged(r) else ", no interval"),
        }
        for r in rows
    ]  # fmt: skip


def beside_in_words(row: Mapping[str, Any]) -> str:
    """Over which float model a ratio is, where that is not the family's own; rows of an earlier version do not say."""
    against = row.get("against", row["family"])
    return "" if against == row["family"] else f" over {against}"


def recommended_in_words(rows: Sequence[Mapping[str, Any]], tried: int) -> str:
    """One sentence: what to take within each bound."""
    told = [
        f"{r['arm']} within {r['within']:.0%} "
        f"({r['times_smaller']:.1f} times smaller, PPL x{ratio_in_words(r)}{beside_in_words(r)})"
        for r in rows
    ]
    few = "" if all(is_judged(r) for r in rows) else " Fewer than three seeds: by the means, and no verdict."
    return (
        f"Smallest files by perplexity's upper end, of {tried} tried (each by its own interval): {'; '.join(told)}.{few}"
        if told
        else "No file is recommended."
    )


def finding_in_words(
    rows: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]],
    unigram: float,
) -> str:  # fmt: skip
    """What counting does in as few bytes, which models read, what to take of them, and what could not be made."""
    told = [f"{counting_in_words(rows, counted)}."] if counted else []
    told.append(vacuous_in_words(rows, unigram))
    missing = [r["arm"] for r in rows if ":" in r["arm"] and r["diverged"]]
    told.append(recommended_in_words(chosen, sum(bool(r["file_bytes"]) for r in rows)))
    told += [f"Not made of every seed: {', '.join(missing)}."] * bool(missing)
    return " ".join(filter(None, told))


def counting_in_words(rows: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]]) -> str:
    """The smallest count model beside the best neural file of as few bytes, and how many of the larger ones are beaten so."""
    told, larger = beside_counting(rows, counted[0])[0], [beside_counting(rows, r)[1] for r in counted[1:]]
    if not larger:
        return told
    beaten = sum(better is True for better in larger)
    are = f"{beaten or 'none'} {'is' if beaten < 2 else 'are'} shown to be"
    return f"{told}; of {len(larger)} larger count models {are} beaten in as few bytes"


def beside_counting(rows: Sequence[Mapping[str, Any]], counted: Mapping[str, Any]) -> tuple[str, Holds]:
    """A count model and the best neural file of at most as many bytes, both packed by zlib, in words, and whether that one
    reads better: as the best of many it must do so by an interval for as many at once; all must be worse to be refuted.

    Packed, since a count model's numbers are float32, of which zlib leaves a third, and of integers nearly all.
    """
    size, ppl = "packed_file_bytes", counted["val_ppl"]
    small = [r for r in rows if r[size] and r["seeds"] and r[size] <= counted[size]]
    words = f"{counted['arm']} has PPL {ppl:.1f} in {_size(counted, size)} packed"
    if not small:
        return f"{words}, and no neural file is as small", None
    best = min(small, key=lambda r: r["val_ppl"])
    words += (
        f"; the best neural file of as few bytes, {best['arm']}, {score_in_words(best)} in {_size(best, size)}"
    )
    if min(r["seeds"] for r in small) < FEWEST_SEEDS:
        return words, None
    if widened(best["val_ppl"], best["val_ppl_high"], best["seeds"], len(small)) < ppl:
        return words, True
    return words, False if all(r["val_ppl_low"] > ppl for r in small) else NOT_SHOWN


def files_title(chosen: Rows, rows: Rows, family: str, baselines: Rows) -> str:
    """The figure's title, of one model: its recommended files, or of none all of ``family``'s, beside counting."""
    family = chosen[0]["family"] if chosen else family
    own = [r["val_ppl"] for r in chosen or (r for r in rows if r["seeds"]) if r["family"] == family]
    return headline(chosen) + (not_beaten_in_short(min(own), baselines) if own else "")


def headline(rows: Rows) -> str:
    """What the first model's smallest files within the tightest and the widest bound are."""
    if not rows:
        return "No file is recommended"
    first = [r for r in rows if r["family"] == rows[0]["family"]]
    told = [f"{r['times_smaller']:.1f} times smaller within {r['within']:.0%}" for r in (first[0], first[-1])]
    few = "" if all(is_judged(r) for r in first) else " (no interval, no verdict)"
    return f"{first[0]['family']}: {', '.join(dict.fromkeys(told))}{few}"
