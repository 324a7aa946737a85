#!/usr/bin/env bash
# numba 0.68.1: last bits of a fastmath sum depend on how far apart in memory the arrays lie that the loop reads and writes
#
# Source: numba's performance tips, on fastmath: numerical rigour is relaxed, so that a loop with a sum can go into vector
#   registers. Nothing there lets a result change from one call to the next.
# Expected: a compiled function, called again in the same process with the same numbers in separate arrays, gives the same bits.
# Seen: one that writes squares and adds them up gives two sums: one where the output begins right behind the input, another
#   where it lies two pages further on. LLVM compiles the loop twice, in vector registers and one number after the other, and asks
#   at each call whether the output begins less than a step of the vector loop behind the input, which is less than needed to
#   overlap where arrays are shorter than that step. So a program's bits hang on what malloc found: one gradient in some
#   thousand differed in its last bit, of a model with arrays of eight numbers. Without the store in that loop, or without
#   "reassoc", all calls agree.
# bklm: sums in vector registers stand in loops that only read (SUMS in bklm/bk_core/cpu/jit.py); tests/test_kernel_sums.py
#   looks at the compiled code.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import numpy as np
from numba import njit


def squares(x, out):
    total = x.dtype.type(0)
    for i in range(len(x)):
        out[i] = x[i] * x[i]
        total += out[i]
    return total


def squares_apart(x, out):
    for i in range(len(x)):
        out[i] = x[i] * x[i]
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += out[i]
    return total


memory = np.zeros(4096, np.float32)


def differing(function):
    """Lengths at which the two places of the output give sums of other bits."""
    found = []
    for n in range(2, 65):
        numbers = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        sums = set()
        for place in (n, 2048):
            x, out = memory[:n], memory[place : place + n]
            assert not np.shares_memory(x, out)
            x[:] = numbers
            sums.add(float(function(x, out)))
        if len(sums) > 1:
            found.append(n)
    return found


fast = {"contract", "reassoc", "nsz"}
one_loop = differing(njit(fastmath=fast)(squares))
print(f"one loop, fastmath: lengths whose sum has two values: {one_loop}")
two_loops = differing(njit(fastmath=fast)(squares_apart))
print(f"two loops, fastmath: {two_loops}")
in_order = differing(njit(fastmath=fast - {"reassoc"})(squares))
print(f'one loop, fastmath without "reassoc": {in_order}')
strict = differing(njit(squares))
print(f"one loop, strict: {strict}")
assert one_loop and not two_loops and not in_order and not strict
PY
echo "As described above."
