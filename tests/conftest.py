"""Shared fixtures: a small text on disk, a small study, and no network or user cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from bklm.studies.grad_blend.config import GradBlendConfig

# On a busy machine an example may take any time: that says nothing about the code. pytest-timeout stops what hangs.
# The same examples everywhere: what CI finds is of the change that it tests. ``--hypothesis-profile search`` draws others.
settings.register_profile("bklm", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("bklm")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever ran before it, a test draws the same numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token caches of tests stay out of the user's cache folder, and no ambient text is picked up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BKLM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.delenv("BKLM_DATA_DIR", raising=False)
        yield


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/valid/test .txt: sentences of a tiny grammar, the same on every machine."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "tree"], ["sees", "likes", "eats", "hears"]
    for name, lines in (("train", 120), ("valid", 30), ("test", 30)):
        sentences = [
            f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} ." for _ in range(lines)
        ]
        (folder / f"{name}.txt").write_text(" = Animals = \n" + "\n".join(sentences) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_in(small_text: Path) -> Callable[[Path], GradBlendConfig]:
    """tiny_in(folder): a sweep of four trials that takes about a second, with its results there."""
    return lambda folder: GradBlendConfig(
        profile="smoke",
        data_dir=str(small_text),
        output_dir=str(folder),
        device="cpu",
        alphas=(0.0, 0.5),
        seeds=(0, 1),
        epochs_per_trial=2,
        final_epochs=2,
        batch_size=8,
        seq_len=8,
        d_model=8,
        n_layers=1,
        max_train_tokens=400,
    )


@pytest.fixture
def tiny_config(tiny_in: Callable[[Path], GradBlendConfig], tmp_path: Path) -> GradBlendConfig:
    """``tiny_in`` a folder of the test's own."""
    return tiny_in(tmp_path / "results")
