"""Every benchmark that a document names runs to its end and prints what it is read for, here at its smallest size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "train_step": ("--quick --rounds 2", "tokens/s"),
    "baseline_step": ("--quick --seconds 1", "of the floor"),
    "freeze_phase2": ("--quick --seconds 1", "kept contexts"),
    "scaling": ("--parts training --rounds 1 --workers 1 --profile smoke", "1 process, 1 thread each"),
    "grad_blend_initialisation": ("--alphas 0 --seeds 0 --data_dir TEXT --output OUTPUT/rows.csv", "val_ppl"),
    "resolvent_solve": ("--quick --seconds 0.2", "scipy / ours"),
    "reading_step": ("--quick", "exponent of the step time over N"),
    "reading_search": ("--quick --only taken", "Validation perplexity after epoch 1"),
    "moe_perplexity": ("--quick --output_dir OUTPUT", "exact router gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_to_its_end(name, small_text, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for file in small_text.iterdir():  # longer than a batch of the published size
        (text / file.name).write_text(40 * file.read_text())
    words, printed = RUNS[name]
    words = words.replace("OUTPUT", str(tmp_path)).replace("TEXT", str(text)).split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout


def test_quick_sweep_compares_medians_of_both_revisions(monkeypatch, capsys):
    """Half an hour and the history of the project are more than a test has: clones and runs are stood in for."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quick_sweep

    seconds = {"old": iter([99.0, 30.0, 36.0, 33.0]), "new": iter([99.0, 11.0, 10.0, 60.0])}
    monkeypatch.setattr(quick_sweep, "checkout", lambda revision, folder: folder)
    monkeypatch.setattr(quick_sweep, "seconds_of", lambda folder, profile, output, more: next(seconds[folder.name]))
    monkeypatch.setattr(sys, "argv", ["quick_sweep"])
    quick_sweep.main()
    assert "measured 3.00" in capsys.readouterr().out


def test_every_benchmark_is_run_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")} - {"bk_core_gpu"}  # wants a GPU
    assert [name for name in sorted(scripts) if name not in tests] == []
