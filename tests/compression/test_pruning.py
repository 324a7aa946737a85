"""Zeros: as many as asked for, the smallest by each method's own score, kept zero in training, and cheap on disk."""

import copy

import pytest
import torch

from bklm.compression import (
    PrunedModel,
    RoundedModel,
    baked,
    file_sizes,
    load_compressed,
    prune,
    pruned_to,
    quantise,
    save_compressed,
)
from bklm.compression.coded_model import matrices, outer_names
from bklm.compression.pruning import scoped
from bklm.compression.retraining import rounded
from bklm.training.evaluation import evaluate


def zeros(model, scope):
    weights = scoped(model, scope)
    return sum(int((w == 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["body", "outer", "all"])
def test_a_scope_loses_as_many_weights_as_asked_for_and_the_rest_nothing(reading, method, scope):
    made = prune(reading, 0.37, method, scope=scope)
    count, whole = zeros(made, scope)
    assert abs(count - round(0.37 * whole)) <= 1
    chosen = scoped(made, scope)
    for (name, w), (_, before) in zip(made.named_parameters(), reading.named_parameters(), strict=True):
        assert name in chosen or torch.equal(w, before)
        assert torch.equal(w[w != 0], before[w != 0])


def test_magnitude_takes_the_smallest_of_all_matrices_together(reading):
    made = prune(reading, 0.5)
    lost = torch.cat([reading.get_parameter(n)[w == 0].abs() for n, w in scoped(made, "body").items()])
    kept = torch.cat([w[w != 0].abs() for w in scoped(made, "body").values()])
    assert lost.max() <= kept.min()


def test_wanda_takes_the_smallest_products_of_weight_and_input_norm_in_each_row(reading, text):
    """The inputs of one map, collected by hand."""
    made = prune(reading, 0.5, "wanda", calibration=text)
    linear, seen = reading.blocks[1].dense.up, []
    hook = linear.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for x, _ in text:
            reading(x)
    hook.remove()
    norms = torch.cat([x.flatten(0, 1) for x in seen]).norm(dim=0)
    scores, alive = linear.weight.detach().abs() * norms, made.blocks[1].dense.up.weight != 0
    for row, keep in zip(scores, alive, strict=True):
        assert int((~keep).sum()) == round(0.5 * len(row))
        assert row[~keep].max() <= row[keep].min()


def test_magnitude_by_row_takes_the_smallest_of_each_row(reading):
    made = prune(reading, 0.5, "magnitude by row")
    for name, w in scoped(made, "body").items():
        alive, sizes = w != 0, reading.get_parameter(name).detach().abs()
        assert ((~alive).sum(-1) == round(0.5 * w.shape[-1])).all()
        assert (
            sizes.where(~alive, sizes.new_zeros(())).amax(-1)
            <= sizes.where(alive, sizes.new_tensor(9e9)).amin(-1)
        ).all()


def test_wanda_sees_the_maps_of_every_model_that_has_them(model_with_maps, text):
    made = prune(model_with_maps, 0.5, "wanda", calibration=text)
    count, whole = zeros(made, "body")
    assert count == pytest.approx(0.5 * whole, rel=0.02)


def test_at_equal_sparsity_random_is_the_floor(any_model, text):
    loss = {
        m: evaluate(prune(any_model, 0.6, m, scope="all"), text, None).loss for m in ("magnitude", "random")
    }
    assert loss["magnitude"] < loss["random"]


def test_zeros_save_bytes_and_may_be_quantised(any_model, tmp_path, text):
    made = prune(any_model, 0.75, scope="all")
    numbers = sum(w.numel() for w in matrices(any_model).values())
    saved = file_sizes(any_model)[0] - file_sizes(made)[0]
    assert saved == pytest.approx(numbers * (4 * 0.75 - 1 / 8), rel=0.02, abs=1000)
    both = quantise(made, 8)
    assert file_sizes(both)[0] < file_sizes(quantise(any_model, 8))[0]
    for model in (made, both):
        again = load_compressed(save_compressed(model, tmp_path / "small"))
        assert torch.equal(again(text[0][0]), model(text[0][0]))


def test_zeros_are_as_many_as_make_a_file_of_the_bytes_asked_for(any_model):
    whole = file_sizes(quantise(any_model))[0]
    made = pruned_to(any_model, round(0.7 * whole))
    assert file_sizes(made)[0] == pytest.approx(0.7 * whole, rel=0.01)
    assert 0.3 < zeros(made, "all")[0] / zeros(made, "all")[1] < 0.7
    with pytest.raises(
        ValueError, match=r"file_bytes: got 10; with 30% to 95% zeros in 8 bits this model's file has"
    ):
        pruned_to(any_model, 10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: prune(m, 1.0), "sparsity: got 1.0; the share of zeros"),
        (
            lambda m: prune(m, 0.5, "sparsegpt"),
            "method: got 'sparsegpt'; allowed are 'magnitude', 'magnitude by row', 'wanda', 'random'",
        ),
        (lambda m: prune(m, 0.5, scope="head"), "scope: got 'head'; allowed are"),
        (lambda m: prune(m, 0.5, "wanda"), "calibration holds no text"),
        (
            lambda m: prune(m, 0.5, "wanda", calibration=[torch.zeros(1, 4, dtype=torch.int64)]),
            "calibration holds a Tensor; give batches",
        ),
    ],
)
def test_bad_values_are_refused_in_one_sentence(reading, call, words):
    with pytest.raises(ValueError, match=words):
        call(reading)


