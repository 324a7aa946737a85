"""The baseline study in two processes: started by torchrun, and from a notebook's own process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bklm.harness.report import command_words
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.run import run_baseline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(small_text: Path, tmp_path_factory: pytest.TempPathFactory):
    """One process's search and two runs of a NewLLM, and nothing random but the batches' order."""
    folder = str(tmp_path_factory.mktemp("one"))
    return run_baseline(BaselineConfig(
        profile="smoke", model="newllm", data_dir=str(small_text), output_dir=folder, device="cpu",
        seeds=(0, 1), epochs=2, learning_rates=(1e-3, 1e-2), search_tokens=200, batch_size=12, seq_len=8, vocab_size=100,
        embed_dim=8, hidden_dim=16, context_dim=8, n_layers=1, max_train_tokens=500, generate_tokens=3, context_tokens=0,
        dropout=0.0,
    ))  # fmt: skip


@pytest.fixture
def together(alone, tmp_path: Path) -> BaselineConfig:
    """The same settings, with results of the test's own."""
    return dataclasses.replace(alone.config, output_dir=str(tmp_path / "two"))


def curves(result) -> list[float]:
    return [
        e[k] for r in result.runs for e in r["epochs"] for k in ("train_loss", "val_loss", "val_perplexity")
    ]


def torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    """``-m MODULE ...`` in two processes of one thread each."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        *words,
    ]
    return subprocess.run(
        launch, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def require_same(found, alone) -> None:
    assert curves(found) == pytest.approx(curves(alone), rel=1e-4)
    assert [r["val_ppl"] for r in found.search] == pytest.approx([r["val_ppl"] for r in alone.search], rel=1e-4)
    assert [r["val_ppl_by_context"]["16"] for r in found.runs] == pytest.approx(
        [r["val_ppl_by_context"]["16"] for r in alone.runs], rel=1e-4
    )


def test_torchrun_gives_the_numbers_of_one_process_and_prints_and_writes_once(alone, together, tmp_path):
    done = torchrun(command_words(together)[2:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Lowest validation PPL") == 1
    assert done.stdout.count("seed 0: epoch 1/2") == 1
    require_same(run_baseline(together), alone)  # reads back what the two wrote
    log = (tmp_path / "two" / "baseline" / "run.log").read_text()
    assert log.count("NewLLM, seed 1: epoch 2/2") == 1


def test_a_notebook_launches_the_processes_and_gets_the_result(alone, together):
    found = run_baseline(dataclasses.replace(together, processes=2))
    require_same(found, alone)
    assert found.bundle.path.exists()


def test_bad_input_in_two_processes_ends_all_of_them_with_the_sentence(together):
    done = torchrun(command_words(dataclasses.replace(together, seq_len=5000))[2:])
    assert done.returncode != 0
    assert "longer than the text" in done.stderr
