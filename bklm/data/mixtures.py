"""Two models of the same text as one: the mixture of their probabilities, and the share that makes a text likeliest.

Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data".
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import bisect


def mixing_weight(one: np.ndarray, other: np.ndarray) -> float:
    """The weight w in [0, 1] that makes w exp(one) + (1 - w) exp(other) likeliest.

    The mean log-likelihood is concave in w, so that its slope has one root between the ends, or points to one of them: exactly
    0 or 1 is returned there, else the root within 1e-12. Where every weight is as good, it is 0.

    Args:
        one, other: log-probabilities in nats of the same targets, float (targets,).

    Raises:
        ValueError: none, or not as many of each; one that is NaN or above 0; a target that has probability 0 in both.
    """
    one, other = _same_targets(one, other)
    # Divided by the larger of the two, which changes no slope: neither overflows, and one of them is 1.
    larger = np.maximum(one, other)
    if np.isneginf(larger).any():
        raise ValueError(
            f"target {int(np.argmin(larger))} has probability 0 in both models, which no weight mends; give it some in one"
        )
    p, q = np.exp(one - larger), np.exp(other - larger)

    def slope(weight: float) -> float:
        """d / dw of the mean log-likelihood; infinite at an end where a target has no probability."""
        with np.errstate(divide="ignore"):
            return float(np.mean((p - q) / (weight * p + (1 - weight) * q)))

    if slope(0.0) <= 0:
        return 0.0
    return 1.0 if slope(1.0) >= 0 else float(bisect(slope, 0.0, 1.0, xtol=1e-12))


def mixed(one: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
    """log(w exp(one) + (1 - w) exp(other)): the log-probabilities of a mixture, nats, float64 (targets,).

    Args:
        one, other: log-probabilities in nats of the same targets, float (targets,).
        weight: w, in [0, 1], the share of ``one``.

    Raises:
        ValueError: none, or not as many of each; one that is NaN or above 0; a weight outside [0, 1].
    """
    one, other = _same_targets(one, other)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight!r}; give the share of the first model, a number from 0 to 1")
    with np.errstate(divide="ignore"):
        return np.logaddexp(one + np.log(weight), other + np.log1p(-weight))


def _same_targets(*given: np.ndarray) -> tuple[np.ndarray, ...]:
    """Log-probabilities of the same targets, float64 (targets,) each."""
    found = tuple(np.asarray(one, np.float64) for one in given)
    shapes = [one.shape for one in found]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(
            f"log-probabilities have the shapes {' and '.join(map(str, shapes))}; give one row of each, of the same targets"
        )
    if not all((one <= 1e-9).all() for one in found):
        raise ValueError(
            "a log-probability is NaN or above 0; give natural logarithms of probabilities, which are at most 0"
        )
    return found
