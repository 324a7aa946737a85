"""How long the GRAD_BLEND sweep will take here: a few timed steps of its own model, times the tokens it will see."""

from __future__ import annotations

import functools
import time

import torch

from bklm.data import load_corpus, tokenize_corpus
from bklm.models import ResNetBK
from bklm.studies.grad_blend import GradBlendConfig, model_config
from bklm.training import make_accelerator

WIKITEXT2 = (30_000, 2_051_910, 213_886)  # its published words, so that an estimate downloads nothing


def estimated_minutes(config: GradBlendConfig) -> float:
    """Minutes that the whole study of a resolved config takes on this machine, reading and figures left out.

    The first call with a model's shape, batch and device times a few steps (seconds); later ones remember it.

    Raises:
        ValueError, OSError: a device or a text that is not to be had.
    """
    vocabulary, train_tokens, val_tokens = text_size(config.dataset, config.data_dir, config.vocab_size)
    return _seconds_per_token(config, vocabulary) * study_tokens(config, train_tokens, val_tokens) / 60


@functools.lru_cache(maxsize=32)
def text_size(dataset: str, data_dir: str | None, vocab_limit: int) -> tuple[int, int, int]:
    """(vocabulary, training tokens, validation tokens) of a study's text."""
    if dataset == "wikitext-2" and not data_dir:
        vocabulary, train_tokens, val_tokens = WIKITEXT2
        return min(vocabulary, vocab_limit), train_tokens, val_tokens
    text = tokenize_corpus(load_corpus(dataset, data_dir), vocab_limit)
    return text.vocab_size, len(text.train), len(text.valid)


def study_tokens(config: GradBlendConfig, train_tokens: int, val_tokens: int) -> float:
    """Tokens that a resolved config's study trains on; a validation token counts a third: it has no backward pass."""
    if config.max_train_tokens:
        train_tokens = min(train_tokens, config.max_train_tokens)
    epochs = len(config.alphas) * len(config.seeds) * config.epochs_per_trial + config.final_epochs
    return epochs * (train_tokens + val_tokens / 3)


_speeds: dict[tuple, float] = {}


def _seconds_per_token(config: GradBlendConfig, vocabulary: int, steps: int = 2) -> float:
    """Seconds that this machine takes to train on one token."""
    settings = model_config(config, vocabulary, 0.5)
    key = (settings, config.batch_size, config.device, config.precision)
    if key not in _speeds:
        with torch.random.fork_rng():
            _speeds[key] = _timed(config, ResNetBK(settings), steps)
    return _speeds[key]


def _timed(config: GradBlendConfig, model: ResNetBK, steps: int) -> float:
    accelerator = make_accelerator(config.device, config.precision)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    x = torch.randint(model.config.vocab_size, (config.batch_size, config.seq_len), device=accelerator.device)
    times = []
    for _ in range(steps + 1):  # the first one compiles
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with accelerator.autocast():
            loss = model.loss(x, x)
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - started)
    return min(times[1:]) / x.numel()


def in_words(minutes: float) -> str:
    """ "12", "about 1" or "under 1"."""
    return f"{minutes:.0f}" if minutes >= 1.5 else "about 1" if minutes > 0.5 else "under 1"
