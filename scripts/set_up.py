"""The second half of a notebook's first cell (first_cell.py), which can only run once the repository is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def set_up(root: Path) -> None:
    """Add the missing packages to this Python, unless the notebook lies in a checkout; then work in the repository.

    Raises:
        SystemExit: the packages could not be added.
    """
    here = Path.cwd()
    if root not in [here, *here.parents]:
        environment = {**os.environ, "BKLM_PYTHON": sys.executable}
        if subprocess.run(["bash", str(root / "colab_setup.sh")], env=environment).returncode:
            sys.exit("The set-up failed; its own message is above.")
    sys.path.insert(0, str(root))
    os.chdir(root)
