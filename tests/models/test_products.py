"""The products give what torch's ordinary ones give, whichever library takes them and however the matrices lie."""

import pytest
import torch

from bklm.models import products
from bklm.models.products import PreparedLinear, linear, onednn_serves, weight_gradient

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def close(got, want):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(got.dtype))


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


def test_linear_of_whole_sliced_and_transposed_matrices(matrices):
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


def test_a_weights_gradient_sums_over_all_leading_dimensions(matrices):
    x, weight = matrices
    d = linear(x, weight)
    close(weight_gradient(d, x), d.flatten(0, 1).double().t() @ x.flatten(0, 1).double())
    turned = x.transpose(0, 1)
    close(weight_gradient(d.transpose(0, 1), turned), d.flatten(0, 1).double().t() @ x.flatten(0, 1).double())
