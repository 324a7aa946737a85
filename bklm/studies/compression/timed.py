"""Tables of time: tokens a second over float32's in the same rounds, and the two shares that bound what blocks can save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.statistics import Perplexity
from bklm.studies.compression.speed import CORE, FLOAT, HIDDEN, PER_TOKEN, TORCHAO
from bklm.studies.compression.tables import megabytes

SEEN = 0.01  # a share of time that a busy machine does not hide


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Perplexity:
    """How many times faster, with its interval over rounds that both were timed in."""
    return Perplexity.over_seeds([a / b for a, b in zip(slow, fast, strict=False)])


def speed_rows(
    models: Mapping[str, Mapping[str, Any]], files: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Per model and arm: tokens a second, over float32's in the same rounds; perplexity and bytes where a file is known."""
    known = {r["arm"]: r for r in files}
    rows = []
    for family, found in models.items():
        for arm, seconds in found["generated"].items():
            scored, written = found["scored"], found["generated"]
            faster, written_faster = ratio(scored[FLOAT], scored[arm]), ratio(written[FLOAT], seconds)
            file = known.get(_file_of(family, arm), {})
            rows.append({
                "family": family, "arm": arm, "val_ppl": found["val_ppl"].get(arm) or file.get("val_ppl"),
                "file_bytes": file.get("file_bytes"),
                "scored_tokens_per_second": found["tokens"] / _typical(scored[arm]),
                "generated_tokens_per_second": found["written"] / _typical(seconds),
                "times_faster": faster.mean, "times_faster_low": faster.low, "times_faster_high": faster.high,
                "written_times_faster": written_faster.mean, "written_times_faster_low": written_faster.low,
                "written_times_faster_high": written_faster.high,
            })  # fmt: skip
    return rows


def _typical(seconds: Sequence[float]) -> float:
    """The geometric mean, so that two columns of tokens a second have the ratio that stands beside them."""
    return Perplexity.over_seeds(seconds).mean


def _file_of(family: str, arm: str) -> str:
    if arm == FLOAT:
        return family
    return f"{family}: {arm}" if "products" in arm else f"{family}, {arm}"


def readable_speed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": r["family"], "products": r["arm"],
            "val PPL": "-" if r["val_ppl"] is None else f"{r['val_ppl']:.2f}" + " (one seed)" * (r["arm"] == TORCHAO),
            "file": megabytes(r.get("file_bytes")),
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
        core = ratio(found["scored"][CORE], found["scored"][FLOAT]) if CORE in parts else None
        rows.append({
            "family": family, "outer_parameter_share": found["outer_share"], "head_time_share": 1 - parts[HIDDEN],
            "core_time_share": parts.get(CORE), "core_time_share_high": core and core.high,
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


def speed_headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure's title: int8 products with a scale a token, of the first model, in both uses; the fastest of many would be
    a lucky one."""
    own = next((r for r in rows if r["arm"] == PER_TOKEN), None)
    if own is None:
        return "No model was timed"
    told = []
    for does, key in (("score", "times_faster"), ("write", "written_times_faster")):
        low, high = own[f"{key}_low"], own[f"{key}_high"]
        found = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
        told.append(f"{does} x{own[key]:.2f} ({low:.2f} to {high:.2f}), {found}")
    return f"{own['family']}, beside float32: int8 products per token {', and '.join(told)}"
