"""benchmarks/moe.py goes on where it was interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "moe.py"


@pytest.mark.slow
def test_a_second_run_takes_the_finished_cases(tmp_path):
    save = tmp_path / "cases.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "-T",
        "64",
        "-D",
        "8",
        "-E",
        "4",
        "--rounds",
        "2",
        "--save",
        str(save),
    ]
    subprocess.run([*command, "-k", "1"], check=True, capture_output=True, timeout=300)
    finished = json.loads(save.read_text())
    for times, _memory in finished.values():
        times["exact"] = [0.0125] * len(times["exact"])
    save.write_text(json.dumps(finished))
    again = subprocess.run([*command, "-k", "1", "2"], check=True, capture_output=True, text=True, timeout=300)
    assert "12.50" in again.stdout
    assert len(json.loads(save.read_text())) == 2
