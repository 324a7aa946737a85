"""One finished run of each study with a model that reads, shared by every test here."""

from __future__ import annotations

import pytest

from bklm.studies import BaselineConfig, GradBlendConfig, run_baseline, run_grad_blend
from bklm.studies.baseline import run as baseline


@pytest.fixture(scope="session")
def runs(small_text, tmp_path_factory):
    """A folder with a run of 03 (one model, words in small letters) and one of 01 (characters)."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BKLM_CACHE_DIR", str(place / "cache"))
        # Costs are not what these tests are about, and take longer than the trainings.
        patch.setattr(baseline, "measure_models", lambda *runs, **settings: {})
        same = {
            "profile": "smoke",
            "data_dir": str(small_text),
            "output_dir": str(place),
            "device": "cpu",
            "workers": 1,
        }
        small = {"batch_size": 8, "n_layers": 2, "max_train_tokens": 800, "seeds": (0, 1)}
        run_baseline(
            BaselineConfig(
                **same, **small, model="resnet_bk", learning_rates=(1e-2,), epochs=1, vocab_size=100, embed_dim=16,
                hidden_dim=16, context_dim=16, generate_tokens=2, context_tokens=100, seq_len=16,
            )
        )  # fmt: skip
        run_grad_blend(
            GradBlendConfig(
                **same,
                **small,
                tokenizer="char",
                mixer="diagonal",
                alphas=(0.5,),
                epochs_per_trial=1,
                final_epochs=1,
                d_model=8,
                seq_len=32,
            )
        )
    return place


@pytest.fixture(scope="session")
def validation(small_text):
    """The validation text of the runs."""
    return small_text / "valid.txt"
