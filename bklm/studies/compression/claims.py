"""What the original announced of compression, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.compression import published_core
from bklm.compression.sized import NEAR
from bklm.harness.arms import NOT_SHOWN, Arm, all_hold, claim, is_below, nats_in_words, verdicts
from bklm.harness.comparison import Trial
from bklm.harness.statistics import widened
from bklm.studies.compression.models import (
    AS_SMALL,
    CHANCE,
    GATED,
    GRADUAL,
    INT8,
    MORE,
    RANDOM,
    ROUNDED,
    SCRATCH,
    family_of,
)
from bklm.studies.compression.speed import PER_TOKEN
from bklm.studies.compression.tables import (
    ARMS,
    SMALLER,
    beside_counting,
    beside_in_words,
    is_judged,
    kind_of,
    ratio_in_words,
    reads,
    upper,
)

BELOW = 1.15
MUCH_SMALLER = ("100 times smaller for less than 15% of perplexity", 100.0)
STUDENT, BETTER = 2.10, -0.0355
CORE_SPEED = 1.8
IDLE = "no better than single words, or of no use for context"
SAME_RATE = 0.05  # of the positions, within which two models skip equally many
# What is said of a whole model's file: how it is made, how many times smaller it must be, and at which ratio of perplexities.
SINGLE_FILES = (
    ("int8 makes {} 4 times (at least 3.5) smaller for 1% to 3% of perplexity", INT8, 3.5, 1.03),
    ("goal: int8 makes {} 3.9 times smaller for 0.3% of perplexity", INT8, 3.9, 1.003),
    ("goal: int8 products cost {} 1% of perplexity at most", PER_TOKEN, 0.0, 1.01),
    (
        "goal: few bits, learned in training, make {} 10 times smaller for 15% of perplexity",
        ROUNDED,
        10.0,
        BELOW,
    ),
)
# Arms and controls that a sentence is about, by a part of either's name.
PAIRS = (
    ("distillation makes every student of {} better than the text alone does", "student at T", ", width"),
    ("pruning {} while training keeps more than as many zeros at random", GRADUAL, RANDOM),
    ("Wanda prunes {} better than magnitude by row", "zeros, wanda", "zeros, magnitude by row"),
    ("Wanda prunes {} better than magnitude", "zeros, wanda", "zeros, magnitude,"),
    ("zeros in all of {}, not retrained, beat a dense model of as many bytes", "zeros everywhere", ", width"),
    ("zeros in all of {}, retrained, beat a dense model of as many bytes and steps", AS_SMALL, ", width"),
    ("a gate that skips a block of {} token by token beats skipping by chance", GATED, CHANCE),
    ("{} without parts beats one that was trained without them", ("skipped", "left"), SCRATCH),
)
# Methods by a part of their name, and what stands in its place in that of their controls.
RIVALS = (
    (" zeros, wanda,", (" zeros, magnitude by row,", " zeros, magnitude,", " zeros, random,")),
    (" zeros, magnitude by row,", (" zeros, random,",)),
    (" zeros, magnitude,", (" zeros, random,",)),
)


def judged(trials: Sequence[Trial], arms: Mapping[str, Arm], unigram: float = math.inf) -> list[dict[str, Any]]:
    """Paired verdicts: retrained arms and students against their controls; Wanda against magnitude, both against chance; zeros
    everywhere against the narrow model of as many bytes and, where there is training, steps; what is left of a model against
    one trained in that size.

    There is none where the model, or both of a pair, read no better than single words or without context: nothing was there
    to lose.
    """
    rows = {row["arm"]: row for row in ARMS.rows(trials)}
    own = {name: arm.against for name, arm in arms.items() if arm.against}
    for name in sorted(rows):
        if rivals := [rival for rival in _rivals(name, rows) if rival in rows]:
            own[name] = (*own.get(name, ()), *rivals)
    found = verdicts(ARMS, trials, {name: Arm(None, against) for name, against in own.items()})
    for row in found:
        pair = [rows[name] for name in (row["arm"], row["against"]) if name in rows]
        whole = rows.get(family_of(row["arm"]))
        if not (whole and reads(whole, unigram) and any(reads(r, unigram) for r in pair)):
            row |= {"low": None, "high": None, "verdict": f"{IDLE}: no verdict"}
    return found


def _rivals(name: str, rows: Mapping[str, Any]) -> list[str]:
    if "zeros everywhere" in name:
        width = name.partition("as small as ")[2].partition(",")[0]
        return [f"{family_of(name)}, {width}: {INT8}"]
    if AS_SMALL in name and name.endswith(f": {INT8}"):
        # In int8 the files are as large.
        width = name.partition(f"{AS_SMALL} ")[2].partition(":")[0]
        rival = f"{family_of(name)}, {width}, {MORE}: {INT8}"
        sizes = [rows[n]["file_bytes"] for n in (name, rival) if n in rows]
        return [rival] if len(sizes) == 2 and abs(sizes[0] / sizes[1] - 1) <= 2 * NEAR else []
    if name.endswith((f"skipped, {INT8}", f"left, {INT8}")):
        ending = f"{SCRATCH}: {INT8}"
        return [other for other in rows if family_of(other) == family_of(name) and other.endswith(ending)]
    return [name.replace(part, other) for part, others in RIVALS if part in name for other in others]


def claims_table(
    rows: Sequence[Mapping[str, Any]],
    verdict_rows: Sequence[Mapping[str, Any]],
    shares: Sequence[Mapping[str, Any]],
    speeds: Sequence[Mapping[str, Any]] = (),
    counted: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict; of each model where it is about one."""
    found = [
        claim(f"a file reads better than counting in as many bytes: {r['arm']}", *beside_counting(rows, r))
        for r in counted
    ]
    families = list(dict.fromkeys(r["family"] for r in rows))
    found += [row for family in families for row in _single_files(rows, family)]
    found += [_as_small(rows, shares, *MUCH_SMALLER), *_student(rows)]
    for words, parts, rival in PAIRS:
        some = (parts,) if isinstance(parts, str) else parts
        for family in families:
            own = [
                r for r in verdict_rows
                if family_of(r["arm"]) == family and any(p in r["arm"] for p in some) and rival in r["against"]
            ]  # fmt: skip
            found += [_at_equal_rates(_all_win(words.format(family), own), own, rows)] if own else []
    found += [
        _speed(row, *which)
        for which in (("score", "times_faster"), ("write", "written_times_faster"))
        for row in speeds
        if row["arm"] == PER_TOKEN
    ]
    return found + [_core(row) for row in shares if row["core_time_share"] is not None] + [_published_core()]