def test_the_gradient_through_rounding_is_the_float_one_where_nothing_was_clipped():
    w = torch.randn(6, 10).mul_(3).requires_grad_()
    scale = torch.full((6, 1), 0.9)
    target = torch.randn(6, 10)
    found = rounded(w, scale, 3)
    (found * target).sum().backward()
    clipped = (w / scale).round().abs() > 3
    assert clipped.any()
    assert torch.equal(w.grad[~clipped], target[~clipped])
    assert (w.grad[clipped] == 0).all()


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model.loss(*batch).backward()
    optimizer.step()


@pytest.mark.parametrize("bits", [3, 8])
def test_a_model_learns_while_rounded_and_is_then_what_it_was_scored_as(model_with_maps, text, bits):
    made = RoundedModel(copy.deepcopy(model_with_maps), bits).train()
    started = evaluate(made, text, None).loss
    assert started == pytest.approx(
        evaluate(quantise(model_with_maps, bits, rest="float32"), text, None).loss, abs=1e-4
    )
    made.train()
    made.loss(*text[0]).backward()
    assert all(p.grad is not None for n, p in made.model.named_parameters() if n in matrices(made.model))
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(15):
        step(made, optimizer, text[0])
    assert evaluate(made, text[:1], None).loss < evaluate(quantise(model_with_maps, bits), text[:1], None).loss
    small = baked(made)
    assert evaluate(small, text, None).loss == pytest.approx(evaluate(made, text, None).loss, abs=1e-4)
    assert file_sizes(small)[0] < (0.5 if bits == 3 else 0.75) * file_sizes(model_with_maps)[0]


def test_a_rounded_model_that_diverges_shows_it_by_its_loss(model_with_maps, text):
    made = RoundedModel(copy.deepcopy(model_with_maps), 4).train()
    with torch.no_grad():
        next(iter(matrices(made.model).values())).fill_(torch.nan)
    assert made.loss(*text[0]).isnan()


def test_gradual_pruning_follows_its_law_and_what_is_zero_stays_zero(reading, text):
    made = PrunedModel(copy.deepcopy(reading), 0.8, steps=60).train()
    assert [round(made.sparsity_at(t), 4) for t in (0, 30, 60, 90)] == [0.0, 0.7, 0.8, 0.8]
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    before = None
    for t in range(1, 62):
        step(made, optimizer, text[t % 3])
        masks = [b.clone() for n, b in made.named_buffers() if n.startswith("mask")]
        # Each step's zeros are the law's, and no jump at the end.
        zero = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        assert zero == pytest.approx(made.sparsity_at(t), abs=1e-3)
        if before is not None:
            assert all(bool((old | ~new).all()) for old, new in zip(before, masks, strict=True))
        before = masks
    count, whole = zeros(baked(made), "body")
    assert count == pytest.approx(0.8 * whole, abs=1)
    assert evaluate(baked(made), text, None).loss < evaluate(prune(reading, 0.8), text, None).loss


@pytest.mark.parametrize("seed", [None, 0])
def test_scoring_in_the_middle_leaves_the_training_as_it_was(reading, text, seed):
    ends = []
    for scores in (False, True):
        torch.manual_seed(0)
        # Masks every five steps: between two of them the weights move on.
        made = PrunedModel(copy.deepcopy(reading), 0.5, steps=250, seed=seed).train()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        for t in range(8):
            if scores and t == 6:
                evaluate(made, text[:1], None)
            step(made, optimizer, text[t % 3])
        ends.append(made.state_dict())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_zeros_at_random_come_on_the_same_schedule_and_differ_by_seed(reading, text):
    made = {s: PrunedModel(copy.deepcopy(reading), 0.5, steps=40, seed=s).train() for s in (0, 1)}
    for model in made.values():
        model.change()
        assert zeros(baked(model), "body")[0] == 0
    counts, before = [], None
    made[0].train()
    for t in (20, 40):
        made[0].steps.fill_(t)
        made[0].change()
        masks = [b.clone() for n, b in made[0].named_buffers() if n.startswith("mask")]
        assert before is None or all(bool((old | ~new).all()) for old, new in zip(before, masks, strict=True))
        before = masks
        counts.append(sum(int((~mask).sum()) for mask in masks))
    whole = zeros(reading, "body")[1]
    assert counts == pytest.approx([0.4375 * whole, 0.5 * whole], abs=1)
    made[1].steps.fill_(40)
    made[1].change()
    others = [b for n, b in made[1].named_buffers() if n.startswith("mask")]
    assert not all(torch.equal(a, b) for a, b in zip(before, others, strict=True))
    with pytest.raises(ValueError, match="seed: got 1 and masks"):
        PrunedModel(copy.deepcopy(reading), 0.5, 10, masks={}, seed=1)


