"""What compression must reach on a trained model: bytes, perplexity within an interval over seeds, on text it never saw."""

import math

import pytest
import torch
from accelerate import Accelerator

from bklm.compression import file_sizes, quantise, with_int8_products
from bklm.compression.calibration import first_batches
from bklm.harness.statistics import Perplexity
from bklm.harness.text import prepare_text
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.studies import CompressionConfig
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings

WIDTH = 128
SEEDS = 3
METHODS = {
    "int8": lambda m, text: quantise(m),
    "int4": lambda m, text: quantise(m, 4, 32),
    "int3": lambda m, text: quantise(m, 3, 128),
    "per tensor": lambda m, text: with_int8_products(m, "tensor", head=True),
    "per token": lambda m, text: with_int8_products(m, head=True),
    "SmoothQuant": lambda m, text: with_int8_products(m, smooth=0.5, calibration=text, head=True),
}


@pytest.fixture(scope="module")
def measured():
    """By method: the perplexity over the float model's on the same seeds, and how many times smaller the file is."""
    config = CompressionConfig(
        profile="smoke", dataset="embedded", device="cpu", vocab_size=2000, seq_len=64, batch_size=16,
        max_train_tokens=60_000,
    ).resolved()  # fmt: skip
    text = prepare_text(config)
    calibration = first_batches(text.train_loader(seed=0), 4096)
    ratios, times = {name: [] for name in METHODS}, {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        sizes = {"mixer": "solve", "n_heads": 4, "num_experts": 1}
        model = ResNetBK(ResNetBKConfig(text.vocab_size, WIDTH, 2, **sizes))
        settings = TrainingSettings(2, learning_rate=3e-3, clip=1.0, seed=seed)
        train(model, text.train_loader(seed), text.val_loader(), settings, accelerator=Accelerator(cpu=True))
        model.eval()
        whole = evaluate(model, text.val_loader(), text.unk_id)
        assert whole.perplexity < 0.75 * text.baselines[0]["val_ppl"], (
            "it has learned more than word frequencies"
        )
        for name, method in METHODS.items():
            small = method(model, calibration)
            loss = evaluate(small, text.val_loader(), text.unk_id).loss
            ratios[name].append(math.exp(loss - whole.loss))
            whole_bytes, (size, packed) = file_sizes(model)[0], file_sizes(small)
            times[name], times[f"{name}, packed"] = whole_bytes / size, whole_bytes / packed
    found = {name: Perplexity.over_seeds(values) for name, values in ratios.items()}
    for name, r in found.items():
        print(f"{name}: {times[name]:.2f} times smaller, PPL x{r.mean:.4f} ({r.low:.4f} to {r.high:.4f})")
    return found, times


@pytest.mark.slow
def test_weights_in_int8_are_almost_four_times_smaller_and_cost_no_three_thousandths(measured):
    found, times = measured
    assert times["int8"] >= 3.9
    assert found["int8"].high <= 1.003


@pytest.mark.slow
def test_int8_products_cost_no_hundredth_where_each_token_has_its_scale(measured):
    found, times = measured
    for name in ("per token", "SmoothQuant"):
        assert found[name].high <= 1.01
        assert times[name] >= 3.5


@pytest.mark.slow
def test_seven_times_fewer_bytes_cost_five_hundredths_at_most_and_ten_times_fifteen(measured):
    found, times = measured
    assert times["int4"] >= 7.0
    assert found["int4"].high <= 1.05
    assert times["int3, packed"] >= 10.0
    assert found["int3"].high <= 1.15
