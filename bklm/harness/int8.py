"""A trained model of a study in int8: size, perplexity and speed, beside what the original planned where it did."""

from __future__ import annotations

from typing import Any

from bklm.compression.int8 import ORIGINAL_PLAN, quantisation_report, quantised, save_quantised
from bklm.files.atomic import replacing
from bklm.harness.report import StudyResult, write_csv
from bklm.harness.text import StudyText

SCORED_TOKENS = 16_384  # of validation text, where a study's settings name no number


def int8_table(result: StudyResult, text: StudyText, model: str = "") -> list[dict[str, Any]]:
    """Quantise one trained model (the best one when ``model`` is empty), write it and the table into the study's folder.

    Scored on as many validation tokens as a study's context lengths are (``context_tokens``). The rows are for people.
    """
    name = model or getattr(result, "best_model", "best_model")
    found = result.load(model or None)
    int8 = quantised(found)
    with replacing(result.folder / f"{name}_int8.safetensors") as temporary:
        save_quantised(int8, temporary)
    batches = list(text.search_val_loader(getattr(result.config, "context_tokens", SCORED_TOKENS)))
    rows = quantisation_report(found, batches, int8=int8, new_tokens=min(64, (found.n_seq or 65) - 1))
    rows = [row for row in rows if result.int8_was_announced or row not in ORIGINAL_PLAN]
    write_csv(result.folder / "int8.csv", [{"model": name, **row.to_dict()} for row in rows])
    return [
        {
            "weights": row.weights,
            "file": "-" if row.file_bytes is None else f"{row.file_bytes / 1e6:.1f} MB",
            "val PPL": _or_dash(row.perplexity, ".2f"),
            "change": _or_dash(row.perplexity_change, "+.2%"),
            "scored tokens/s": _or_dash(row.scored_tokens_per_second, ",.0f"),
            "generated tokens/s": _or_dash(row.generated_tokens_per_second, ",.0f"),
        }
        for row in rows
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
