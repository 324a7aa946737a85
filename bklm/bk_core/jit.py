"""``numba.njit`` with the settings of this package's kernels, and a compiled-code cache where the disk allows one."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

_SETTINGS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def jit(function: Callable) -> Callable:
    """Compile on first use, without the GIL; cached on disk unless numba finds no writable folder for the cache."""
    try:
        return njit(cache=True, **_SETTINGS)(function)
    except (
        RuntimeError
    ) as error:  # raised when neither the package's folder nor the user's cache can be written
        if "cannot cache function" not in str(error):
            raise
        return njit(**_SETTINGS)(function)
