"""The physics study's tables: arms, verdicts, energies, steps to a loss, stability, memory, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import claim, helps, nats_in_words
from bklm.harness.comparison import Column, Comparison, Trial
from bklm.harness.statistics import Perplexity, interval95
from bklm.training.context_gain import gain_in_words
from bklm.training.stability import largest_rate, steps_to_loss

CONSERVED, COLLAPSED = 0.1, 0.1  # drift over spread; spread over its first value
MEMORY = 1.3  # of the deepest over that of the shallowest
Rows = list[dict[str, Any]]


def _highest_norm(group: Sequence[Trial]) -> float:
    return interval95([max(e["gradient_norm_99"] for e in t["epochs"]) for t in group])[0]


def _comparison(other: str) -> Comparison:
    return Comparison(
        by="arm", title=str, other=other,
        columns=(
            Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
            Column("learning_rate", "learning_rate", "rate"),
            Column("parameters", "parameters", "parameters", ",.0f"),
            Column("gradient_norm_99", _highest_norm, "99% gradient norm", ".3g"),
            Column("embedding_norm", "embedding_norm", "embedding size", ".3f"),
            Column("seconds", "seconds", "seconds", ".1f"),
        ),
    )  # fmt: skip


LOSSES, BLOCKS = _comparison("other term"), _comparison("other block")


def energy_rows(trials: Sequence[Trial], first: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row per arm with an energy: does it drift, does it still tell states apart, and what does it take of the clip?

    Args:
        first: per arm the same measures of its untrained model of the first seed.
    """
    rows = []
    for arm, group in LOSSES.groups(trials).items():
        if arm not in first:
            continue
        row: dict[str, Any] = {"arm": arm}
        for key in ("drift", "spread", "ratio", "gradient_share", "work", "inverse_error"):
            values = [t["energy"].get(key) for t in group]
            row[key] = None if None in values else interval95(values)[0]
        # A published energy begins when the model has learned a while: from there on its spread is its own doing.
        begun = [t["energy"]["trace"][0] for t in group if t["energy"].get("trace")]
        row["first_spread"] = interval95([r["spread"] for r in begun])[0] if begun else first[arm]["spread"]
        ratios = [r["drift"] / r["spread"] for r in begun] or [first[arm].get("ratio", math.nan)]
        row["first_ratio"] = interval95(ratios)[0]
        row["first_share"] = first[arm].get("gradient_share")
        row["spread_kept"] = row["spread"] / row["first_spread"]
        row["conserves"] = row["ratio"] < CONSERVED and row["spread_kept"] >= COLLAPSED
        rows.append(row)
    return rows


def kept_in_words(share: float) -> str:
    """ "42%", or "57 times"."""
    return f"{share:.0%}" if share < 2 else f"{share:.0f} times" if share >= 10 else f"{share:.1f} times"


def readable_energies(rows: Sequence[Mapping[str, Any]]) -> Rows:
    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    return [
        {
            "arm": r["arm"], "drift": number(r["drift"], ".3g"), "spread of E": number(r["spread"], ".3g"),
            "drift / spread, first / last": f"{number(r['first_ratio'])} / {number(r['ratio'])}",
            "spread kept": kept_in_words(r["spread_kept"]),
            "conserves": "yes" if r["conserves"] else "no: collapsed" if r["spread_kept"] < COLLAPSED else "no",
            "share of the gradient, first / last": f"{number(r['first_share'])} / {number(r['gradient_share'])}",
            "drift / spread with the drive": number(r["work"]),
            "inverse's error": number(r["inverse_error"], ".0e"),
        }
        for r in rows
    ]  # fmt: skip


def step_rows(trials: Sequence[Trial], arms: Mapping[str, Any], steps: int, first_loss: float) -> Rows:
    """Steps to the plain model's last loss of the same seed, and paired ratios against every control.

    Args:
        arms: with ``against``; the first is the plain one. steps: of one recorded epoch.
    """
    groups, target = LOSSES.groups(trials), next(iter(arms))
    goals = {t["seed"]: t["epochs"][-1]["val_loss"] for t in groups.get(target, [])}
    taken = {
        arm: {
            t["seed"]: steps_to_loss(t["epochs"], goals[t["seed"]], first_loss)
            for t in group
            if t["seed"] in goals
        }
        for arm, group in groups.items()
    }
    rows = []
    for arm, found in taken.items():
        reached = [n for n in found.values() if n is not None]
        row = {"arm": arm, "reached": len(reached), "seeds": len(goals)}
        row["steps"] = steps * interval95(reached)[0] if reached and len(reached) == len(goals) else None
        for control in arms[arm].against or ((target,) if arm != target else ()):
            other = taken.get(control, {})
            pairs = [(found.get(s), other.get(s)) for s in goals]
            known = bool(pairs) and all(n is not None and m for n, m in pairs)
            ratio = Perplexity.over_seeds([max(n, 1e-9) / m for n, m in pairs]) if known else None
            low, high = ratio.interval if ratio else (None, None)
            rows.append(row | {"against": control, "ratio": ratio and ratio.mean, "low": low, "high": high})
        if arm == target:
            rows.append(row | {"against": "-", "ratio": None, "low": None, "high": None})
    return rows


def readable_steps(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"], "seeds that get there": f"{r['reached']} of {r['seeds']}",
            "steps to the plain model's loss": "-" if r["steps"] is None else f"{r['steps']:,.0f}",
            "against": r["against"],
            "steps over its (95%)": "-" if r["ratio"] is None else str(Perplexity(r["ratio"], r["low"], r["high"])),
        }
        for r in rows
    ]  # fmt: skip


