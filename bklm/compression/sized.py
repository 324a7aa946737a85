"""Zeros to a size: as many as make a model's file as small as another's, so that both can be compared at equal bytes."""

from __future__ import annotations

from typing import Any

from bklm.compression.coding import CannotServeError
from bklm.compression.pruning import prune
from bklm.compression.saving import file_sizes
from bklm.compression.weights import quantise

NEAR = 0.01  # of the bytes
MOST_ZEROS = 0.95
ENDS = (0.3, MOST_ZEROS)  # sparsities that a mask pays at, and that leave something


def pruned_to(
    model: Any, file_bytes: int, *, bits: int = 8, method: str = "magnitude", scope: str = "all"
) -> Any:
    """A copy in ``bits`` bits with the zeros of ``prune`` that make its file ``file_bytes`` bytes, within a hundredth.

    The bytes of a coded matrix fall in proportion to its zeros, so two files tell the sparsity of the third.

    Args:
        model: a language model, or a run of ``bklm.load``; the result is of the same kind.
        method, scope: as ``prune`` takes them, but no method that needs a text.

    Raises:
        TypeError, ValueError: as ``prune`` and ``quantise``. CannotServeError: a size that no sparsity between ENDS gives.
    """

    sparsity = sparsity_of_size(model, file_bytes, bits=bits, method=method, scope=scope)
    found = quantise(prune(model, sparsity, method, scope=scope), bits)
    if abs(file_sizes(found)[0] / file_bytes - 1) > NEAR:
        raise CannotServeError(
            f"file_bytes: got {file_bytes:,}, and the nearest file has {file_sizes(found)[0]:,}; give another."
        )
    return found


def sparsity_of_size(
    model: Any, file_bytes: int, *, bits: int = 8, method: str = "magnitude", scope: str = "all"
) -> float:
    """The share of zeros with which ``pruned_to`` makes a file of ``file_bytes`` bytes.

    Raises:
        TypeError, ValueError: as ``prune`` and ``quantise``. CannotServeError: a size that no sparsity between ENDS gives.
    """
    few, many = (
        file_sizes(quantise(prune(model, sparsity, method, scope=scope), bits))[0] for sparsity in ENDS
    )
    share = (few - file_bytes) / max(1, few - many)
    if not 0.0 <= share <= 1.0:
        raise CannotServeError(
            f"file_bytes: got {file_bytes:,}; with {ENDS[0]:.0%} to {ENDS[1]:.0%} zeros in {bits} bits this model's file has "
            f"{few:,} to {many:,} bytes: give a size between them."
        )
    return ENDS[0] + share * (ENDS[1] - ENDS[0])
