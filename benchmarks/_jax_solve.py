"""A second process that solves with jax: python _jax_solve.py FOLDER CALLS, run by resolvent_solve.py with jax's interpreter.

For every line that it reads, "forward", "both" or "a" (forward and the gradients of all inputs, or of a), it makes CALLS calls
and answers with a line; "values" saves the solution. The inputs are FOLDER's inputs.npz, the solution goes to its jax.npy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def solve(x, a, b, c, z):
    """(T - z)^-1 x (B, N, D); jax wants three diagonals of length N."""
    d = a - z[:, None]
    lower = jnp.pad(c, ((0, 0), (1, 0))).astype(d.dtype)
    upper = jnp.pad(b, ((0, 0), (0, 1))).astype(d.dtype)
    return jax.lax.linalg.tridiagonal_solve(lower, d, upper, x)


def both(x, a, b, c, z, gbar):
    """The solution and the gradients of all five inputs."""
    y, pull = jax.vjp(solve, x, a, b, c, z)
    return y, pull(jnp.conj(gbar))


def gradient_of_a(x, a, b, c, z, gbar):
    """The solution and the gradient of a."""
    y, pull = jax.vjp(lambda diagonal: solve(x, diagonal, b, c, z), a)
    return y, pull(jnp.conj(gbar))


def main() -> None:
    folder, calls = Path(sys.argv[1]), int(sys.argv[2])
    given = np.load(folder / "inputs.npz", allow_pickle=False)
    inputs = [jnp.asarray(given[name]) for name in ("x", "a", "b", "c", "z")]
    gbar = jnp.asarray(given["gbar"])
    forward, with_gradients, with_one = (jax.jit(f) for f in (solve, both, gradient_of_a))
    arms = {
        "forward": lambda: forward(*inputs),
        "both": lambda: with_gradients(*inputs, gbar),
        "a": lambda: with_one(*inputs, gbar),
    }
    for line in sys.stdin:
        name = line.strip()
        if name == "values":
            np.save(folder / "jax.npy", np.asarray(arms["forward"]()))
        else:
            for _ in range(calls):
                jax.block_until_ready(arms[name]())
        print(jax.__version__, flush=True)


if __name__ == "__main__":
    main()
