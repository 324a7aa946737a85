"""How long the GRAD_BLEND sweep will take on this machine."""

from __future__ import annotations

from bklm.models import ResNetBK
from bklm.studies.estimate import EVALUATION, seconds_per_token, text_size
from bklm.studies.grad_blend import GradBlendConfig, model_config


def estimated_minutes(config: GradBlendConfig) -> float:
    """Minutes that the whole study of a resolved config takes, reading and figures left out.

    The first call with a model's shape, batch and device times a few steps (seconds); later ones remember it.

    Raises:
        ValueError, OSError: a device or a text that is not to be had.
    """
    vocabulary, train_tokens, val_tokens = text_size(config.dataset, config.data_dir, config.vocab_size)
    settings = model_config(config, vocabulary, 0.5)
    speed = seconds_per_token(settings, lambda: ResNetBK(settings), config)
    train_tokens = min(train_tokens, config.max_train_tokens or train_tokens)
    epochs = len(config.alphas) * len(config.seeds) * config.epochs_per_trial + config.final_epochs
    return epochs * (train_tokens + EVALUATION * val_tokens) * speed / 60
