"""The smallest config of every study: about a second each. A new study needs a line here, and gets its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from bklm import studies

SMALL: dict[str, dict[str, Any]] = {
    "grad_blend": {
        "alphas": (0.5,), "seeds": (0, 1), "epochs_per_trial": 2, "final_epochs": 1, "batch_size": 8, "seq_len": 8,
        "d_model": 8, "n_layers": 1, "max_train_tokens": 400,
    },
    "precision": {
        "sizes": (4, 96), "shifts": (1.0,), "batch_sizes": (2,), "batch_length": 8, "reference_n": 4, "repeats": 3,
        "seconds": 0.01, "model_batch": 1, "model_vocab": 40,
    },
    "baseline": {
        "model": "newllm", "seeds": (0, 1), "epochs": 2, "learning_rates": (1e-2,), "search_tokens": 200, "batch_size": 8,
        "seq_len": 8, "vocab_size": 100, "embed_dim": 8, "hidden_dim": 16, "context_dim": 8, "n_layers": 1,
        "max_train_tokens": 300, "generate_tokens": 3, "context_tokens": 0,
    },
    "embedding_freeze": {
        "dataset": "embedded", "initialisation": "random", "head": "tied", "original_comparison": False, "samples": (5,),
        "seeds": (0, 1), "val_documents": 3, "document_tokens": 100, "pretraining_documents": 4, "vocab_size": 300,
        "embed_dim": 8, "context_dim": 8, "n_layers": 1, "epochs": 2, "batch_tokens": 128, "iterations": 2,
    },
    "koopman": {
        "weights": (0.1,), "seeds": (0,), "epochs": 2, "batch_size": 8, "seq_len": 8, "vocab_size": 100, "d_model": 8,
        "n_heads": 2, "n_layers": 2, "lift": 8, "learning_rates": (3e-3,), "max_train_tokens": 300, "fit_positions": 100,
        "score_tokens": 100, "units": 4, "delays": (1, 2), "recall_steps": 4, "recall_width": 8, "recall_layers": 1,
        "recall_pairs": 1, "trained_distance": 8, "distances": (8, 16),
    },
    "physics": {
        "seeds": (0, 1), "epochs": 1, "pieces": 2, "learning_rates": (3e-3,), "decays": (1.0,), "stable_rates": (1e-2,),
        "score_tokens": 50, "stable_tokens": 100, "batch_size": 8, "seq_len": 8, "vocab_size": 100, "d_model": 8,
        "n_layers": 2, "max_train_tokens": 300, "memory_layers": (1, 2), "workers": 1,
    },
    "compression": {
        "models": "resnet_bk", "seeds": (0,), "epochs": 1, "retrain_epochs": 1, "batch_size": 8, "seq_len": 8,
        "vocab_size": 100, "d_model": 16, "n_layers": 2, "max_train_tokens": 300, "bits": (8,), "groups": (0,),
        "sparsities": (0.5,), "widths": (0.5,), "temperatures": (2.0,), "calibration_tokens": 64, "workers": 1,
    },
    "dialogue": {
        "dataset": "grammar", "pretraining": "wikitext-2", "seeds": (0, 1), "epochs": 1, "pretraining_epochs": 1,
        "max_dialogues": 8, "held_out_dialogues": 4, "vocab_size": 320, "seq_len": 64, "batch_size": 8, "width": 8,
        "max_pretraining_tokens": 600, "context_replies": 3, "sample_dialogues": 1, "reply_tokens": 2, "model": "resnet_bk",
    },
    "integration": {
        "seeds": (0,), "epochs": 1, "scores": 1, "batch_size": 16, "seq_len": 8,
        "vocab_size": 100, "d_model": 16, "n_layers": 2, "max_train_tokens": 300, "workers": 1,
    },
}  # fmt: skip


def small(study: str, folder: Path, text: Path, **changes: Any) -> Any:
    """The config of a study on the small text, where it reads one; results go to ``folder``."""
    config_class = getattr(studies, f"{studies.STUDIES[study]}Config")
    settings = {"profile": "smoke", "device": "cpu", "output_dir": str(folder), **SMALL[study]}
    if "data_dir" in config_class.names() and "dataset" not in settings:
        settings["data_dir"] = str(text)
    if "pretraining_dir" in config_class.names():
        settings["pretraining_dir"] = str(text)
    return config_class(**{**settings, **changes})


def run_of(study: str) -> Any:
    """The study's run function."""
    return getattr(studies, f"run_{study}")


def require_that_figures_say_what_the_model_sees(result: Any) -> None:
    """Of a run as it was published: every figure says that its model sees the future."""
    drawn = {p.name: Image.open(p).text["Description"] for p in result.folder.glob("*.png")}
    assert drawn
    assert [name for name, note in drawn.items() if "THIS MODEL SEES THE FUTURE" not in note] == []
