"""Gain from context: none for a model that reads nothing, found in one that reads, for every kind of model."""

import copy

import pytest
import torch
from torch import nn

from bklm.data import IGNORED
from bklm.models import (
    GPT,
    LSTM,
    Conservative,
    ConservativeConfig,
    GPTConfig,
    LanguageModel,
    LinearContext,
    LinearContextConfig,
    LSTMConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
)
from bklm.models.mixing import MixingPoint
from bklm.training import measure_context_gain
from bklm.training.context_gain import ContextGain, gain_in_words, relative_gain, short_lengths
from bklm.training.evaluation import evaluate

V = 6
MODELS = {
    "diagonal": lambda: ResNetBK(ResNetBKConfig(V, 16, 1, None, num_experts=2, n_heads=2, dropout_p=0.0)),
    "solve": lambda: ResNetBK(ResNetBKConfig(V, 16, 1, mixer="solve", n_heads=4, num_experts=1, dropout_p=0.0)),
    "gpt": lambda: GPT(GPTConfig(V, 16, 1, 2, 16, dropout_p=0.0)),
    "newllm": lambda: NewLLM(NewLLMConfig(V, 16, 32, 16, 1, dropout_p=0.0)),
    "lstm": lambda: LSTM(LSTMConfig(V, 16, 1, dropout_p=0.0)),
    "linear_context": lambda: LinearContext(LinearContextConfig(V, 16, 1, dropout_p=0.0)),
    "lru": lambda: LinearContext(LinearContextConfig(V, 16, 1, dropout_p=0.0, recurrence="lru")),
    "conservative": lambda: Conservative(ConservativeConfig(V, 16, 1, 64, n_heads=4, dropout_p=0.0)),
}


class Bigram(LanguageModel):
    """Logits of the last token alone; a mixing point passes what nothing reads."""

    def __init__(self):
        super().__init__()
        self.vocab_size = V
        self.embedding = nn.Embedding(V, 8)
        self.mixed = MixingPoint()
        self.output = nn.Linear(8, V)

    def hidden(self, input_ids):
        x = self.embedding(input_ids)
        return x + 0.0 * self.mixed(x.cumsum(1))

    def head(self):
        return self.output.weight, self.output.bias


