"""Phase 2: kept contexts give the numbers of the walk from token to token, by every way of keeping them."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase import store as context_store
from bklm.training.two_phase.phase1 import FixedPointSettings, train_context
from bklm.training.two_phase.phase2 import build
from bklm.training.two_phase.store import choose_plan

VOCABULARY, WIDTH, LAYERS = 40, 8, 5
TRAIN, VALID = 300, 90


def ids_of(length, seed):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def model_of(seed=0, tied=True, frozen=False, double=False):
    torch.manual_seed(seed)
    model = ContextTokenLM(ContextTokenConfig(VOCABULARY, WIDTH, WIDTH, LAYERS, tied))
    model = model.double() if double else model
    train_context(model, ids_of(100, 9), FixedPointSettings(iterations=2))
    if frozen:
        model.freeze_embedding()
    return model


def texts():
    return {"train": ids_of(TRAIN, 1), "valid": ids_of(VALID, 2)}


def run(cached, epochs=2, folder=None, **options):
    settings = TrainingSettings(epochs=epochs, learning_rate=2e-3, weight_decay=0.0, clip=1.0, seed=4)
    return train(
        cached,
        cached.batches("train", 64, shuffle=True, seed=4),
        cached.batches("valid", 64),
        settings,
        accelerator=make_accelerator("cpu", "fp32"),
        folder=folder,
        **options,
    )


def walked(model, ids):
    """(positions, L, D) contexts and the losses of every target, token after token."""
    ids = torch.as_tensor(ids)[None]
    with torch.no_grad():
        return model.contexts(ids)[0], model.token_losses(ids[:, :-1], ids[:, 1:]).nll[0]


# Room for the contexts of every layer in double, in half; for the final ones in double, in half; for none.
NUMBERS = (TRAIN + VALID) * WIDTH
ROOM = [8 * NUMBERS * LAYERS, 2 * NUMBERS * LAYERS, 8 * NUMBERS, 2 * NUMBERS, 0]


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("frozen", [True, False])
def test_every_way_of_keeping_gives_the_contexts_and_losses_of_the_walk(room, frozen):
    model = model_of(frozen=frozen, double=True)
    cached = build(model, texts(), memory_bytes=room, tolerance=1e-9)
    exact = cached.plan.dtype == torch.float64
    for name, ids in texts().items():
        contexts, losses = walked(model, ids)
        loader = cached.batches(name, 64)
        got = torch.cat([cached.contexts(x)[0][y[0] != -100] for x, y in loader])
        torch.testing.assert_close(got, contexts[:-1], rtol=0, atol=1e-7 if exact else 5e-3)
        nll = torch.cat([cached.token_losses(x, y).nll[y != -100] for x, y in loader])
        torch.testing.assert_close(nll, losses, rtol=0, atol=1e-7 if exact else 5e-3)


@pytest.mark.parametrize("room", ROOM)
def test_with_the_mixer_off_a_kept_context_is_made_of_its_own_token(room):
    model = model_of(double=True)
    cached = build(model, texts(), memory_bytes=room, tolerance=1e-9)
    ids = torch.as_tensor(texts()["valid"])
    (x, y), *_ = cached.batches("valid", len(ids) - 1)
    with cached.recording_mixing() as recorded:
        cached.token_losses(x, y)
    (mean,), exact = recorded.means(), cached.plan.dtype == torch.float64
    finals = walked(model, ids)[0][:-2, -1]
    torch.testing.assert_close(mean, finals.sum(0) / (len(ids) - 1), rtol=0, atol=1e-7 if exact else 1e-3)
    with cached.without_mixing([mean]), torch.no_grad():
        off = cached.token_losses(x, y).nll[0]
        hidden = model.token_block(
            model.embed(ids), model.context_block(mean.expand(len(ids), -1), model.embed(ids))
        )
    torch.testing.assert_close(
        off, torch.nn.functional.cross_entropy(model.logits(hidden[:-1]), ids[1:], reduction="none"),
        rtol=0, atol=1e-12 if exact else 1e-3,
    )  # fmt: skip
    # Zeros are what the first token of a text hears of: windows of one.
    with cached.without_mixing([torch.zeros(WIDTH)]):
        alone = cached.token_losses(x, y).nll[0]
    ones = model.token_losses(ids[:-1, None], ids[1:, None]).nll[:, 0]
    torch.testing.assert_close(alone, ones, rtol=0, atol=1e-12 if exact else 1e-3)
    assert (alone - off).abs().max() > 1e-6


def test_the_first_plan_that_fits_is_taken_and_said():
    model = model_of(double=True)
    plans = [choose_plan(model, TRAIN + VALID, room) for room in ROOM]
    kept = [(p.layers, p.dtype, p.on_disk) for p in plans]
    half, full = torch.float16, torch.float64
    assert kept == [
        (True, full, False), (True, half, False), (False, full, False), (False, half, False), (False, half, True)
    ]  # fmt: skip
    assert [p.bytes(TRAIN + VALID, model) for p in plans] == [*ROOM[:4], ROOM[3]]
    assert str(plans[1]) == "contexts of every layer, float16, in memory"
    assert str(plans[4]) == "final contexts, layers recomputed per batch, float16, in a file"


def test_the_published_size_does_not_need_9_gigabytes(monkeypatch):
    with torch.device("meta"):
        model = ContextTokenLM(ContextTokenConfig())
    model.embedding.weight = torch.nn.Parameter(torch.empty(1, 1))  # says where the model is
    monkeypatch.setattr(context_store, "free_bytes", lambda device: 4 * 2**30)
    plan = choose_plan(model, 552_498)  # 1000 samples and validation, 4 GB free
    assert not plan.layers
    assert plan.bytes(552_498, model) < 2 * 2**30


@pytest.mark.parametrize("layers", [True, False])
def test_free_memory_decides_where_contexts_are_kept_and_no_number_of_them(layers, monkeypatch):
    monkeypatch.setattr(context_store, "LAYERS_BYTES", 10**9 if layers else 0)
    model, kept = model_of(), []
    # Room for half precision alone: the numbers stay whole.
    for free in (10**9, 2 * 2 * NUMBERS, 0):
        monkeypatch.setattr(context_store, "free_bytes", lambda device, free=free: free)
        cached = build(model, texts())
        assert (cached.plan.layers, cached.plan.dtype, cached.plan.on_disk) == (
            layers,
            torch.float32,
            free < 10**9,
        )
        kept.append(torch.cat([cached.contexts(x).flatten(0, 1) for x, _ in cached.batches("train", 64)]))
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_a_disk_too_small_is_refused_in_one_sentence(monkeypatch):
    model = model_of()
    monkeypatch.setattr(context_store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"final contexts of 390 tokens take .* set TMPDIR to a larger disk"):
        build(model, texts(), memory_bytes=0)


def test_documents_restart_in_the_cache_as_they_would_alone():
    model = model_of(frozen=True)
    documents = [ids_of(n, n) for n in (40, 70, 33)]
    starts = np.cumsum([0, 40, 70])
    for room in (10**9, 4 * 143 * WIDTH):
        cached = build(
            model, {"all": np.concatenate(documents)}, document_starts={"all": starts}, memory_bytes=room
        )
        for start, ids in zip(starts, documents, strict=True):
            got = cached.contexts(torch.arange(start, start + len(ids))[None])[0]
            torch.testing.assert_close(got, walked(model, ids)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_training_changes_what_is_trainable_and_leaves_the_rest_bit_equal(tied):
    model = model_of(tied=tied, frozen=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = run(build(model, texts()))
    changed = {
        name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == ({"token_block"} if tied else {"token_block", "output"})
    assert records[1].train_loss < records[0].train_loss


def test_a_trained_embedding_gets_the_gradient_that_the_walk_gives_with_contexts_held():
    model, ids = model_of(double=True), torch.as_tensor(ids_of(30, 3))
    cached = build(model, {"text": ids.numpy()}, tolerance=1e-10)
    x, y = next(iter(cached.batches("text", 29)))
    cached.loss(x, y).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.token_block(model.embed(ids[None, :-1]), model.contexts(ids[None, :-1]).detach())
    torch.nn.functional.cross_entropy(model.logits(hidden)[0], ids[1:]).backward()
    assert {"embedding.weight", "norm.weight"} < set(got)
    for name, value in got.items():
        torch.testing.assert_close(value, model.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("room", [10**9, 4 * NUMBERS])
def test_refreshed_contexts_are_those_of_the_trained_embedding_and_the_log_says_so(room, caplog):
    model = model_of(double=True)
    cached = build(model, texts(), refresh=True, memory_bytes=room, tolerance=1e-9)
    with caplog.at_level(logging.INFO, "bklm"):
        records = run(cached)
    assert cached.recomputed == 2  # after each epoch
    assert "the embedding has changed; contexts computed again (2)" in caplog.text
    _, losses = walked(model, texts()["valid"])
    assert records[-1].val_loss == pytest.approx(float(losses.mean()), abs=1e-7 if room > 10**8 else 2e-3)


def test_contexts_stay_those_of_the_embedding_they_were_computed_with_unless_refreshed():
    model = model_of()
    many, few = (build(model, texts(), memory_bytes=room) for room in (10**9, 4 * NUMBERS))
    assert many.plan.layers
    assert not few.plan.layers
    positions = torch.arange(100)[None]
    with torch.no_grad():
        model.embedding.weight.add_(0.1 * torch.randn_like(model.embedding.weight))
    torch.testing.assert_close(few.contexts(positions), many.contexts(positions), rtol=0, atol=1e-5)
    assert (walked(model, texts()["train"])[0][:100] - many.contexts(positions)).abs().max() > 0.1


def test_frozen_contexts_are_never_computed_again():
    cached = build(model_of(frozen=True), texts(), refresh=True)
    run(cached)
    assert cached.recomputed == 0


@pytest.mark.slow
def test_a_run_killed_between_epochs_ends_with_bit_equal_numbers(tmp_path):
    whole = model_of()
    records = run(build(whole, texts(), refresh=True), epochs=2)
    killed = model_of()

    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build(killed, texts(), refresh=True), epochs=2, folder=tmp_path, on_epoch=stop)
    resumed = model_of()
    again = run(build(resumed, texts(), refresh=True), epochs=2, folder=tmp_path)
    assert [r.val_loss for r in again] == [r.val_loss for r in records]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_every_token_after_the_first_is_a_target_once_and_no_batch_crosses_texts():
    cached = build(model_of(), texts())
    for name, ids in texts().items():
        pairs = [(x[y != -100], y[y != -100]) for x, y in cached.batches(name, 64, shuffle=True, seed=1)]
        order = torch.argsort(torch.cat([x for x, _ in pairs]))
        assert torch.equal(torch.cat([y for _, y in pairs])[order], torch.as_tensor(ids[1:]))
    first = [next(iter(cached.batches("train", 64)))[0][0, 0], next(iter(cached.batches("valid", 64)))[0][0, 0]]
    assert first == [0, TRAIN]
    assert evaluate(cached, cached.batches("valid", 64), None).tokens == VALID - 1


def test_the_final_context_of_a_token_predicts_nothing_that_came_before_it():
    """A changed token moves kept contexts and losses from its position on, none before."""
    model, changed = model_of(frozen=True, double=True), texts()["train"]
    cached = build(model, texts(), tolerance=1e-10)
    changed[150] = (changed[150] + 1) % VOCABULARY
    other = build(model, {"train": changed, "valid": texts()["valid"]}, tolerance=1e-10)
    positions = torch.arange(TRAIN + VALID)[None]
    moved = (cached.contexts(positions) - other.contexts(positions)).abs().amax((0, 2, 3))
    assert moved[:150].max() <= 1e-9
    assert moved[150] > 1e-3
    assert moved[TRAIN:].max() <= 1e-9


# --- refusals --------------------------------------------------------------------------------------------------------


def test_phase_2_before_phase_1_is_refused():
    model = ContextTokenLM(ContextTokenConfig(VOCABULARY, WIDTH, WIDTH, LAYERS))
    with pytest.raises(ValueError, match="run phase 1 first"):
        build(model, texts())
    assert model.context_block.linears[0].weight.requires_grad  # refused before anything was changed


def test_phase_1_done_travels_with_the_weights():
    model = ContextTokenLM(ContextTokenConfig(VOCABULARY, WIDTH, WIDTH, LAYERS))
    model.load_state_dict(model_of().state_dict())
    assert build(model, texts()).plan.layers


def test_a_model_with_nothing_to_train_is_refused():
    model = model_of(frozen=True)
    model.token_block.requires_grad_(False)
    with pytest.raises(ValueError, match="phase 2 has nothing to train"):
        build(model, texts())


def test_texts_and_positions_that_do_not_exist_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="texts: got none"):
        build(model, {})
    with pytest.raises(ValueError, match=r"document_starts: got \['trian'\]"):
        build(model, texts(), document_starts={"trian": [0]})
    with pytest.raises(ValueError, match=f"token_ids: got 0 to {VOCABULARY}"):
        build(model, {"train": np.array([0, VOCABULARY])})
    cached = build(model, texts())
    with pytest.raises(ValueError, match="text: got 'test'; allowed are 'train', 'valid'"):
        cached.batches("test")
    with pytest.raises(ValueError, match=f"allowed is 0 to {TRAIN + VALID - 1}"):
        cached(torch.full((1, 2), TRAIN + VALID))
    with pytest.raises(TypeError, match="positions: got"):
        cached(torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"generate with its \.model"):
        cached.generate(torch.zeros(1, 2, dtype=torch.int64), 3)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_finds_the_same_loss_in_every_arm_and_kept_contexts_fastest():
    script = Path(__file__).parents[1] / "benchmarks" / "freeze_phase2.py"
    command = [sys.executable, script, "--quick", "--sweeps", "--seconds", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr  # it stops where the arms' first losses differ
    factors = dict(re.findall(r"^  (token by token|kept contexts) .* ([0-9.]+)x", done.stdout, re.MULTILINE))
    assert float(factors["kept contexts"]) > 1  # far more: how much is the machine's and its other work's
