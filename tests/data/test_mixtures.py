"""The likeliest mixture of two models is found to the end, also where one of them is best alone."""

import numpy as np
import pytest

from bklm.data.mixtures import mixed, mixing_weight

RANDOM = np.random.default_rng(0)
ONE, OTHER = -RANDOM.exponential(2, 501), -RANDOM.exponential(2.2, 501)


def test_the_weight_of_two_models_is_the_likeliest_one():
    grid = np.linspace(0, 1, 1001)
    best = grid[np.argmax([mixed(ONE, OTHER, w).mean() for w in grid])]
    weight = mixing_weight(ONE, OTHER)
    assert 0 < best < 1
    assert weight == pytest.approx(best, abs=1e-3)
    near = [mixed(ONE, OTHER, weight + step).mean() for step in (-1e-4, 0, 1e-4)]
    assert np.argmax(near) == 1
    assert mixing_weight(OTHER, ONE) == pytest.approx(1 - weight, abs=1e-9)


@pytest.mark.parametrize("gap", [1e-6, 0.01, 5.0, 900.0])
def test_a_model_that_is_worse_at_every_target_has_no_share(gap):
    # By a hundredth of a nat: 100 rounds of expectation-maximisation from a half stop at 0.269.
    assert mixing_weight(ONE - gap, ONE) == 0
    assert mixing_weight(ONE, ONE - gap) == 1
    np.testing.assert_array_equal(mixed(ONE, ONE - gap, 1), ONE)
    np.testing.assert_array_equal(mixed(ONE - gap, ONE, 0), ONE)


def test_targets_that_one_model_calls_impossible_keep_the_weight_off_the_end():
    # Likelihood of w: (1 - w) w^2, whose maximum is 2/3.
    one, other = np.array([-np.inf, 0.0, 0.0]), np.array([0.0, -np.inf, -np.inf])
    assert mixing_weight(one, other) == pytest.approx(2 / 3, abs=1e-9)
    assert mixed(one, other, 0.25) == pytest.approx(np.log([0.75, 0.25, 0.25]))


@pytest.mark.parametrize(
    ("one", "other", "weight", "sentence"),
    [
        (ONE, OTHER[:9], 0.5, r"the shapes \(501,\) and \(9,\); give one row of each"),
        (ONE[:0], ONE[:0], 0.5, r"the shapes \(0,\) and \(0,\)"),
        (np.full(3, np.nan), np.zeros(3), 0.5, "is NaN or above 0"),
        (np.full(3, 0.1), np.zeros(3), 0.5, "is NaN or above 0"),
        (ONE, OTHER, 1.5, "weight is 1.5; give the share of the first model, a number from 0 to 1"),
        (ONE, OTHER, float("nan"), "weight is nan"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(one, other, weight, sentence):
    with pytest.raises(ValueError, match=sentence):
        mixed(one, other, weight)
    if "weight" not in sentence:
        with pytest.raises(ValueError, match=sentence):
            mixing_weight(one, other)


def test_a_target_that_both_models_call_impossible_is_named():
    impossible = np.array([0.0, -np.inf])
    with pytest.raises(ValueError, match=r"^target 1 has probability 0 in both models"):
        mixing_weight(impossible, impossible)
