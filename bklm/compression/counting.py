"""The size of a count model's file: what a compressed language model is to be compared with."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from bklm.compression.saving import sizes_of
from bklm.data.baselines import KneserNey

UNSIGNED = (np.uint8, np.uint16, np.uint32, np.uint64)


def count_model_sizes(model: KneserNey) -> tuple[int, int]:
    """Bytes of a fitted model's file, and of that file packed by zlib.

    The file holds all that scoring reads: sorted keys as differences in the smallest unsigned type, the rest in float32.
    """
    tensors = {}
    for i, level in enumerate(model.levels):
        histories = level.histories()
        steps = np.diff(histories * model.vocab_size + level.words, prepend=0)
        kind = next(t for t in UNSIGNED if steps.max() <= np.iinfo(t).max)
        # As bytes: not every version of torch has all unsigned types.
        tensors[f"{i}.keys.{np.dtype(kind).name}"] = torch.from_numpy(steps.astype(kind).view(np.uint8).copy())
        tensors |= {
            f"{i}.gain": torch.from_numpy(level.gain(slice(None), histories)).float(),
            f"{i}.backoff": torch.from_numpy(level.backoff).float(),
        }
    return sizes_of(lambda place: save_file(tensors, str(place)))
