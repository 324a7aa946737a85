"""A run that goes on: moments from its checkpoint, hyperparameters from its settings, whatever wraps the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from every_model import MODELS, WITH_STATE, V
from torch.utils.data import DataLoader, TensorDataset

from bklm.data import make_loader, windows
from bklm.models import (
    GPT,
    ContextTokenConfig,
    ContextTokenLM,
    GPTConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
)
from bklm.training.checkpoints import CheckpointFolder, read_state
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import OtherModelError, load_weights, save_weights

MAKERS = {
    "GPT": lambda v=30: GPT(GPTConfig(v, 8, 1, 2, 8, dropout_p=0.0)),
    # Without dropout: with a compiled layer it draws its masks in another order.
    "NewLLM": lambda v=30: NewLLM(NewLLMConfig(v, 8, 8, 8, 2, dropout_p=0.0)),
    "ResNetBK": lambda v=30: ResNetBK(ResNetBKConfig(v, 8, 1, n_seq=8, num_experts=2)),
    "ContextTokenLM": lambda v=30: ContextTokenLM(ContextTokenConfig(v, 8, 8, 1)),
    "ContextTokenLM, untied": lambda v=30: ContextTokenLM(ContextTokenConfig(v, 8, 12, 1, tied=False)),
}
IDS = np.random.default_rng(0).integers(2, 30, 150).astype(np.uint16)


def batches(size=4, shuffle=True):
    return make_loader(windows(IDS, 8), size, shuffle=shuffle)


def run(model, folder=None, *, train_batches=None, identity=None, **settings):
    """(records, the (learning rate, weight decay, first moment's norm) that every step began with)"""
    used, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        moments = [s["exp_avg"].double().norm() for s in self.state.values()]
        group = self.param_groups[0]
        used.append((group["lr"], group["weight_decay"], float(sum(moments))))
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = spy
    try:
        records = train(
            model,
            train_batches or batches(),
            batches(shuffle=False),
            TrainingSettings(**settings),
            accelerator=make_accelerator("cpu", "fp32"),
            folder=folder,
            identity=identity,
        )
    finally:
        torch.optim.AdamW.step = step
    return records, used


def fresh(name, vocabulary=30):
    torch.manual_seed(0)
    return MAKERS[name](vocabulary)


def whole(model):
    return torch.compile(model, backend="eager")


def a_part(model):
    """The model with its first block or layer compiled."""
    for parts in ("blocks", "layers", "token_block"):
        if isinstance(found := getattr(model, parts, None), torch.nn.ModuleList):
            found[0] = torch.compile(found[0], backend="eager")
            return model
    model.norm = torch.compile(model.norm, backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("wrap", [whole, a_part])
def test_compiled_and_plain_models_go_on_from_each_others_checkpoints_with_the_same_numbers(
    tmp_path, name, wrap
):
    plain, want = fresh(name), fresh(name)
    records = run(want, epochs=2)[0]
    for first, second, folder in ((wrap, lambda m: m, "a"), (lambda m: m, wrap, "b")):
        run(first(fresh(name)), tmp_path / folder, epochs=1)
        plain = fresh(name)
        went_on = run(second(plain), tmp_path / folder, epochs=2)[0]
        # What is compiled may round otherwise.
        assert np.allclose([r.val_loss for r in went_on], [r.val_loss for r in records], rtol=1e-5)
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.parameters(), want.parameters(), strict=True)
        )


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_with_the_names_of_a_compiled_model_is_read(tmp_path, name):
    from safetensors.torch import save_model

    model = fresh(name)
    save_model(whole(model), str(tmp_path / "w.safetensors"))  # as such files were written before
    save_weights(whole(model), tmp_path / "plain.safetensors")
    for file in ("w", "plain"):
        other = MAKERS[name]()
        load_weights(other, tmp_path / f"{file}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_rate_and_decay_are_those_asked_for_from_the_first_step_on_and_moments_those_of_the_checkpoint(
    tmp_path,
):
    run(fresh("GPT"), tmp_path, epochs=1, learning_rate=1e-3, weight_decay=0.01)
    moments = read_state(CheckpointFolder(tmp_path).newest())["optimizer"]["state"]
    norm = sum(float(s["exp_avg"].double().norm()) for s in moments.values())
    _, used = run(fresh("GPT"), tmp_path, epochs=2, learning_rate=1e-5, weight_decay=0.5)
    assert {step[:2] for step in used} == {(1e-5, 0.5)}
    assert used[0][2] == pytest.approx(norm)
    assert norm > 0


@pytest.mark.parametrize("before", [1, 2])
def test_a_longer_cosine_run_steps_as_the_longer_schedule_says(tmp_path, before):
    identity = {"model": "gpt"}
    _, first = run(fresh("GPT"), tmp_path, identity=identity, epochs=before, schedule="cosine")
    _, went_on = run(fresh("GPT"), tmp_path, identity=identity, epochs=4, schedule="cosine")
    _, planned = run(fresh("GPT"), epochs=4, schedule="cosine")
    assert [step[0] for step in went_on] == [step[0] for step in planned[len(first) :]]


def test_another_number_of_steps_an_epoch_keeps_the_place_in_the_schedule(tmp_path, caplog):
    run(fresh("GPT"), tmp_path, epochs=2, schedule="cosine")
    _, went_on = run(fresh("GPT"), tmp_path, train_batches=batches(2), epochs=4, schedule="cosine")
    _, planned = run(fresh("GPT"), train_batches=batches(2), epochs=4, schedule="cosine")
    assert [step[0] for step in went_on] == [step[0] for step in planned[len(planned) // 2 :]]
    assert "the schedule goes on after 2 epochs" in caplog.text


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_of_another_vocabulary_or_model_is_refused_in_one_sentence(tmp_path, name):
    run(fresh(name), tmp_path, epochs=1)
    others = [fresh(name, 31), fresh("GPT" if name != "GPT" else "NewLLM")]
    for model in others:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="of another model") as caught:
            run(model, tmp_path, epochs=2)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        with pytest.raises(OtherModelError, match=r"there and .* in this"):
            load_weights(model, CheckpointFolder(tmp_path).newest() / "model.safetensors")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_checkpoint_of_another_frozen_part_is_refused_in_one_sentence(
    tmp_path, frozen_first, named, monkeypatch
):
    if not named:  # as checkpoints were written before
        monkeypatch.setattr("bklm.training.loop.trainable_names", lambda model: None)
    models = [fresh("GPT"), fresh("GPT")]
    models[not frozen_first].embedding.requires_grad_(False)
    run(models[0], tmp_path, epochs=1)
    with pytest.raises(ValueError, match="of which other parts were frozen") as caught:
        run(models[1], tmp_path, epochs=2)
    assert "\n" not in str(caught.value)
    assert not named or "embedding.weight is trained only" in str(caught.value)


def test_parts_of_equal_shape_that_change_places_are_told_apart_by_their_names(tmp_path):
    models = [fresh("NewLLM"), fresh("NewLLM")]
    models[0].forget_gate.requires_grad_(False)
    models[1].input_gate.requires_grad_(False)
    run(models[0], tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"forget_gate\.weight is trained only now"):
        run(models[1], tmp_path, epochs=2)


def pairs():
    return list(batches(shuffle=False))


@pytest.mark.parametrize("kind", ["list", "tuple", "DataLoader", "shuffled DataLoader"])
def test_lists_and_ordinary_loaders_train_too_and_go_on_as_if_never_stopped(tmp_path, kind):
    x, y = (torch.cat(part) for part in zip(*pairs(), strict=True))
    made = {
        "list": pairs,
        "tuple": lambda: tuple(pairs()),
        "DataLoader": lambda: DataLoader(TensorDataset(x, y), 4),
        "shuffled DataLoader": lambda: DataLoader(TensorDataset(x, y), 4, shuffle=True),
    }[kind]
    want, model = fresh("GPT"), fresh("GPT")
    records = run(want, train_batches=made(), epochs=2)[0]
    run(fresh("GPT"), tmp_path, train_batches=made(), epochs=1)
    went_on = run(model, tmp_path, train_batches=made(), epochs=2)[0]
    assert went_on[-1].val_loss == records[-1].val_loss
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (iter([]), TypeError, "train_batches: got a list_iterator; give a loader"),
        ((b for b in []), TypeError, "train_batches: got a generator"),
        (7, TypeError, "train_batches: got a int"),
        ([], ValueError, "train_batches: got no batch"),
    ],
)
def test_batches_that_cannot_be_gone_through_once_an_epoch_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        train(fresh("GPT"), given, pairs(), TrainingSettings(1), accelerator=make_accelerator("cpu", "fp32"))
    if given != []:
        with pytest.raises(error, match=message.replace("train", "val")):
            train(
                fresh("GPT"), pairs(), given, TrainingSettings(1), accelerator=make_accelerator("cpu", "fp32")
            )


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_without_a_trainable_part_is_refused(name):
    with pytest.raises(ValueError, match=r"model: no parameter of this \w+ is trained"):
        run(fresh(name).requires_grad_(False), epochs=1)


