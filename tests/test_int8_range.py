"""Int8 maps serve numbers of every size, and copies travel: pickled, moved by the default device, of diverged models."""

import copy as copying
import io
import pickle

import pytest
import torch
from torch import nn

from bklm.compression.int8 import load_quantised, quantised, save_quantised, with_float_products
from bklm.compression.int8_linear import row_exponents
from bklm.models import (
    GPT,
    LSTM,
    GPTConfig,
    LinearContext,
    LinearContextConfig,
    LSTMConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
)  # fmt: skip

MAKERS = {
    "NewLLM": lambda: NewLLM(NewLLMConfig(40, 24, 32, 24, 2)),
    "GPT": lambda: GPT(GPTConfig(40, 32, 2, 2, 16)),
    "ResNetBK": lambda: ResNetBK(ResNetBKConfig(40, 24, 2, n_seq=None)),
    "LSTM": lambda: LSTM(LSTMConfig(40, 32, 2)),
    "ResNetBK of 8 heads": lambda: ResNetBK(ResNetBKConfig(40, 24, 1, n_seq=None, n_heads=8)),
    "ResNetBK that reads": lambda: ResNetBK(ResNetBKConfig(40, 24, 1, mixer="solve", n_heads=4)),
    "LinearContext": lambda: LinearContext(LinearContextConfig(40, 24, 2, 0.0)),
}


@pytest.fixture(params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


def int8_map(weight, bias=None):
    """The int8 form of one linear map, taken from the head of a model."""
    gpt = GPT(GPTConfig(len(weight), weight.shape[1], 1, 2, 16))
    with torch.no_grad():
        gpt.embedding.weight.copy_(weight)
    head = quantised(gpt).int8_head
    if bias is not None:
        integers, scales, _ = head.weight_and_bias()
        head.set_weight_and_bias(integers, scales, bias)
    return head


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("exponent", [0, -2, -3, -6, -20, -37, -44, 10, 30, 37])
def test_activations_of_any_size_are_rounded_as_ordinary_ones_are(exponent):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(10, 64)
    error = relative(int8_map(weight)((x.double() * 10.0**exponent).float()), x @ weight.t() * 10.0**exponent)
    # Subnormal numbers have few bits of their own.
    assert error < (0.2 if exponent == -44 else 0.03)


@pytest.mark.parametrize("exponent", [0, -4, -5, -6, -12, -30, -37, 20, 34])
@pytest.mark.parametrize("with_bias", [False, True])
def test_small_and_large_rows_of_a_weight_are_rounded_as_ordinary_ones_are(exponent, with_bias):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(10, 64)
    weight[::2] *= 10.0**exponent
    bias = torch.randn(48) if with_bias else None
    head = int8_map(weight, bias)
    found, wanted = head(x), x.double() @ weight.double().t()
    if with_bias:
        assert torch.allclose(found, (wanted + bias).float(), rtol=0.05, atol=0.5 * max(1.0, 10.0**exponent))
        head.set_weight_and_bias(*head.weight_and_bias()[:2], torch.zeros(48))
        found = head(x)
    assert relative(found[:, ::2], wanted[:, ::2]) < 0.03
    assert relative(found[:, 1::2], wanted[:, 1::2]) < 0.03


def test_a_rescaling_by_powers_of_two_that_leaves_the_function_as_it_is_changes_no_bit():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(10, 64)
    plain = int8_map(weight)(x)
    for power in (2.0**-12, 2.0**-60, 2.0**40):
        assert torch.equal(int8_map(weight / power)(x * power), plain)


def test_within_the_kernels_range_nothing_is_done_around_it():
    weight, x = torch.randn(48, 64), torch.randn(10, 64)
    head = int8_map(weight)
    assert head.factors is None
    assert torch.equal(head(x), head.product(x))
    assert row_exponents(torch.tensor([0.0, 1e-6, 1.0, 1e6])).tolist() == [0] * 4
    assert torch.equal(head(torch.zeros(2, 64)), torch.zeros(2, 48))
    assert head(torch.zeros(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others_alone(value):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(10, 64)
    head, spoilt = int8_map(weight), x.clone()
    spoilt[3, 5] = value
    kept = torch.arange(10) != 3
    assert head(spoilt)[3].isnan().all()
    assert torch.equal(head(spoilt)[kept], head(x * kept[:, None])[kept])


def test_logits_follow_the_float_model_where_a_layer_is_written_in_small_numbers():
    torch.manual_seed(0)
    model = MAKERS["GPT"]().eval()
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        before = quantised(model)(ids)
        for block in model.blocks:  # value and output projections: one down, the other up
            block.qkv.weight[64:].mul_(2.0**-20)
            block.qkv.bias[64:].mul_(2.0**-20)
            block.attention_output.weight.mul_(2.0**20)
        after = quantised(model)(ids)
    assert relative(after, before) < 1e-3


def test_a_copy_is_pickled_saved_and_copied_whole(model):
    int8, ids = quantised(model), torch.randint(0, 40, (2, 5))
    buffer = io.BytesIO()
    torch.save(int8, buffer)
    buffer.seek(0)
    others = (
        pickle.loads(pickle.dumps(int8)),
        torch.load(buffer, weights_only=False),
        copying.deepcopy(int8),
    )
    for back in others:
        assert type(back) is type(int8)
        assert torch.equal(back(ids), int8(ids))
        assert back.num_parameters() == model.num_parameters()
        with pytest.raises(TypeError, match="not trained"):
            back.train()


def test_small_rows_come_back_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = MAKERS["NewLLM"]()
    with torch.no_grad():
        model.update.weight[::3] *= 1e-9
    int8, ids = quantised(model), torch.randint(0, 40, (2, 5))
    save_quantised(int8, tmp_path / "int8.safetensors")
    back = load_quantised(MAKERS["NewLLM"](), tmp_path / "int8.safetensors")
    assert torch.equal(back(ids), int8(ids))
    plain = with_float_products(back).update.weight
    assert (plain - model.update.weight).abs()[::3].max() < 0.01 * model.update.weight[::3].abs().max()


def test_a_diverged_model_is_refused_by_the_name_of_its_weight(model):
    name, weight = list(model.named_parameters())[-1]
    with torch.no_grad():
        weight.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=f"quantised: {name} holds NaN"):
        quantised(model)


def test_targets_that_are_left_out_do_not_make_the_head_coarser():
    torch.manual_seed(0)
    int8 = quantised(MAKERS["GPT"]())
    ids, targets = torch.randint(0, 40, (2, 6)), torch.randint(0, 40, (2, 6))
    targets[:, 4:] = -100
    hidden = int8.hidden(ids)
    int8.hidden = lambda _: hidden
    want = int8.token_losses(ids, targets)
    hidden[:, 4:] = 1e6
    assert torch.equal(int8.token_losses(ids, targets).nll, want.nll)
    hidden[:, 5:] = float("nan")
    assert torch.equal(int8.token_losses(ids, targets).nll, want.nll)
    assert int8.loss(ids, targets).isfinite()


class Renamed(GPT):
    """A class that this module's user made of a model."""


def test_copies_of_other_peoples_classes_are_pickled_too():
    model, ids = Renamed(GPTConfig(40, 32, 1, 2, 16)), torch.randint(0, 40, (2, 5))
    int8 = quantised(model)
    back = pickle.loads(pickle.dumps(int8))
    assert isinstance(back, Renamed)
    assert torch.equal(back(ids), int8(ids))
    assert not any(isinstance(m, nn.Linear) and m.in_features >= 16 for m in back.modules())
