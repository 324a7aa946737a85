"""The Koopman study's tables: the arms, replaced blocks, recall by distance, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Column, Comparison, Trial
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.training.context_gain import gain_in_words

LONG = 128  # distances from here on are what "long range" means


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
        Column("seconds", "seconds", "seconds", ".1f"),
    ),
)
RECALL = Comparison(
    by="arm", title=str, other="other model",
    columns=(Column("learning_rate", "learning_rate", "rate"), Column("parameters", "parameters", "parameters", ",.0f")),
)  # fmt: skip


def linearised_rows(
    by_seed: Sequence[Sequence[Mapping[str, Any]]], times: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """One row per block and replacement: means over seeds with intervals, and the time of a block over its stand-in's."""
    rows = []
    for group in zip(*by_seed, strict=True):
        first, original = group[0], [next(r for r in s if r["block"] == group[0]["block"]) for s in by_seed]
        ratio = Perplexity.over_seeds(
            [math.exp(r["val_loss"] - o["val_loss"]) for r, o in zip(group, original, strict=True)]
        )
        gain, half = interval95([r["context_gain_nats"] for r in group])
        kept = [r["context_gain_kept"] for r in group if r["context_gain_kept"] is not None]
        nothing = gain <= (half or 0.0)
        row = {
            "block": first["block"],
            "replacement": first["replacement"],
            "r2": interval95([r["r2"] for r in group])[0],
        }
        row |= {"val_ppl": Perplexity.over_seeds([math.exp(r["val_loss"]) for r in group]).mean}
        row |= {
            "ppl_ratio": ratio.mean,
            **dict(zip(("ppl_ratio_low", "ppl_ratio_high"), ratio.interval, strict=True)),
        }
        row |= {"context_gain_nats": gain, "context_gain_nats_95": half}
        row |= dict(zip(("context_gain_kept", "context_gain_kept_95"),
                        (None, None) if nothing or not kept else interval95(kept), strict=True))  # fmt: skip
        if first["replacement"] in times:
            speed = Perplexity.over_seeds(
                [b / r for b, r in zip(times["original"], times[first["replacement"]], strict=False)]
            )
            row |= {
                "milliseconds": 1e3 * sorted(times[first["replacement"]])[len(times[first["replacement"]]) // 2]
            }
            row |= {"times_faster": speed.mean, "times_faster_low": speed.low, "times_faster_high": speed.high}
        rows.append(row)
    return rows


def ppl_ratio(row: Mapping[str, Any]) -> Perplexity:
    """A replacement's perplexity over the original's on the same seeds."""
    return Perplexity(row["ppl_ratio"], row["ppl_ratio_low"], row["ppl_ratio_high"])


def readable_linearised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def kept(row: Mapping[str, Any]) -> str:
        found = row["context_gain_kept"]
        return "nothing to keep" if found is None else with_interval(found, row["context_gain_kept_95"], 2)

    return [
        {
            "block": r["block"], "replacement": r["replacement"], "R² of the increment": f"{r['r2']:.3f}",
            "val PPL": f"{r['val_ppl']:.1f}",
            "PPL ratio (95%)": str(ppl_ratio(r)),
            "context gain kept": kept(r),
            "ms": f"{r['milliseconds']:.2f}" if r.get("milliseconds") is not None else "-",
            "times faster (95%)": str(Perplexity(r["times_faster"], r["times_faster_low"], r["times_faster_high"]))
            if r.get("times_faster") is not None else "-",
        }
        for r in rows
    ]  # fmt: skip


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


def recall_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every model's accuracy at the longest distance that it can be asked at."""
    places = [k for k in rows[0] if k.startswith("accuracy_") and not k.endswith("_95")]
    told = []
    for row in (r for r in rows if r["seeds"]):
        far = next((k for k in reversed(places) if row[k] is not None), None)
        told.append(f"{row['arm']} {row[far]:.0%} at {far[9:]}" if far else f"{row['arm']} nowhere")
    return f"Recall at the longest distance that was asked: {', '.join(told)}"


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
    trials: Sequence[Trial], model: str = "LinearContext", to: str = "NewLLM"
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


def shares_in_words(times: Mapping[str, Sequence[float]], outer: float) -> str:
    """The two shares that bound every speed-up and every saving by the blocks."""
    part = interval95([b / w for b, w in zip(times["blocks"], times["whole"], strict=False)])[0]
    return (
        f"Embedding and head hold {outer:.0%} of the parameters, and the blocks take {part:.0%} of the time of a forward to "
        f"logits: blocks that cost nothing would make it {1 / max(1 - part, 0.01):.1f} times faster at most."
    )
