"""ResNet-BK: sees no future, streams with constant state, and is the architecture that was published."""

import cmath
import dataclasses
import statistics
import time

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.bk_core import resolvent_diagonal
from bklm.models import ResNetBK, ResNetBKConfig, future_leak, reading_settings

VOCABULARY = 23


def model_of(seed=0, *, double=True, original=False, **changes):
    """A small model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    settings = {"d_model": 12, "n_layers": 3, "n_seq": 24, "dropout_p": 0.0, **changes}
    make = ResNetBKConfig.original if original else ResNetBKConfig
    model = ResNetBK(make(VOCABULARY, **settings))
    torch.nn.init.ones_(model.norm.weight)  # its training gain of 3 would only magnify the logits' rounding
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return (model.double() if double else model).eval()


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- the future ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 2}, {"num_experts": 1}, {"n_heads": 3}, {"clamps": True}, {"n_seq": None}]
)
def test_changing_later_tokens_leaves_earlier_logits_alone(changes):
    model, ids = model_of(**changes), ids_of(3, 20)
    before = model(ids)
    for cut in (1, 10, 19):
        altered = ids.clone()
        altered[:, cut:] = (ids[:, cut:] + 1 + ids_of(3, 20 - cut, seed=cut) % (VOCABULARY - 1)) % VOCABULARY
        after = model(altered)
        assert (after - before)[:, :cut].abs().max() <= 1e-12
        assert (after - before)[:, cut].abs().max() > 1e-3


def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero():
    require_no_gradient_to_the_future(model_of(), ids_of(2, 16), (0, 7, 14))


def test_leak_is_zero_for_the_causal_core_and_found_in_the_bidirectional_one():
    ids = ids_of(2, 20)
    causal = future_leak(model_of(double=False), ids, 19)
    bidirectional = future_leak(model_of(double=False, causal=False), ids, 19)
    assert causal.shape == bidirectional.shape == (19,)
    assert causal.max() <= 1e-12
    assert bidirectional[18] > 1e-3
    assert bidirectional[18] > bidirectional[10] > 0


def test_leak_measure_leaves_the_model_as_it_was():
    model = model_of(double=False).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    future_leak(model, ids_of(1, 8), 4, new_token=0 if ids_of(1, 8)[0, 4] else 1)
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("position", [0, 8, -1])
def test_leak_measure_refuses_a_position_with_no_past_or_outside(position):
    with pytest.raises(ValueError, match=f"position: got {position}"):
        future_leak(model_of(), ids_of(1, 8), position)


def test_leak_measure_refuses_a_change_that_changes_nothing():
    ids = ids_of(1, 8)
    with pytest.raises(ValueError, match="already at position 4"):
        future_leak(model_of(), ids, 4, new_token=int(ids[0, 4]))


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"n_seq": None, "top_k": 4}, {"n_heads": 2, "clamps": True, "eta": 0.5}]
)
def test_steps_give_the_logits_of_the_full_forward(changes, double):
    model, ids = model_of(double=double, **changes), ids_of(2, 24)
    whole, state = model(ids), model.init_state(2)
    tolerance = (1e-12 if double else 1e-5) * whole.abs().max().item()
    for i in range(24):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=tolerance)
    assert state.position == 24


def test_steps_of_the_published_size_agree_to_1e_5():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(5000)).eval()
    ids = torch.randint(0, 5000, (2, 128))
    whole, state = model(ids), model.init_state(2)
    for i in range(128):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=1e-5)


def test_prefill_stands_where_the_steps_would():
    model, ids = model_of(n_heads=2), ids_of(2, 17)
    logits, state = model.prefill(ids)
    torch.testing.assert_close(logits, model(ids)[:, -1])
    stepped = model.init_state(2)
    for i in range(17):
        _, stepped = model.step(ids[:, i], stepped)
    assert state.position == stepped.position == 17
    for a, b in zip(state.resolvents, stepped.resolvents, strict=True):
        torch.testing.assert_close(a, b)


def test_state_is_one_complex_number_per_head_layer_and_row_at_any_position():
    model = model_of(n_seq=None, n_heads=2)
    for length in (1, 5, 300):
        _, state = model.prefill(ids_of(4, length))
        assert [r.shape for r in state.resolvents] == [(4, 2)] * 3


def test_step_leaves_the_given_state_unchanged():
    model, ids = model_of(), ids_of(1, 6)
    _, state = model.prefill(ids)
    kept = [r.clone() for r in state.resolvents]
    first, _ = model.step(ids[:, 0], state)
    again, _ = model.step(ids[:, 0], state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(kept, state.resolvents, strict=True))


def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward():
    model, ids = model_of(), ids_of(2, 5)
    out = model.generate(ids, 10, temperature=0.0)
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(out[:, 5:], model(out)[:, 4:-1].argmax(-1))


def test_bidirectional_generation_runs_over_the_window_again():
    model, ids = model_of(causal=False), ids_of(1, 5)
    out = model.generate(ids, 6, temperature=0.0)
    for i in range(5, 11):
        assert out[0, i] == model(out[:, :i])[0, -1].argmax()
    for call in (lambda: model.init_state(1), lambda: model.prefill(ids), lambda: model.step(ids[:, 0], None)):
        with pytest.raises(TypeError, match="does not stream"):
            call()


def test_sampling_repeats_with_its_generator_and_follows_the_distribution():
    model, ids = model_of(), ids_of(1, 4)
    runs = [model.generate(ids, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    many = model.generate(ids.expand(4000, -1), 1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    expected = torch.softmax(model(ids)[0, -1] / 2.0, -1)
    seen = torch.bincount(many[:, -1], minlength=VOCABULARY) / 4000
    assert (seen - expected).abs().max() < 0.03


def test_a_tiny_temperature_is_greedy_and_not_a_number():
    model, ids = model_of(double=False), ids_of(2, 5)
    assert torch.equal(model.generate(ids, 4, temperature=1e-30), model.generate(ids, 4, temperature=0.0))


def test_generation_switches_dropout_off_and_training_back_on():
    model, ids = model_of(dropout_p=0.9).train(), ids_of(1, 5)
    out = model.generate(ids, 10, temperature=0.0)
    assert model.training
    assert torch.equal(out, model.eval().generate(ids, 10, temperature=0.0))


def test_generation_without_position_embedding_has_no_end():
    assert model_of(n_seq=None).generate(ids_of(1, 3), 200).shape == (1, 203)


@pytest.mark.parametrize(
    ("length", "new", "temperature", "message"),
    [
        (20, 5, 1.0, "25 positions, but this model has n_seq = 24"),
        (25, 0, 1.0, "25 positions"),
        (0, 5, 1.0, "at least one token"),
        (3, -1, 1.0, "max_new_tokens: got -1"),
        (3, 1, -0.5, "temperature: got -0.5"),
        (3, 1, float("nan"), "temperature: got nan"),
    ],
)
def test_generation_refuses_what_it_cannot_do(length, new, temperature, message):
    with pytest.raises(ValueError, match=message):
        model_of().generate(ids_of(1, length), new, temperature)


def test_step_beyond_the_last_position_is_refused():
    model = model_of()
    _, state = model.prefill(ids_of(1, 24))
    with pytest.raises(ValueError, match="n_seq = 24"):
        model.step(torch.zeros(1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=f"input_ids: got {VOCABULARY}"):
        model.step(torch.full((1,), VOCABULARY), model.init_state(1))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"n_heads": 8, **reading_settings(64)}], ids=["diagonal", "solve"])
@torch.no_grad()
def test_a_token_at_position_100_000_is_the_forwards_and_takes_as_long_as_at_100(fields):
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(1000, n_seq=None, **fields)).eval()
    token, ids = torch.zeros(1, dtype=torch.int64), torch.randint(0, 1000, (1, 100_000))
    states = {n: model.prefill(ids[:, :n])[1] for n in (100, 100_000)}
    assert model.state_bytes(100) == model.state_bytes(100_000)
    whole, _ = model.prefill(torch.cat([ids, token[None]], 1))
    torch.testing.assert_close(model.step(token, states[100_000])[0], whole, rtol=0, atol=1e-5)

    def seconds(state):
        start = time.perf_counter()
        model.step(token, state)
        return time.perf_counter() - start

    # Taken in turn, and the lower quartile: what a busy machine adds is not the model's. A cost that grew with the
    # position would be a thousand times as high; a factor of two is beyond what noise makes of the same work.
    pairs = [(seconds(states[100]), seconds(states[100_000])) for _ in range(1500)]
    near, far = (statistics.quantiles(times, n=4)[0] for times in zip(*pairs, strict=True))
    assert far < 2 * near


# --- the architecture ------------------------------------------------------------------------------------------------


def test_parameter_count_is_that_of_the_published_size():
    d, v = 64, 30_000
    experts = 4 * ((d * 2 * d + 2 * d) + (2 * d * d + d))
    router, norm, potential, mix, scale = 4 * d + 4, 2 * d, d + 1, 2 * d + d, 1
    blocks = 4 * (experts + router + norm + potential + mix + scale)
    model = ResNetBK(ResNetBKConfig(v))
    assert model.num_parameters() == v * d + 128 * d + blocks + 2 * d + v * d + v
    assert model.num_parameters(trainable_only=True) == model.num_parameters()
    model.embedding.requires_grad_(False)
    assert model.num_parameters(trainable_only=True) == model.num_parameters() - v * d


@pytest.mark.parametrize("causal", [True, False])
def test_block_is_x_plus_f_plus_scaled_mix_of_the_resolvent_diagonal(causal):
    model, ids = model_of(n_layers=1, causal=causal), ids_of(2, 9)
    block = model.blocks[0]
    x = model.embedding(ids) + model.positions.weight[:9]
    f = block.moe(F.layer_norm(x, (12,), block.norm.weight, block.norm.bias, block.norm.eps))
    v = f @ block.potential.weight[0] + block.potential.bias
    rows = []
    for row in v:
        h = torch.diag(row - 2) + torch.diag(torch.ones(8), 1) + torch.diag(torch.ones(8), -1)
        if causal:
            g = torch.stack(
                [torch.linalg.inv(h[: i + 1, : i + 1] - 1j * torch.eye(i + 1))[-1, -1] for i in range(9)]
            )
        else:
            g = torch.linalg.inv(h - 1j * torch.eye(9)).diagonal()
        rows.append(torch.stack([g.real, g.imag], -1))
    mixed = torch.stack(rows) @ block.mix.weight.t() + block.mix.bias
    y = x + f + block.scale * mixed
    y = F.layer_norm(y, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
    torch.testing.assert_close(model(ids), y @ model.output.weight.t() + model.output.bias)


def test_clamps_bound_the_potential_as_the_original_did():
    clamped, free = model_of(clamps=True), model_of()
    for model in (clamped, free):
        model.blocks[0].potential.bias.data.fill_(50.0)
    seen = []
    for model in (clamped, free):
        handle = model.blocks[0].core.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(ids_of(1, 6))
        handle.remove()
    assert (seen[0] == 3.0).all()
    assert seen[1].min() > 3.0


def test_original_protocol_turns_every_correction_off_and_can_be_resized():
    config = ResNetBKConfig.original(100, d_model=8, grad_blend=0.5)
    assert (config.causal, config.gradient, config.router_gradient, config.clamps) == (
        False,
        "original",
        "none",
        True,
    )
    assert (config.vocab_size, config.d_model, config.grad_blend) == (100, 8, 0.5)


def test_core_computes_with_the_settings_of_the_config():
    settings = {"causal": False, "gradient": "local", "grad_blend": 0.25, "eta": 0.5, "n_heads": 2}
    for block in model_of(**settings).blocks:
        assert {name: getattr(block.core, name) for name in settings} == settings


@pytest.mark.parametrize("original", [True, False])
def test_every_trainable_parameter_learns(original):
    model, ids = model_of(original=original, double=False).train(), ids_of(8, 24)
    model.loss(ids, ids.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
    frozen = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("router" in n for n in frozen)
    assert bool(frozen) == original


def test_exact_gradient_is_the_derivative_of_the_loss():
    model, ids = model_of(num_experts=1, n_seq=None), ids_of(2, 7)
    y = ids.roll(-1, 1)
    weight = model.blocks[1].potential.weight
    (gradient,) = torch.autograd.grad(model.loss(ids, y), weight)
    step = 1e-6
    for j in range(3):
        with torch.no_grad():
            weight[0, j] += step
            up = model.loss(ids, y)
            weight[0, j] -= 2 * step
            down = model.loss(ids, y)
            weight[0, j] += step
        assert abs((up - down) / (2 * step) - gradient[0, j]) < 1e-7


def test_seeded_training_step_repeats_bit_for_bit():
    def step():
        model = model_of(dropout_p=0.2, double=False).train()
        torch.manual_seed(7)
        model.loss(ids_of(4, 24), ids_of(4, 24, seed=2)).backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_expert_counts_add_up_over_training_steps_and_start_anew():
    model = model_of(double=False).train()
    assert model.expert_counts() == []
    for _ in range(3):
        model.loss(ids_of(2, 24), ids_of(2, 24))
    assert [sum(c) for c in model.expert_counts()] == [3 * 48] * 3
    model.eval()(ids_of(2, 24))
    assert [sum(c) for c in model.expert_counts()] == [3 * 48] * 3
    model.reset_expert_counts()
    assert model.expert_counts() == []


def test_balance_adds_its_weighted_loss_in_training_and_nothing_in_evaluation():
    ids = ids_of(4, 24)
    y = ids.roll(-1, 1)
    values = {}
    for balance in (0.0, 0.5):
        model = model_of(balance=balance).train()
        torch.manual_seed(3)
        mean = model.loss(ids, y)
        torch.manual_seed(3)
        total = model.loss(ids, y, reduction="sum")
        torch.testing.assert_close(total, mean * ids.numel())
        values[balance] = mean.item()
        extra = sum(b.moe.balance_loss.item() for b in model.blocks) if balance else 0.0
        model.eval()
        assert model.loss(ids, y) == model_of().loss(ids, y)
    assert extra > 0.5
    assert values[0.5] - values[0.0] == pytest.approx(extra, rel=1e-9)


@pytest.mark.slow
def test_compiles_whole_and_gives_the_eager_numbers():
    model, ids = model_of(double=False, dropout_p=0.1).train(), ids_of(2, 24)
    y = ids.roll(-1, 1)
    compiled = torch.compile(lambda: model.loss(ids, y), fullgraph=True, backend="aot_eager")
    results = []
    for loss in (model.loss, lambda *_: compiled()):
        torch.manual_seed(3)
        value = loss(ids, y)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager)


def test_trains_under_bfloat16_autocast_with_float32_gradients():
    model, ids = model_of(double=False).train(), ids_of(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss - model.eval().loss(ids, ids.roll(-1, 1))) < 0.5


def test_untrained_bidirectional_model_already_shows_its_leak():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(1000, causal=False))
    assert future_leak(model, ids_of(1, 32), 31).max() > 1e-3


def test_fresh_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        model.reset_parameters()
        return {k: v.clone() for k, v in model.state_dict().items()}

    model = model_of()
    first, second, other = weights(4), weights(4), weights(5)
    assert all(torch.equal(first[k], second[k]) for k in first)
    changed = [k for k in first if not torch.equal(first[k], other[k])]
    assert "embedding.weight" in changed
    assert any(k.startswith("blocks.") for k in changed)


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(1000)).eval()
    ids = torch.randint(0, 1000, (4, 128))
    assert abs(model.loss(ids, ids.roll(-1, 1)).item() - torch.tensor(1000.0).log().item()) < 0.2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vocab_size": 2}, ValueError),
        ({"vocab_size": 10.0}, TypeError),
        ({"d_model": 0}, ValueError),
        ({"n_layers": True}, TypeError),
        ({"n_seq": 0}, ValueError),
        ({"num_experts": 0}, ValueError),
        ({"top_k": 5}, ValueError),
        ({"top_k": 0}, ValueError),
        ({"dropout_p": 1.0}, ValueError),
        ({"dropout_p": float("nan")}, ValueError),
        ({"grad_blend": 1.1}, ValueError),
        ({"grad_blend": float("nan")}, ValueError),
        ({"gradient": "theory"}, ValueError),
        ({"router_gradient": "all"}, ValueError),
        ({"eta": 0.0}, ValueError),
        ({"causal": "yes"}, ValueError),
        ({"clamps": None}, ValueError),
        ({"n_heads": 0}, ValueError),
        ({"balance": -1.0}, ValueError),
        ({"balance": 0.1, "num_experts": 1}, ValueError),
    ],
)
def test_config_refuses_a_bad_field_by_name_and_value(changes, error):
    (name, value), *_ = changes.items()
    with pytest.raises(error, match=f"{name}: got {value!r}"):
        ResNetBKConfig(**{"vocab_size": 10, **changes})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ResNetBKConfig(10).d_model = 3


@pytest.mark.parametrize(
    ("ids", "targets", "error", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int32), None, TypeError, "input_ids: got torch.int32"),
        (torch.zeros(4, dtype=torch.int64), None, ValueError, r"input_ids: got shape \(4,\)"),
        (
            torch.full((1, 4), VOCABULARY),
            None,
            ValueError,
            f"input_ids: got {VOCABULARY}; .* 0 to {VOCABULARY - 1}",
        ),
        (torch.full((1, 4), -100), None, ValueError, "input_ids: got -100"),
        (
            torch.zeros(1, 25, dtype=torch.int64),
            None,
            ValueError,
            "25 positions, but this model has n_seq = 24",
        ),
        (ids_of(1, 4), ids_of(1, 5), ValueError, r"targets: got shape \(1, 5\)"),
        (ids_of(1, 4), ids_of(1, 4).int(), TypeError, "targets: got torch.int32"),
        (ids_of(1, 4), torch.full((1, 4), -1), ValueError, "targets: got -1"),
        (ids_of(1, 4), torch.full((1, 4), -100), ValueError, "no loss to average"),
    ],
)
def test_bad_batches_are_refused_by_name_and_value(ids, targets, error, message):
    model = model_of()
    with pytest.raises(error, match=message):
        model(ids) if targets is None else model.loss(ids, targets)


@pytest.mark.parametrize("eta", [0.01, 0.001])
@pytest.mark.parametrize("v", [0.0, 0.1, 1.0, 2.0, -0.5])
def test_memory_reaches_as_far_back_as_the_theory_says(v, eta):
    """Positions in which |dG_i / da_j| falls by 1 / e, beside the exact formula and its limits for small eta."""
    n, back = 20_000, 200 if v >= 0 else 5  # the recursion settles in the first part; what falls fast is soon 0
    a = torch.full((1, n), v - 2, dtype=torch.float64, requires_grad=True)
    last = resolvent_diagonal(a, 1.0, 1.0, complex(0, eta), causal=True)[0, -1]
    real, imaginary = (torch.autograd.grad(x, a, retain_graph=True)[0][0] for x in (last.real, last.imag))
    coupling = torch.hypot(real, imaginary)
    reach = back / float(torch.log(coupling[-1] / coupling[-1 - back]))
    assert reach == pytest.approx(1 / (2 * abs(cmath.acos(complex(1 - v / 2, eta / 2)).imag)), rel=1e-3)
    if v == 0:
        assert reach == pytest.approx(1 / (2 * eta) ** 0.5, rel=0.01)
    elif v > 0:
        assert reach == pytest.approx((v * (1 - v / 4)) ** 0.5 / eta, rel=0.01)
    else:
        assert reach < 1
