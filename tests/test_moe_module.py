"""AnalyticMoE as a module: randomness, evaluation, usage, precision, compiler, refusals."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bklm.moe.analytic import Settings
from bklm.moe.layer import AnalyticMoE, total_balance_loss, unused_experts, usage_entropy
from bklm.moe.ops import draw
from bklm.moe.reference import dense_moe

D, H = 12, 24
PARAMETERS = ["router.weight", "router.bias", "up_weight", "up_bias", "down_weight", "down_bias"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("k", "router_gradient"), list(itertools.product((1, 2, 4), ("exact", "selected", "none")))
)
def test_training_forward_is_the_definition_with_the_generators_noise_and_mask(k, router_gradient):
    model = AnalyticMoE(D, 4, k, 0.1, 0.7, router_gradient).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    noise, keep, keep_p = draw(x.view(-1, D), 4 if k < 4 and router_gradient != "none" else 0, H, 0.1)
    parameters = [model.get_parameter(name) for name in PARAMETERS]
    config = Settings(k, 0.7, router_gradient, keep_p, torch.float64)
    expected = dense_moe(x.view(-1, D), *parameters, noise, keep, config)
    torch.testing.assert_close(y.view(-1, D), expected, rtol=1e-12, atol=1e-12)


def test_seeded_step_repeats_and_restored_generator_repeats_it():
    model, x = AnalyticMoE(D), torch.randn(3, 20, D)

    def step():
        model.zero_grad()
        model(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(1)
    first, state = step(), torch.get_rng_state()
    second = step()
    torch.manual_seed(1)
    assert torch.equal(step(), first)
    torch.set_rng_state(state)
    assert torch.equal(step(), second)
    assert not torch.equal(first, second)


def test_resumed_run_goes_on_bit_for_bit():
    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x).square().mean() + total_balance_loss(model)).backward()
            optimizer.step()

    x, model = torch.randn(40, D), AnalyticMoE(D, balance=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    train(model, optimizer, 2)
    resumed = AnalyticMoE(D, balance=0.01)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(resumed, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_gumbel_top_1_samples_experts_from_the_softmax():
    model = AnalyticMoE(D, num_experts=4, dropout_p=0.0)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
        model(torch.randn(20000, D))
    share, expected = model.expert_counts / 20000, model.router.bias.detach().softmax(0)
    assert float((share - expected).abs().max()) < 4 * math.sqrt(0.25 / 20000)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-7, 0.1, 0.5, 0.99])
def test_mask_keeps_what_it_says(dropout_p):
    noise, keep, keep_p = draw(torch.zeros(3000, 1), 0, 33, dropout_p)
    assert noise is None
    assert keep_p == pytest.approx(1 - dropout_p, abs=2**-17)
    if dropout_p < 2**-17:
        assert keep is None
    else:
        assert set(keep.unique().tolist()) == {0, 1}
        assert float(keep.float().mean()) == pytest.approx(keep_p, abs=4 * math.sqrt(dropout_p / 99000))


def test_evaluation_uses_the_largest_logits_without_noise_or_dropout():
    model, x = AnalyticMoE(D, 4, 2, dropout_p=0.5).double().eval(), torch.randn(50, D, dtype=torch.float64)
    y = model(x)
    assert torch.equal(y, model(x))
    for row, out in zip(x, y, strict=True):
        chosen = model.router(row).topk(2).indices
        hidden = [F.linear(row, model.up_weight[e], model.up_bias[e]).relu() for e in chosen]
        outs = [
            F.linear(h, model.down_weight[e], model.down_bias[e]) for h, e in zip(hidden, chosen, strict=True)
        ]
        torch.testing.assert_close(out, sum(outs) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_generation_path_for_few_tokens_equals_the_grouped_one(tokens, k):
    model, x = AnalyticMoE(D, 4, k).double().eval(), torch.randn(1, tokens, D, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-12, atol=1e-12)


def test_one_expert_is_a_dense_network_without_router():
    model = AnalyticMoE(D, num_experts=1, dropout_p=0.0).double()
    dense = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).double()
    with torch.no_grad():
        for p, q in zip(dense.parameters(), model.parameters(), strict=True):
            p.copy_(q[0])
    x = torch.randn(2, 6, D, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    for p, q in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad[0], p.grad, rtol=1e-10, atol=1e-12)


def test_router_of_the_original_is_frozen_and_noiseless():
    model = AnalyticMoE(D, dropout_p=0.0, router_gradient="none")
    x = torch.randn(3, 30, D)
    y = model(x)
    assert torch.equal(y, model(x))
    y.square().sum().backward()
    assert model.router.weight.grad is None
    assert not any(p.requires_grad for p in model.router.parameters())
    assert model.up_weight.grad.any()


@pytest.mark.parametrize("router_gradient", ["exact", "selected"])
def test_router_learns_which_expert_is_right(router_gradient):
    """Expert 2 returns the target, the others its opposite: the router must find it."""
    model = AnalyticMoE(D, num_experts=4, dropout_p=0.0, router_gradient=router_gradient)
    target = torch.ones(D)
    with torch.no_grad():
        model.down_weight.zero_()
        model.down_bias.copy_(-target.expand(4, D))
        model.down_bias[2] = target
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.05)
    x = torch.randn(64, D)
    for _ in range(120):
        optimizer.zero_grad()
        (model(x) - target).square().mean(-1).sum().backward()
        optimizer.step()
    model(x)
    assert int(model.expert_counts[2]) > 48


def test_balance_loss_pulls_a_collapsed_router_back():
    model = AnalyticMoE(D, num_experts=4, dropout_p=0.0, balance=0.1)
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    x = torch.randn(256, D)
    model(x)
    before, start = usage_entropy(model.expert_counts, normalised=True), model.balance_loss.item() / 0.1
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(x)
        total_balance_loss(model).backward()
        optimizer.step()
    assert start > 2
    assert usage_entropy(model.expert_counts, normalised=True) > max(0.9, before)
    assert model.balance_loss.item() / 0.1 == pytest.approx(1.0, abs=0.1)


def test_balance_losses_of_a_model_add_up_and_are_left_only_by_training():
    model = nn.Sequential(AnalyticMoE(D, balance=0.5), AnalyticMoE(D, balance=0.25), AnalyticMoE(D))
    assert total_balance_loss(model) == 0.0
    model(torch.randn(9, D))
    assert total_balance_loss(model) == model[0].balance_loss + model[1].balance_loss
    assert model[2].balance_loss is None
    model.eval()(torch.randn(9, D))
    assert total_balance_loss(model) == 0.0


def test_counts_are_of_the_last_training_forward_and_not_part_of_the_state():
    model = AnalyticMoE(D, num_experts=4, top_k=2, balance=0.1)
    assert model.expert_counts is None
    model(torch.randn(5, 6, D))
    counts = model.expert_counts
    assert counts.dtype == torch.int64
    assert counts.shape == (4,)
    assert int(counts.sum()) == 60
    model.eval()(torch.randn(3, D))
    assert model.expert_counts is counts
    assert set(model.state_dict()) == set(PARAMETERS)


def test_module_can_be_copied_between_forward_and_backward():
    model, x = AnalyticMoE(D, balance=0.1, dropout_p=0.0), torch.randn(7, D)
    model(x)
    twin = copy.deepcopy(model)
    assert model.balance_loss is not None
    assert twin.balance_loss is None
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_experts_start_like_nn_linear():
    model = AnalyticMoE(64, num_experts=8)
    for weight, fan_in in (
        (model.up_weight, 64),
        (model.up_bias, 64),
        (model.down_weight, 128),
        (model.down_bias, 128),
    ):
        bound = fan_in**-0.5
        assert weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_usage_statistics():
    assert usage_entropy([5, 5, 5, 5]) == pytest.approx(math.log(4))
    assert usage_entropy(torch.tensor([5, 5, 5, 5]), normalised=True) == pytest.approx(1.0)
    assert usage_entropy([7, 0]) == 0.0
    assert usage_entropy([7], normalised=True) == 0.0
    assert unused_experts([1000, 0, 2, 998]) == 2
    assert unused_experts([1, 1]) == 0
    with pytest.raises(ValueError, match="not all zero"):
        usage_entropy([0, 0])
    with pytest.raises(ValueError, match="not all zero"):
        unused_experts([0, 0])


# Mixed precision, compiler


def test_autocast_runs_experts_low_and_routes_as_without():
    model, x = AnalyticMoE(D, dropout_p=0.0), torch.randn(200, D, requires_grad=True)
    torch.manual_seed(1)
    y = model(x)
    counts = model.expert_counts
    y.square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad, _ = None, model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert torch.equal(model.expert_counts, counts)
    for a, b in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 0.08 * float(b.norm())  # bfloat16 moves hidden units across zero
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(x[:2]).dtype == torch.bfloat16


def test_works_under_accelerate_mixed_precision():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # another test may have asked for another precision
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = AnalyticMoE(D, balance=0.01)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    before = [p.clone() for p in model.parameters()]
    accelerator.backward(model(torch.randn(4, 8, D)).float().square().mean() + total_balance_loss(model))
    optimizer.step()
    assert all(bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("experts", "k", "router_gradient"), [(4, 2, "exact"), (4, 1, "none"), (1, 1, "exact")]
)
def test_compiled_whole_and_equal_to_eager(experts, k, router_gradient):
    torch._dynamo.reset()
    model, x = AnalyticMoE(D, experts, k, router_gradient=router_gradient), torch.randn(2, 5, D)

    def step(run):
        model.zero_grad()
        torch.manual_seed(2)
        y = run(x)
        y.square().sum().backward()
        return [y.detach(), model.expert_counts, *(p.grad for p in model.parameters() if p.requires_grad)]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for eager, whole in zip(step(model), step(compiled), strict=True):
        torch.testing.assert_close(whole, eager)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": 5}, ValueError, "top_k is 5.*num_experts = 4"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ({"num_experts": 0}, ValueError, "num_experts is 0"),
        ({"d_model": -2}, ValueError, "d_model is -2"),
        ({"tau": 0.0}, ValueError, "tau is 0.0"),
        ({"tau": math.nan}, ValueError, "tau is nan"),
        ({"tau": 1e-40}, ValueError, "tau is 1e-40; the temperature must be at least 1e-06"),
        ({"tau": "a"}, TypeError, "tau is 'a'"),
        ({"dropout_p": None}, TypeError, "dropout_p is None"),
        ({"balance": "x"}, TypeError, "balance is 'x'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must lie in \[0, 1\)"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"router_gradient": "all"}, ValueError, "'exact', 'selected', 'none'"),
        ({"balance": -1.0}, ValueError, "balance is -1.0"),
        ({"balance": 0.1, "router_gradient": "none"}, ValueError, "router that learns"),
        ({"balance": 0.1, "num_experts": 1}, ValueError, "balance is 0.1, but one expert has no router"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        AnalyticMoE(**{"d_model": D, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 3, D + 1), ValueError, "last dimension must be d_model = 12"),
        (torch.zeros(()), ValueError, "last dimension"),
        (torch.zeros(0, 3, D), ValueError, "empty"),
        (torch.zeros(2, 3, D, dtype=torch.int64), TypeError, "floating-point"),
        (torch.zeros(2, 3, D, dtype=torch.float64), TypeError, "float64 and the parameters are torch.float32"),
    ],
)
def test_bad_input_is_refused(x, error, words):
    with pytest.raises(error, match=words):
        AnalyticMoE(D)(x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_logits_are_refused(value, k, tokens, training):
    model, x = AnalyticMoE(D, 4, k).train(training), torch.randn(tokens, D)
    x[1, 2] = value
    with torch.no_grad(), pytest.raises(ValueError, match=f"not finite for 1 of {tokens} tokens"):
        model(x)


@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-6])
def test_large_finite_logits_are_accepted(tau):
    """The sum of the logits overflows, and so does each over tau; none of them does itself."""
    model = AnalyticMoE(D, tau=tau)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([3e38, 3e38, -3e38, 1.0]))
    y = model(torch.randn(30, D))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("k", "chosen"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3])])
def test_of_equal_logits_the_first_expert_is_chosen_by_every_road(k, chosen):
    model = AnalyticMoE(D, 5, k, 0.0, router_gradient="none").double()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    x = torch.randn(20, D, dtype=torch.float64)
    y = model(x)
    assert model.expert_counts.tolist() == [20 * (e in chosen) for e in range(5)]
    config = Settings(k, 1.0, "none", 1.0, torch.float64)
    parameters = [model.get_parameter(name) for name in PARAMETERS]
    torch.testing.assert_close(dense_moe(x, *parameters, None, None, config), y)
    with torch.no_grad():
        few = torch.cat([model.eval()(row) for row in x.split(2)])
    torch.testing.assert_close(few, y)
