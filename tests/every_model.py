"""Every model of the package, tiny, for tests that hold for all of them. A new model is added here."""

from __future__ import annotations

from collections.abc import Callable

from bklm.compression.distilling import Distilled
from bklm.compression.retraining import PrunedModel, RoundedModel
from bklm.models import (
    GPT,
    LSTM,
    Conservative,
    ConservativeConfig,
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
from bklm.training.auxiliary import WithTerm
from bklm.training.energy_terms import DepthEnergy, PublishedEnergy
from bklm.training.koopman import KoopmanTerm, PublishedTerm

V = 20
"""The vocabulary of each."""


def diagonal(n_layers: int, p: float, **more) -> ResNetBK:
    return ResNetBK(ResNetBKConfig(V, 12, n_layers, dropout_p=p, **{"n_seq": 16, **more}))


def reads(n_layers: int, p: float, **more) -> ResNetBK:
    more = {"mixer": "solve", "n_heads": 2, **more}
    return ResNetBK(ResNetBKConfig(V, 12, n_layers, None, dropout_p=p, **more))


def conservative(p: float, **more) -> Conservative:
    return Conservative(ConservativeConfig(V, 8, 2, units=6, n_heads=2, dropout_p=p, **more))


MODELS: dict[str, Callable[..., LanguageModel]] = {
    "GPT": lambda p=0.0: GPT(GPTConfig(V, 16, 1, 2, 16, p)),
    "NewLLM": lambda p=0.0: NewLLM(NewLLMConfig(V, 8, 12, 6, 2, p)),
    "ResNetBK": lambda p=0.0: diagonal(2, p),
    "ResNetBK, two of three": lambda p=0.0: diagonal(
        1, p, n_seq=None, num_experts=3, top_k=2, balance=0.1, n_heads=2
    ),
    "ResNetBK, dense": lambda p=0.0: diagonal(1, p, num_experts=1),
    "ResNetBK, original": lambda p=0.0: ResNetBK(
        ResNetBKConfig.original(V, d_model=12, n_layers=1, dropout_p=p)
    ),
    "ResNetBK that reads": lambda p=0.0: reads(1, p),
    "ResNetBK that reads, dense, both directions": lambda p=0.0: reads(1, p, num_experts=1, causal=False),
    "LSTM": lambda p=0.0: LSTM(LSTMConfig(V, 8, 1, p)),
    "LinearContext": lambda p=0.0: LinearContext(LinearContextConfig(V, 8, 1, p)),
    "LinearContext, LRU": lambda p=0.0: LinearContext(LinearContextConfig(V, 8, 1, p, recurrence="lru")),
    "ContextTokenLM": lambda p=0.0: ContextTokenLM(ContextTokenConfig(V, 8, 8, 2)),
    "Conservative": lambda p=0.0: conservative(p),
    "Conservative, checkpoint": lambda p=0.0: conservative(p, backward="checkpoint"),
    "Conservative, coupled": lambda p=0.0: conservative(p, kind="coupled", every=2),
    "ResNetBK with a Koopman term": lambda p=0.0: WithTerm(
        reads(2, p, num_experts=1), KoopmanTerm(12, 2, 6), 0.1, limit=0.01
    ),
    "ResNetBK with an energy": lambda p=0.0: WithTerm(reads(2, p, num_experts=1), DepthEnergy(12, 2), 0.1),
}

WITH_STATE: dict[str, Callable[..., LanguageModel]] = {
    "published Koopman term": lambda p=0.0: WithTerm(
        diagonal(2, p), PublishedTerm(12, 2, 6, most=0.5, start=1, epochs=2, steps=3), 1.0, apart=False
    ),
    "published energy": lambda p=0.0: WithTerm(diagonal(2, p), PublishedEnergy(12, 2), 1.0),
}
"""Models whose training term moves numbers of its own at each step: what is no step is refused."""


def of(*names: str) -> dict[str, Callable[..., LanguageModel]]:
    """The models named."""
    return {name: MODELS[name] for name in names}


def wide(p: float) -> ResNetBK:
    """With matrices that are large enough to be compressed."""
    return ResNetBK(ResNetBKConfig(V, 16, 1, None, mixer="solve", n_heads=2, num_experts=1, dropout_p=p))


LEARNS_COMPRESSED: dict[str, Callable[..., LanguageModel]] = {
    "rounded": lambda p=0.0: RoundedModel(wide(p), 4),
    "pruned": lambda p=0.0: PrunedModel(wide(p), 0.5, 2),
    "distilled": lambda p=0.0: Distilled(wide(p), diagonal(1, 0.0)),
}
"""Models around a model that learn under compression: they read numbers whenever they train."""
