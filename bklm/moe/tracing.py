"""Whether a tensor has values to compute with, or something looks on: a transform, a tracer, a compiler."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
"""Of the vmap older than torch.func, which torch.autograd itself still maps with: its tensors show no other sign."""


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func, forward mode, torch.jit.trace or a batched gradient is at work: then values cannot be read."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    return any(t is not None and _is_legacy_batched(t) for t in tensors)


def is_ordinary(x: Tensor) -> bool:
    """Whether x has values and nothing traces it: no compiler, no fake or meta tensor, no dispatch mode, no subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
