"""The numba backend: tiles, chunks, polishing, threads; each against the scalar complex128 rows or the reference."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc

import numba
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bklm.bk_core import reference, resolvent_diagonal
from bklm.bk_core.cpu import backend as cpu
from bklm.bk_core.cpu import jit
from bklm.bk_core.cpu.scratch import LANES, LONGEST_TILE

TILE = cpu.LONG_ROW_TILE
EDGES = sorted(
    {1, 2, 3, 127, 128, 129, 4095, 5 * TILE, 9 * TILE + 1}
    | {edge + i for edge in (cpu.SHORT_ROW, LONGEST_TILE) for i in (-1, 0, 1)}
)


def problem(m, n, dtype=torch.float64, k_rows=1, eta=0.7, seed=0):
    """(gbar, a, k, z) on rows, k between 0.2 and 1.2."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    a = torch.randn(m, n, dtype=dtype, generator=g)
    k = torch.rand(k_rows, n - 1, dtype=dtype, generator=g) + 0.2
    z = torch.complex(torch.randn(m, generator=g), torch.full((m,), eta)).to(wide)
    return torch.randn(m, n, dtype=wide, generator=g), a, k, z


def both_ways(gbar, a, k, z, causal):
    """(G, grad_a, K, Dsum) of the SIMD tiles, and of the scalar rows in complex128 (which complex ``a`` takes)."""
    G, saved = cpu.forward(a, k, z, causal)
    tiles = (G, *cpu.backward(gbar, a, k, z, G, saved, causal, True, True))
    wide = [x.to(torch.complex128) for x in (gbar, a, k, z)]
    G = cpu.forward(*wide[1:], causal)[0]
    rows = [G, *cpu.backward(*wide, G, (), causal, True, True)]
    rows[1] = rows[1].real
    return tiles, rows


def assert_close(tiles, rows, tolerance):
    """G, grad_a, K within ``tolerance`` of the largest entry; the sum of D of the largest sum of moduli (it may cancel)."""
    scales = [x.abs().max() if x.numel() else 0 for x in rows[:3]]
    scales.append(rows[3].abs().max() + rows[1].abs().sum(-1).max())
    for ours, theirs, scale in zip(tiles, rows, scales, strict=True):
        assert ours.shape == theirs.shape
        if theirs.numel():
            assert (ours - theirs).abs().max() <= tolerance * scale


