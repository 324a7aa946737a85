"""How long the embedding-freeze study will take here at most: a few timed steps of its own models, times its tokens."""

from __future__ import annotations

import functools
from itertools import islice

import torch

from bklm.data import load_corpus
from bklm.harness.estimate import best_of
from bklm.models import ContextTokenConfig, ContextTokenLM, linear_cross_entropy
from bklm.studies.embedding_freeze.config import Arm, EmbeddingFreezeConfig, arms_of
from bklm.training.processes import make_accelerator

TOKENS_PER_WORD = 1.4  # of a BPE of some thousand tokens on tokenised text
DIALOGUE_TOKENS = 1_100  # of an UltraChat dialogue, so that an estimate downloads nothing
SWEEPS, GRADIENT = (
    3,
    3,
)  # evaluations per token of a corpus's contexts; forward and backward against a forward pass


def estimated_minutes(config: EmbeddingFreezeConfig) -> float:
    """Minutes that both phases of a resolved config take on this machine if no arm stops early, reading and figures left out.

    The first call with a model's shape, batch and device times a few steps (seconds); later ones remember it.

    Raises:
        ValueError, OSError: a device or a text that is not to be had.
    """
    valid = _tokens(config, config.val_documents, "valid")
    per_context = _seconds(config, None, config.vocab_size)
    arms, seconds = arms_of(config), 0.0
    searched = 1 + (len(config.learning_rates) - 1) / (len(config.seeds) * len(config.samples))
    for samples in config.samples:
        train = _tokens(config, samples, "train")
        starts = len({arm.initialisation for arm in arms})
        seconds += starts * train * per_context * (SWEEPS + config.iterations * (1 + GRADIENT))
        for arm in arms:
            tokens = arm.train_share * train
            epoch = (tokens + valid / GRADIENT) * _seconds(config, _shape(arm), config.vocab_size)
            sweeps = 1 + config.epochs * (arm.trains_norm and config.recompute_contexts)
            seconds += searched * (config.epochs * epoch + sweeps * SWEEPS * (tokens + valid) * per_context)
    return seconds * len(config.seeds) / 60


def _shape(arm: Arm) -> tuple[str, str]:
    return arm.freezing, arm.head


def _tokens(config: EmbeddingFreezeConfig, documents: int, split: str) -> float:
    """About how many tokens the first documents of a split have, cut as the study cuts them."""
    longest = config.document_tokens or 10**9
    if config.dataset == "ultrachat" and not config.data_dir:
        return documents * min(longest, DIALOGUE_TOKENS)
    words = _words(config.dataset, config.data_dir, documents, split)
    return sum(min(longest, TOKENS_PER_WORD * n) for n in words)


@functools.lru_cache(maxsize=32)
def _words(dataset: str, data_dir: str | None, documents: int, split: str) -> list[int]:
    corpus = load_corpus(dataset, data_dir, max_documents=documents)
    return [len(text.split()) for text in islice(corpus.documents(split), documents)]


_speeds: dict[tuple, float] = {}


def _seconds(config: EmbeddingFreezeConfig, shape: tuple[str, str] | None, vocab_size: int) -> float:
    """Seconds per token of a step of phase 2 of an arm (freezing, head), or for None of one evaluation of the contexts."""
    key = (
        shape, vocab_size, config.embed_dim, config.context_dim, config.n_layers, config.batch_tokens, config.device,
        config.precision,
    )  # fmt: skip
    if key not in _speeds:
        with torch.random.fork_rng():
            _speeds[key] = _timed(config, shape, vocab_size)
    return _speeds[key]


def _timed(config: EmbeddingFreezeConfig, shape: tuple[str, str] | None, vocab_size: int) -> float:
    accelerator = make_accelerator(config.device, config.precision)
    device = accelerator.device
    freezing, head = shape or ("frozen", "untied")
    size = ContextTokenConfig(
        vocab_size, config.embed_dim, config.context_dim, config.n_layers, tied=head == "tied"
    )
    model = ContextTokenLM(size).to(device)
    model.freeze_context()
    if freezing == "frozen":
        model.freeze_embedding()
    ids = torch.randint(vocab_size, (1, config.batch_tokens), device=device)
    contexts = torch.randn(1, config.batch_tokens, config.n_layers, config.context_dim, device=device)

    def evaluate_contexts() -> None:
        with torch.no_grad():
            model.context_block.final(contexts[:, :, 0], model.embed(ids)).sum().item()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with accelerator.autocast():
            loss = linear_cross_entropy(model.token_block(model.embed(ids), contexts), *model.head(), ids)
        loss.backward()
        optimizer.step()
        loss.item()

    return best_of(step if shape else evaluate_contexts, times=3) / config.batch_tokens
