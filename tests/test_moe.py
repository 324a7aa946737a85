"""The mixture of experts: its analytic backward is that of autograd, and of finite differences."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import profile

from bklm.moe import analytic as moe_core
from bklm.moe import products
from bklm.moe.analytic import Settings
from bklm.moe.layer import AnalyticMoE
from bklm.moe.ops import draw, mixture
from bklm.moe.reference import balance_loss, dense_moe, gates, looped_moe

D, H = 12, 24


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setitem(moe_core._BLOCK_TOKENS, "cpu", 7)


def make_inputs(tokens, experts, dtype=torch.float64):
    """x, router weight and bias, up, down: leaves of a size that keeps every term of the gradient visible."""
    shapes = [
        (tokens, D),
        (experts, D),
        (experts,),
        (experts, H, D),
        (experts, H),
        (experts, D, H),
        (experts, D),
    ]
    scales = [1, 0.3, 0.3, D**-0.5, 0.3, H**-0.5, 0.3]
    leaves = [(torch.randn(s, dtype=dtype) * c).requires_grad_() for s, c in zip(shapes, scales, strict=True)]
    return [*leaves[:1], None, None, *leaves[3:]] if experts == 1 else leaves


def draw_for(leaves, k, router_gradient, dropout_p):
    x, experts = leaves[0], len(leaves[3])
    return draw(x.detach(), experts if k < experts and router_gradient != "none" else 0, H, dropout_p)


def grads(loss, leaves):
    return torch.autograd.grad(
        loss, [a for a in leaves if a is not None], allow_unused=True, materialize_grads=True
    )


def assert_equals_autograd(leaves, noise, keep, config, tolerance):
    """y, the balance and every gradient equal those of the dense definition, relative to the largest entry."""
    y, balance, counts = mixture(*leaves, noise, keep, config)
    expected = dense_moe(*leaves, noise, keep, config)
    _, selected, p = gates(*leaves[:3], noise, config)
    expected_balance = balance_loss(selected, p)
    weight = torch.randn_like(y)
    with_balance = 0.0 if config.router_gradient == "none" else 0.7
    got = grads((y * weight).sum() + with_balance * balance, leaves)
    want = grads((expected * weight).sum() + with_balance * expected_balance, leaves)
    if config.router_gradient != "none":
        assert balance.item() == pytest.approx(expected_balance.item(), rel=tolerance)
    assert counts.tolist() == selected.sum(0).tolist()
    for a, b in zip([y, *got], [expected, *want], strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("router_gradient", ["exact", "selected", "none"])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_backward_equals_autograd(dtype, tolerance, router_gradient, experts, k):
    for tau, dropout_p, tokens in itertools.product((0.5, 1.0, 2.0), (0.0, 0.1), (1, 33)):
        leaves = make_inputs(tokens, experts, dtype)
        noise, keep, keep_p = draw_for(leaves, k, router_gradient, dropout_p)
        config = Settings(k, tau, router_gradient, keep_p, dtype)
        assert_equals_autograd(leaves, noise, keep, config, tolerance)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("router_gradient", ["exact", "none"])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_experts_by_onednns_products_are_the_same(monkeypatch, router_gradient, experts, k):
    monkeypatch.setattr(products, "ONEDNN_FROM", 1)
    monkeypatch.setattr(products, "WEIGHT_GRADIENT_FROM", 1)
    monkeypatch.setattr(products, "RAGGED_FROM", 1)
    monkeypatch.setattr(products, "is_intel", lambda: False)
    for tokens, block in ((33, 7), (1, 64), (33, 64)):
        monkeypatch.setitem(moe_core._BLOCK_TOKENS, "cpu", block)
        leaves = make_inputs(tokens, experts, torch.float32)
        noise, keep, keep_p = draw_for(leaves, k, router_gradient, 0.1)
        config = Settings(k, 1.0, router_gradient, keep_p, torch.float32)
        assert_equals_autograd(leaves, noise, keep, config, 1e-5)
    y = None

    def products_of(step):
        with profile() as seen:
            step()
        return sum(event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")

    def forward():
        nonlocal y
        y, *_ = mixture(*leaves, noise, keep, config)

    # Of each expert two forward; backward the first again and four of the gradients.
    assert products_of(forward) == 2 * experts
    assert products_of(lambda: y.sum().backward()) == 5 * experts


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("router_gradient", ["exact", "selected"])
@pytest.mark.parametrize(
    ("choice", "counts"), [([0] * 20, [20, 0, 0]), ([2] * 20, [0, 0, 20]), ([1] * 19 + [0], [1, 19, 0])]
)
def test_backward_with_experts_that_get_no_token_one_or_all(router_gradient, choice, counts):
    leaves = make_inputs(20, 3)
    noise = 30.0 * F.one_hot(torch.tensor(choice), 3).t().double()
    config = Settings(1, 20.0, router_gradient, 1.0, torch.float64)
    assert mixture(*leaves, noise, None, config)[2].tolist() == counts
    assert_equals_autograd(leaves, noise, None, config, 1e-10)
    gradient = grads(mixture(*leaves, noise, None, config)[0].square().sum(), leaves)[3]
    assert [bool(g.any()) for g in gradient] == [c > 0 for c in counts]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40), experts=st.integers(2, 9), k=st.integers(1, 9), tau=st.floats(0.1, 5.0),
    dropout_p=st.floats(0.0, 0.9), router_gradient=st.sampled_from(["exact", "selected", "none"]),
    block=st.integers(1, 50), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_backward_equals_autograd_anywhere(tokens, experts, k, tau, dropout_p, router_gradient, block, seed):
    torch.manual_seed(seed)
    k = min(k, experts)
    leaves = make_inputs(tokens, experts)
    noise, keep, keep_p = draw_for(leaves, k, router_gradient, dropout_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moe_core._BLOCK_TOKENS, "cpu", block)
        config = Settings(k, tau, router_gradient, keep_p, torch.float64)
        assert_equals_autograd(leaves, noise, keep, config, 1e-10)


def test_dense_mixture_passes_gradcheck():
    leaves = make_inputs(5, 3)
    keep = (torch.rand(5, H) > 0.2).to(torch.uint8)
    config = Settings(3, 0.7, "exact", 0.8, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: mixture(*a, None, keep, config)[:2], leaves)


def test_routed_experts_pass_gradcheck():
    x, router_weight, router_bias, *experts = make_inputs(6, 3)
    noise, keep, keep_p = draw(x.detach(), 3, H, 0.1)
    config = Settings(2, 1.0, "none", keep_p, torch.float64)

    def run(x, *experts):
        return mixture(x, router_weight.detach(), router_bias.detach(), *experts, noise, keep, config)[0]

    assert torch.autograd.gradcheck(run, (x, *experts))


@pytest.mark.parametrize("k", [1, 2])
def test_exact_router_gradient_is_the_derivative_of_the_mixture_that_p_stands_for(k):
    """Finite differences of sum_t <ybar, sum_e p_e(b) f_e>: no autograd and none of our formulas."""
    leaves = make_inputs(9, 3)
    noise, _, _ = draw(leaves[0].detach(), 3, H, 0.0)
    config = Settings(k, 0.8, "exact", 1.0, torch.float64)
    y = mixture(*leaves, noise, None, config)[0]
    ybar = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves[2], ybar)[0]

    def surrogate(bias):
        x, router_weight, _, up_weight, up_bias, down_weight, down_bias = (a.detach() for a in leaves)
        p = torch.softmax((F.linear(x, router_weight, bias) + noise.t()) / config.tau, 1)
        outputs = [
            F.linear(F.linear(x, up_weight[e], up_bias[e]).relu(), down_weight[e], down_bias[e])
            for e in range(3)
        ]
        return sum((p[:, e] * (ybar * outputs[e]).sum(1)).sum() for e in range(3))

    bias, step = leaves[2].detach(), 1e-6 * torch.eye(3, dtype=torch.float64)
    want = torch.stack([(surrogate(bias + s) - surrogate(bias - s)) / 2e-6 for s in step])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_selected_router_gradient_is_switchs():
    leaves = make_inputs(9, 3)
    noise, _, _ = draw(leaves[0].detach(), 3, H, 0.0)
    config = Settings(1, 0.8, "selected", 1.0, torch.float64)
    ybar = torch.randn(9, D, dtype=torch.float64)
    got = torch.autograd.grad(mixture(*leaves, noise, None, config)[0], leaves[1], ybar)[0]
    _, selected, p = gates(*leaves[:3], noise, config)
    outputs = looped_moe(*leaves, noise, None, config).detach()
    want = torch.autograd.grad((p * selected).sum(1, keepdim=True) * outputs, leaves[1], ybar)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_loop_over_selected_experts_equals_the_dense_definition():
    leaves = make_inputs(20, 4)
    for k, router_gradient in itertools.product((1, 2, 4), ("selected", "none")):
        noise, keep, keep_p = draw_for(leaves, k, router_gradient, 0.1)
        config = Settings(k, 1.3, router_gradient, keep_p, torch.float64)
        y, z = (f(*leaves, noise, keep, config) for f in (looped_moe, dense_moe))
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
        for a, b in zip(grads(y.square().sum(), leaves), grads(z.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_do_not_touch_each_other():
    model = AnalyticMoE(D, dropout_p=0.0).double()
    x = torch.randn(1, 10, D, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(model(x)[0, 3].sum(), x)[0][0]
    assert gradient[3].any()
    assert not gradient[[i for i in range(10) if i != 3]].any()


def test_expanded_gradient_and_strided_input():
    model = AnalyticMoE(D, dropout_p=0.0).double().eval()
    x = torch.randn(D, 3, 5, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    y = model(x)
    y.sum().backward()
    again = x.detach().contiguous().requires_grad_()
    (model(again) * torch.ones_like(y)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_nothing_of_hidden_width_is_saved_but_the_mask():
    model, tokens = AnalyticMoE(32, num_experts=8), 4096
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(tokens, 32, requires_grad=True))
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in saved if t.is_floating_point()) <= tokens * (32 + 8) + parameters
    assert sum(t.numel() for t in saved if t.dtype == torch.uint8) == tokens * 64


@pytest.mark.slow
@pytest.mark.parametrize("router_gradient", ["exact", "selected", "none"])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_registered_operators_pass_opcheck(experts, k, router_gradient):
    leaves = make_inputs(10, experts, torch.float32)
    noise, keep, keep_p = draw_for(leaves, k, router_gradient, 0.1)
    config = Settings(k, 1.0, router_gradient, keep_p, torch.float32)
    torch.library.opcheck(torch.ops.bklm.moe_forward, (*leaves, noise, keep, *config))
    y, _, p, tokens, bounds = moe_core.forward(*leaves, noise, keep, config)
    detached = [None if a is None else a.detach() for a in leaves]
    arguments = (torch.randn_like(y), torch.ones(()), *detached, keep, p.detach(), tokens, bounds, *config)
    torch.library.opcheck(torch.ops.bklm.moe_backward, arguments)
