"""The second int8 backend, where torchao is installed; without it one sentence says so."""

import pytest
import torch

from bklm.compression import torchao_products
from bklm.compression.products import multiplies_exactly
from bklm.compression.torchao_products import has_torchao, with_torchao_products
from bklm.models import LSTM, LSTMConfig
from bklm.training.evaluation import evaluate


@pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")
@pytest.mark.skipif(not multiplies_exactly(), reason="torch's int8 product saturates without VNNI")
def test_a_model_through_torchao_is_near_the_float_one_which_stays(model_with_maps, text):
    before = [p.clone() for p in model_with_maps.parameters()]
    small = with_torchao_products(model_with_maps)
    assert evaluate(small, text, None).loss == pytest.approx(
        evaluate(model_with_maps, text, None).loss, abs=0.03
    )
    assert not torch.equal(small(text[0][0]), model_with_maps(text[0][0]))
    assert torch.equal(small.head()[0], model_with_maps.head()[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model_with_maps.parameters(), strict=True))
    assert small.generate(text[0][0][:1, :3], 3).shape == (1, 6)


def test_what_it_cannot_serve_is_refused_in_one_sentence(reading, monkeypatch):
    monkeypatch.setattr(torchao_products, "has_torchao", lambda: False)
    with pytest.raises(RuntimeError, match="torchao is not installed; pip install torchao"):
        with_torchao_products(reading)
    monkeypatch.setattr(torchao_products, "has_torchao", lambda: True)
    monkeypatch.setattr(torchao_products, "multiplies_exactly", lambda: False)
    with pytest.raises(RuntimeError, match="torch's int8 product saturates on this processor"):
        with_torchao_products(reading)
    monkeypatch.setattr(torchao_products, "multiplies_exactly", lambda: True)
    with pytest.raises(TypeError, match="this LSTM has no maps of its own"):
        with_torchao_products(LSTM(LSTMConfig(30, 16, 1)))
