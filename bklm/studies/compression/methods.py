"""What is done to a trained model without training: every way to keep it smaller, scored and weighed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bklm.compression import (
    low_rank,
    prune,
    quantise,
    quantised,
    remove_experts,
    save_quantised,
    skip_blocks,
    tie_head,
    with_int8_products,
)
from bklm.compression.calibration import first_batches
from bklm.harness.session import Session
from bklm.models import LanguageModel
from bklm.studies.compression.config import CompressionConfig
from bklm.studies.compression.models import EXPERTS, INT8, load_model, score, sizes

TORCH_AO = "int8 products, torch.ao"
PRODUCTS = "int8 products, "
KEYS = {"val_ppl": float, "seconds": float, "epochs": list, "methods": list}
Method = Callable[[LanguageModel, Sequence[Any]], LanguageModel]


def methods_of(config: CompressionConfig, family: str, seed: int = 0) -> dict[str, Method]:
    """Every method by name but int8, which every trained model is measured in; each takes a model and calibration batches.

    The seed is of random zeros.
    """
    if family == EXPERTS:
        left = sorted({config.num_experts - 1, max(2, config.num_experts // 2)}, reverse=True)
        return {
            f"{keep} experts left, int8": lambda m, text, keep=keep: quantise(remove_experts(m, keep, text))
            for keep in left
        }
    found: dict[str, Method] = {"float16": lambda m, text: quantise(m, 16)}
    for bits in config.bits:
        for group in config.groups:
            name = f"int{bits}" if not group else f"int{bits} in groups of {group}"
            if name != INT8 and group < config.widest_input(family):
                found[name] = lambda m, text, b=bits, g=group: quantise(m, b, g or None)
    found |= products_of(config)
    for sparsity in config.sparsities:
        for method in ("magnitude", "wanda", "random"):
            found[f"{sparsity:.0%} zeros, {method}, int8"] = lambda m, text, s=sparsity, k=method: quantise(
                prune(m, s, k, calibration=text, seed=seed)
            )
        found[f"{sparsity:.0%} zeros everywhere, magnitude, int8"] = lambda m, text, s=sparsity: quantise(
            prune(m, s, scope="all")
        )
    for share in (2, 4):
        found[f"head of rank 1/{share}, int8"] = lambda m, text, s=share: quantise(
            low_rank(m, max(1, min(m.head()[0].shape) // s), bits=8)
        )
    if family == "NewLLM":
        # The others' is tied from the start.
        found["tied head, int8"] = lambda m, text: quantise(tie_head(m))
    else:
        for count in sorted({1, config.n_layers // 2} & set(range(1, config.n_layers))):
            found[f"{count} block{'s' * (count > 1)} skipped, int8"] = lambda m, text, c=count: quantise(
                skip_blocks(m, c, text)
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


def measure_methods(study: Session, family: str, seed: int) -> dict[str, Any]:
    """One record with what every method makes of the trained model of a seed."""
    config, text = study.config, study.text
    started = time.perf_counter()
    model = load_model(study.folder, config, family, seed)
    batches, device = (
        first_batches(text.train_loader(seed=0), config.calibration_tokens),
        study.accelerator.device,
    )
    rows = []
    for name, method in methods_of(config, family, seed).items():
        made = method(model, batches)
        multiplies = name.startswith(PRODUCTS)
        weighed = sizes(made, save_quantised) if name == TORCH_AO else sizes(made)
        scored = score(made, text, "cpu" if multiplies else device)
        rows.append({"name": name, "parameters": made.num_parameters(), **weighed, **scored})
    whole = score(model, text, device)["val_ppl"]
    return {"val_ppl": whole, "seconds": time.perf_counter() - started, "epochs": [], "methods": rows}