def text(length=4096):
    """The next token is the one of two positions before, three times of four: a bigram model cannot know it."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (length,), generator=g)
    for t in range(2, length):
        if torch.rand((), generator=g) < 0.75:
            ids[t] = ids[t - 2]
    return ids


IDS = text()


def windows_of(length):
    """The same targets at every length that divides them."""
    return [(IDS[:-1][:4080].view(-1, length)[i::4], IDS[1:][:4080].view(-1, length)[i::4]) for i in range(4)]


def trained(make, steps=150):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = windows_of(16)
    for step in range(steps):
        x, y = batches[step % 4]
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
    return model.eval()


def measured(model, lengths=(1, 2, 4, 16)):
    return measure_context_gain(model, windows_of(16), None, windows_of=windows_of, window=16, lengths=lengths)


def test_a_model_that_reads_nothing_gains_nothing():
    found = measured(trained(Bigram))
    assert abs(found.gain) < 1e-6
    assert found.mixer_off == pytest.approx(found.perplexity, rel=1e-6)
    assert found.by_window[1] == pytest.approx(found.by_window[16], rel=1e-6)
    assert gain_in_words(found.gain).endswith("0.00%: a bigram model")


@pytest.mark.parametrize("name", ["solve", "gpt", "lstm", "linear_context"])
def test_a_model_that_reads_gains_and_its_windows_say_how_far_back(name):
    found = measured(trained(MODELS[name]))
    assert found.gain > 0.2
    assert (found.mixer_off is None) == (name == "lstm")
    assert found.by_window[16] < 0.9 * found.by_window[1]
    assert "bigram" not in gain_in_words(found.gain)
    assert found.to_dict()["gain"] == found.gain


@pytest.mark.parametrize("name", MODELS)
def test_without_its_mixer_a_model_hears_of_no_other_position(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = windows_of(16)[0][0][:3]
    if name == "lstm":
        for call in (model.without_mixing([]), model.recording_mixing()):
            with pytest.raises(TypeError, match=r"LSTM has no mixer .* windows of one token"), call:
                pass
        return
    before = model(x)
    with model.recording_mixing() as recorded:
        assert torch.equal(model(x), before) or (model(x) - before).abs().max() < 1e-12
    means = recorded.means()
    assert all(m.is_floating_point() for m in means)
    changed = x.clone()
    changed[:, 3] = (x[:, 3] + 1) % V
    with torch.no_grad(), model.without_mixing(means):
        off, other = model(x), model(changed)
    kept = [i for i in range(16) if i != 3]
    assert (off - other)[:, kept].abs().max() < 1e-12
    assert (off - other)[:, 3].abs().max() > 1e-6
    assert (before - off).abs().max() > 1e-6
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_the_means_are_those_over_all_positions():
    model = MODELS["linear_context"]().double().eval()
    seen = []
    model.blocks[0].mixed.register_forward_hook(lambda _, given, __: seen.append(given[0].flatten(0, 1)))
    with model.recording_mixing() as recorded, torch.no_grad():
        for x, _ in windows_of(16):
            model(x)
    (mean,) = recorded.means()
    torch.testing.assert_close(mean, torch.cat(seen).mean(0))


@pytest.mark.parametrize("name", ["solve", "gpt"])
def test_padding_behind_a_text_is_in_no_mean(name):
    model = trained(MODELS[name], steps=5)
    lengths = [3, 16, 7, 16]
    rows = [
        (IDS[i : i + n][None], IDS[i + 1 : i + n + 1][None])
        for i, n in zip(range(0, 80, 20), lengths, strict=True)
    ]
    x, y = (torch.full((4, 16), value) for value in (V - 1, IGNORED))
    for i, (own, target) in enumerate(rows):
        x[i, : lengths[i]], y[i, : lengths[i]] = own[0], target[0]
    padded, plain = (
        measure_context_gain(model, batches, None, windows_of=lambda n: None, window=16)
        for batches in ([(x, y)], rows)
    )
    assert padded.perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert padded.mixer_off == pytest.approx(plain.mixer_off, rel=1e-6)


def test_a_measurement_leaves_the_model_as_it_was_even_when_it_fails():
    model = trained(MODELS["solve"], steps=2).train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), model.without_mixing([torch.zeros(2, 16), torch.zeros(16)]):
        1 / 0  # noqa: B018
    measured(model)
    assert model.training
    assert all(point.idle and point.total is None for point in model.mixing_points())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with (
        pytest.raises(ValueError, match="means: got 1; this model mixes positions at 2 places"),
        model.without_mixing([torch.zeros(1)]),
    ):
        pass
    with pytest.raises(ValueError, match="no position passed"), model.recording_mixing() as recorded:
        recorded.means()


def test_a_model_without_mixing_points_or_longer_windows_says_none():
    found = measured(trained(MODELS["gpt"], steps=2), lengths=(1, 16, 24))
    assert found.by_window[24] is None
    lm = MODELS["lstm"]()
    found = measure_context_gain(
        lm, windows_of(16), None, windows_of=lambda n: None, window=16, lengths=(1, 16)
    )
    assert (found.mixer_off, found.by_window, found.gain) == (None, {1: None, 16: None}, None)
    assert found.perplexity == evaluate(lm, windows_of(16), None).perplexity
    assert gain_in_words(None) == "not measured"


def test_the_gain_is_the_smaller_of_the_two_and_takes_the_longest_window_trained_with():
    assert relative_gain(80.0, 100.0, {1: 90.0, 8: 81.0, 64: 1.0}, 8) == pytest.approx(0.1)
    assert relative_gain(95.0, 100.0, {1: 90.0, 8: 45.0}, 8) == pytest.approx(0.05)
    assert relative_gain(95.0, 100.0, {8: 45.0}, 8) == pytest.approx(0.05)
    assert relative_gain(95.0, None, {1: 90.0}, 8) is None
    assert ContextGain(80.0, 100.0, {}, 8).gain == pytest.approx(0.2)
    assert gain_in_words(0.0021) == "0.2%"
    assert gain_in_words(0.0019) == "0.19%: a bigram model"
    # It reads, to its harm: no bigram model.
    assert gain_in_words(-0.038) == "-3.8%: no gain"


def test_short_windows_are_powers_of_two_and_that_of_the_training():
    assert short_lengths(128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert short_lengths(4096) == [1, 2, 4, 8, 16, 32, 64, 4096]
    assert short_lengths(24) == [1, 2, 4, 8, 16, 24]
    assert short_lengths(1) == [1]
