"""The Koopman study's tables: the arms, what a term costs, replaced blocks, recall by distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.harness.step_times import at_equal_seconds as equal_seconds
from bklm.training.context_gain import gain_in_words

LONG = 128  # distances from here on are what "long range" means
SHOWN = 10  # eigenvalues, in the table for people
OWN = 0.1  # a residual below which an eigenvalue is taken for one of the map
CONTROLS = ("original", "mixer off", "skip", "MLP")
LINEAR = "LRU"  # the recurrence that is linear, which claims of one are about


def _lifting(key: str, title: str, form: str = ".2f") -> Column:
    def mean(group: Sequence[Trial]) -> float | None:
        values = [t["lifting"][key] for t in group if key in t["lifting"]]
        if key.endswith("_ppl") and values:
            return Perplexity.over_seeds(values).mean
        return interval95(values)[0] if values else None

    return Column(key, mean, title, form)


ARMS = Comparison(
    by="arm",
    title=str,
    other="other arm",
    columns=(
        Column("context_gain", "context_gain", "context gain", lambda row: gain_in_words(row["context_gain"])),
        _lifting("r2", "R² of K"),
        _lifting("r2_persistence", "R² of no change"),
        _lifting("r2_least_squares", "R² of least squares"),
        _lifting("phi_variance", "variance of phi", ".3g"),
        _lifting("psi_error", "psi's error"),
        _lifting("koopman_ppl", "PPL of the Koopman forward", ".0f"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("seconds", "seconds"),
    ),
)
RECALL = Comparison(
    by="arm", title=str, other="other model",
    columns=(Column("learning_rate", "learning_rate", "rate"), Column("parameters", "parameters", "parameters", ",.0f")),
)  # fmt: skip


def rate_in_words(trials: Sequence[Trial], tried: Sequence[float]) -> str:
    """The learning rate of all arms, and whether the search that found it ended at an edge of what it tried."""
    rate = trials[0]["learning_rate"]
    if len(tried) == 1:
        return f"learning rate {rate:g} for all"
    edge = ", at the edge of these" if rate in (min(tried), max(tried)) else ""
    return (
        f"learning rate {rate:g} for all, the plain model's best of {', '.join(f'{r:g}' for r in tried)}{edge}"
    )


def plain_in_words(trials: Sequence[Trial], tried: Sequence[float]) -> str:
    """What the plain model reaches, at which rate."""
    group = ARMS.groups(trials).get("none")
    return f"The plain model: PPL {ARMS.perplexity(group)}, {rate_in_words(trials, tried)}" if group else ""


def at_equal_seconds(trials: Sequence[Trial], step: Sequence[float], any_of: int) -> list[dict[str, Any]]:
    """A row per arm with the mended term: it and the plain model when both have trained as long. See
    ``bklm.harness.step_times.at_equal_seconds``."""
    groups = ARMS.groups(trials)
    return [
        {"arm": arm, "against": "none, equal seconds"}
        | equal_seconds(group, groups.get("none", []), step, any_of)
        for arm, group in groups.items()
        if arm.startswith("mended")
    ]


def linearised_rows(
    by_seed: Sequence[Sequence[Mapping[str, Any]]], times: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """One row per block and replacement, means over seeds with intervals; those of all blocks also hold times: of one block
    and of a forward to logits, with intervals over the rounds of timing one model. Ratios are for all operators at once."""
    rows = []
    many = len({r["replacement"] for r in by_seed[0]} - set(CONTROLS))
    for group in zip(*by_seed, strict=True):
        first, original = group[0], [next(r for r in s if r["block"] == group[0]["block"]) for s in by_seed]
        ratio = Perplexity.over_seeds(
            [math.exp(r["val_loss"] - o["val_loss"]) for r, o in zip(group, original, strict=True)], many
        )
        gain, half = interval95([r["context_gain_nats"] for r in group])
        kept = [r["context_gain_kept"] for r in group if r["context_gain_kept"] is not None]
        nothing = gain <= (half or 0.0)
        row = {name: first[name] for name in ("block", "replacement")} | {
            "r2": interval95([r["r2"] for r in group])[0]
        }
        row |= {"val_ppl": Perplexity.over_seeds([math.exp(r["val_loss"]) for r in group]).mean, "any_of": many}
        row |= _with_ends("ppl_ratio", ratio, ratio.interval)
        row |= {"context_gain_nats": gain, "context_gain_nats_95": half}
        row |= dict(zip(("context_gain_kept", "context_gain_kept_95"),
                        (None, None) if nothing or not kept else interval95(kept), strict=True))  # fmt: skip
        for prefix, taken in times.items() if first["block"] == "all" else ():
            if own := taken.get(first["replacement"]):
                speed = Perplexity.over_seeds(
                    [b / r for b, r in zip(taken["original"], own, strict=False)], many
                )
                row |= {f"{prefix}milliseconds": 1e3 * sorted(own)[len(own) // 2]}
                row |= _with_ends(f"{prefix}times_faster", speed, (speed.low, speed.high))
        rows.append(row)
    return rows


def _with_ends(
    name: str, found: Perplexity, ends: tuple[float | None, float | None]
) -> dict[str, float | None]:
    return {name: found.mean, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def ratio_of(row: Mapping[str, Any], name: str) -> Perplexity:
    """A ratio with its interval: a row's "ppl_ratio", or "times_faster" with or without "forward_"."""
    return Perplexity(row[name], row[f"{name}_low"], row[f"{name}_high"])


