"""Training: resume, evaluation, refusal of non-finite numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bklm.data import make_loader, windows
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training import (
    NonFiniteError,
    TrainingSettings,
    convergence_epoch,
    evaluate,
    make_accelerator,
    train,
)

VOCABULARY = 20


def make_model(seed: int = 0) -> ResNetBK:
    torch.manual_seed(seed)
    return ResNetBK(ResNetBKConfig(VOCABULARY, d_model=8, n_layers=2, n_seq=6, num_experts=2))


def make_batches(shuffle: bool = True, tokens: int = 200):
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1)).numpy()
    return make_loader(windows(ids, 6), 4, shuffle=shuffle, seed=3)


def run(model, settings, folder=None, **options):
    accelerator = make_accelerator("cpu", "fp32")
    return train(
        model, make_batches(), make_batches(False), settings, accelerator=accelerator, folder=folder, **options
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_killed_in_its_second_epoch_ends_with_bit_equal_numbers_and_weights(tmp_path, schedule):
    settings = TrainingSettings(epochs=3, schedule=schedule)
    whole = make_model()
    records = run(whole, settings)

    steps = len(make_batches())
    seen = []

    def kill(n):
        seen.append(n)
        if len(seen) == steps + 2:
            raise KeyboardInterrupt

    killed = make_model()
    with pytest.raises(KeyboardInterrupt):
        run(killed, settings, tmp_path, on_step=kill)
    torch.manual_seed(12345)  # whatever the new process happens to have drawn
    torch.rand(7)
    resumed, skipped = make_model(seed=99), []
    again = run(resumed, settings, tmp_path, on_skip=skipped.append)
    assert skipped == [steps]
    for a, b in zip(records, again, strict=True):
        same = (
            "train_loss",
            "val_loss",
            "val_accuracy",
            "gradient_norm_variance",
            "learning_rate",
            "expert_counts",
        )
        assert [getattr(a, n) for n in same] == [getattr(b, n) for n in same]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_non_finite_loss_stops_the_run_and_names_run_step_and_last_good_checkpoint(tmp_path):
    model = make_model()
    steps = len(make_batches())
    count = []

    def poison(n):
        count.append(n)
        if len(count) == steps + 3:
            with torch.no_grad():
                model.output.bias[0] = math.nan

    with pytest.raises(NonFiniteError, match=rf"alpha 0.3: at step {steps + 4} the loss was nan .*epoch_0001"):
        run(model, TrainingSettings(epochs=3), tmp_path, label="alpha 0.3", on_step=poison)
    assert (tmp_path / "epoch_0001").exists()


def test_evaluation_weighs_every_token_once_whatever_the_batches_are():
    model = make_model().eval()
    data = windows(make_batches(False).dataset.ids, 6)
    scores = [evaluate(model, make_loader(data, size), unk_id=1) for size in (1, 3, 16)]
    x, y = data[list(range(len(data)))]
    logits = model(x).detach().double()
    valid = y != -100
    nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="none").view_as(y)
    for score in scores:
        assert score.tokens == int(valid.sum()) == data.num_targets
        assert score.loss == pytest.approx(float(nll[valid].mean()), rel=1e-6)
        assert score.known_tokens == int((valid & (y != 1)).sum())
        assert score.perplexity_without_unk == pytest.approx(
            math.exp(float(nll[valid & (y != 1)].mean())), rel=1e-5
        )
        assert score.correct == int(((logits.argmax(-1) == y) & valid).sum())


def test_evaluation_leaves_training_mode_and_weights_alone():
    model = make_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, make_batches(False), None)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_learns_a_text_in_which_each_word_follows_from_the_one_before():
    ids = torch.arange(400).remainder(VOCABULARY).numpy()
    model = make_model()
    train_batches = make_loader(windows(ids, 6), 4, shuffle=True)
    settings = TrainingSettings(epochs=6, learning_rate=1e-2)
    accelerator = make_accelerator("cpu", "fp32")
    records = train(model, train_batches, make_loader(windows(ids, 6), 4), settings, accelerator=accelerator)
    assert records[0].val_perplexity > 2 * records[-1].val_perplexity
    assert records[-1].val_perplexity < 3


def test_cosine_schedule_warms_up_and_ends_near_zero():
    records = run(make_model(), TrainingSettings(epochs=3, schedule="cosine", learning_rate=1e-2))
    assert records[-1].learning_rate < 1e-3 < records[0].learning_rate


@pytest.mark.parametrize(
    ("perplexities", "epoch"),
    [([100.0], 1), ([100.0, 50.0, 49.0], 2), ([100.0, 90.0, 50.0], 3), ([5.0, 6.0, 7.0], 1)],
)
def test_convergence_is_the_first_epoch_with_nine_tenths_of_the_improvement(perplexities, epoch):
    assert convergence_epoch(perplexities) == epoch


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("device", "precision"), [("cuda", "fp32"), ("cpu", "fp16")])
def test_a_device_or_precision_that_is_not_there_is_refused(device, precision):
    with pytest.raises(ValueError, match=r"got '(cuda|fp16)'.*choose"):
        make_accelerator(device, precision)
