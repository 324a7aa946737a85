"""The products give what torch's ordinary ones give, whichever library takes them and however the matrices lie."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.profiler import profile

from bklm.models import LSTM, ContextTokenConfig, ContextTokenLM, LSTMConfig
from bklm.moe import products
from bklm.moe.products import (
    Linear,
    PreparedLinear,
    add_linear,
    add_weight_gradient,
    linear,
    onednn_serves,
    scaled_linear,
    weight_gradient,
)
from bklm.training.koopman import Lifting

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def close(got, want):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(got.dtype))


@pytest.fixture
def small_ones_too(monkeypatch):
    """oneDNN takes a product of any size."""
    for limit in ("ONEDNN_FROM", "WEIGHT_GRADIENT_FROM"):
        monkeypatch.setattr(products, limit, 1)


@pytest.fixture(params=[*DTYPES, "float32 by MKL"], ids=str)
def matrices(request, monkeypatch):
    """x and a weight; in float32 once as on an Intel processor and once as on others."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "is_intel", lambda: request.param == "float32 by MKL")
    if request.param == "float32 by MKL":
        return torch.randn(3, 5, 8), torch.randn(6, 8)
    return torch.randn(3, 5, 8, dtype=request.param), torch.randn(6, 8, dtype=request.param)


def test_onednn_takes_single_precision_on_a_cpu_that_is_not_intels_and_nothing_else(matrices):
    x, _ = matrices
    expected = x.dtype == torch.float32 and not products.is_intel() and torch.backends.mkldnn.is_available()
    assert onednn_serves(x) == expected


def test_linear_of_whole_sliced_and_transposed_matrices(matrices, small_ones_too):
    x, weight = matrices
    bias = weight[:, 0].contiguous()
    close(linear(x, weight, bias), x.double() @ weight.double().t() + bias.double())
    close(linear(x[..., 2:5], weight[:, 2:5]), x[..., 2:5].double() @ weight[:, 2:5].double().t())
    close(linear(x[..., :6], weight.t()), x[..., :6].double() @ weight.double())
    close(linear(x.transpose(0, 1), weight), x.transpose(0, 1).double() @ weight.double().t())


@pytest.mark.parametrize("relu", [True, False])
def test_a_prepared_linear_is_the_same_for_any_number_of_rows(matrices, relu):
    x, weight = matrices
    bias = weight[:, 0].contiguous()
    prepared = PreparedLinear(weight, bias, rows=5, relu=relu)
    for rows in (x[0], x[1, :1], x.flatten(0, 1)):
        want = rows.double() @ weight.double().t() + bias.double()
        close(prepared(rows), want.relu() if relu else want)
    close(PreparedLinear(weight.t(), rows=5)(x[0, :, :6]), x[0, :, :6].double() @ weight.double())


def test_a_relu_lets_nan_through(matrices):
    x, weight = matrices
    weight[2, 3] = torch.nan
    y = PreparedLinear(weight, rows=5, relu=True)(x[0])
    assert y[:, 2].isnan().all()
    assert not y[:, :2].isnan().any()


def test_a_weights_gradient_sums_over_all_leading_dimensions(matrices, small_ones_too):
    x, weight = matrices
    d = linear(x, weight)
    close(weight_gradient(d, x), d.flatten(0, 1).double().t() @ x.flatten(0, 1).double())
    turned = x.transpose(0, 1)
    close(weight_gradient(d.transpose(0, 1), turned), d.flatten(0, 1).double().t() @ x.flatten(0, 1).double())


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_products_that_record_nothing_scale_and_add(matrices, monkeypatch, rows, scale, small_ones_too):
    monkeypatch.setattr(products, "RAGGED_FROM", 1)
    x, weight = matrices[0][0, :rows], matrices[1]
    bias = weight[:, 0].contiguous()
    exact = x.double() @ weight.double().t()
    close(scaled_linear(x, weight, None, scale), scale * exact)
    close(scaled_linear(x, weight, bias, scale), scale * (exact + bias.double()))
    close(scaled_linear(x[:, :6], weight.t(), None, scale), scale * x[:, :6].double() @ weight.double())
    total = torch.ones(rows, 6, dtype=x.dtype)
    add_linear(total, x, weight)
    close(total, 1 + exact)
    d = torch.randn(rows, 6, dtype=x.dtype)
    for total in (torch.ones(6, 8, dtype=x.dtype), torch.ones(6, 8, dtype=torch.float64)):
        add_weight_gradient(total, d, x, scale)
        torch.testing.assert_close(
            total.double(), 1 + scale * d.double().t() @ x.double(), rtol=0, atol=tolerance(x.dtype)
        )


