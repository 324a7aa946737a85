"""One notebook executed by papermill in a process of its own: the notebook's end is not the batch's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook

ENGINE = "bklm-batch"
STARTS = 3
NEVER_BEGAN = "Kernel died before replying to kernel_info"
"""Seen once, of two kernels that started at one moment (jupyter_client 8.10.0), and not since; no cell has run then."""


class _ReportingEngine(NBClientEngine):
    """Papermill's own engine, telling ``on_cell`` after each cell how many are done."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, on_cell: Callable[[int], None], **options: Any
    ) -> None:
        complete = nb_man.cell_complete

        def cell_complete(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            complete(cell, cell_index=cell_index, **more)
            if cell_index is not None:
                on_cell(cell_index + 1)

        nb_man.cell_complete = cell_complete
        super().execute_managed_notebook(nb_man, kernel_name, **options)


def execute(
    notebook: str, output: str, parameters: dict[str, Any], printed: str, threads: int, pipe: Connection
) -> None:
    """Execute ``notebook`` into ``output``; send ("cell", number) as cells end, and at the end ("end", error or None).

    Everything that the notebook, its kernel and this process print goes to the file ``printed``. The kernel ends with this
    process, however it ends.
    """
    with Path(printed).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    papermill_engines.register(ENGINE, _ReportingEngine)
    # It would warn of every name of a form's first cell; all names were checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    error = None
    try:
        _with_a_kernel_that_began(lambda: execute_notebook(
            notebook, output, parameters, engine_name=ENGINE, progress_bar=False, cwd=str(Path(notebook).parent),
            stdout_file=sys.stdout, stderr_file=sys.stdout, on_cell=lambda number: pipe.send(("cell", number)),
        ))  # fmt: skip
    except PapermillExecutionError as failure:
        error = f"cell {failure.cell_index}: {failure.ename}: {failure.evalue}"
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as failure:  # a dead kernel, a full disk: whatever ends this notebook ends no other
        error = f"{type(failure).__name__}: {failure}"
    pipe.send(("end", error))


def _with_a_kernel_that_began(work: Callable[[], object]) -> None:
    """Do the work, and again where its kernel died before it began, ``STARTS`` times in all."""
    for start in range(1, STARTS + 1):
        try:
            work()
        except RuntimeError as failure:
            if NEVER_BEGAN not in str(failure) or start == STARTS:
                raise
        else:
            return