def _all_win(announced: str, own: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Whether every pair of a kind is won beyond its interval; told are the best one, the worst, and which gave no verdict."""
    known = sorted((r for r in own if r["loss_difference"] is not None), key=lambda r: r["loss_difference"])
    shown = dict.fromkeys((0, len(known) - 1)) if known else ()
    told = [f"{known[i]['arm']} - {known[i]['against']}: {nats_in_words(known[i], 3)} nats" for i in shown]
    found = [is_below(r["low"], r["high"]) for r in own]
    if any(holds is not None for holds in found):
        told.append(f"lower beyond the interval in {found.count(True)} of {len(own)}")
    lost = [f"{r['arm']}: {r['verdict'].removesuffix(': no verdict')}" for r in own if r["low"] is None]
    return claim(announced, "; ".join([*told, *lost[:1]]), all_hold(found))


def _at_equal_rates(
    row: dict[str, str], pairs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The claim itself, of blocks that skip positions with the shares that they keep; no verdict where these are apart."""
    kept = {r["arm"]: r["kept_share"] for r in rows if r.get("kept_share") is not None}
    shares = [kept[name] for pair in pairs for name in (pair["arm"], pair["against"]) if name in kept]
    if not shares:
        return row
    told = f"{row['measured']}; kept: {', '.join(f'{share:.0%}' for share in shares)} of the positions"
    verdict = row["verdict"] if max(shares) - min(shares) <= SAME_RATE else "no verdict"
    return row | {"measured": told, "verdict": verdict}


def _single_files(rows: Sequence[Mapping[str, Any]], family: str) -> list[dict[str, str]]:
    """Of one kind of file each: the best of many would be lucky. It must be both small and near."""
    found = []
    for words, method, smaller, most in SINGLE_FILES:
        for row in (r for r in rows if _made_by(method, r, family) and upper(r) is not None):
            told = f"{row['arm']}: {_in_words(row)}"
            near = is_below(row["ppl_ratio_low"], row["ppl_ratio_high"], most) if is_judged(row) else None
            found.append(
                claim(words.format(family), told, near and False if row["times_smaller"] < smaller else near)
            )
    return found


def _made_by(method: str, row: Mapping[str, Any], family: str) -> bool:
    return row["arm"] == f"{family}: {method}" or (
        method == ROUNDED and row["family"] == family and row["arm"].endswith(ROUNDED)
    )


def _in_words(row: Mapping[str, Any]) -> str:
    read = (
        "" if row["float_reads"] else ", of a model that reads no better than single words, or without context"
    )
    return f"{row['times_smaller']:.2f} times smaller, PPL x{ratio_in_words(row)}{beside_in_words(row)}{read}"


def _as_small(
    rows: Sequence[Mapping[str, Any]], shares: Sequence[Mapping[str, Any]], announced: str, times: float
) -> dict[str, str]:
    """The smallest file within the bound, the smallest that was tried at all, and what the blocks alone could bring.

    As one of many it is judged by an interval for as many at once. A smaller model from scratch compresses nothing.
    """
    made = [r for r in rows if r["times_smaller"] and r["float_reads"] and kind_of(r["arm"]) != SMALLER]
    within = [r for r in made if upper(r) is not None and upper(r) <= BELOW]
    best = max(within, key=lambda r: r["times_smaller"], default=None)
    told = [f"{best['arm']}: {_in_words(best)}" if best else "no file of a model that reads is within 15%"]
    if made and (tried := max(made, key=lambda r: r["times_smaller"])) is not best:
        told.append(f"the smallest tried, {tried['arm']}: {_in_words(tried)}")
    told += [
        f"no bytes at all for the blocks of {r['family']} would make {1 / r['outer_parameter_share']:.2f} times"
        for r in shares
    ]
    if best and best["times_smaller"] >= times:
        high = (
            widened(best["ppl_ratio"], upper(best), best["seeds"], len(made)) if is_judged(best) else math.inf
        )
        told.append(f"of {len(made)} files at once up to x{high:.3f}" if is_judged(best) else "no interval")
        holds = high <= BELOW or (NOT_SHOWN if is_judged(best) else None)
        return claim(announced, "; ".join(told), holds)
    # Another that is as small and has no interval might be near.
    open_ones = [r["arm"] for r in made if r["times_smaller"] >= times and not is_judged(r)]
    told += [f"{arm} has no interval" for arm in open_ones[:1]]
    return claim(announced, "; ".join(told), None if open_ones or not any(map(is_judged, made)) else False)


def _student(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    # Announced of the one that the original distilled.
    for family in dict.fromkeys(r["family"] for r in rows if "student" in r["arm"] and r["family"] != "NewLLM"):
        own = [r for r in rows if r["family"] == family and "student" in r["arm"] and INT8 not in r["arm"]]
        known = sorted((r for r in own if upper(r) is not None), key=upper)
        # The nearest to it, and the one that decides where all are asked for.
        shown = dict.fromkeys((0, len(known) - 1)) if known else ()
        told = [f"{known[i]['arm']}: {_in_words(known[i])}" for i in shown]
        told += [f"{r['arm']}: a seed diverged" for r in own if upper(r) is None][:1]
        holds = None
        if all(map(is_judged, own)):
            judged_ones = [
                r["times_smaller"] >= STUDENT and is_below(r["ppl_ratio_low"], r["ppl_ratio_high"], 1 + BETTER)
                for r in own
            ]
            holds = all_hold(judged_ones)
            told.append(f"both in {judged_ones.count(True)} of {len(own)}")
        announced = f"every distilled {family} is {STUDENT:.2f} times smaller and {BETTER:+.2%} in perplexity"
        found.append(claim(announced, "; ".join(told), holds))
    return found


def _speed(row: Mapping[str, Any], verb: str, key: str) -> dict[str, str]:
    """Over the rounds of one run; an interval around 1 neither shows nor refutes it."""
    low, high = (row[f"{key}_{end}"] for end in ("low", "high"))
    told = f"per token: x{row[key]:.3f} ({low:.3f} to {high:.3f}) of float32's tokens a second, one model's"
    return claim(f"goal: int8 products {verb} {row['family']} no slower", told, is_below(-high, -low, -1.0))


def _core(row: Mapping[str, Any]) -> dict[str, str]:
    share, high = row["core_time_share"], row.get("core_time_share_high")
    bounds = [1 / max(1 - value, 1e-3) for value in (share, high) if value is not None]
    told = f"the recursions take {share:.1%} of {row['family']}'s time of scoring: skipped whole, at no cost, x{bounds[0]:.3f}"
    told += f" (up to x{bounds[1]:.3f} over the rounds)" if len(bounds) > 1 else " (no interval)"
    # A bound that is high enough is no speed that was reached.
    return claim(
        f"a sparse core makes the model {CORE_SPEED} times faster",
        f"{told}, one model's",
        False if len(bounds) > 1 and bounds[1] < CORE_SPEED else None,
    )


def _published_core() -> dict[str, str]:
    """The published sparse core against the resolvent: it is run here, on random potentials, and is no approximation of it."""
    rows = published_core.published_rows()
    whole = next(r for r in rows if not r["masked"])
    alone, batch = (
        next(r for r in rows if r["batch"] == b and r["masked"] == 0.5) for b in published_core.BATCHES
    )
    told = (
        f"the published one, run here: a mean error of {whole['error']:.0%} with nothing masked and of {alone['error']:.0%} "
        f"with half; what is masked in one row is in all, so with {batch['batch']} rows {batch['skipped']:.0%} of the "
        f"positions are, and G differs from 1 by {batch['from_one']:.1g} at most"
    )
    return claim("a sparse core gives the resolvent's diagonal", told, alone["error"] < 0.01)
