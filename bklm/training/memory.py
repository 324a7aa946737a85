"""Memory: how much there is to take, and a batch that does not fit worked through in parts whose gradients add up."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from bklm.models import LanguageModel
from bklm.training.processes import name_of_what_keeps_state

log = logging.getLogger(__name__)

# What torch's CPU allocator, C++ itself and oneDNN (which could not map memory for its code) say, as a plain RuntimeError.
_CPU_WORDS = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory|"
    r"could not create a (memory object|primitive)(?! descriptor)"
)


class OutOfMemoryError(RuntimeError):
    """Memory is short whatever is tried; the message is one sentence with what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory was short, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_WORDS.search(str(error)) is not None


@contextlib.contextmanager
def memory_shortage_explained(label: str) -> Iterator[None]:
    """Turn a shortage of memory that nothing in the block could mend into one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{label}: out of memory ({_first_line(error)}); take a smaller batch_size, seq_len, model or vocabulary, or a "
            "machine with more memory. What was finished is kept."
        ) from error


class BatchParts:
    """The number of parts that every batch is worked through in; doubled when memory is short.

    The parts' losses are divided by the whole batch's target count, so that their gradients add up to the whole batch's:
    but for rounding and random draws (dropout, router noise), the steps are those of a machine with enough memory. A
    load-balancing loss (``balance`` above 0) is the exception: it multiplies averages over tokens, so that the mean of the
    parts' losses is not the whole batch's.
    """

    def __init__(self, parts: int, label: str) -> None:
        self.parts, self.label = parts, label

    def backward(self, model: LanguageModel, rows: int, run: Callable[[int], Tensor]) -> Tensor:
        """What ``run(parts)`` returns, after as many attempts as it takes; gradients must be empty before.

        An attempt that fails leaves nothing behind: random numbers, expert counts and gradients are as they were.

        Args:
            rows: sequences in the batch, the largest number of parts.

        Raises:
            OutOfMemoryError: one sequence at a time is still too much; or a term keeps numbers from step to step, to which the
                failed attempt and each part were a step.
        """
        while True:
            draws, counts = _random_state(), model.expert_counts()
            try:
                return run(self.parts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = _first_line(error)
            # Only here: while the error lives, its traceback holds the tensors that are in the way.
            if (name := name_of_what_keeps_state(model)) is not None:
                raise OutOfMemoryError(
                    f"{self.label}: out of memory ({reason}), and {name} keeps numbers from step to step, so a batch cannot "
                    "be worked through in parts; take a smaller batch_size, seq_len or model. What was finished is kept."
                )
            model.zero_grad(set_to_none=True)
            model.reset_expert_counts(counts)
            _restore_random_state(draws)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._double(rows, reason)

    def _double(self, rows: int, reason: str) -> None:
        if self.parts >= rows:
            raise OutOfMemoryError(
                f"{self.label}: out of memory even with one sequence at a time ({reason}); take a smaller seq_len, model or "
                "vocabulary, or a machine with more memory. What was finished is kept."
            )
        self.parts = min(2 * self.parts, rows)
        log.warning(
            "%s: out of memory (%s); each batch of %d sequences is now worked through in %d parts: slower, the same steps "
            "but for random draws.",
            self.label, reason, rows, self.parts,
        )  # fmt: skip


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


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