def kept_in_words(row: Mapping[str, Any]) -> str:
    """What is left of the gain from context: "74 ± 3%"; a loss above that of the best model without context is "none", or
    "none shown" where its interval reaches above 0."""
    found, half = row["context_gain_kept"], row["context_gain_kept_95"]
    if found is None:
        return "nothing to keep"
    if found <= 0:
        return "none shown" if half is not None and found + half > 0 else "none"
    return _percent(found, half)


def readable_linearised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a replacement, of all blocks; what each block's own does alone stands in one cell, block by block."""
    many = max(int(r.get("any_of") or 1) for r in rows)
    found = []
    for whole in (r for r in rows if r["block"] == "all"):
        alone = [r for r in rows if r["replacement"] == whole["replacement"] and r["block"] != "all"]
        found.append({
            "replacement": whole["replacement"],
            "R² of the increment, by block": ", ".join(f"{r['r2']:.2f}" for r in alone),
            "PPL ratio, one block": ", ".join(f"{r['ppl_ratio']:.3f}" for r in alone),
            "context gain kept, one block": ", ".join(kept_in_words(r) for r in alone),
            "val PPL, all blocks": f"{whole['val_ppl']:.1f}",
            f"PPL ratio, all blocks (95%{f' for {many} operators at once' * (many > 1)})": str(ratio_of(whole, "ppl_ratio")),
            "context gain kept, all blocks": kept_in_words(whole),
        })  # fmt: skip
    return found


def readable_speed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Times of one model's blocks and their stand-ins; the interval is over rounds of timing it, not over seeds."""

    def cells(row: Mapping[str, Any], prefix: str, what: str) -> dict[str, str]:
        known = row.get(f"{prefix}milliseconds") is not None
        return {
            f"{what}, ms": f"{row[f'{prefix}milliseconds']:.2f}" if known else "-",
            f"{what}, times faster (95% over rounds)": str(ratio_of(row, f"{prefix}times_faster"))
            if known
            else "-",
        }

    return [
        {"replacement": r["replacement"]}
        | cells(r, "", "one block")
        | cells(r, "forward_", "forward to logits")
        for r in rows
        if r["block"] == "all" and r.get("milliseconds") is not None
    ]


def recall_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """``RECALL``'s rows with accuracy_D and accuracy_D_95 of every distance D, None where a model has no such position."""
    rows, groups = RECALL.rows(trials), RECALL.groups(trials)
    for row in rows:
        group = groups.get(row["arm"], [])
        for distance in _distances(trials):
            values = [t["recall"][distance] for t in group]
            known = bool(values) and None not in values
            row |= dict(zip((f"accuracy_{distance}", f"accuracy_{distance}_95"), interval95(values) if known else (None, None),
                            strict=True))  # fmt: skip
    return rows


