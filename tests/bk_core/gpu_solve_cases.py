"""The solve's Triton kernels against the sequential recursions, on a GPU or in Triton's interpreter: see test_gpu.py."""

import pytest
import torch

from bklm.bk_core import resolvent_solve, solve_backends, solve_reference
from bklm.bk_core.gpu import backend as gpu

if not gpu.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

from bklm.bk_core.gpu import solve as gpu_solve

DEVICE = "cpu" if gpu._interpreted() else "cuda"
F32, F64 = torch.float32, torch.float64


def problem(m, n, columns, dtype=F64, complex_x=False, complex_entries=False, shared=False, seed=0):
    """x, left-determining a, b, c, z on DEVICE; c has one row where ``shared``."""
    g = torch.Generator().manual_seed(seed + n)
    wide = torch.complex128 if dtype == F64 else torch.complex64
    entries = wide if complex_entries else dtype
    x = torch.randn(m, n, columns, dtype=wide if complex_x else dtype, generator=g)
    a = torch.randn(m, n, dtype=entries, generator=g)
    b = torch.randn(m, n - 1, dtype=entries, generator=g)
    c = torch.randn(1 if shared else m, n - 1, dtype=entries, generator=g)
    if not complex_entries:
        b, c = b.abs(), c.abs()
    z = torch.complex(torch.randn(m, generator=g), torch.full((m,), 6.0 if complex_entries else 1.0)).to(wide)
    return [t.to(DEVICE) for t in (x, a, b, c, z)]


def check(inputs, tolerance):
    for causal in (False, True):
        y = resolvent_solve(*inputs, causal=causal, backend="triton")
        wide = [t.to(torch.complex128 if t.is_complex() else F64) for t in inputs]
        expected = solve_reference.sequential(*wide, causal=causal)
        assert y.device == inputs[0].device
        assert (y - expected).abs().max() < tolerance * expected.abs().max()


@pytest.fixture
def chunks(monkeypatch):
    """Every line is cut into chunks of 8."""
    monkeypatch.setattr(gpu_solve, "chunk_length", lambda lines, n: 8)


@pytest.mark.parametrize(("m", "n", "columns"), [(1, 1, 1), (3, 2, 5), (2, 9, 33), (33, 3, 1)])
def test_short_lines_agree_with_the_sequential_solve(m, n, columns):
    check(problem(m, n, columns), 1e-13)


@pytest.mark.parametrize("kind", [{}, {"complex_x": True, "shared": True}, {"complex_entries": True}])
def test_every_kind_of_operand_agrees_with_the_sequential_solve(kind, chunks):
    check(problem(2, 17, 3, F32, **kind), 5e-6)
    check(problem(2, 17, 3, F64, **kind), 1e-12)


@pytest.mark.parametrize("n", [8, 15, 16, 33])
def test_chunk_edges_agree_with_the_sequential_solve(n, chunks):
    check(problem(2, n, 2), 1e-12)


def test_the_past_does_not_move_when_the_future_does(chunks):
    x, a, b, c, z = problem(2, 30, 2, F32)
    before = resolvent_solve(x, a, b, c, z, causal=True, backend="triton")
    x[:, 20:] = float("nan")
    after = resolvent_solve(x, a, b, c, z, causal=True, backend="triton")
    assert torch.equal(after[:, :20], before[:, :20])
    assert torch.isnan(after[:, 20:]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_reference(causal, chunks):
    inputs = [t.requires_grad_() for t in problem(2, 11, 3, shared=True)]
    grads = []
    for backend in ("triton", "reference"):
        y = resolvent_solve(*inputs, causal=causal, backend=backend)
        grads.append(torch.autograd.grad((y.real**2 + y.imag).sum(), inputs))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_the_cut_fills_the_gpu_and_covers_the_line():
    for lines, n in [(1, 1), (1, 257), (64, 4096), (8, 65536), (1, 10**6), (40000, 5000)]:
        length = gpu_solve.chunk_length(lines, n)
        assert length % 8 == 0
        assert length >= n or (length >= gpu_solve.SHORTEST_CHUNK and lines * n / length <= 1.1 * 32768)


def test_the_named_backend_reaches_these_kernels():
    assert solve_backends.select("triton", torch.device(DEVICE)) is gpu_solve


@pytest.mark.slow
def test_longer_lines_take_the_cut_in_use():
    check(problem(1, 1000, 2, F32), 1e-5)
    check(problem(1, 700, 1, F64), 1e-12)