def test_low_precision_is_rounded_once_where_a_product_is_scaled(small_ones_too):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(16, 32, dtype=torch.bfloat16)
    once = (0.3 * (x.double() @ weight.double().t())).to(torch.bfloat16)
    assert (scaled_linear(x, weight, None, 0.3) != once).double().mean() < 0.02


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("rows", "count"), [(products.WHOLE, 2), (products.WHOLE + 1, 0)])
def test_a_number_of_rows_that_may_not_come_again_is_not_prepared_for(monkeypatch, rows, count, small_ones_too):
    monkeypatch.setattr(products, "is_intel", lambda: False)
    x, weight = torch.randn(rows, 8), torch.randn(6, 8)
    with profile() as seen:
        add_weight_gradient(torch.zeros(6, 8), scaled_linear(x, weight), x)
    assert sum(e.count for e in seen.key_averages() if e.key == "mkldnn::_linear_pointwise") == count


@pytest.fixture
def layer(monkeypatch, small_ones_too):
    """A small map that takes oneDNN's products wherever they can be had, and its input."""
    monkeypatch.setattr(products, "is_intel", lambda: False)
    torch.manual_seed(0)
    return Linear(8, 6), torch.randn(3, 5, 8, requires_grad=True)


def by_torch(layer, x):
    return F.linear(x, layer.weight, layer.bias)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_layer_takes_onednns_products_forward_and_backward(layer):
    module, x = layer
    with profile() as seen:
        module(x).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert any("_linear_pointwise" in name for name in names)
    assert not names & {"aten::mm", "aten::addmm", "aten::linear"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_whole_logits_the_context_block_and_koopmans_nets_take_onednns_products(monkeypatch, small_ones_too):
    monkeypatch.setattr(products, "is_intel", lambda: False)
    model = ContextTokenLM(ContextTokenConfig(vocab_size=20, embed_dim=8, context_dim=8, n_layers=2))
    x = torch.randn(2, 40, 8)
    lifting = Lifting(8, 12)
    for run, expected in (
        (lambda: LSTM(LSTMConfig(20, d_model=8, n_layers=1)).logits(x), 1),
        (lambda: model.logits(x), 1),
        # What the token gives in one product, the context in one a layer.
        (lambda: model.context_block(x, x), 3),
        (lambda: model.token_block(x, torch.randn(2, 40, 2, 8)), 2),
        # phi twice and psi twice, two maps each, and the matrix.
        (lambda: lifting.parts(x, x), 9),
    ):
        with torch.no_grad(), profile() as seen:
            run()
        found = {event.key: event.count for event in seen.key_averages()}
        assert found.get("mkldnn::_linear_pointwise", 0) == expected


def test_a_slice_of_a_weight_is_laid_out_for_many_rows_alone(layer):
    weight = torch.randn(6, 16)[:, :8]
    for rows, count in ((products.FEWEST_FOR_A_SLICE - 1, 0), (products.FEWEST_FOR_A_SLICE, 1)):
        x = torch.randn(rows, 8)
        with profile() as seen:
            y = linear(x, weight)
        assert sum(e.count for e in seen.key_averages() if e.key == "mkldnn::_linear_pointwise") == count
        torch.testing.assert_close(y, F.linear(x, weight), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_layer_is_traced_without_a_warning(layer):
    module, x = layer
    with warnings.catch_warnings():
        # Of torch itself: its tracer is old.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module, x.detach())
    torch.testing.assert_close(traced(x), by_torch(module, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (3, 5, 8), (0, 8)])
def test_a_layers_gradients_are_those_of_torchs_own(layer, shape, wanted):
    module, _ = layer
    x = torch.randn(shape, requires_grad=wanted[0])
    for parameter, needed in zip(module.parameters(), wanted[1:], strict=True):
        parameter.requires_grad_(needed)
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
    y = module(x)
    # Neither a gradient in order nor one of ones.
    g = torch.randn(*shape[:-1], 12)[..., ::2]
    torch.testing.assert_close(y, by_torch(module, x), rtol=0, atol=1e-5)
    expected = torch.autograd.grad(by_torch(module, x), leaves, g)
    for got, want in zip(torch.autograd.grad(y, leaves, g), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_layer_without_a_bias_in_double_precision_or_with_few_rows_is_torchs_own(layer, monkeypatch):
    _, x = layer
    plain = Linear(8, 6, bias=False)
    torch.testing.assert_close(plain(x), F.linear(x, plain.weight), rtol=0, atol=1e-5)
    module = Linear(8, 6).double()
    assert torch.equal(module(x.double()), by_torch(module, x.double()))
    monkeypatch.setattr(products, "ONEDNN_FROM", 2**21)
    module = Linear(8, 6)
    assert torch.equal(module(x), by_torch(module, x))


def test_a_layer_follows_second_derivatives_batched_gradients_and_torch_func(layer):
    module, x = layer

    def twice(forward):
        (g,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, module.weight))

    def batched(forward):
        directions = torch.eye(6).view(6, 1, 1, 6).expand(6, 3, 5, 6)
        return torch.autograd.grad(forward(x), (x, module.weight), directions, is_grads_batched=True)

    def jacobian(forward):
        def of_weight(weight, row):
            with_it = {"weight": weight, "bias": module.bias}
            return (
                torch.func.functional_call(module, with_it, row)
                if forward is module
                else F.linear(row, *with_it.values())
            )

        return [
            torch.func.vmap(torch.func.jacrev(of_weight), in_dims=(None, 0))(module.weight.detach(), x.detach())
        ]

    def forward_mode(forward):
        return torch.func.jvp(forward, (x.detach(),), (torch.ones_like(x),))

    for derivative in (twice, batched, jacobian, forward_mode):
        for got, want in zip(derivative(module), derivative(lambda t: by_torch(module, t)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_autocast_makes_a_layers_products_half_precision_as_it_does_torchs(layer):
    module, x = layer
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), by_torch(module, x))
        assert module(x).dtype == torch.bfloat16


def test_mixed_dtypes_are_refused_as_torch_refuses_them(layer):
    module, x = layer
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double())


def test_a_compiled_layer_is_compiled_once_for_few_rows_and_many(layer, monkeypatch):
    module, _ = layer
    monkeypatch.setattr(products, "ONEDNN_FROM", 2**21)
    counted = CompileCounter()
    compiled = torch.compile(module, backend=counted, dynamic=True, fullgraph=True)
    for rows in (3, 400_000):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), by_torch(module, x), rtol=0, atol=1e-5)
    assert counted.frame_count == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("smaller", "count"), [(0, 1), (1, 0)])
def test_a_small_weights_gradient_is_not_laid_out_for_onednn(monkeypatch, smaller, count):
    monkeypatch.setattr(products, "is_intel", lambda: False)
    monkeypatch.setattr(products, "WEIGHT_GRADIENT_FROM", 64 * 6 * 8 + smaller)
    d, x = torch.randn(64, 6), torch.randn(64, 8)
    for gradient in (
        lambda: weight_gradient(d, x),
        lambda: add_weight_gradient(torch.zeros(6, 8), d, x),
    ):
        with profile() as seen:
            gradient()
        assert sum(e.count for e in seen.key_averages() if e.key == "mkldnn::_linear_pointwise") == count
