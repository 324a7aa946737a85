"""Where the contexts of a corpus are kept for phase 2.

By default they are kept as computed, whatever memory is free: arms, seeds and continued runs must read the same numbers,
and half precision moves a loss by as much as arms differ. How much there is decides the number of tokens alone: of every
layer (T L D_c numbers) up to ``LAYERS_BYTES``, else the final ones (T D_c), from which the layers of a batch follow by its
left neighbours. Free memory decides where: on the GPU, in the computer's memory, or in a file, of which the system keeps in
memory as much as it can.

Told what they may take, they are kept in the first of these ways that fits:

    the contexts of every layer, as computed
    the contexts of every layer, in half precision
    the final contexts, as computed, then in half
    the final contexts, in half precision, in a file
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bklm.models import ContextTokenLM
from bklm.training.memory import free_bytes

LAYERS_BYTES = 2 * 2**30  # the contexts of every layer are kept up to this size
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
    """How to keep the contexts of so many tokens: as computed, or in the first way that fits into ``memory_bytes``."""
    device, exact = model.embedding.weight.device, model.embedding.weight.dtype
    here = torch.device("cpu")
    if memory_bytes is None:
        plan = Plan(True, exact, device)
        if plan.bytes(tokens, model) > LAYERS_BYTES:
            plan = Plan(False, exact, device)
        for place in dict.fromkeys((device, here)):
            if plan.bytes(tokens, model) <= SHARE * free_bytes(place):
                return replace(plan, device=place)
        return replace(plan, device=here, on_disk=True)
    # Contexts come out of a LayerNorm: no range is needed, and bfloat16 has 8 times the error.
    half = torch.float16
    for layers in (True, False):
        for dtype in (exact, half):
            plan = Plan(layers, dtype, device)
            if plan.bytes(tokens, model) <= memory_bytes:
                return plan
    return Plan(False, half, here, on_disk=True)


def empty_store(plan: Plan, tokens: int, model: ContextTokenLM) -> Tensor:
    """An uninitialised tensor (tokens, L, D_c) or (tokens, D_c) where the plan says."""
    width, layers = model.config.context_dim, model.config.n_layers
    shape = (tokens, layers, width) if plan.layers else (tokens, width)
    if not plan.on_disk:
        return torch.empty(shape, dtype=plan.dtype, device=plan.device)
    needed, folder = plan.bytes(tokens, model), tempfile.gettempdir()
    free, what = shutil.disk_usage(folder).free, "contexts of every layer" if plan.layers else "final contexts"
    if needed > free:
        raise ValueError(
            f"texts: the {what} of {tokens} tokens take {needed / 2**30:.1f} GiB, more than memory or the "
            f"{free / 2**30:.1f} GiB free in {folder} hold; give fewer tokens, or set TMPDIR to a larger disk."
        )
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  gone with the tensor that maps it
    if hasattr(os, "posix_fallocate"):
        # A mapped file that runs out of disk would kill the process.
        os.posix_fallocate(file.fileno(), 0, needed)
    # By its bytes: numpy has no bfloat16.
    return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(needed,))).view(plan.dtype).view(shape)
