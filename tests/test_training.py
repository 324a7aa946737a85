"""Training: resume, evaluation, refusal of non-finite numbers."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest
import torch
from torch.nn import functional as F

from bklm.data import make_loader, windows
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.non_finite import NonFiniteError
from bklm.training.processes import make_accelerator
from bklm.training.records import convergence_epoch
from bklm.training.schedules import TrainingSettings

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
    model = make_model().double().eval()  # so that no two logits are equal but for rounding
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


def test_the_signal_of_ctrl_c_and_of_the_stop_button_ends_training_within_the_step_at_hand():
    steps = asked_after = 0

    def count(done):
        nonlocal steps
        steps += done

    def ask():
        nonlocal asked_after
        while steps < 5:
            time.sleep(1e-4)
        os.kill(os.getpid(), signal.SIGINT)
        asked_after = steps  # read behind the signal: before it, any number of steps may still be made

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    try:
        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(KeyboardInterrupt):
            run(make_model(), TrainingSettings(epochs=50), on_step=count)
        asking.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps <= asked_after + 1


def test_training_stops_when_the_loss_has_not_fallen_for_patience_epochs_and_a_resumed_run_knows(tmp_path):
    settings = TrainingSettings(epochs=9, learning_rate=1e-9, patience=2)
    records = run(make_model(), settings, tmp_path)
    assert len(records) == 3  # the first epoch sets the mark, two do not improve on it
    trained = []
    again = run(make_model(), settings, tmp_path, on_step=trained.append)
    assert trained == []
    assert [r.val_loss for r in again] == [r.val_loss for r in records]


def test_the_clip_schedule_takes_hold_in_its_epochs():
    def moved(clip):
        model = make_model()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        # Adam forgets a constant scale; a clip that begins in the second epoch meets moments of another scale.
        run(model, TrainingSettings(epochs=2, clip=clip, weight_decay=0.0))
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    whole, tight = moved(((1, 1e6),)), moved(((1, 1e6), (2, 1e-9)))
    assert not torch.equal(whole, tight)
    assert torch.equal(moved(((1, 1e6), (2, 1e6))), whole)


def saved_run(tmp_path, identity, epochs=3):
    folder = CheckpointFolder(tmp_path / "first", keep=9)
    records = run(make_model(), TrainingSettings(epochs=epochs), folder, identity=identity)
    return folder, records


def test_a_run_goes_on_from_any_checkpoint_with_the_numbers_of_the_undisturbed_one(tmp_path):
    identity = {"model": "resnet_bk", "d_model": 8, "epochs": 3}
    folder, records = saved_run(tmp_path, identity)
    assert [p.name for p in folder.all()] == [
        f"epoch_{r.epoch:04d}_ppl_{r.val_perplexity:.3f}" for r in records
    ]
    for place in folder.all()[:2]:
        again = run(
            make_model(seed=5),
            TrainingSettings(epochs=3),
            tmp_path / place.name,
            identity={**identity, "resume_from": str(place)},
            resume_from=place,
        )
        assert [r.val_loss for r in again] == [r.val_loss for r in records]


def test_a_checkpoint_of_another_model_or_vocabulary_is_refused_naming_the_fields(tmp_path):
    identity = {"model": "resnet_bk", "d_model": 8, "vocabulary": "20 words", "epochs": 3}
    folder, _ = saved_run(tmp_path, identity, epochs=1)
    other = {"model": "gpt", "d_model": 8, "vocabulary": "30 words", "epochs": 5}
    with pytest.raises(
        ValueError, match=r"model \('resnet_bk' there, 'gpt' now\), vocabulary \('20 words' there"
    ):
        run(make_model(), TrainingSettings(epochs=5), identity=other, resume_from=folder.newest())
    # A longer run may go on from it; in the run's own folder not even that may differ.
    longer = {**identity, "epochs": 2}
    run(make_model(), TrainingSettings(epochs=2), identity=longer, resume_from=folder.newest())
    with pytest.raises(ValueError, match=r"epochs \(3 there, 2 now\)"):
        run(make_model(), TrainingSettings(epochs=2), folder, identity=longer)


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_path_that_is_no_whole_checkpoint_is_refused_in_one_sentence(tmp_path, damage):
    folder, _ = saved_run(tmp_path, {"model": "m"}, epochs=1)
    place = folder.newest()
    if damage == "missing":
        (place / "state.pt").unlink()
    else:
        (place / "state.pt").write_bytes(b"\x00" * 99)
    with pytest.raises(ValueError, match=r"resume_from: .*(is no checkpoint|is damaged)"):
        run(make_model(), TrainingSettings(epochs=2), identity={"model": "m"}, resume_from=place)


def test_a_batch_without_any_target_is_refused_in_one_sentence():
    x = torch.zeros(2, 6, dtype=torch.int64)
    loader = [(x, torch.full_like(x, -100))]

    class Loader(list):
        def set_epoch(self, epoch):
            pass

    with pytest.raises(
        ValueError, match="batch 1 of epoch 1 has no target left after masking; leave such a batch"
    ):
        train(
            make_model(), Loader(loader), make_batches(False), TrainingSettings(epochs=1),
            accelerator=make_accelerator("cpu", "fp32"),
        )  # fmt: skip


def test_an_evaluation_that_fails_and_a_generation_leave_every_module_in_its_mode():
    model = make_model().train()
    model.blocks[0].eval()  # frozen by its owner
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    x = torch.full((1, 6), VOCABULARY)
    with pytest.raises(ValueError, match="input_ids: got 20"):
        evaluate(model, [(x, x)], None)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.generate(torch.zeros(1, 2, dtype=torch.int64), 2)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_split_without_any_target_cannot_be_evaluated():
    x = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="no target to score"):
        evaluate(make_model(), [(x, torch.full_like(x, -100))], None)


def run_with_scaler(monkeypatch, scale: float, epochs: int = 2):
    """`run` under a loss scaler on the CPU: float32 gradients overflow there as float16 ones do on a GPU."""
    accelerator = make_accelerator("cpu", "fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    unscale = accelerator.scaler.unscale_
    clip = accelerator.clip_grad_norm_

    def unscaled_clip(parameters, norm):
        unscale(accelerator._optimizers[-1].optimizer)
        return clip(parameters, norm)

    monkeypatch.setattr(accelerator, "clip_grad_norm_", unscaled_clip)
    settings = TrainingSettings(epochs, schedule="cosine")
    records = train(make_model(), make_batches(), make_batches(False), settings, accelerator=accelerator)
    return records, accelerator.scaler


def test_a_loss_scaler_that_overflows_skips_the_step_and_the_run_goes_on(monkeypatch):
    records, scaler = run_with_scaler(monkeypatch, 2.0**127)
    assert scaler.get_scale() < 2.0**127
    assert all(math.isfinite(r.gradient_norm_mean) and r.gradient_norm_mean > 0 for r in records)
    assert records[1].train_loss < records[0].train_loss
    whole = run(make_model(), TrainingSettings(epochs=2, schedule="cosine"))
    # A step that was skipped is none of the schedule.
    assert records[-1].learning_rate > whole[-1].learning_rate


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run(monkeypatch):
    def poisoned(self, *arguments, **options):
        return super(ResNetBK, self).loss(*arguments, **options) + (self.output.bias * 0).sqrt().sum()

    monkeypatch.setattr(ResNetBK, "loss", poisoned)  # a finite loss whose gradient is 0 * inf
    with pytest.raises(NonFiniteError, match=r"infinite or NaN in 21 steps in a row, up to step 21"):
        run_with_scaler(monkeypatch, 2.0, epochs=3)


def test_a_validation_loss_that_is_no_number_and_experts_that_diverge_end_the_run_by_name(monkeypatch):
    from bklm.moe.analytic import NonFiniteRouterError
    from bklm.training import loop as training
    from bklm.training.evaluation import Evaluation

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *a: Evaluation(math.nan, 1, 0, math.nan, 1))
        with pytest.raises(NonFiniteError, match=r"alpha 0\.3: the validation loss after epoch 1 was nan"):
            run(make_model(), TrainingSettings(epochs=1), label="alpha 0.3")

    def diverged(*arguments, **options):
        raise NonFiniteRouterError("the router's logits are not finite")

    monkeypatch.setattr(ResNetBK, "loss", diverged)
    with pytest.raises(NonFiniteError, match=r"alpha 0\.3: in epoch 1 the router's logits are not finite"):
        run(make_model(), TrainingSettings(epochs=1), label="alpha 0.3")


def test_a_split_in_which_every_target_is_unknown_is_refused_in_one_sentence():
    x = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"each of the 12 targets is <unk>.*take a larger vocabulary"):
        evaluate(make_model(), [(x, x)], unk_id=1)


def test_a_checkpoint_of_more_epochs_than_are_asked_for_is_refused(tmp_path):
    folder, _ = saved_run(tmp_path, {"model": "m"}, epochs=2)
    with pytest.raises(ValueError, match=r"epochs: got 1, but the checkpoint .*epoch_0002.* has done 2"):
        run(make_model(), TrainingSettings(epochs=1), identity={"model": "m"}, resume_from=folder.newest())


def test_a_cosine_run_that_is_made_longer_says_from_where_the_rate_rises_again(tmp_path, caplog):
    settings = TrainingSettings(epochs=1, schedule="cosine")
    run(make_model(), settings, tmp_path)
    run(make_model(), settings, tmp_path)
    assert "rises again" not in caplog.text
    run(make_model(), TrainingSettings(epochs=2, schedule="cosine"), tmp_path)
    assert (
        "training: the schedule is stretched over more steps, so the learning rate rises again from 0 to"
        in caplog.text
    )
