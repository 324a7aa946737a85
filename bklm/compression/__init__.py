"""Smaller models: few bits, zeros, low rank, fewer parts, students; what each costs, and the files that hold them."""

from bklm.compression.activations import with_int8_products
from bklm.compression.coding import CannotServeError
from bklm.compression.distilling import Distilled, distil
from bklm.compression.gating import GatedBlocks
from bklm.compression.int8 import (
    QuantisationRow,
    load_quantised,
    quantisation_report,
    quantised,
    save_quantised,
    with_float_products,
)
from bklm.compression.pruning import prune
from bklm.compression.retraining import PrunedModel, RoundedModel, baked
from bklm.compression.saving import file_sizes, load_compressed, save_compressed
from bklm.compression.sized import pruned_to
from bklm.compression.structure import narrower, remove_experts, skip_blocks
from bklm.compression.tying import TiedModel, tie_head
from bklm.compression.weights import low_rank, quantise

__all__ = [
    "CannotServeError",
    "Distilled",
    "GatedBlocks",
    "PrunedModel",
    "QuantisationRow",
    "RoundedModel",
    "TiedModel",
    "baked",
    "distil",
    "file_sizes",
    "load_compressed",
    "load_quantised",
    "low_rank",
    "narrower",
    "prune",
    "pruned_to",
    "quantisation_report",
    "quantise",
    "quantised",
    "remove_experts",
    "save_compressed",
    "save_quantised",
    "skip_blocks",
    "tie_head",
    "with_float_products",
    "with_int8_products",
]
