"""Several processes that train one model together, launched from this one: for a notebook, which torchrun cannot start."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState

from bklm.harness.config import StudyConfig
from bklm.training.processes import require_launch


def is_to_launch(config: StudyConfig) -> bool:
    """Whether a config asks for several processes and this one was not started as one of them."""
    return getattr(config, "processes", 1) > 1 and "WORLD_SIZE" not in os.environ


def launch(config: StudyConfig, work: Callable[..., Any], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``config.processes`` processes and wait for them.

    Raises:
        ValueError: fewer GPUs than processes. RuntimeError: CUDA is in use here, and does not survive a fork.
    """
    require_launch(config.processes, config.device)
    # The launcher refuses a state, and a run before this one has left its own.
    AcceleratorState._reset_state(True)
    notebook_launcher(_launched, (work, arguments), num_processes=config.processes, use_port=_free_port())


def _launched(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Where the launcher sees one device it calls this at once, in the same process.
    if torch.distributed.is_torchelastic_launched():
        # A notebook's own stream belongs to the kernel that this process was forked from.
        sys.stdout = sys.__stdout__
        # OpenMP's threads do not survive a fork; where the environment names no number, Accelerate takes all cores.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    work(*arguments)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
