"""What the original announced of compression, beside what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import Arm, claim, helps, nats_in_words, verdicts
from bklm.harness.comparison import Trial
from bklm.studies.compression.models import GRADUAL, INT8, RANDOM, family_of
from bklm.studies.compression.tables import ARMS, is_judged, ratio_in_words, upper

FOUR_TIMES, MOST_OF_IT = 3.5, 1.03
HUNDRED, BELOW = 100.0, 1.15
STUDENT, BETTER = 2.10, -0.0355
CORE_SPEED = 1.8
DENSE = "dense int8 of as many bytes"  # between the two nearest that were trained


def judged(trials: Sequence[Trial], arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Paired verdicts: retrained arms and students against their controls; Wanda against magnitude, both against chance.

    Zeros without further training are compared with ``DENSE`` as well, where it lies within the range measured.
    """
    names = {t["arm"] for t in trials}
    own = {name: arm for name, arm in arms.items() if arm.against}
    for name in sorted(names):
        for kind, rivals in (("wanda", ("magnitude", "random")), ("magnitude", ("random",))):
            if f"zeros, {kind}," in name:
                against = [name.replace(f", {kind},", f", {rival},") for rival in rivals]
                own[name] = Arm(None, tuple(a for a in against if a in names))
    found = verdicts(ARMS, trials, own)
    for name in dict.fromkeys(t["arm"] for t in trials if _is_pruned(t["arm"])):
        mine = [t for t in trials if t["arm"] == name]
        dense = [_dense_of_size(trials, t) for t in mine if t["val_ppl"] is not None]
        if dense and None not in dense:
            found += verdicts(ARMS, [*mine, *dense], {name: Arm(None, (DENSE,))})
    return found


def _is_pruned(name: str) -> bool:
    """Zeros that were chosen; a retrained arm had more passes over the text than the dense models."""
    chosen = "zeros" in name and "random" not in name and name.endswith(INT8)
    return chosen and GRADUAL not in name


def _dense_of_size(trials: Sequence[Trial], pruned: Trial) -> Trial | None:
    """``DENSE`` of one seed: log PPL linear in log bytes between the two nearest dense int8 files; None outside of all."""
    family = family_of(pruned["arm"])
    points = sorted(
        (math.log(t["file_bytes"]), math.log(t["val_ppl"]))
        for t in trials
        if t["seed"] == pruned["seed"] and t["val_ppl"] is not None
        and (t["arm"] == f"{family}: {INT8}" or (t["arm"].startswith(f"{family}, width") and t["arm"].endswith(INT8)))
    )  # fmt: skip
    size = math.log(pruned["file_bytes"])
    for (small, worse), (large, better) in itertools.pairwise(points):
        if small <= size <= large:
            part = (size - small) / (large - small) if large > small else 0.0
            return pruned | {"arm": DENSE, "val_ppl": math.exp(worse + part * (better - worse))}
    return None