def recall_in_words(rows: Sequence[Mapping[str, Any]], chance: float) -> str:
    """Every model's accuracy at the longest distance that it can be asked at."""
    places = [k for k in rows[0] if k.startswith("accuracy_") and not k.endswith("_95")]
    told = []
    for row in (r for r in rows if r["seeds"]):
        far = next((k for k in reversed(places) if row[k] is not None), None)
        told.append(f"{row['arm']} {row[far]:.0%} at {far[9:]}" if far else f"{row['arm']} nowhere")
    return f"Recall at the longest distance that was asked: {', '.join(told)}, chance {chance:.0%}"


def _percent(mean: float, half: float | None) -> str:
    return with_interval(100 * mean, None if half is None else 100 * half, 0) + "%"


def _distances(trials: Sequence[Trial]) -> list[str]:
    return next((list(t["recall"]) for t in RECALL.finished(trials)), [])


def readable_recall(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row, words in zip(rows, RECALL.readable(rows), strict=True):
        places = [k for k in row if k.startswith("accuracy_") and not k.endswith("_95")]
        found.append({"model": words.pop("arm"), **words} | {
            f"at {k[9:]}": "-" if row[k] is None else _percent(row[k], row[f"{k}_95"])
            for k in places
        })  # fmt: skip
    return found


def long_range(
    trials: Sequence[Trial], model: str = LINEAR, to: str = "NewLLM"
) -> tuple[float, float | None] | None:
    """Difference of two models' mean accuracy at the distances from LONG on, paired over seeds, with its interval."""
    groups, far = RECALL.groups(trials), [d for d in _distances(trials) if int(d) >= LONG]
    if not far or not {model, to} <= groups.keys():
        return None
    means = {
        name: {t["seed"]: sum(t["recall"][d] for d in far) / len(far) for t in groups[name]} for name in (model, to)
    }  # fmt: skip
    shared = sorted(means[model].keys() & means[to].keys())
    return interval95([means[model][s] - means[to][s] for s in shared]) if shared else None


def has_learned(group: Sequence[Trial], chance: float) -> bool:
    """Whether a model answers better than chance at the shortest distance, beyond its interval: else it never learned the
    task, and says nothing about distance."""
    shortest = min(group[0]["recall"], key=int)
    mean, half = interval95([t["recall"][shortest] for t in group])
    return half is not None and mean - half > chance


def readable_spectrum(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The eigenvalues of the smallest residuals, a conjugate pair once."""
    upper = sorted((r for r in rows if r["imaginary"] >= 0), key=lambda r: r["residual"])
    return [
        {"eigenvalue": f"{r['real']:.3f}" + f" ± {r['imaginary']:.3f} i" * (r["imaginary"] > 0),
         "modulus": f"{r['modulus']:.3f}", "residual, held-out": f"{r['residual']:.3f}"}
        for r in upper[:SHOWN]
    ]  # fmt: skip


def spectrum_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many eigenvalues can be told from artefacts of the dictionary."""
    upper = [r for r in rows if r["imaginary"] >= 0]
    near = [r for r in upper if r["residual"] < OWN]
    least, told = min(r["residual"] for r in upper), f"{len(near)} of {len(upper)} eigenvalues"
    return (
        f"The block that is repeated at every depth: {told} have a residual below {OWN:g} on held-out text, the smallest is "
        f"{least:.2f}; near 1 an eigenvalue is an artefact of the dictionary"
    )


def shares_in_words(times: Mapping[str, Sequence[float]], outer: float) -> str:
    """The two shares that bound every speed-up and every saving by the blocks; times of all blocks, and of a forward."""
    part = interval95([b / w for b, w in zip(times["all blocks"], times["original"], strict=False)])[0]
    return (
        f"Embedding and head hold {outer:.0%} of the parameters, and the blocks take {part:.0%} of the time of a forward to "
        f"logits: blocks that cost nothing would make it {1 / max(1 - part, 0.01):.1f} times faster at most."
    )
