"""The file of the running notebook: recognised by what it holds, taken only when it is as executed as the kernel is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from bklm.harness.bundle import read_notebook


def saved_notebook(shell: Any) -> Path:
    """The saved file of the notebook that this kernel runs, all its executed cells in it.

    Args:
        shell: the kernel's IPython shell.

    Raises:
        ValueError: there is none that can be taken; one sentence that says why and what to do.
    """
    # Jupyter's server names it in the environment, which every process that a cell starts inherits; VS Code in a variable.
    named = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
    path = Path(named)
    if path.suffix != ".ipynb" or not path.is_file():
        raise ValueError("this kernel does not know the notebook's file")
    cells = [c for c in read_notebook(path.read_text(encoding="utf-8")).cells if c.cell_type == "code"]
    ran = [source.strip() for source in shell.history_manager.input_hist_raw]
    sources = [cell.source.strip() for cell in cells]
    if not ran or ran[-1] not in sources:
        raise ValueError(f"{path.name} holds no cell like this one: it is another notebook, or not saved since")
    # The cell at hand has no output yet, and the last number of the others is that of what is shown.
    last = {source: number for number, source in enumerate(ran[:-1]) if source and source != ran[-1]}
    executed = [cell for cell, source in zip(cells, sources, strict=True) if source in last]
    late = [cell for cell in executed if cell.execution_count != last[cell.source.strip()]]
    # After a restart the numbers begin anew, and a file of before may have the same.
    if executed and path.stat().st_mtime < psutil.Process().create_time():
        late = executed
    if late:
        raise ValueError(
            f"{path.name} as it is saved lacks the outputs of {len(late)} of the {len(executed)} cells that ran"
        )
    return path
