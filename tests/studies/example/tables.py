"""The example study's table: one row per dropout."""

from __future__ import annotations

from bklm.harness.comparison import Column, Comparison

DROPOUTS = Comparison(
    by="dropout",
    title="dropout {:g}".format,
    short="{:g}".format,
    other="other dropout",
    order=lambda trial: trial["dropout"],
    columns=(
        Column("accuracy", "val_accuracy", "accuracy", ".1%"),
        Column("seconds", "seconds", "seconds", ".1f", spread=True),
    ),
)
