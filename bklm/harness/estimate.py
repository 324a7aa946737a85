"""How long a training will take on this machine: a few timed steps of its own model, times the tokens it will see."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bklm.data import load_corpus, tokenize_corpus
from bklm.models import LanguageModel
from bklm.training.evaluation import evaluate
from bklm.training.one_step import training_step
from bklm.training.processes import make_accelerator

KNOWN = {"wikitext-2": (30_000, 2_051_910, 213_886), "wikitext-103": (267_735, 103_227_021, 217_646),
         "c4": (10**6, 10**11, 200_000)}  # fmt: skip
# Tokens a word, and how large a vocabulary gets, counted on a WikiText-2 sample (of BPE with 8,000 pieces).
UNITS = {"word": (1.0, 10**9), "bpe": (1.2, 10**9), "char": (4.9, 1000)}
LONG = 90  # minutes, from which on people count hours


@functools.lru_cache(maxsize=32)
def text_size(
    dataset: str, data_dir: str | None, vocab_limit: int, tokenizer: str = "word"
) -> tuple[int, int, int]:
    """(vocabulary, training tokens, validation tokens) of a study's text; where ``KNOWN``, as published: nothing is fetched.
    Words are published; pieces and characters are taken to be as many a word as ``UNITS`` says.

    Raises:
        ValueError, OSError: see ``bklm.data.load_corpus``.
    """
    if dataset in KNOWN and not data_dir and (tokenizer == "word" or dataset != "wikitext-2"):
        vocabulary, *tokens = KNOWN[dataset]
        a_word, most = UNITS[tokenizer]
        return min(vocabulary, vocab_limit, most), *(int(n * a_word) for n in tokens)
    text = tokenize_corpus(load_corpus(dataset, data_dir), vocab_limit, tokenizer=tokenizer)
    return text.vocab_size, len(text.train), len(text.valid)


@dataclass(frozen=True)
class Run:
    """Trainings of one model: ``epochs`` passes over ``train_tokens``, each scored on ``val_tokens``, in all trials together.

    ``name`` tells the model from others: its speed is measured once and remembered under it. ``build`` makes the model.
    """

    name: Hashable
    build: Callable[[], LanguageModel]
    epochs: float
    train_tokens: float
    val_tokens: float


def minutes(config: Any, runs: Iterable[Run]) -> float:
    """Minutes that some trainings of a resolved config take on this machine; reading, compiling and figures are left out.

    Args:
        config: gives batch_size, seq_len, device and precision.

    Raises:
        ValueError, OSError: a device or a text that this machine lacks.
    """
    seconds = 0.0
    for run in runs:
        step, score = seconds_per_token(run.name, run.build, config)
        seconds += run.epochs * (run.train_tokens * step + run.val_tokens * score)
    return seconds / 60


_measured: dict[Hashable, tuple[float, float]] = {}


def seconds_per_token(name: Hashable, build: Callable[[], LanguageModel], config: Any) -> tuple[float, float]:
    """Seconds that a training step of a resolved config, and that scoring, takes per token of its batch.

    Args:
        name: what tells this model from others; its speed is timed by a few steps, once, and remembered under it.
        build: makes the model. torch's random state is left as it was.
        config: gives batch_size, seq_len, device and precision.
    """
    key = (name, config.batch_size, config.seq_len, config.device, config.precision)
    if key not in _measured:
        with torch.random.fork_rng():
            taken = _seconds_of_a_step_and_score(build(), config)
        _measured[key] = tuple(seconds / (config.batch_size * config.seq_len) for seconds in taken)
    return _measured[key]


def _seconds_of_a_step_and_score(model: LanguageModel, config: Any) -> tuple[float, float]:
    accelerator = make_accelerator(config.device, config.precision)
    model.to(accelerator.device)
    x = torch.randint(model.config.vocab_size, (config.batch_size, config.seq_len), device=accelerator.device)
    step = training_step(model, x, x, accelerator)
    return best_of(lambda: step().item()), best_of(lambda: evaluate(model, [(x, x)], None))


def best_of(work: Callable[[], None], times: int = 2) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    work()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def duration_in_words(minutes: float) -> str:
    """ "less than a minute", "about 12 min", and in hours from 90 minutes on: "about 1.5 h"."""
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} min" if minutes < LONG else f"about {minutes / 60:.{int(minutes < 600)}f} h"


def round_minutes(minutes: float) -> str:
    """ "12", "about 1" or "under 1"."""
    return f"{minutes:.0f}" if minutes >= 1.5 else "about 1" if minutes > 0.5 else "under 1"
