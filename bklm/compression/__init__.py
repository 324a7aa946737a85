"""Smaller models: int8 copies, what they cost in perplexity, and the files that hold them."""

from bklm.compression.int8 import (
    QuantisationRow,
    load_quantised,
    quantisation_report,
    quantised,
    save_quantised,
    with_float_products,
)

__all__ = [
    "QuantisationRow",
    "load_quantised",
    "quantisation_report",
    "quantised",
    "save_quantised",
    "with_float_products",
]
