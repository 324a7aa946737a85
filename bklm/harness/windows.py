"""What short windows and no mixer leave of a model's perplexity, a table of every study whose trials measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.comparison import Comparison, Trial, geometric_mean
from bklm.harness.statistics import Perplexity

WINDOW = "val_ppl_context_"


def window_rows(comparison: Comparison, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Perplexity with the mixer off and in windows of the same targets, a row per value of the compared factor (means over
    seeds); [] where no trial holds what ``bklm.training.context_gain`` measures."""
    rows = []
    for value, group in comparison.groups(trials).items():
        known = [t["windows"] for t in group if "windows" in t]
        if len(known) == len(group):
            row = {comparison.by: value, "seeds": len(group)}
            row["val_ppl_mixer_off"] = geometric_mean("mixer_off")(known)
            # A record that was read back has words for keys, one of this process numbers.
            by_length = [{str(n): ppl for n, ppl in w["by_window"].items()} for w in known]
            rows.append(row | {f"{WINDOW}{n}": geometric_mean(n)(by_length) for n in by_length[0]})
    return rows


def readable_windows(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for people."""
    return [
        {comparison.by: comparison.short(row[comparison.by]), "mixer off": _rounded(row["val_ppl_mixer_off"])}
        | {k.removeprefix(WINDOW): _rounded(v) for k, v in row.items() if k.startswith(WINDOW)}
        for row in rows
    ]


def _rounded(perplexity: float | None) -> str:
    return "-" if perplexity is None else str(Perplexity(perplexity, None, None))
