"""Int8 products: the integers of the formula, near the float model, independent of the batch, and loadable."""

import copy
import pickle

import pytest
import torch

from bklm.compression import load_compressed, products, save_compressed, with_int8_products
from bklm.compression.coding import integers
from bklm.compression.int8 import quantised
from bklm.compression.products import Int8Product, _product, multiplies_exactly
from bklm.models import LSTM, LSTMConfig, ResNetBK, ResNetBKConfig
from bklm.training.evaluation import evaluate


def reference(x, coded, bias, per, outliers):
    """The formula in double precision, row by row."""
    x = x.double() if coded.columns is None else x.double() * coded.columns.double()
    weight = coded.values.double() * coded.scales.double()
    whole = x.clone()
    whole[:, outliers] = 0.0
    rows = []
    for i, row in enumerate(whole):
        largest = (whole if per == "tensor" else row).abs().max()
        step = (largest / 127).float().double() if largest > 0 else torch.tensor(1.0)
        rows.append((row / step).round() * step @ weight.t() + x[i, outliers] @ weight[:, outliers].t() + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("outliers", [[], [3, 20]])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 17, 19), (5, 64, 33), (40, 37, 16)])
def test_a_product_is_that_of_the_rounded_numbers(per, outliers, rows, inputs, outputs):
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows).unsqueeze(1)
    if inputs <= max(outliers, default=0):
        outliers = outliers[:1]
    x[:, 3] *= 50
    x[0] = 0.0
    w, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    coded = integers(w, 8, columns=torch.rand(inputs) + 0.5)
    made = Int8Product(coded, bias, per, torch.tensor(outliers) if outliers else None)
    expected = reference(x, coded, bias.double(), per, outliers)
    # A number half-way between two steps may fall to either side in float32: one step of one input.
    assert torch.allclose(made(x).double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert made(x.view(1, rows, inputs)).shape == (1, rows, outputs)


@pytest.mark.parametrize("exactly", [True, False])
def test_the_sums_are_exact_also_where_torchs_int8_product_saturates(exactly, monkeypatch):
    """At the ends of int8, and of more inputs than float32 sums exactly at once."""
    monkeypatch.setattr(products, "multiplies_exactly", lambda: exactly and multiplies_exactly())
    for rows, inputs, outputs in [(1, 17, 19), (40, 37, 16), (33, 2500, 17)]:
        x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
        w = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        x[0], w[0] = 127, -128
        assert torch.equal(_product(x, w.t()).long(), x.long() @ w.t().long())


def test_per_token_a_row_does_not_depend_on_its_neighbours_and_a_bad_one_spoils_itself_alone():
    made = Int8Product(integers(torch.randn(20, 32)), None, "token")
    x = torch.randn(6, 32)
    alone = made(x[2:3])
    x[4] = torch.nan
    x[5, 0] = torch.inf
    x[0] = 1e30
    y = made(x)
    assert torch.equal(y[2:3], alone)
    assert y[4:].isnan().all()
    assert y[:4].isfinite().all()
    assert made(x[:0]).shape == (0, 20)


KINDS = {
    "per token": {},
    "per tensor": {"per": "tensor"},
    "SmoothQuant": {"smooth": 0.5},
    "outlier columns": {"outliers": 2},
    "int8 head": {"head": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_int8_products_is_near_the_float_one_and_loads_again(
    model_with_maps, text, tmp_path, kind
):
    small = with_int8_products(model_with_maps, calibration=text, **KINDS[kind])
    score = evaluate(model_with_maps, text, None)
    assert evaluate(small, text, None).loss == pytest.approx(score.loss, abs=0.03)
    assert small.num_parameters() == model_with_maps.num_parameters()
    x, y = text[0]
    again = load_compressed(save_compressed(small, tmp_path / "small"))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    for other in (again, copied):
        assert torch.equal(small(x), other(x))
    assert small.loss(x, y).item() == pytest.approx(small.token_losses(x, y).nll.mean().item())
    logits, state = small.prefill(x[:, :5])
    stepped, _ = small.step(x[:, 5], state)
    assert torch.allclose(stepped, small(x[:, :6])[:, -1], atol=0.05 * float(stepped.detach().abs().max()))
    assert logits.shape == stepped.shape


@pytest.mark.parametrize("mixer", ["diagonal", "solve"])
@pytest.mark.parametrize("make", [with_int8_products, lambda m: with_int8_products(m, head=True), quantised])
def test_a_mixtures_router_multiplies_in_float_however_many_experts_it_has(mixer, make):
    config = ResNetBKConfig(50, d_model=16, n_layers=1, n_heads=2, num_experts=17, top_k=2, mixer=mixer)
    torch.manual_seed(0)
    model = ResNetBK(config).eval()
    ids = torch.arange(24).view(2, 12)
    if mixer == "diagonal" and make is not quantised:
        with pytest.raises(TypeError, match="without maps"):
            make(model)
        return
    torch.testing.assert_close(make(model)(ids), model(ids), rtol=0, atol=0.05)


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_losses_do_not_depend_on_how_many_rows_are_scored_at_once(reading, text, per, monkeypatch):
    small, (x, y) = with_int8_products(reading, per, head=True), text[0]
    y = y.clone()
    y[1:3] = -100
    found = []
    for count in (1, 7 * reading.vocab_size, 2**30):
        monkeypatch.setattr(products, "LOGITS_AT_ONCE", count)
        found.append(small.token_losses(x, y))
    scored = y != -100
    logits = small.logits(small.hidden(x).masked_fill(~scored.unsqueeze(2), 0.0))
    expected = torch.nn.functional.cross_entropy(logits[scored], y[scored], reduction="none")
    for losses in found:
        assert torch.allclose(losses.nll[scored], expected, atol=1e-5)
        assert (losses.nll[~scored] == 0).all()
        assert torch.equal(losses.correct, (logits.argmax(2) == y) & scored)


def test_of_words_with_equal_logits_the_first_is_the_likeliest(reading, text):
    model, x = copy.deepcopy(reading), text[0][0]
    with torch.no_grad():
        model.embedding.weight[7] = model.embedding.weight[6]
        model.embedding.weight[6:8] *= 30
    small = with_int8_products(model, head=True)
    first = small(x).argmax(2)
    assert (first == 6).any()
    assert small.token_losses(x, first).correct.all()
    assert not small.token_losses(x, torch.where(first == 6, 7, first)).correct[first == 6].any()


def test_smoothing_saves_what_one_large_input_would_spoil(reading, text):
    """An activation's column that is 300 times the others, its weight so much smaller: the function is the same."""
    model = copy.deepcopy(reading)
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight[3] *= 300
            block.norm.bias[3] *= 300
            block.dense.up.weight[:, 3] /= 300
    exact = evaluate(model, text, None).loss
    assert exact == pytest.approx(evaluate(reading, text, None).loss, abs=1e-4)
    loss = {
        name: abs(evaluate(with_int8_products(model, calibration=text, **kw), text, None).loss - exact)
        for name, kw in KINDS.items()
        if name != "int8 head"
    }
    assert loss["SmoothQuant"] < 0.5 * loss["per token"]
    assert loss["outlier columns"] < 0.5 * loss["per token"]


def test_what_cannot_multiply_in_int8_is_refused_in_one_sentence(reading, text):
    with pytest.raises(TypeError, match="got a LSTM without maps that are modules"):
        with_int8_products(LSTM(LSTMConfig(30, 16, 1)))
    with pytest.raises(ValueError, match="per: got 'row'; allowed are 'token', 'tensor'"):
        with_int8_products(reading, "row")
    with pytest.raises(ValueError, match="smooth: got 2; it must lie between"):
        with_int8_products(reading, smooth=2, calibration=text)
    with pytest.raises(ValueError, match=r"outliers: got 2\.5; give a number of columns"):
        with_int8_products(reading, outliers=2.5, calibration=text)
    with pytest.raises(ValueError, match="calibration holds no text; give some batches"):
        with_int8_products(reading, smooth=0.5)
    small = with_int8_products(reading, head=True)
    with pytest.raises(TypeError, match="got a Int8ResNetBK; it takes a plain"):
        with_int8_products(small)
    with pytest.raises(TypeError, match="is not trained"):
        small.train()
    with pytest.raises(TypeError, match="no float head"):
        small.head()
