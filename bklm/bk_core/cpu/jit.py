"""``numba.njit`` with the settings of this package's kernels, and a compiled-code cache where the disk allows one."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba.core.event
import numpy as np
from numba import njit

NO, YES = np.bool_(False), np.bool_(True)
"""To pass to kernels: numba compiles a function once more for every literal that it is called with, not for these."""

SUMS = {"contract", "reassoc", "nsz"}
"""``fastmath`` of sums: terms are added in vector registers, in another order than one after the other. Not for a loop that
reads one array and writes another: LLVM compiles it twice and takes the slow one where the two lie close together, so that
the last bits of a sum would depend on where memory was found."""
_SETTINGS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


@functools.cache
def _sources_digest() -> str:
    """Of all kernel sources together. numba takes cached code for fresh as long as the function's own file is unchanged,
    although constants and functions of other files are compiled into it."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def jit(function: Callable, **settings: Any) -> Callable:
    """Compile on first use, without the GIL; cached on disk unless numba finds no writable folder for the cache.

    Args:
        settings: of ``numba.njit``, where a kernel's differ from the package's.
    """
    settings = _SETTINGS | settings
    function.__qualname__ += f"_{_sources_digest()}"  # part of the name of the cache's files
    try:
        return njit(cache=True, **settings)(function)
    except RuntimeError as error:
        # Raised when neither the package's folder nor the user's cache can be written.
        if "cannot cache function" not in str(error):
            raise
        NOTICE.kept = False
        return njit(**settings)(function)


def part(function: Callable, **settings: Any) -> Callable:
    """As :func:`jit` for what only kernels call: without a way in from Python, and cached with the kernels alone."""
    return njit(**_SETTINGS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True} | settings)(function)


inlined = functools.partial(part, forceinline=True)
"""For small functions: part of whatever calls them."""
summing = functools.partial(inlined, fastmath=SUMS)
"""For small functions that add up what they read, and write nothing: see ``SUMS``."""


class _Notice(numba.core.event.Listener):
    """Says, at the first compilation of a process, what is being waited for."""

    def on_start(self, event: numba.core.event.Event) -> None:
        if (
            not self.said
            and event.data["dispatcher"].py_func.__module__.partition(".")[0] == __name__.partition(".")[0]
        ):
            self.said = True
            later = (
                "later processes find them on the disk"
                if self.kept
                else "every process will again, as it finds no folder that it may write them to"
            )
            print(
                "bklm: compiling kernels for this processor, five to ten seconds for the operator and again when a model "
                f"needs its own; {later}.",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, event: numba.core.event.Event) -> None:
        pass

    said = False
    kept = True
    """Whether numba found a folder for every kernel's cache."""


NOTICE = _Notice()
numba.core.event.register("numba:compile", NOTICE)
