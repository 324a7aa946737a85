"""How much memory there is to take, on a GPU or here, inside a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

__all__ = ["free_bytes"]

# (limit, usage) of control groups, version 2 and 1, as a container sees its own.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be taken on ``device``; on the CPU without swapping and within the container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        # What torch holds without using is free to us too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = psutil.virtual_memory().available
    for limit, usage in _GROUPS:
        if Path(limit).exists() and Path(usage).exists():
            allowed = Path(limit).read_text().strip()
            if allowed.isdigit():
                free = min(free, max(0, int(allowed) - int(Path(usage).read_text())))
    return free
