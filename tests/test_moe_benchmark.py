"""benchmarks/moe.py goes on where it was interrupted, and divides by no memory that it could not measure."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "moe.py"


@pytest.mark.parametrize(
    ("small", "shown", "worst"),
    [
        (0, [["-", "-"]] * 5, (0.5, None)),
        (2**21, [["1.00x", "2.00x"], ["0.50x", "1.00x"]] * 2 + [["1.00x", "2.00x"]], (0.5, 0.5)),
    ],
)
def test_memory_too_small_to_be_told_divides_nothing_and_is_no_gain(monkeypatch, capsys, small, shown, worst):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    moe = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    taken = {"dense": [1.0, 1.0], "loop": [2.0, 2.0], "exact": [1.0, 1.0], "selected": [2.0, 2.0]}
    taken["layer"] = [0.5, 0.5]
    memory = {"dense": small, "loop": 2 * small, "exact": small, "selected": 2 * small}
    memory["layer"] = small
    gains = moe.report(moe.Case(64, 8, 4, 1), taken, memory)
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()] == shown
    assert gains["selected"].over_layer == 0.25
    assert moe.worst_of([gain for name, gain in gains.items() if name != "layer"]) == worst


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
