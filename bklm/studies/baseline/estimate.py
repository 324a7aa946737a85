"""How long the baseline study will take on this machine, at most: no run is assumed to end early."""

from __future__ import annotations

import json
from functools import partial

from bklm.harness.estimate import EVALUATION, seconds_per_token, text_size
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.models import build_model, model_names, model_settings


def estimated_minutes(config: BaselineConfig) -> float:
    """Minutes that the trainings of a resolved config take; reading, timing and figures are left out.

    The first call with a model's shape, batch and device times a few steps (seconds); later ones remember it.

    Raises:
        ValueError, OSError: a device or a text that is not to be had.
    """
    vocabulary, train_tokens, val_tokens = text_size(config.dataset, config.data_dir, config.vocab_size)
    train_tokens = min(train_tokens, config.max_train_tokens or train_tokens)
    searched = min(train_tokens, config.search_tokens or train_tokens)
    trials = len(config.learning_rates) if len(config.learning_rates) > 1 else 0
    epochs = config.epochs * len(config.seeds)
    # A search is judged by at most as many validation tokens as it trains on.
    search = trials * (searched + EVALUATION * min(searched, val_tokens))
    tokens = search + epochs * (train_tokens + EVALUATION * val_tokens)
    seconds = 0.0
    for name in model_names(config.model):
        settings = model_settings(name, config, vocabulary)
        build = partial(build_model, name, settings)
        seconds += tokens * seconds_per_token((name, json.dumps(settings)), build, config)
    return seconds / 60
