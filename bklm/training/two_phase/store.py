"""Where the contexts of a corpus are kept for phase 2, chosen by the memory there is: the first of these that fits.

    the contexts of every layer, as computed             T L D_c numbers
    the contexts of every layer, in half precision
    the final contexts, as computed, then in half        T D_c: the layers of a batch follow from its left neighbours
    the final contexts, in half precision, in a file     the system keeps in memory as much of it as it can

With a GPU, its memory is tried first, then the computer's, both without the file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bklm.models import ContextTokenLM
from bklm.training.memory import free_bytes

SHARE = 0.5  # of the free memory that a cache may take: optimiser, gradients and the batch want the rest


@dataclass(frozen=True)
class Plan:
    """What is kept, and where."""

    layers: bool  # the contexts of every layer, or the final ones alone
    dtype: torch.dtype
    device: torch.device
    on_disk: bool = False

    def bytes(self, tokens: int, model: ContextTokenLM) -> int:
        per_token = model.config.context_dim * (model.config.n_layers if self.layers else 1)
        return tokens * per_token * self.dtype.itemsize

    def __str__(self) -> str:
        what = "contexts of every layer" if self.layers else "final contexts, layers recomputed per batch"
        where = "a file" if self.on_disk else "GPU memory" if self.device.type == "cuda" else "memory"
        return f"{what}, {str(self.dtype).removeprefix('torch.')}, in {where}"


def choose_plan(model: ContextTokenLM, tokens: int, memory_bytes: int | None = None) -> Plan:
    """The first way to keep the contexts of so many tokens that fits into ``memory_bytes`` (None: half of what is free)."""
    device, exact = model.embedding.weight.device, model.embedding.weight.dtype
    # Contexts come out of a LayerNorm: no range is needed, and bfloat16 has 8 times the error.
    half = torch.float16
    here = torch.device("cpu")
    for place in dict.fromkeys((device, here)):
        room = SHARE * free_bytes(place) if memory_bytes is None else memory_bytes
        for layers in (True, False):
            for dtype in (exact, half):
                plan = Plan(layers, dtype, place)
                if plan.bytes(tokens, model) <= room:
                    return plan
    return Plan(False, half, here, on_disk=True)


def empty_store(plan: Plan, tokens: int, model: ContextTokenLM) -> Tensor:
    """An uninitialised tensor (tokens, L, D_c) or (tokens, D_c) where the plan says."""
    width, layers = model.config.context_dim, model.config.n_layers
    shape = (tokens, layers, width) if plan.layers else (tokens, width)
    if not plan.on_disk:
        return torch.empty(shape, dtype=plan.dtype, device=plan.device)
    needed, folder = plan.bytes(tokens, model), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"texts: the final contexts of {tokens} tokens take {needed / 2**30:.1f} GiB, more than memory or the "
            f"{free / 2**30:.1f} GiB free in {folder} hold; give fewer tokens, or set TMPDIR to a larger disk."
        )
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  gone with the tensor that maps it
    if hasattr(os, "posix_fallocate"):
        # A mapped file that runs out of disk would kill the process.
        os.posix_fallocate(file.fileno(), 0, needed)
    return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=shape))