def stability_rows(trials: Sequence[Trial], unigram: float) -> Rows:
    """Per arm the largest rate at which every seed stays finite and below the unigram model."""
    found: dict[str, dict[float, list[float | None]]] = {}
    for t in trials:
        found.setdefault(t["arm"], {}).setdefault(t["learning_rate"], []).append(t["val_ppl"])
    rows = []
    for arm, scores in found.items():
        most, stayed = largest_rate(scores, unigram)
        rows.append({"arm": arm, "largest_rate": most, "seeds": len(next(iter(scores.values())))}
                    | {f"stayed_{rate:g}": count for rate, count in stayed.items()})  # fmt: skip
    return rows


def readable_stability(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {"arm": r["arm"]}
        | {f"rate {k[7:]}": f"{v} of {r['seeds']}" for k, v in r.items() if k.startswith("stayed_")}
        | {"largest stable rate": "none" if r["largest_rate"] is None else f"{r['largest_rate']:g}"}
        for r in rows
    ]


def readable_memory(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {"blocks": r["way"]}
        | {f"{k[6:]} layers, MB": "-" if v is None else f"{v / 1e6:.1f}" for k, v in r.items() if k.startswith("bytes_")}
        | {"deepest / shallowest": "-" if r["growth"] is None else f"{r['growth']:.2f}"}
        for r in rows
    ]  # fmt: skip


def growth(by_layers: Mapping[int, int | None]) -> float | None:
    """Memory at the largest depth over that at the smallest; None where one could not be measured."""
    low, high = by_layers[min(by_layers)], by_layers[max(by_layers)]
    return high / low if low and high else None


def claims_table(found: Mapping[str, Rows]) -> Rows:
    """Announced, measured, verdict. ``found``: rows of "verdicts", "energies", "steps", "stability" and "memory"."""
    rows, judged, steps = [], found["verdicts"], found["steps"]
    words = [f"{r['arm']} - {r['against']}: {nats_in_words(r)} nats" for r in judged]
    helping = {arm: helps(judged, arm) for arm in dict.fromkeys(r["arm"] for r in judged)}
    if "published" in helping:
        told = "; ".join(w for w in words if w.startswith(("published -", "apart -", "mended -")))
        better = [helping[arm] for arm in ("published", "apart", "mended") if arm in helping]
        holds = True if True in better else None if None in better else False
        rows.append(claim("the energy term improves generalisation", told, holds))
    if "conservative" in helping:
        told = "; ".join(w for w in words if w.startswith("conservative -"))
        rows.append(claim("conservative blocks read better", told, helping["conservative"]))
    for r in found["energies"]:
        told = f"drift / spread {r['ratio']:.2f}, spread kept {kept_in_words(r['spread_kept'])}"
        if r["work"] is not None:
            told += f"; with the causal drive {r['work']:.2f}"
        if r["arm"] in ("published", "mended", "conservative"):
            which = r["arm"] if r["work"] is None else f"{r['arm']}, drive off"
            rows.append(claim(f"energy is conserved: {which}", told, r["conserves"]))
    there = {r["arm"]: f"{r['reached']} of {r['seeds']}" for r in steps}
    for arm in ("published", "mended", "conservative"):
        own = [r for r in steps if r["arm"] == arm]
        if own:
            told = "; ".join(f"over {r['against']}'s " + (
                f"no ratio, it gets there in {there[arm]} seeds, that in {there.get(r['against'], 'none')}"
                if r["ratio"] is None else str(Perplexity(r["ratio"], r["low"], r["high"]))) for r in own)  # fmt: skip
            # One that always gets there where a control does not is beyond what a ratio can say.
            arrives = all(r["reached"] == r["seeds"] for r in own)
            slower = not arrives or any(r["high"] is not None and r["high"] >= 1 for r in own)
            faster = all(r["high"] is not None and r["high"] < 1 for r in own)
            rows.append(
                claim(f"faster convergence: {arm}", f"steps {told}", faster or (False if slower else None))
            )
    rates = {r["arm"]: r["largest_rate"] or 0.0 for r in found["stability"]}
    if rates:
        told = "largest rate: " + ", ".join(f"{arm} {rate or 'none'}" for arm, rate in rates.items())
        most = max(rates["conservative"], rates["conservative-clipped"])
        control = max(rate for arm, rate in rates.items() if arm.startswith("plain"))
        rows.append(claim("more stable than the plain model, clipped or not", told, most > control))
    growths = {r["way"]: r["growth"] for r in found["memory"] if r["growth"] is not None}
    if growths:
        told = "deepest over shallowest: " + ", ".join(f"{way} {times:.2f}" for way, times in growths.items())
        rows.append(claim("memory does not grow with depth", told, growths["leapfrog, reversible"] <= MEMORY))
    return rows


def claims_in_words(claims: Sequence[Mapping[str, str]]) -> str:
    """Which of the announced things were found here."""
    by = {
        v: [c["announced"] for c in claims if c["verdict"] == v]
        for v in ("holds", "does not hold", "no verdict")
    }
    words = {"holds": "Found here", "does not hold": "Not found", "no verdict": "Undecided"}
    return "".join(f" {words[v]}: {'; '.join(names)}." for v, names in by.items() if names)


def nearest_decay(trials: Sequence[Trial], size: float) -> float | None:
    """The weight decay whose plain models' embeddings came nearest to a size, by ratio; None where all diverged."""
    groups = Comparison(by="decay", title=str).groups(trials)
    means = {d: interval95([math.log(t["embedding_norm"]) for t in group])[0] for d, group in groups.items()}
    return min(means, key=lambda d: abs(means[d] - math.log(size)), default=None)
