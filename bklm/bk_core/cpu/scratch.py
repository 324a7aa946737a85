"""The scratch buffer of the SIMD kernels: its length, and arrays from addresses.

The kernels of the diagonal name their vectors (cpu/vectors.py, cpu/groups.py). Those of the solve leave vectors to LLVM:
their indices are unsigned and every distance between two accesses is a constant, which lets it see, without run-time
checks, that the lanes do not depend on each other. Fused multiply-add is the only liberty that either takes with floating
point: NaN and infinities go where IEEE 754 sends them.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from bklm.bk_core.cpu.jit import inlined, part
from bklm.bk_core.cpu.vectors import pointer

LANES = 64  # four AVX-512 registers of float32: one step of a recursion waits less for the one before it
LONGEST_TILE = 512
SCRATCH_LENGTH = 12 * (LONGEST_TILE + 2) * LANES  # the fields of cpu/groups.py, and what it has once

_15, _16 = np.uintp(15), np.uintp(16)


@part
def reals_at(address, length, like):
    """The ``length`` elements at an address as an array of the type of ``like``."""
    return carray(pointer(address, like), (length,))


@inlined
def vectors(used):
    """Lanes to compute with when the first ``used`` hold something: whole AVX-512 registers. The others hold leftovers."""
    return (used + _15) // _16 * _16