def test_given_masks_hold_from_the_first_step(reading, text):
    masks = {n: torch.rand_like(w) < 0.5 for n, w in scoped(reading, "body").items()}
    made = PrunedModel(copy.deepcopy(reading), 0.5, 10, masks=masks).train()
    step(made, torch.optim.Adam(made.parameters(), lr=1e-2), text[0])
    plain = baked(made)
    for name, mask in masks.items():
        assert (plain.get_parameter(name)[~mask] == 0).all()
        assert not torch.equal(plain.get_parameter(name)[mask], reading.get_parameter(name)[mask])
    assert outer_names(plain) == outer_names(reading)


CHANGED = {"rounded": lambda m: RoundedModel(m, 3, 8), "pruned": lambda m: PrunedModel(m, 0.5, 0)}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_model_that_learns_under_compression_writes_as_the_plain_one_it_becomes(model_with_maps, kind, text):
    made = CHANGED[kind](copy.deepcopy(model_with_maps))
    plain, prompt = baked(made), text[0][0][:2, :4]
    assert made.streams == plain.streams == model_with_maps.streams
    made.train()
    assert torch.equal(made.generate(prompt, 5, 0.0), plain.generate(prompt, 5, 0.0))
    assert made.training
    made.eval()
    if made.streams:
        (logits, state), (own, own_state) = made.prefill(prompt), plain.prefill(prompt)
        assert torch.allclose(logits, own, atol=1e-5)
        assert not torch.allclose(logits, model_with_maps.prefill(prompt)[0], atol=1e-3)
        next_token = prompt[:, 0]
        assert torch.allclose(made.step(next_token, state)[0], plain.step(next_token, own_state)[0], atol=1e-5)
        first = made.step(next_token, made.init_state(2))[0]
        assert torch.allclose(first, plain(next_token.unsqueeze(1))[:, -1], atol=1e-5)
        assert made.state_bytes(7) == plain.state_bytes(7)


@pytest.mark.parametrize("kind", CHANGED)
def test_weights_that_are_loaded_or_moved_are_changed_anew(reading, kind, text):
    made, x = CHANGED[kind](copy.deepcopy(reading)).eval(), text[0][0]
    before = made(x)
    other = CHANGED[kind](type(reading)(reading.config))
    made.load_state_dict(other.state_dict())
    assert not torch.allclose(made(x), before, atol=1e-3)
    assert torch.allclose(made(x), other.eval()(x), atol=1e-6)
    assert made.double()(x).dtype == torch.float64
    made.train()
    made.loss(*text[0])
    assert made.double().loss(*text[0]).dtype == torch.float64


def test_masks_are_found_once_at_the_schedules_end(reading, text, monkeypatch):
    made, found = PrunedModel(copy.deepcopy(reading), 0.5, 3).train(), []
    find = made._masks_at
    monkeypatch.setattr(made, "_masks_at", lambda *given: found.append(int(made.steps)) or find(*given))
    for _ in range(6):
        made.loss(*text[0])
    assert found == [1, 2, 3]
    count, whole = zeros(baked(made), "body")
    assert count == pytest.approx(0.5 * whole, abs=1)


def test_a_long_schedule_finds_its_masks_fifty_times(reading):
    assert [PrunedModel(copy.deepcopy(reading), 0.5, steps).steps_between for steps in (0, 49, 100, 1000)] == [
        1,
        1,
        2,
        20,
    ]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: RoundedModel(m, 9), "bits: got 9; a weight is rounded to 2 to 8 bits"),
        (lambda m: RoundedModel(m, 4, 0), "group: got 0; give the number of inputs"),
        (lambda m: PrunedModel(m, 1.0, 5), "sparsity: got 1.0; the share of zeros"),
        (lambda m: PrunedModel(m, 0.5, -1), "steps: got -1; the schedule ends"),
        (lambda m: PrunedModel(m, 0.5, 5, masks={}), "masks: got no mask of 'blocks"),
        (
            lambda m: PrunedModel(m, 0.5, 5, masks={n: w != 0 for n, w in scoped(m, "all").items()}),
            "masks: got one of 'embedding",
        ),
        (
            lambda m: PrunedModel(m, 0.5, 5, masks=scoped(m, "body")),
            r"masks: that of 'blocks.* is torch.float32 of shape .*; it must be torch.bool",
        ),
    ],
)
def test_bad_values_of_training_under_compression_are_refused_in_one_sentence(reading, call, words):
    with pytest.raises(ValueError, match=words):
        call(copy.deepcopy(reading))
