"""Several processes that train one model together, launched from this one: for a notebook, which torchrun cannot start."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from bklm.harness.config import StudyConfig
from bklm.training.processes import require_launch


def is_to_launch(config: StudyConfig) -> bool:
    """Whether a config asks for several processes and this one was not started as one of them."""
    return getattr(config, "processes", 1) > 1 and "WORLD_SIZE" not in os.environ


def spoils_a_launch(config: StudyConfig) -> bool:
    """Whether computing on the config's device in this process would make its launch impossible."""
    return is_to_launch(config) and config.device != "cpu" and torch.cuda.is_available()


def launch(config: StudyConfig, work: Callable[..., Any], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``config.processes`` processes and wait for them.

    Raises:
        ValueError: fewer GPUs than processes. RuntimeError: CUDA is in use here, and does not survive a fork; or a process
            ended before its work did. KeyboardInterrupt: stopped. Any ValueError, OSError or RuntimeError of a process is
            raised again here, by its own sentence.
    """
    require_launch(config.processes, config.device)
    # The launcher refuses a state, and a run before this one has left its own.
    AcceleratorState._reset_state(True)
    # Its own log of a failure is a page, and the cause is raised here.
    log = logging.getLogger("torch.distributed.elastic")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        notebook_launcher(_launched, (work, arguments), num_processes=config.processes, use_port=_free_port())
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        raise _cause(error) from None
    finally:
        log.setLevel(before)


def _cause(error: ChildFailedError) -> Exception:
    """What the process that failed first raised, as torch wrote it down: "ValueError: n_layers: got 0; ..."."""
    told = error.get_first_failure()[1].message
    told = told["message"] if isinstance(told, dict) else told
    name, _, words = told.partition(": ")
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (ValueError, OSError, RuntimeError)):
        # One such as UnicodeDecodeError is not made of a sentence.
        with contextlib.suppress(TypeError):
            return kind(words)
    return RuntimeError(f"processes: one ended before its work did ({told}); what was finished is kept.")


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
