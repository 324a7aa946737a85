"""What the original announced of compression, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import Arm, claim, nats_in_words, verdicts
from bklm.harness.comparison import Trial
from bklm.studies.compression import sparse_core
from bklm.studies.compression.models import GRADUAL, INT8, RANDOM, family_of
from bklm.studies.compression.tables import ARMS, is_judged, ratio_in_words, upper

FOUR_TIMES, MOST_OF_IT = 3.5, 1.03
HUNDRED, BELOW = 100.0, 1.15
STUDENT, BETTER = 2.10, -0.0355
CORE_SPEED = 1.8
NEAR = 0.1  # of a file's bytes, within which another has as many


def judged(trials: Sequence[Trial], arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Paired verdicts: retrained arms and students against their controls; Wanda against magnitude, both against chance.

    Zeros without further training are compared as well with the dense int8 file that is nearest in bytes, if it is ``NEAR``.
    """
    sizes = {row["arm"]: row["file_bytes"] for row in ARMS.rows(trials) if row["file_bytes"]}
    own = {name: arm.against for name, arm in arms.items() if arm.against}
    for name in sorted(sizes):
        for kind, rivals in (("wanda", ("magnitude", "random")), ("magnitude", ("random",))):
            if f"zeros, {kind}," in name:
                against = [name.replace(f", {kind},", f", {rival},") for rival in rivals]
                own[name] = tuple(a for a in against if a in sizes)
        if _is_pruned(name) and (dense := _dense_of_size(name, sizes)):
            own[name] = (*own.get(name, ()), dense)
    return verdicts(ARMS, trials, {name: Arm(None, against) for name, against in own.items()})


def _is_pruned(name: str) -> bool:
    """Zeros that were chosen; a retrained arm had more passes over the text than the dense models."""
    chosen = "zeros" in name and "random" not in name and name.endswith(INT8)
    return chosen and GRADUAL not in name


def _is_dense(name: str) -> bool:
    """Int8 of a trained model, whole or smaller from scratch, and of nothing else."""
    return name == f"{family_of(name)}: {INT8}" or (", width" in name and name.endswith(f": {INT8}"))


def _dense_of_size(pruned: str, sizes: Mapping[str, float]) -> str | None:
    dense = [n for n in sizes if _is_dense(n) and family_of(n) == family_of(pruned)]
    away = {n: abs(sizes[n] / sizes[pruned] - 1) for n in dense}
    nearest = min(dense, key=away.__getitem__, default=None)
    return nearest if nearest and away[nearest] <= NEAR else None


def claims_table(
    rows: Sequence[Mapping[str, Any]],
    verdict_rows: Sequence[Mapping[str, Any]],
    shares: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """Rows announced, measured, verdict."""
    found = [*_four_times(rows), _hundred(rows), *_student(rows)]
    for words, part, rival in (
        ("distillation makes a better student than the text alone", "student at T", ", width"),
        ("pruning while training keeps more than as many zeros at random", GRADUAL, RANDOM),
        ("Wanda prunes better than magnitude", "zeros, wanda", "zeros, magnitude"),
    ):
        if own := [r for r in verdict_rows if part in r["arm"] and rival in r["against"]]:
            found.append(_all_win(words, own))
    if pruned := [r["arm"] for r in rows if _is_pruned(r["arm"])]:
        words = "zeros beat a dense model of as many bytes"
        near = [r for r in verdict_rows if r["arm"] in pruned and _is_dense(r["against"])]
        none = claim(words, f"no dense int8 file lies within {NEAR:.0%} of a pruned file's bytes", None)
        found.append(_all_win(words, near) if near else none)
    return found + [_core(row) for row in shares if row["core_time_share"] is not None] + [_published_core()]


def _all_win(announced: str, own: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Whether every pair of a kind is won beyond its interval; told is the best one, and which gave no verdict."""
    known = sorted((r for r in own if r["loss_difference"] is not None), key=lambda r: r["loss_difference"])
    told = [f"{r['arm']} - {r['against']}: {nats_in_words(r, 3)} nats" for r in known[:1]]
    if all(r["low"] is not None for r in own):
        wins = sum(r["high"] < 0 for r in own)
        told.append(f"beyond the interval in {wins} of {len(own)}")
        return claim(announced, "; ".join(told), wins == len(own))
    lost = [r["arm"] for r in own if r["loss_difference"] is None]
    return claim(announced, "; ".join([*told, *(f"{arm}: a seed diverged" for arm in lost[:1])]), None)


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
    made = [r for r in rows if r["times_smaller"]]
    within = [r for r in made if upper(r) is not None and upper(r) <= BELOW]
    best = max(within, key=lambda r: r["times_smaller"], default=None)
    told = "no file is within 15%"
    if best:
        told = f"{best['arm']}: {best['times_smaller']:.1f} times smaller, PPL x{ratio_in_words(best)}"
        if best["times_smaller"] >= HUNDRED:
            return claim(announced, told, True if is_judged(best) else None)
    # Another that is as small and has no interval might be near.
    open_ones = [r["arm"] for r in made if r["times_smaller"] >= HUNDRED and not is_judged(r)]
    told += "".join(f"; {arm} has no interval" for arm in open_ones[:1])
    return claim(announced, told, None if open_ones or not any(map(is_judged, made)) else False)


def _student(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for family in dict.fromkeys(r["family"] for r in rows if "student" in r["arm"]):
        own = [r for r in rows if r["family"] == family and "student" in r["arm"] and INT8 not in r["arm"]]
        known = sorted((r for r in own if upper(r) is not None), key=upper)
        told = [
            f"{r['arm']}: {r['times_smaller']:.2f} times smaller, PPL x{ratio_in_words(r)}" for r in known[:1]
        ]
        told += [f"{r['arm']}: a seed diverged" for r in own if upper(r) is None][:1]
        holds = None
        if all(map(is_judged, own)):
            reached = sum(upper(r) <= 1 + BETTER and r["times_smaller"] >= STUDENT for r in own)
            holds = reached == len(own)
            told.append(f"both in {reached} of {len(own)}")
        announced = f"a distilled {family} is {STUDENT:.2f} times smaller and {BETTER:+.2%} in perplexity"
        found.append(claim(announced, "; ".join(told), holds))
    return found


def _core(row: Mapping[str, Any]) -> dict[str, str]:
    share = row["core_time_share"]
    bound = 1 / max(1 - share, 1e-3)
    told = f"the recursions take {share:.1%} of {row['family']}'s time of scoring: skipped whole, at no cost, x{bound:.3f}"
    # The fastest calls of one seed's model: there is no interval, and so no verdict.
    return claim(
        f"a sparse core makes the model {CORE_SPEED} times faster", f"{told} (one model, no interval)", None
    )


def _published_core() -> dict[str, str]:
    """The published sparse core against the resolvent: it is run here, on random potentials, and is no approximation of it."""
    rows = sparse_core.published_rows()
    whole = next(r for r in rows if not r["masked"])
    alone, batch = (
        next(r for r in rows if r["batch"] == b and r["masked"] == 0.5) for b in sparse_core.BATCHES
    )
    told = (
        f"the published one, run here: a mean error of {whole['error']:.0%} with nothing masked and of {alone['error']:.0%} "
        f"with half; what is masked in one row is in all, so with {batch['batch']} rows {batch['skipped']:.0%} of the "
        f"positions are, and G differs from 1 by {batch['from_one']:.1g} at most"
    )
    return claim("a sparse core gives the resolvent's diagonal", told, alone["error"] < 0.01)