def claims_table(
    rows: Sequence[Mapping[str, Any]],
    verdict_rows: Sequence[Mapping[str, Any]],
    shares: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict."""
    found = [*_four_times(rows), _hundred(rows), *_student(rows)]
    for words, part in (
        ("distillation makes a better student than the text alone", "student at T"),
        ("pruning while training keeps more than as many zeros at random", GRADUAL),
        ("Wanda prunes better than magnitude", "zeros, wanda"),
    ):
        if row := _pairs(words, part, verdict_rows):
            found.append(row)
    pruned = [r for r in verdict_rows if r["against"] == DENSE and r["low"] is not None]
    if pruned:
        best = min(pruned, key=lambda r: r["loss_difference"])
        wins = sum(r["high"] < 0 for r in pruned)
        told = f"{best['arm']} - {DENSE}: {nats_in_words(best, 3)} nats; beyond the interval in {wins} of {len(pruned)}"
        found.append(claim("zeros beat a smaller dense model of as many bytes", told, wins == len(pruned)))
    return found + [_core(row) for row in shares if row["core_time_share"] is not None]


def _four_times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of plain int8, a scale a row: the best of many files would be lucky. It must be both small and near."""
    found = []
    for row in (r for r in rows if r["arm"] == f"{r['family']}: {INT8}" and upper(r) is not None):
        announced = f"int8 makes {row['family']} 4 times smaller for 1% to 3% of perplexity"
        told = f"{row['arm']}: {row['times_smaller']:.2f} times smaller, PPL x{ratio_in_words(row)}"
        holds = row["times_smaller"] >= FOUR_TIMES and upper(row) <= MOST_OF_IT
        found.append(claim(announced, told, holds if is_judged(row) else None))
    return found


def _hundred(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    announced = "100 times smaller for less than 15% of perplexity"
    within = [r for r in rows if upper(r) is not None and upper(r) <= BELOW and r["times_smaller"]]
    if not within:
        return claim(announced, "no file is within 15%", False)
    best = max(within, key=lambda r: r["times_smaller"])
    told = f"{best['arm']}: {best['times_smaller']:.1f} times smaller, PPL x{ratio_in_words(best)}"
    return claim(announced, told, best["times_smaller"] >= HUNDRED if is_judged(best) else None)


def _student(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for family in dict.fromkeys(r["family"] for r in rows if "student" in r["arm"]):
        own = [r for r in rows if r["family"] == family and "student" in r["arm"] and INT8 not in r["arm"]
               and upper(r) is not None]  # fmt: skip
        if not own:
            continue
        best = min(own, key=upper)
        told = f"{best['arm']}: {best['times_smaller']:.2f} times smaller, PPL x{ratio_in_words(best)}"
        reached = sum(upper(r) <= 1 + BETTER and r["times_smaller"] >= STUDENT for r in own)
        holds = reached == len(own) if is_judged(best) else None
        told += f"; both in {reached} of {len(own)}" if is_judged(best) else ""
        found.append(
            claim(
                f"a distilled {family} is {STUDENT:.2f} times smaller and {BETTER:+.2%} in perplexity",
                told,
                holds,
            )
        )
    return found


def _pairs(announced: str, part: str, verdict_rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Whether every arm of a kind beats all its controls; told is the one that comes nearest."""
    names = [n for n in dict.fromkeys(r["arm"] for r in verdict_rows) if part in n and RANDOM not in n]
    if part == GRADUAL:
        names = [n for n in names if not n.endswith(INT8)]
    own = {n: [r for r in verdict_rows if r["arm"] == n and r["against"] != DENSE] for n in names}
    own = {n: rows for n, rows in own.items() if rows and all(r["loss_difference"] is not None for r in rows)}
    if part == GRADUAL:
        own = {n: [r for r in rows if RANDOM in r["against"]] for n, rows in own.items()}
    if part == "zeros, wanda":
        own = {n: [r for r in rows if "magnitude" in r["against"]] for n, rows in own.items()}
    own = {n: rows for n, rows in own.items() if rows}
    if not own:
        return None
    found = {n: helps(rows, n) for n, rows in own.items()}
    best = min(own, key=lambda n: max(r["loss_difference"] for r in own[n]))
    told = "; ".join(f"{r['arm']} - {r['against']}: {nats_in_words(r, 3)} nats" for r in own[best])
    wins = sum(v is True for v in found.values())
    told += f"; beyond the interval in {wins} of {len(found)}" if None not in found.values() else ""
    return claim(announced, told, None if None in found.values() else wins == len(found))


def _core(row: Mapping[str, Any]) -> dict[str, str]:
    share = row["core_time_share"]
    bound = 1 / max(1 - share, 1e-3)
    told = f"the recursions take {share:.1%} of {row['family']}'s time of scoring: skipped whole, at no cost, x{bound:.3f}"
    # The fastest calls of one seed's model: there is no interval, and so no verdict.
    return claim(
        f"a sparse core makes the model {CORE_SPEED} times faster", f"{told} (one model, no interval)", None
    )
