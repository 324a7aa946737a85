"""What the original announced of compression, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import Arm, claim, helps, nats_in_words, verdicts
from bklm.harness.comparison import Trial
from bklm.studies.compression.models import GRADUAL, INT8, RANDOM
from bklm.studies.compression.tables import ARMS, is_judged, ratio_in_words, upper

FOUR_TIMES, MOST_OF_IT = 3.5, 1.03
HUNDRED, BELOW = 100.0, 1.15
STUDENT, BETTER = 2.10, -0.0355
CORE_SPEED = 1.8


def judged(trials: Sequence[Trial], arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Paired verdicts: retrained arms and students against their controls; Wanda against magnitude, both against chance."""
    names = {t["arm"] for t in trials}
    own = {name: arm for name, arm in arms.items() if arm.against}
    for name in sorted(names):
        for kind, rivals in (("wanda", ("magnitude", "random")), ("magnitude", ("random",))):
            if f"zeros, {kind}," in name:
                against = [name.replace(f", {kind},", f", {rival},") for rival in rivals]
                own[name] = Arm(None, tuple(a for a in against if a in names))
    for name in list(dict.fromkeys(t["arm"] for t in trials)):
        if _is_pruned(name) and (rival := _dense_of_size(trials, name)):
            before = own[name].against if name in own else ()
            own[name] = Arm(None, (*before, rival))
    return verdicts(ARMS, trials, own)


def _is_pruned(name: str) -> bool:
    return "zeros" in name and "random" not in name and name.endswith(INT8)


def _dense_of_size(trials: Sequence[Trial], name: str) -> str | None:
    """The largest smaller model in int8 whose file is not above a pruned one's, of the same kind."""
    sizes = {t["arm"]: t["file_bytes"] for t in trials if t["val_ppl"] is not None}
    family = name.partition(":")[0].partition(",")[0]
    fit = [
        arm for arm, size in sizes.items()
        if arm.startswith(f"{family}, width") and arm.endswith(INT8) and name in sizes and size <= sizes[name]
    ]  # fmt: skip
    return max(fit, key=sizes.__getitem__, default=None)


def claims_table(
    rows: Sequence[Mapping[str, Any]],
    verdict_rows: Sequence[Mapping[str, Any]],
    shares: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict."""
    found = [*_four_times(rows), _hundred(rows, shares), *_student(rows)]
    for words, part in (
        ("distillation makes a better student than the text alone", "student at T"),
        ("pruning while training keeps more than as many zeros at random", GRADUAL),
        ("Wanda prunes better than magnitude", "zeros, wanda"),
    ):
        if row := _pairs(words, part, verdict_rows):
            found.append(row)
    pruned = [
        r
        for r in verdict_rows
        if r["arm"].endswith(INT8) and ", width" in r["against"] and r["low"] is not None
    ]
    if pruned:
        best = min(pruned, key=lambda r: r["loss_difference"])
        told = (
            f"{best['arm']} - {best['against']}: {nats_in_words(best, 3)} nats, the best of {len(pruned)} pairs"
        )
        found.append(claim("zeros beat a smaller dense model of no more bytes", told, best["high"] < 0))
    return found + [_core(row) for row in shares if row["core_time_share"] is not None]


def _four_times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same arm must be small and near: of the small ones the nearest is shown."""
    found = []
    for family in dict.fromkeys(r["family"] for r in rows):
        small = [r for r in rows if r["arm"].startswith(f"{family}: {INT8}") and upper(r) is not None
                 and (r["times_smaller"] or 0) >= FOUR_TIMES]  # fmt: skip
        announced = f"int8 makes {family} 4 times smaller for 1% to 3% of perplexity"
        if not small:
            found.append(claim(announced, f"no int8 file is {FOUR_TIMES} times smaller", False))
            continue
        best = min(small, key=upper)
        told = f"{best['arm']}: {best['times_smaller']:.2f} times smaller, PPL x{ratio_in_words(best)}"
        found.append(claim(announced, told, upper(best) <= MOST_OF_IT if is_judged(best) else None))
    return found


def _hundred(rows: Sequence[Mapping[str, Any]], shares: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    announced = "100 times smaller for less than 15% of perplexity"
    within = [r for r in rows if upper(r) is not None and upper(r) <= BELOW and r["times_smaller"]]
    if not within:
        return claim(announced, "no file is within 15%", False)
    best = max(within, key=lambda r: r["times_smaller"])
    told = f"{best['arm']}: {best['times_smaller']:.1f} times smaller, PPL x{ratio_in_words(best)}"
    bound = next((s["outer_parameter_share"] for s in shares if s["family"] == best["family"]), None)
    if bound:
        told += (
            f"; embedding and head alone are {bound:.0%}: blocks of no bytes are {1 / bound:.2f} times at most"
        )
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
        holds = upper(best) < 1 and best["times_smaller"] >= STUDENT if is_judged(best) else None
        found.append(
            claim(
                f"a distilled {family} is {STUDENT:.2f} times smaller and {BETTER:+.2%} in perplexity",
                told,
                holds,
            )
        )
    return found


def _pairs(announced: str, part: str, verdict_rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Whether any arm of a kind beats all its controls; told is the one that comes nearest."""
    names = [n for n in dict.fromkeys(r["arm"] for r in verdict_rows) if part in n and RANDOM not in n]
    if part == GRADUAL:
        names = [n for n in names if not n.endswith(INT8)]
    own = {
        n: [
            r
            for r in verdict_rows
            if r["arm"] == n and ", width" not in (r["against"] if part != "student at T" else "")
        ]
        for n in names
    }
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
    return claim(announced, told, None if None in found.values() else wins > 0)


def _core(row: Mapping[str, Any]) -> dict[str, str]:
    share = row["core_time_share"]
    bound = 1 / max(1 - share, 1e-3)
    told = f"the recursions take {share:.1%} of {row['family']}'s time of scoring: skipped whole, at no cost, x{bound:.3f}"
    # A call that took longer than the whole that it is a part of was disturbed.
    return claim(
        f"a sparse core makes the model {CORE_SPEED} times faster",
        told,
        None if share >= 1 else bound >= CORE_SPEED,
    )
