"""Small models of every class, trained a little, so that a perplexity has room to get worse."""

from __future__ import annotations

import pytest
import torch

from bklm import models

VOCABULARY = 120

MAKERS = {
    "NewLLM": lambda: models.NewLLM(
        models.NewLLMConfig(VOCABULARY, embed_dim=24, hidden_dim=32, context_dim=24, n_layers=2)
    ),
    "ResNetBK that reads": lambda: models.ResNetBK(
        models.ResNetBKConfig(VOCABULARY, d_model=32, n_layers=2, mixer="solve", n_heads=4, num_experts=1)
    ),
    "ResNetBK": lambda: models.ResNetBK(models.ResNetBKConfig(VOCABULARY, d_model=24, n_layers=2, n_seq=16)),
    "GPT": lambda: models.GPT(models.GPTConfig(VOCABULARY, d_model=32, n_layers=2, n_heads=2, n_seq=16)),
    "LinearContext": lambda: models.LinearContext(
        models.LinearContextConfig(VOCABULARY, d_model=32, n_layers=2)
    ),
    "LSTM": lambda: models.LSTM(models.LSTMConfig(VOCABULARY, 24, 2)),
    "ContextTokenLM": lambda: models.ContextTokenLM(models.ContextTokenConfig(VOCABULARY, 24, 24, 2)),
    "Conservative": lambda: models.Conservative(models.ConservativeConfig(VOCABULARY, 32, 2)),
}
UNTIED = ("NewLLM", "ResNetBK")  # whose head is no embedding
WITH_MAPS = ("NewLLM", "ResNetBK that reads", "GPT", "LinearContext")


def batches_of(count: int, seed: int = 0, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Text in which each word is three times as likely followed by its successor as by all else together."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        words = torch.randint(VOCABULARY, (rows, 13), generator=g)
        for t in range(1, 13):
            follows = torch.rand(rows, generator=g) < 0.75
            words[:, t] = torch.where(follows, (words[:, t - 1] + 1) % VOCABULARY, words[:, t])
        batches.append((words[:, :-1], words[:, 1:]))
    return batches


_trained: dict[str, models.LanguageModel] = {}


def trained_model(name: str) -> models.LanguageModel:
    """The model of that name after 40 steps, made once."""
    if name not in _trained:
        torch.manual_seed(0)
        model = MAKERS[name]()
        if name == "NewLLM":  # its first weights are meant for widths of hundreds
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(4.0 if p.ndim == 2 else 1.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for x, y in batches_of(40, rows=16):
            optimizer.zero_grad()
            model.loss(x, y).backward()
            optimizer.step()
        _trained[name] = model.eval()
    return _trained[name]


@pytest.fixture(params=MAKERS)
def any_model(request: pytest.FixtureRequest) -> models.LanguageModel:
    return trained_model(request.param)


@pytest.fixture(params=WITH_MAPS)
def model_with_maps(request: pytest.FixtureRequest) -> models.LanguageModel:
    return trained_model(request.param)


@pytest.fixture(params=UNTIED)
def untied(request: pytest.FixtureRequest) -> models.LanguageModel:
    return trained_model(request.param)


@pytest.fixture
def text() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return batches_of(3, seed=1)


@pytest.fixture
def reading() -> models.LanguageModel:
    return trained_model("ResNetBK that reads")