@pytest.mark.parametrize("causal", [False, True])
def test_scalar_rows_equal_the_reference(causal):
    gbar, a, k, z = problem(3, 40)
    a, k = a.to(torch.complex128).requires_grad_(), k.to(torch.complex128)
    expected = reference.left_right(a, k, torch.ones_like(k), z, causal)
    G = cpu.forward(a.detach(), k, z, causal)[0]
    torch.testing.assert_close(G, expected.detach())
    grad_a = cpu.backward(gbar, a.detach(), k, z, G, (), causal, False, False)[0]
    torch.testing.assert_close(grad_a.conj(), torch.autograd.grad(expected, a, gbar)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("n", EDGES)
def test_tiles_equal_scalar_rows_at_every_edge(n, dtype, tolerance, causal):
    for m in (1, 3, LANES + 1):
        for k_rows in {1, m}:
            assert_close(*both_ways(*problem(m, n, dtype, k_rows), causal), tolerance)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 1500),
    eta=st.sampled_from([1.0, 0.1, 1e-2]),
    shared=st.booleans(),
    causal=st.booleans(),
)
@example(m=1, n=1500, eta=1e-2, shared=True, causal=False)
def test_tiles_equal_scalar_rows_for_any_shape(m, n, eta, shared, causal):
    tiles, rows = both_ways(*problem(m, n, k_rows=1 if shared else m, eta=eta, seed=n), causal)
    assert_close(tiles, rows, 1e-13 / eta**2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k_value", [-0.9, 0.0])
def test_negative_and_vanishing_couplings_between_tiles(k_value, causal):
    gbar, a, k, z = problem(2, 800)
    a = a + 6
    k.fill_(k_value)
    assert_close(*both_ways(gbar, a, k, z, causal), 1e-14)


@pytest.mark.parametrize("a_value", [0.0, -2.0])
@pytest.mark.parametrize("eta", [1e-3, 1e-5])
def test_chunks_are_polished_until_sequential_where_almost_nothing_contracts(a_value, eta):
    """A constant diagonal without disorder: at eta = 1e-5 a state is remembered over the whole row."""
    n = 20_000
    a = torch.full((1, n), a_value, dtype=torch.float64)
    k = torch.ones(1, n - 1, dtype=torch.float64)
    z = torch.full((1,), complex(0, eta), dtype=torch.complex128)
    assert_close(*both_ways(torch.ones(1, n, dtype=torch.complex128), a, k, z, False), 1e-12 / eta)


def test_small_eta_in_complex64_keeps_the_accuracy_of_a_sequential_sweep():
    _, a, k, z = problem(1, 65536, torch.float32, eta=1e-3)
    k.fill_(1.0)
    G = cpu.forward(a, k, z, False)[0]
    exact = cpu.forward(*(x.to(torch.complex128) for x in (a, k, z)), False)[0]
    assert ((G - exact).abs() / exact.abs()).max() < 2e-4


def test_backward_gives_the_same_bits_with_and_without_what_the_forward_saved():
    gbar, a, k, z = problem(2, 3000, torch.float32)
    G, saved = cpu.forward(a, k, z, False)
    assert saved
    kept = cpu.backward(gbar, a, k, z, G, saved, False, True, True)
    again = cpu.backward(gbar, a, k, z, G, (), False, True, True)
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1100, 128), (4, 40_000)])
def test_number_of_threads_does_not_change_one_bit(m, n, causal):
    assert m * n >= cpu.THREADS_FROM
    inputs = problem(m, n, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            G, saved = cpu.forward(*inputs[1:], causal)
            results.append((G, *cpu.backward(*inputs, G, saved, causal, True, True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # A row is cut by its shape alone, and every tile goes through the same code in whichever thread.
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_one_row_does_not_change_with_the_other_rows():
    _, a, k, z = problem(80, 500, torch.float32)
    G = cpu.forward(a, k, z, False)[0]
    other = a.clone()
    other[1:] = float("nan")
    assert torch.equal(cpu.forward(other, k, z, False)[0][0], G[0])


def gradient_at_long_rows(seed):
    a = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    resolvent_diagonal(a, 1.0, 1.0, 1j).abs().sum().backward()
    return a.grad


def test_many_python_threads_may_call_at_once():
    expected = [gradient_at_long_rows(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(gradient_at_long_rows, list(range(8)) * 3))
    assert all(torch.equal(x, y) for x, y in zip(found, expected * 3, strict=True))


def _in_child(queue, a, k, z):  # torch's own parallel operations hang after a fork: none is used here
    queue.put(cpu.forward(a, k, z, False)[0].numpy().tobytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_after_its_parent_used_the_pool():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, a, k, z = problem(4, 40_000, torch.float32)
        expected = cpu.forward(a, k, z, False)[0].numpy().tobytes()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue, a, k, z))
        child.start()
        try:
            assert queue.get(timeout=60) == expected
        finally:
            child.join(timeout=10)
            if child.is_alive():
                child.kill()
    finally:
        torch.set_num_threads(before)


def test_extra_memory_is_a_few_bytes_per_element():
    """Beside G (8 B) and the gradient (4 B) only the states between tiles: under 4 B per element, forward and backward."""
    m, n = 1, 400_000
    gbar, a, k, z = problem(m, n, torch.float32)
    G, saved = cpu.forward(a, k, z, False)
    assert sum(x.numel() * x.element_size() for x in saved) < 1.0 * n
    with torch.profiler.profile(profile_memory=True) as profile:
        cpu.backward(gbar, a, k, z, G, saved, False, False, False)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated < (4 + 4) * n
    tracemalloc.start()
    cpu.forward(a, k, z, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * n  # numpy buffers


def test_kernels_compile_where_numba_finds_no_folder_for_its_cache(monkeypatch):
    def njit_without_a_cache_folder(**settings):
        if settings.get("cache"):
            raise RuntimeError("cannot cache function 'f': no locator available for file 'x'")
        return numba.njit(**settings)

    monkeypatch.setattr(jit, "njit", njit_without_a_cache_folder)
    assert jit.jit(lambda x: x + 1)(2) == 3


def test_package_computes_where_numba_finds_no_folder_for_its_cache():
    """A locator that takes files in zip archives only leaves numba no place for any other file's code."""
    words = (
        "import torch\n"
        "from bklm.bk_core import resolvent_diagonal\n"
        "a = torch.tensor([1 + 1j], dtype=torch.complex128)\n"  # complex: the scalar rows
        "print(resolvent_diagonal(a, a[:0], a[:0], -1j, backend='cpu').item())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    ran = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert complex(ran.stdout) == pytest.approx(1 / (1 + 2j))


def test_cached_code_is_named_after_all_kernel_sources():
    """Constants of one file are compiled into functions of others, which numba's own check of freshness does not see."""

    def kernel(x):
        return x

    assert jit.jit(kernel).py_func.__qualname__.endswith(f"kernel_{jit._sources_digest()}")


@pytest.mark.slow
def test_time_grows_with_the_length_and_not_with_its_square():
    """Sixteen times the positions: about 16 times the processor time, more beyond a cache; the square would be 256."""
    problems = {n: problem(1, n, torch.float32) for n in (250_000, 4_000_000)}

    def seconds(n):
        gbar, a, k, z = problems[n]
        start = time.process_time()
        G, saved = cpu.forward(a, k, z, False)
        cpu.backward(gbar, a, k, z, G, saved, False, False, False)
        return time.process_time() - start

    seconds(250_000)  # compiles
    # Taken in turn, and the least of processor time: what a busy machine adds is not the operator's.
    rounds = [[seconds(n) for n in problems] for _ in range(5)]
    short, long = (min(times) for times in zip(*rounds, strict=True))
    assert long < 64 * short
