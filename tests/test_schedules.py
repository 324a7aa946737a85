"""Clipping by epoch, learning rate by step, and when training stops early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bklm.training.schedules import (
    TrainingSettings,
    epochs_without_improvement,
    learning_rate_factor,
    parse_clip,
)


def test_the_originals_schedule_clips_at_a_half_then_one_then_two():
    settings = TrainingSettings(50, clip=parse_clip("0.5@1, 1@11, 2@31"))
    by_epoch = [settings.clip_at(epoch) for epoch in range(1, 51)]
    assert by_epoch == [0.5] * 10 + [1.0] * 20 + [2.0] * 20


def test_one_number_holds_for_the_whole_run():
    assert parse_clip("0.5") == parse_clip(0.5) == ((1, 0.5),)
    assert TrainingSettings(3, clip=0.7).clip_at(3) == 0.7


@pytest.mark.parametrize(
    "text",
    ["", "high", "0.5@2", "0.5@1,1@1", "0.5@1,1@3,2@2", "-1", "0", "0.5@1,,1@2", "1e999", "e@1", "0.5@1.5"],
)
def test_a_schedule_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"clip: got .*such as 0\.5@1, 1@11, 2@31"):
        parse_clip(text)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1e3)), max_size=5))
def test_every_schedule_that_can_be_written_is_read_back(steps):
    stages, epoch = [(1, 0.5)], 1
    for gap, norm in steps:
        epoch += gap
        stages.append((epoch, norm))
    assert parse_clip(", ".join(f"{norm!r}@{first}" for first, norm in stages)) == tuple(stages)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"patience": 0}, r"patience: got 0; allowed is 1 or more"),
        ({"accumulate": 0}, r"accumulate: got 0"),
        ({"epochs": 0}, r"epochs: got 0; a run has 1 or more epochs"),
        ({"epochs": 2.0}, r"epochs: got 2\.0; a run has 1 or more epochs"),
        ({"epochs": True}, r"epochs: got True"),
        ({"schedule": "linear"}, r"schedule: got 'linear'; allowed are 'constant' and 'cosine'"),
        ({"schedule": "Constant"}, r"schedule: got 'Constant'"),
        ({"schedule": None}, r"schedule: got None"),
        ({"learning_rate": float("nan")}, r"learning_rate: got nan"),
        ({"learning_rate": -1e-3}, r"learning_rate: got -0\.001"),
        ({"learning_rate": "1e-3"}, r"learning_rate: got '1e-3'"),
        ({"weight_decay": float("inf")}, r"weight_decay: got inf"),
        ({"warmup": 1.5}, r"warmup: got 1\.5; a fraction of all steps"),
        ({"min_delta": None}, r"min_delta: got None"),
        ({"seed": 0.5}, r"seed: got 0\.5; a whole number"),
        ({"clip": 0.0}, r"clip: got 0\.0; gradient norms must be positive"),
        ({"clip": "0.5@1"}, r"clip: got '0\.5@1'"),
        ({"clip": ()}, r"clip: got \(\); .*stages that begin at epoch 1 and go up"),
        ({"clip": ((2, 0.5),)}, r"stages that begin at epoch 1 and go up"),
        ({"clip": ((1, 0.5), (1, 0.6))}, r"stages that begin at epoch 1 and go up"),
        ({"clip": ((1, float("inf")),)}, r"stages that begin at epoch 1 and go up"),
        ({"clip": parse_clip("0.5@1, 1@6")}, r"last stage begins at epoch 6, but the run has 5 epochs"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(bad, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TrainingSettings(**{"epochs": 5, **bad})


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([], 0),
        ([5.0], 0),
        ([5.0, 4.0], 0),
        ([5.0, 4.9995], 1),
        ([5.0, 4.9995, 4.9985], 0),
        ([5.0, 6.0, 5.0], 2),
    ],
)
def test_only_a_fall_by_more_than_the_least_delta_below_the_best_counts(losses, epochs):
    assert epochs_without_improvement(losses, 1e-3) == epochs


@given(warmup=st.floats(0, 0.9), total=st.integers(2, 500))
def test_the_cosine_schedule_stays_within_zero_and_one_and_ends_near_zero(warmup, total):
    factor = learning_rate_factor(TrainingSettings(1, schedule="cosine", warmup=warmup), total)
    values = [factor(step) for step in range(total + 1)]
    assert all(0 <= v <= 1 for v in values)
    assert factor(total) < 1e-9 or round(warmup * total) >= total
