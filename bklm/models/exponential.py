"""exp for kernels: numba calls the C library's, one number at a time; this one LLVM turns into vector instructions."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


@intrinsic
def _float_of_bits(typingctx, bits):
    """An int32 as the float32 of the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def exponential(x):
    """exp(x); for float32 within two rounding errors, and 0 below -87."""
    return math.exp(x)


# Of its own fastmath: a caller whose sums may be reordered must not have the two parts of ln 2 added up.
@overload(exponential, jit_options={"forceinline": True, "fastmath": {"contract"}})
def _exponential(x):
    if x != types.float32:
        return lambda x: math.exp(x)
    f, i = np.float32, np.int32
    least, most, log2e = f(-87.0), f(88.0), f(1.4426950408889634)
    # ln 2 in two parts, the first with few digits, so that k times it is exact.
    high, low = f(0.693359375), f(-2.12194440e-4)
    half, one, c3, c4, c5, c6, c7 = (f(1 / v) for v in (2, 1, 6, 24, 120, 720, 5040))
    bias, shift, zero = i(127), i(23), f(0)

    def exp32(x):
        y = least if x < least else x
        y = most if y > most else y
        k = np.floor(y * log2e + half)
        r = (y - k * high) - k * low
        p = c7
        p = p * r + c6
        p = p * r + c5
        p = p * r + c4
        p = p * r + c3
        p = p * r + half
        p = p * r + one
        p = p * r + one
        p = zero if x < least else p
        return p * _float_of_bits((i(k) + bias) << shift)

    return exp32
