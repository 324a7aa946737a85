"""The Triton backend. Whether Triton compiles or interprets is settled when kernels are defined, which another test may
have caused already: what needs the interpreter, or must not have it, runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this platform")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(arguments, interpret):
    """Run Python in the repository root; its output is shown if it fails. Returns the output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def run_cases(selection, interpret):
    cases = [
        "-m",
        "pytest",
        str(HERE / "gpu_cases.py"),
        str(HERE / "gpu_solve_cases.py"),
        str(HERE / "test_every_backend.py"),
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-m",
        selection,
    ]
    assert " passed" in run(cases, interpret)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute of work, on a machine that may be busy
def test_kernels_under_the_interpreter():
    run_cases("not slow", interpret=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kernels_under_the_interpreter_at_full_size():
    run_cases("slow", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_device():
    run_cases("slow or not slow", interpret=False)


@pytest.mark.parametrize(
    "capability", [75, pytest.param(80, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.slow)]
)
def test_kernels_compile_without_a_gpu(capability):
    """For a T4, an A100 and an H100, down to machine code; the interpreter accepts what the compiler may refuse."""
    output = run([str(HERE / "gpu_compile.py"), str(capability)], interpret=False)
    if "cannot compile" in output:
        pytest.skip(output.strip())
    assert "compiled" in output


def test_everything_imports_without_triton():
    """The operator then works on its other backends, and says that this one is missing."""
    run(
        [
            "-c",
            "import sys; sys.modules['triton'] = None\n"
            "import torch\n"
            "from bklm.bk_core import BackendUnavailableError, available_backends, resolvent_diagonal, resolvent_solve\n"
            "from bklm.bk_core.gpu import backend as gpu\n"
            "assert not gpu.is_available()\n"
            "assert 'triton' not in available_backends()\n"
            "a = torch.zeros(2, 3)\n"
            "assert resolvent_diagonal(a, 1.0, 1.0, 1j).shape == (2, 3)\n"
            "assert resolvent_solve(a[..., None], a, 1.0, 1.0, 1j).shape == (2, 3, 1)\n"
            "try: resolvent_diagonal(a, 1.0, 1.0, 1j, backend='triton')\n"
            "except BackendUnavailableError: pass\n"
            "else: raise SystemExit('backend=triton was accepted')\n"
            "try: gpu.forward(a, torch.ones(1, 2), torch.ones(2) * 1j, False)\n"
            "except OSError as e: assert 'not installed' in str(e)\n"
            "else: raise SystemExit('forward ran without Triton')\n",
        ],
        interpret=False,
    )