def test_a_wrapped_model_is_unwrapped_in_the_refusal_too(tmp_path):
    run(fresh("GPT"), tmp_path, epochs=1)
    with pytest.raises(OtherModelError, match="in this GPT"):
        load_weights(whole(fresh("GPT", 31)), CheckpointFolder(tmp_path).newest() / "model.safetensors")


# Models whose state is not weights and moments alone, or that no test above trains.
GOING_ON = ["LSTM", "Conservative", "ResNetBK with an energy", *WITH_STATE]


@pytest.mark.parametrize("name", GOING_ON)
def test_every_kind_of_model_goes_on_with_the_same_bits_whatever_the_default_device(tmp_path, name):
    def ran(folder, epochs):
        with torch.device("cpu"):
            torch.manual_seed(0)
            model = {**MODELS, **WITH_STATE}[name](0.1)
        text, accelerator = windows(IDS % V, 8), make_accelerator("cpu", "fp32")
        loaders = make_loader(text, 4, shuffle=True), make_loader(text, 4)
        records = train(model, *loaders, TrainingSettings(epochs), accelerator=accelerator, folder=folder)
        return [r.val_loss for r in records], list(model.state_dict().values())

    losses, want = ran(None, 3)
    ran(tmp_path, 1)
    # A tensor that is made there by mistake has no values.
    torch.set_default_device("meta")
    try:
        went_on, found = ran(tmp_path, 3)
    finally:
        torch.set_default_device(None)
    assert went_on == losses
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
