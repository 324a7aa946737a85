"""benchmarks/bk_core.py runs, goes on where it was interrupted, and refuses sizes that do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bk_core.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_quick_tables_are_printed_and_a_second_run_takes_the_finished_cases(tmp_path):
    save = tmp_path / "cases.json"
    quick = ("--quick", "--seconds", 0.05, "--save", save)
    first = run(*quick, "--only", "loop", "batched")
    assert first.returncode == 0, first.stderr
    assert "loop, diagonal backward" in first.stdout
    assert "vmap in chunks" in first.stdout
    finished = json.loads(save.read_text())
    marked = {key: [row | {"B, N": "kept"} for row in rows] for key, rows in finished.items()}
    save.write_text(json.dumps(marked))
    second = run(*quick, "--only", "loop", "linear")
    assert "kept" in second.stdout
    assert "ns/element" in second.stdout


@pytest.mark.slow
@pytest.mark.parametrize("table", ["loop", "copy", "linear", "peers", "batched"])
def test_sizes_that_do_not_fit_are_refused_with_the_size_needed(table):
    refused = run("--only", table, "--size", 10**6, 10**10)
    assert refused.returncode != 0
    assert "GiB" in refused.stderr
    assert "choose a smaller size" in refused.stderr
