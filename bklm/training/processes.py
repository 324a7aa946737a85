"""The device, and several processes that train one model together: rows shared out, sums added up, files written by one.

Every process reads the same batches and works on its own rows of each. Gradients are added up by hand after the backward
pass rather than by DistributedDataParallel: that wrapper synchronises calls of ``forward``, while the models here are
trained through ``model.loss``, whose chunked cross-entropy never makes the logits that ``forward`` returns; and it averages
over processes, while a mean over tokens must weigh each process by the targets it has. One flat all-reduce of gradients
that are already divided by the whole batch's target count is exact, and small.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the group of all processes as their default when it is imported. Imported later, as AdamW's step does,
# they would hold gloo's threads to the end, whatever lets go of the group (torch 2.13.0).
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An Accelerator for ``device`` ("auto", "cpu", "cuda") and ``precision`` ("fp32", "bf16", "fp16").

    Accelerate keeps device and precision once a process: those of an Accelerator made before are forgotten, and it is not
    to be used any more.

    Raises:
        ValueError: this machine has no such device, or does not compute in that precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: got 'cuda', but torch sees no CUDA GPU here; choose 'auto' or 'cpu', or switch the runtime to a GPU."
        )
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if precision == "fp16" and not on_gpu:
        raise ValueError(
            "precision: got 'fp16' on a CPU, where it is slower than fp32; choose 'fp32' or 'bf16'."
        )
    if precision == "bf16" and on_gpu and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(
            f"precision: got 'bf16', which {torch.cuda.get_device_name()} only emulates; choose 'fp16' or 'fp32'."
        )
    # A notebook may ask for another device or precision than the run before.
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision={"fp32": "no"}.get(precision, precision))
    if accelerator.num_processes > 1:
        # Once, however many Accelerators this process makes.
        atexit.unregister(leave_gloo)
        atexit.register(leave_gloo)
    return accelerator


def leave_gloo() -> None:
    """Let go of what this process shares with others, while Python still stands.

    gloo's threads hold tensors to the end. One that lets go of them while Python is being taken down ends the process with
    signal 6 (torch 2.13.0: one launch in fifteen), and torchrun then stops the main process, which still writes.
    NCCL has no such threads; to leave it waits for every process, also for one that has failed.
    """
    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def name_of_what_keeps_state(model: nn.Module) -> str | None:
    """The class of a term that moves numbers of its own at each forward (``keeps_state``); None where there is none."""
    return next((type(m).__name__ for m in model.modules() if getattr(m, "keeps_state", False)), None)


def require_steps_of_its_own(model: nn.Module, accelerator: Accelerator, parts: int) -> None:
    """Refuse a term that keeps numbers from step to step where one forward is not one step of the training.

    Raises:
        ValueError: with several processes, each of which would keep numbers of its own; or where a batch has several parts.
    """
    name = name_of_what_keeps_state(model)
    if name is None or (accelerator.num_processes == 1 and parts == 1):
        return
    raise ValueError(
        f"{name}: this term keeps numbers from step to step, but a batch is shared by {accelerator.num_processes} "
        f"process(es) in {parts} part(s); train it in one process with accumulate 1, or take the model inside: "
        "without_term(model)."
    )


def require_launch(processes: int, device: str) -> None:
    """Refuse to launch ``processes`` from this one where they could not work.

    Raises:
        ValueError: fewer GPUs than processes. RuntimeError: CUDA is in use here, and does not survive a fork.
    """
    if not torch.cuda.is_available():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"processes: got {processes}, but this process already uses CUDA, which its copies could not; press the Run "
            "button (it starts a process of its own), use torchrun, or restart the kernel and run this first."
        )
    gpus = torch.cuda.device_count()
    if device != "cpu" and processes > gpus:
        raise ValueError(
            f"processes: got {processes}, but torch sees {gpus} GPU{'s' if gpus > 1 else ''}; take at most as many processes, "
            "or device 'cpu'."
        )


def rows_of_this_process(accelerator: Accelerator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """This process's rows of a batch: every ``num_processes``-th one. A small batch may leave a process none."""
    if accelerator.num_processes == 1:
        return tensors
    return tuple(t[accelerator.process_index :: accelerator.num_processes] for t in tensors)


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in place, the same bits in each."""
    if accelerator.num_processes > 1:
        dist.all_reduce(values)
    return values


def sum_gradients_over_processes(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one all-reduce.

    A parameter without a gradient in any process keeps none: an optimiser treats that otherwise than a gradient of zeros.
    """
    if accelerator.num_processes == 1:
        return
    has = [p.grad is not None for p in parameters]
    parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
    bucket = torch.cat([*parts, parts[0].new_tensor(has)])
    dist.all_reduce(bucket)
    sizes = [p.numel() for p in parameters]
    *gradients, present = bucket.split([*sizes, len(sizes)])
    for parameter, gradient, here in zip(parameters, gradients, present.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter) if here else None


def broadcast(accelerator: Accelerator, value: Any) -> Any:
    """The main process's ``value`` in every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def main_first(accelerator: Accelerator) -> Iterator[None]:
    """A block that the main process finishes before the others begin: it fills a cache that they then read."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    yield
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
