"""The shared interface, seen from a model that supplies only hidden states and a tied head."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bklm.models import (
    GPT,
    LSTM,
    ContextTokenConfig,
    ContextTokenLM,
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
from bklm.models.base import _draw

VOCABULARY = 11


class Averager(LanguageModel):
    """Predicts from the mean of the embeddings so far; head tied to the embedding, no bias, no streaming."""

    def __init__(self, n_seq=None):
        super().__init__()
        self.vocab_size, self.n_seq = VOCABULARY, n_seq
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.readout = self.embedding  # registered twice, one parameter
        self.dropout = nn.Dropout(0.5)

    def hidden(self, input_ids):
        x = self.dropout(self.embedding(input_ids))
        return x.cumsum(1) / torch.arange(1, input_ids.shape[1] + 1, dtype=x.dtype)[:, None]

    def head(self):
        return self.embedding.weight, None


class Penalised(Averager):
    def auxiliary_loss(self):
        return self.embedding.weight.square().sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Averager().double().eval()


@pytest.fixture
def batch():
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return ids, targets


def test_loss_token_losses_and_logits_agree(model, batch):
    ids, targets = batch
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected)
    torch.testing.assert_close(model.loss(ids, targets, reduction="sum"), expected * 18)
    nll, correct = model.token_losses(ids, targets)
    torch.testing.assert_close(nll.sum() / 18, expected)
    assert torch.equal(correct[:, :-1], logits[:, :-1].argmax(-1) == targets[:, :-1])
    assert not correct[:, -1].any()


def test_loss_reaches_a_tied_head_from_both_sides(model, batch):
    ids, targets = batch
    weight = model.embedding.weight
    (ours,) = torch.autograd.grad(model.loss(ids, targets), weight)
    whole = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, torch.autograd.grad(whole, weight)[0])


def test_auxiliary_loss_counts_in_training_only(batch):
    ids, targets = batch
    model = Penalised().double()
    model.dropout.p = 0.0
    plain = model.eval().loss(ids, targets)
    model.train()
    penalty = model.auxiliary_loss()
    torch.testing.assert_close(model.loss(ids, targets), plain + penalty)
    torch.testing.assert_close(model.loss(ids, targets, reduction="sum"), 18 * (plain + penalty))


def test_a_shared_parameter_is_counted_once(model):
    assert model.num_parameters() == model.num_parameters(trainable_only=True) == VOCABULARY * 6
    model.embedding.requires_grad_(False)
    assert model.num_parameters(trainable_only=True) == 0


def test_generation_without_streaming_runs_over_the_text_again(model, batch):
    out = model.generate(batch[0], 5, temperature=0.0)
    assert torch.equal(out[:, :7], batch[0])
    assert torch.equal(out[:, 7:], model(out)[:, 6:-1].argmax(-1))


def test_generating_nothing_returns_the_prompt(model, batch):
    assert torch.equal(model.generate(batch[0], 0), batch[0])


def test_generation_stops_at_the_last_position_not_before(batch):
    model = Averager(n_seq=10)
    assert model.generate(batch[0], 3).shape == (3, 10)
    with pytest.raises(ValueError, match="11 positions, but this model has n_seq = 10"):
        model.generate(batch[0], 4)


def test_training_mode_comes_back_even_when_generation_fails(model, batch, monkeypatch):
    model.train()
    monkeypatch.setattr(model, "hidden", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(batch[0], 2)
    assert model.training


def test_a_model_that_cannot_stream_says_so(model, batch):
    with pytest.raises(TypeError, match="Averager does not stream"):
        model.init_state(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens: got 2.5; it must be an integer"),
        ({"max_new_tokens": "3"}, "max_new_tokens: got '3'"),
        ({"max_new_tokens": 1, "temperature": "a"}, "temperature: got 'a'; it must be 0"),
        ({"max_new_tokens": 1, "temperature": None}, "temperature: got None"),
    ],
)
def test_a_count_or_temperature_that_is_no_number_is_refused_in_one_sentence(model, batch, options, message):
    with pytest.raises(TypeError, match=message):
        model.generate(batch[0], **options)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_an_empty_prompt_is_refused_by_every_model_that_streams(shape):
    models = [
        GPT(GPTConfig(VOCABULARY, d_model=4, n_layers=1, n_heads=1, n_seq=8)),
        NewLLM(NewLLMConfig(VOCABULARY, embed_dim=4, hidden_dim=4, context_dim=4, n_layers=1)),
        ResNetBK(ResNetBKConfig(VOCABULARY, d_model=4, n_layers=1, n_seq=None)),
        ResNetBK(ResNetBKConfig(VOCABULARY, d_model=4, n_layers=1, mixer="solve")),
        LSTM(LSTMConfig(VOCABULARY, d_model=4, n_layers=1)),
        LinearContext(LinearContextConfig(VOCABULARY, d_model=4, n_layers=1)),
        ContextTokenLM(ContextTokenConfig(VOCABULARY, embed_dim=4, context_dim=4, n_layers=1)),
    ]
    for streaming in models:
        with pytest.raises(ValueError, match="a prompt needs at least one token"):
            streaming.prefill(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", ["GPT", "NewLLM", "ResNetBK", "ContextTokenLM"])
@pytest.mark.parametrize("temperature", [1e-5, 1e-37, 1e-40, 1e-46, 1e-300, 5e-324, Fraction(1, 10**60)])
def test_any_positive_temperature_down_to_the_smallest_takes_the_likeliest_token(name, temperature):
    torch.manual_seed(0)
    made = {
        "GPT": lambda: GPT(GPTConfig(50, 16, 1, 2, 32)),
        "NewLLM": lambda: NewLLM(NewLLMConfig(50, 16, 16, 16, 1)),
        "ResNetBK": lambda: ResNetBK(ResNetBKConfig(50, 16, 1, 32)),
        "ContextTokenLM": lambda: ContextTokenLM(ContextTokenConfig(50, 16, 16, 1)),
    }[name]()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    prompt = torch.randint(0, 50, (3, 5))
    assert torch.equal(made.generate(prompt, 5, temperature), made.generate(prompt, 5, 0.0))


def test_a_tiny_temperature_still_draws_between_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, -float("inf")]]).expand(400, -1)
    torch.manual_seed(0)
    for temperature in (1e-320, 1e-3):
        drawn = _draw(logits, temperature, None)
        assert sorted(drawn.unique().tolist()) == [1, 2]
        assert 120 < int((drawn == 1).sum()) < 280


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_a_step_takes_one_id_a_sequence(shape):
    for model in (
        GPT(GPTConfig(50, 16, 1, 2, 32)),
        ResNetBK(ResNetBKConfig(50, 16, 1, 32)),
        LSTM(LSTMConfig(50, 16, 1)),
        LinearContext(LinearContextConfig(50, 16, 1)),
    ):
        with pytest.raises(ValueError, match=r"token: got shape .*; it must be \(batch,\), one id a sequence"):
            model.step(torch.zeros(shape, dtype=torch.int64), model.init_state(1))
