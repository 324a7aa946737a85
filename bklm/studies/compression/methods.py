"""What is done to a trained model without training: every way to keep it smaller, scored and weighed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bklm.compression import (
    CannotServeError,
    low_rank,
    prune,
    pruned_to,
    quantise,
    quantised,
    remove_experts,
    save_quantised,
    skip_blocks,
    tie_head,
    with_int8_products,
)
from bklm.compression.calibration import first_batches
from bklm.compression.pruning import METHODS
from bklm.harness.session import Session
from bklm.models import LanguageModel
from bklm.studies.compression.config import CompressionConfig
from bklm.studies.compression.models import (
    EXPERTS,
    GROUP,
    INT8,
    families,
    half_of_experts,
    load_model,
    percent,
    score,
    sizes,
    smaller,
)

TORCH_AO = "int8 products, torch.ao"
PRODUCTS = "int8 products, "
KEYS = {
    "val_ppl": float, "seconds": float, "parameters": int, "file_bytes": int, "packed_file_bytes": int,
    "context_gain": float | None,
}  # fmt: skip
Method = Callable[[LanguageModel, Sequence[Any]], LanguageModel]


def sources(config: CompressionConfig) -> list[str]:
    """The trained models that something is done to: the whole ones, and smaller ones from scratch."""
    small = [f"{family}, {name}" for family in families(config) for name in smaller(config, family)]
    return [*families(config), *small]


def methods_of(config: CompressionConfig, source: str, folder: Path, seed: int = 0) -> dict[str, Method]:
    """Every method by name but int8, which every trained model is measured in; each takes a model and calibration batches.

    Fewer than 8 bits are tried on smaller models and with part of the experts as well, where the smallest files come from.

    Args:
        folder: the study's, with the models whose bytes zeros are brought to.
        seed: of random zeros, and of these models.
    """
    few = {b: _in_groups(b) for b in dict.fromkeys((4, min(config.bits))) if b in config.bits and b < 8}
    if source == EXPERTS:
        keep, left = half_of_experts(config), f"{half_of_experts(config)} experts left"
        kept = {
            f"{left}, {name}": lambda m, text, b=b, g=g: quantise(remove_experts(m, keep, text), b, g)
            for b, g, name in ((8, None, INT8), *((b, GROUP, name) for b, name in few.items()))
        }
        return kept | {name: lambda m, text, b=b: quantise(m, b, GROUP) for b, name in few.items()}
    if source not in families(config):
        return {name: lambda m, text, b=b: quantise(m, b, GROUP) for b, name in few.items()}
    found: dict[str, Method] = {"float16": lambda m, text: quantise(m, 16)}
    for bits in config.bits:
        for group in config.groups:
            name = f"int{bits}" if not group else f"int{bits} in groups of {group}"
            # int8 with a scale a row is what every trained model is measured in.
            if group < config.widest_input(source) and name != INT8:
                found[name] = lambda m, text, b=bits, g=group: quantise(m, b, g or None)
    return found | products_of(config) | _zeros(config, source, folder, seed) | _fewer_parts(config, source)


def _in_groups(bits: int) -> str:
    return f"int{bits} in groups of {GROUP}"


def _zeros(config: CompressionConfig, source: str, folder: Path, seed: int) -> dict[str, Method]:
    found: dict[str, Method] = {}
    for sparsity in config.sparsities:
        for method in METHODS:
            found[f"{percent(sparsity)} zeros, {method}, int8"] = lambda m, text, s=sparsity, k=method: (
                quantise(prune(m, s, k, calibration=text, seed=seed))
            )
    # One size: of the next one the mask and the scales alone take most of the bytes.
    width = f"width {config.widths[0]:g}"

    def made(model: LanguageModel, text: Any) -> LanguageModel:
        size = sizes(quantise(load_model(folder, config, f"{source}, {width}", seed)))
        return pruned_to(model, size["file_bytes"])

    found[f"zeros everywhere, as small as {width}, int8"] = made
    return found


def _fewer_parts(config: CompressionConfig, source: str) -> dict[str, Method]:
    found: dict[str, Method] = {}
    for share, bits in itertools.product((2, 4), (8, 4)):
        if bits in config.bits:
            rest = INT8 if bits == 8 else _in_groups(bits)
            found[f"head of rank 1/{share}, {rest}"] = lambda m, text, s=share, b=bits: quantise(
                low_rank(m, max(1, min(m.head()[0].shape) // s), bits=b), b, None if b == 8 else GROUP
            )
    if source == "NewLLM":
        # The others' is tied from the start.
        found["tied head, int8"] = lambda m, text: quantise(tie_head(m))
        if 4 in config.bits:
            found[f"tied head, {_in_groups(4)}"] = lambda m, text: quantise(tie_head(m), 4, GROUP)
    elif count := config.n_layers - config.n_layers // 2 if config.n_layers > 1 else 0:
        found[f"{count} block{'s' * (count > 1)} skipped, int8"] = lambda m, text: quantise(
            skip_blocks(m, count, text)
        )
    return found


def products_of(config: CompressionConfig) -> dict[str, Method]:
    """Ways to multiply in int8: the head as well, as torch.ao does it, but for the one whose name says otherwise."""
    return {
        TORCH_AO: lambda m, text: quantised(m),
        f"{PRODUCTS}per tensor": lambda m, text: with_int8_products(m, "tensor", head=True),
        f"{PRODUCTS}per token": lambda m, text: with_int8_products(m, head=True),
        f"{PRODUCTS}per token, head in float": lambda m, text: with_int8_products(m, head=False),
        f"{PRODUCTS}SmoothQuant": lambda m, text: with_int8_products(
            m, smooth=config.smooth, calibration=text, head=True
        ),
        f"{PRODUCTS}outlier columns": lambda m, text: with_int8_products(
            m, outliers=config.outliers, calibration=text, head=True
        ),
    }


def measure(study: Session, source: str, name: str, seed: int) -> dict[str, Any]:
    """What a method makes of the trained model of a seed; where it cannot serve that model, its sentence as the reason."""
    config, text = study.config, study.text
    started = time.perf_counter()
    model = load_model(study.folder, config, source, seed)
    batches = first_batches(text.train_loader(seed=0), config.calibration_tokens)
    try:
        made = methods_of(config, source, study.folder, seed)[name](model, batches)
    except CannotServeError as error:
        return {"val_ppl": None, "reason": str(error), "seconds": time.perf_counter() - started}
    weighed = sizes(made, save_quantised) if name == TORCH_AO else sizes(made)
    scored = score(made, text, "cpu" if name.startswith(PRODUCTS) else study.accelerator.device)
    own = {"parameters": made.num_parameters(), **weighed, **scored}
    return own | {"seconds": time.perf_counter() - started, "epochs": []}
