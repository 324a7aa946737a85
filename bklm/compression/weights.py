"""Weights in 2 to 8 bits: ``quantise`` codes a copy of a model, ``low_rank`` its head."""

from __future__ import annotations

from typing import Any

from bklm.compression.coded_model import (
    codes_of,
    copy_of,
    forget_codes,
    halve_the_rest,
    like,
    matrices,
    model_of,
    outer_names,
    put,
)
from bklm.compression.coding import Factors, Tied, check_finite, factors, integers

HALF = 16  # bits


def quantise(
    model: Any, bits: int = 8, group: int | None = None, *, outer_bits: int | None = None, rest: str = "float16"
) -> Any:
    """A copy whose weights are integers of so many bits with scales; products stay in float32. The model is left as it is.

    It serves every model of ``bklm.models``, tied or not: each tensor is coded where it lies, and a shared one once.
    ``save_compressed`` writes it in that many bits. Not to be confused with ``quantised``; for int8 products of these weights
    see ``bklm.compression.with_int8_products``.

    Args:
        model: a language model, or a run of ``bklm.load``; the result is of the same kind.
        bits: 2 to 8, of every matrix with at least 8 inputs and outputs, but a head of ``low_rank`` or ``tie_head``, which
            keeps its factors; 16: half precision for everything.
        group: inputs that share a scale, such as 32 or 128; None: a scale an output.
        outer_bits: of embeddings and head, where they differ.
        rest: "float16" or "float32", for vectors and small matrices.

    Raises:
        TypeError, ValueError: another kind of model, bits, group or rest outside what is allowed, weights that are not finite.
    """
    plain = model_of(model, "quantise")
    if rest not in ("float16", "float32"):
        raise ValueError(f"rest: got {rest!r}; allowed are 'float16' and 'float32'.")
    if bits == HALF and (group, outer_bits) != (None, None):
        raise ValueError(
            f"bits: got {HALF} with group {group} and outer_bits {outer_bits}; half precision has neither: leave them out, or "
            "give bits 2 to 8."
        )
    check_finite(plain.parameters())
    made = copy_of(plain)
    outer, held = outer_names(made), codes_of(made)
    if bits == HALF:
        forget_codes(made)
    else:
        put(made, {
            name: integers(p, outer_bits if outer_bits is not None and name in outer else bits, group)
            for name, p in matrices(made).items() if not isinstance(held.get(name), Factors | Tied)
        })  # fmt: skip
    if rest == "float16":
        halve_the_rest(made)
    return like(model, made)


def low_rank(model: Any, rank: int, *, bits: int | None = None) -> Any:
    """A copy whose head is a matrix of that rank, kept as its two factors; a tied head's embedding with it.

    The file holds rank (V + D) numbers in place of V D. In memory, and in products, the head stays one matrix.

    Args:
        bits: of the factors' numbers, 2 to 8; None: half precision.

    Raises:
        TypeError, ValueError: another kind of model; a rank outside 1 to the head's smaller side.
    """
    made = copy_of(model_of(model, "low_rank"))
    weight = made.head()[0]
    name = next(n for n, p in made.named_parameters() if p is weight)
    put(made, {name: factors(weight, rank, bits)})
    return like(model, made)
