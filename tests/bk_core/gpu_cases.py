"""What the Triton backend must do, run by test_gpu.py in a process of its own: under Triton's interpreter on CPU
tensors, and on a CUDA device where there is one. Not collected by name, since it needs TRITON_INTERPRET to be set
before anything imports Triton's kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.bk_core import available_backends, resolvent_diagonal
from bklm.bk_core.gpu import backend as gpu

if not gpu.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

DEVICE = "cpu" if gpu._interpreted() else "cuda"
F32, F64 = torch.float32, torch.float64
SMALL_BLOCK = 4  # chunks scanned together in these tests: blocks and their edges appear at small N
on_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="blocks of 4 lanes exist in the interpreter only")


def problem(m, n, dtype, *, complex_a=False, complex_k=False, shared_k=False, eta=1.0, seed=0):
    """gbar, a, k, z with |k| in [0.5, 1.5]; complex parts of a and k that keep every pivot away from 0."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n)) - 1j * rng.uniform(size=(m, n)) * complex_a
    rows = 1 if shared_k else m
    k = rng.uniform(0.5, 1.5, (rows, n - 1)) + 0.1j * rng.normal(size=(rows, n - 1)) * complex_k
    z = rng.normal(size=m) + 1j * eta * rng.uniform(1, 2, m)
    gbar = rng.normal(size=(m, n)) + 1j * rng.normal(size=(m, n))
    wide = torch.complex64 if dtype == F32 else torch.complex128

    def put(x, is_complex):
        return torch.tensor(x if is_complex else x.real).to(DEVICE, wide if is_complex else dtype)

    return put(gbar, True), put(a, complex_a), put(k, complex_k), put(z, True)


def recurrence(gbar, a, k, z, causal, precision=np.complex128):
    """(G, D, K) by the published recurrences, one position after the other."""
    gbar, a, k, z = (x.cpu().numpy().astype(precision) for x in (gbar, a, k, z))
    m, n = a.shape
    d, k = (a - z[:, None]).T, np.broadcast_to(k, (m, n - 1)).T
    left, right, source = np.zeros_like(d), np.zeros_like(d), gbar.conj().T.copy()
    for i in range(n):
        left[i] = 1 / (d[i] - (k[i - 1] * left[i - 1] if i else 0))
    for i in reversed(range(n)):
        right[i] = 1 / (d[i] - (k[i] * right[i + 1] if i < n - 1 else 0))
    if causal:
        for i in reversed(range(n - 1)):
            source[i] += k[i] * left[i + 1] ** 2 * source[i + 1]
        D = -(left**2) * source
        return left.T, D.T, (-left[:-1] * D[1:]).T
    denominator = d.copy()
    denominator[1:] -= k * left[:-1]
    denominator[:-1] -= k * right[1:]
    G = 1 / denominator
    P = source * G * G
    s, t = P.copy(), P.copy()
    for i in reversed(range(n - 1)):
        s[i] += k[i] * left[i] ** 2 * s[i + 1]
    for i in range(1, n):
        t[i] += k[i - 1] * right[i] ** 2 * t[i - 1]
    return G.T, (P - s - t).T, (left[:-1] * s[1:] + right[1:] * t[:-1]).T


def error(x, expected):
    """Largest error relative to the largest entry; 0 for empty ones."""
    x = x.cpu().numpy()
    assert x.shape == expected.shape
    return np.max(np.abs(x - expected), initial=0) / np.max(np.abs(expected), initial=1e-300)


def check(inputs, causal, tolerance):
    """Forward and backward against the recurrences."""
    gbar, a, k, z = inputs
    G, saved = gpu.forward(a, k, z, causal)
    assert G.dtype == z.dtype
    grad_a, K, total = gpu.backward(gbar, a, k, z, G, saved, causal, True, True)
    assert grad_a.dtype == a.dtype
    expected_G, D, expected_K = recurrence(*inputs, causal)
    assert error(G, expected_G) < tolerance
    assert error(grad_a, D if a.is_complex() else D.real) < tolerance
    assert error(K, expected_K) < tolerance
    size = np.abs(D).sum(1)  # terms of the sum cancel: its error is relative to their moduli
    assert np.max(np.abs(total.cpu().numpy() - D.sum(1)) / size) < tolerance


@pytest.fixture
def chunks(monkeypatch):
    """Call with a chunk length to have every row cut into such chunks, in blocks of SMALL_BLOCK."""

    def use(chunk, wide=F64, polish=False, block=SMALL_BLOCK):
        def plan(rows, n, dtype, fast_float64):
            cut = gpu.cut(n, chunk, wide, polish)
            block_ = block if DEVICE == "cpu" else cut.block
            return cut._replace(block=block_, blocks=-(-cut.chunks // block_))

        monkeypatch.setattr(gpu, "plan", plan)

    return use


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 2), (33, 3), (3, 8), (1, 9)])
def test_short_rows_agree_with_the_recurrences(m, n, causal):
    check(problem(m, n, F64), causal, 1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("complex_a", "complex_k", "shared_k"), [(0, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_every_kind_of_operand_agrees_with_the_recurrences(chunks, causal, complex_a, complex_k, shared_k):
    kind = {"complex_a": bool(complex_a), "complex_k": bool(complex_k), "shared_k": bool(shared_k)}
    check(problem(33, 5, F32, **kind), causal, 5e-6)
    chunks(8)
    check(problem(2, 17, F32, **kind), causal, 5e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [15, 16, 17, 33])
def test_chunk_and_block_edges_agree_with_the_recurrences(chunks, n, causal):
    """Chunks of 8, blocks of 32 elements, three rows."""
    chunks(8, F32, polish=n == 33)
    check(problem(3, n, F32), causal, 5e-6)


def test_a_row_of_three_blocks_agrees_with_the_recurrences(chunks):
    chunks(8)
    check(problem(1, 65, F32), False, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [31, 64, 129])
def test_more_lengths_agree_with_the_recurrences(chunks, n, causal):
    """One short of a block, two whole ones, and an element more than four; three rows uncut."""
    check(problem(3, n, F32, complex_k=True), causal, 1e-5)
    chunks(8, F64, polish=True)
    check(problem(1, n, F64, complex_a=True), causal, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "n", "causal", "fast_float64"),
    [(2, 300, False, False), (2, 300, True, True), (1, 4095, True, False), (1, 4095, False, True)],
)
def test_the_plan_in_use_agrees_with_the_recurrences(monkeypatch, m, n, causal, fast_float64):
    monkeypatch.setattr(gpu, "_fast_float64", lambda device: fast_float64)
    check(problem(m, n, F32, complex_a=True), causal, 1e-5)


# 64-bit operands are cut alike on every GPU.
@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "causal"), [(2, 300, True), (1, 4095, False)])
def test_the_plan_in_use_of_64_bits_agrees_with_the_recurrences(m, n, causal):
    check(problem(m, n, F64, shared_k=True), causal, 1e-12)


@pytest.mark.slow
@on_interpreter
@settings(max_examples=12, deadline=None, database=None)
@given(
    m=st.integers(1, 3), n=st.integers(1, 70), chunk=st.sampled_from([8, 16, 24]), causal=st.booleans(),
    complex_a=st.booleans(), complex_k=st.booleans(), shared_k=st.booleans(), polish=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_size_and_cut_agrees_with_the_recurrences(m, n, chunk, causal, polish, seed, **kind):
    cut = gpu.cut(n, chunk, F64, polish)
    cut = cut._replace(block=SMALL_BLOCK, blocks=-(-cut.chunks // SMALL_BLOCK))
    original, gpu.plan = gpu.plan, lambda *_: cut
    try:
        check(problem(m, n, F64, seed=seed, **kind), causal, 1e-11)
    finally:
        gpu.plan = original


@pytest.mark.parametrize(("chunk", "wide", "polish"), [(128, F32, True), (32, F64, False)])
def test_cutting_a_row_costs_no_accuracy_at_small_imaginary_part(chunks, chunk, wide, polish):
    """Im z = 1e-3 in 32 bits, weak disorder at the band edge, where an unpolished 32-bit scan is 200 times worse."""
    n = 1024
    rng = np.random.default_rng(3)
    a = torch.tensor(-2 + 0.1 * rng.normal(size=(1, n)), dtype=F32, device=DEVICE)
    k = torch.ones(1, n - 1, device=DEVICE)
    z = torch.tensor([1e-3j], dtype=torch.complex64, device=DEVICE)
    gbar = torch.tensor(rng.normal(size=(1, n)) + 0j, dtype=torch.complex64, device=DEVICE)
    exact = recurrence(gbar, a, k, z, True)[0]
    sequential = recurrence(gbar, a, k, z, True, np.complex64)[0]
    chunks(chunk, wide, polish, block=64)
    G, _ = gpu.forward(a, k, z, True)
    worst = np.max(np.abs(G.cpu().numpy() - exact) / np.abs(exact))
    assert worst < 1.5 * np.max(np.abs(sequential - exact) / np.abs(exact))


def test_the_past_does_not_move_when_the_future_does(chunks):
    """Causal mode, bit for bit, across chunks and blocks; a NaN in the future stays there."""
    _, a, k, z = problem(2, 40, F32)
    chunks(8, F32, polish=True)
    G, _ = gpu.forward(a, k, z, True)
    for position in (20, 33):
        changed = a.clone()
        changed[0, position] += 1
        changed[1, position] = float("nan")
        other, _ = gpu.forward(changed, k, z, True)
        assert torch.equal(other[:, :position], G[:, :position])
        assert not torch.equal(other[0, position:], G[0, position:])
        assert other[1, position:].isnan().all()


def test_nan_spoils_its_own_row_only(chunks):
    gbar, a, k, z = problem(3, 40, F32)
    a[1, 7] = float("nan")
    for cut in (False, True):
        if cut:
            chunks(8)
        G, saved = gpu.forward(a, k, z, False)
        grad_a, K, _ = gpu.backward(gbar, a, k, z, G, saved, False, True, False)
        for x in (G, grad_a, K):
            assert x[1].isnan().any()
            assert x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_saved_and_what_is_wanted_do_not_change_the_numbers(chunks, causal):
    """The registered operator saves nothing; the carries are then computed again."""
    chunks(8, F32, polish=True)
    gbar, a, k, z = problem(2, 20, F32)
    G, saved = gpu.forward(a, k, z, causal)
    again, _ = gpu.forward(a, k, z, causal)
    assert torch.equal(G, again)
    grad_a, K, total = gpu.backward(gbar, a, k, z, G, saved, causal, True, True)
    assert all(x is not None for x in (K, total))
    alone, no_K, no_total = gpu.backward(gbar, a, k, z, G, (), causal, False, False)
    torch.testing.assert_close(alone, grad_a)  # another kernel: what is not wanted is left out of it
    assert no_K is None
    assert no_total is None


def test_lazy_conjugates_and_strided_rows_are_read_as_what_they_mean():
    _, a, k, z = problem(3, 12, F64, complex_a=True)
    expected, _ = gpu.forward(a, k, z, False)
    strided = torch.stack([a, a], dim=-1)[..., 0]
    conjugate = z.conj().resolve_conj().conj()
    assert conjugate.is_conj()
    G, _ = gpu.forward(strided, k, conjugate, False)
    assert torch.equal(G, expected)


@pytest.mark.parametrize(("n", "forward", "backward"), [(128, 1, 1), (1000, 3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_number_of_launches(monkeypatch, n, forward, backward, causal):
    """(32, 128) must be bound by launches, of which it may have four; rows that are cut take three each way."""
    started = []
    monkeypatch.setattr(gpu, "_launch", lambda device, kernel, grid, *args, **constants: started.append(kernel))
    gbar, a, k, z = problem(32, n, F32)
    G, saved = gpu.forward(a, k, z, causal)
    assert len(started) == forward
    gpu.backward(gbar, a, k, z, G, saved, causal, True, True)
    assert len(started) == forward + backward


def test_the_plan_keeps_its_promises():
    """A cut covers the row, chunks are whole strips, blocks fit the scan, and 32-bit polishing has its 128 elements."""
    for rows, n in [
        (1, 1),
        (32, 128),
        (1, 257),
        (8, 65536),
        (1, 10**6),
        (1, 2**28),
        (30000, 5000),
        (40000, 5000),
    ]:
        for dtype, fast in [(F32, True), (F32, False), (F64, True)]:
            plan = gpu.plan(rows, n, dtype, fast)
            assert plan.chunk * plan.chunks >= n > plan.chunk * (plan.chunks - 1)
            assert plan.chunk % 8 == 0
            if plan.chunks > 1:
                assert plan.block * plan.blocks >= plan.chunks
                assert plan.blocks <= gpu.MAX_BLOCKS
                assert plan.polish == (plan.wide == dtype)
                assert plan.chunk >= (128 if plan.polish else 32)


def test_bad_operands_are_refused_in_one_sentence():
    _, a, k, z = problem(2, 5, F32)
    with pytest.raises(ValueError, match="do not fit"):
        gpu.forward(a, k[:, :-1], z, False)
    with pytest.raises(TypeError, match="of its precision"):
        gpu.forward(a.double(), k, z, False)
    with pytest.raises(TypeError, match="complex64 or complex128"):
        gpu.forward(a, k, z.real.contiguous(), False)
    with pytest.raises(ValueError, match="is on meta"):
        gpu.forward(a.to("meta"), k.to("meta"), z.to("meta"), False)


def test_the_operator_reaches_the_kernels_and_their_gradients():
    assert "triton" in available_backends()
    _, a, k, z = problem(2, 11, F64)
    b, c = k.sqrt(), k.sqrt()
    inputs = [x.requires_grad_() for x in (a, b, c, z)]
    for causal in (False, True):
        results = []
        for backend in ("triton", "reference"):
            G = resolvent_diagonal(*inputs, causal=causal, backend=backend)
            loss = (G.real**2 + G.imag).sum()
            results.append([G, *torch.autograd.grad(loss, inputs)])
        for x, expected in zip(*results, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(F32, 62.5), (F64, 510.5)])
def test_pivots_whose_square_leaves_the_range_give_nan_not_zero(dtype, most, causal):
    """Right up to the stated moduli; beyond them neither 0 nor a number with few digits left."""
    for sign in (-1, 1):
        for exponent, fits in ((sign * most, True), (sign * (most + 1), False)):
            gbar, a, k, z = problem(2, 20, dtype)
            s = 2.0**exponent
            G = gpu.forward(a * 0, k * 0, torch.full_like(z, 1j) * s, causal)[0]
            grad_a = gpu.backward(gbar, a * 0, k * 0, torch.full_like(z, 1j) * s, G, (), causal, False, False)[
                0
            ]
            if fits:
                assert ((G * s - 1j).abs() < 1e-6).all()
                torch.testing.assert_close(grad_a.double() * s * s, gbar.real.double(), rtol=1e-5, atol=1e-5)
            else:
                assert torch.isnan(G).all()
                assert torch.isnan(grad_a).all()


@pytest.mark.parametrize("causal", [False, True])
def test_extreme_shifts_are_right_through_the_operator(causal):
    for z in (1e20j, 1e-20j):
        G = resolvent_diagonal(torch.zeros(2, 5, device=DEVICE), 0.0, 0.0, z, causal=causal, backend="triton")
        assert ((G * z + 1).abs() < 1e-6).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exponent", [-58, 58])
@pytest.mark.parametrize("complex_k", [False, True])
def test_gradients_are_right_where_third_powers_of_the_result_leave_the_range(exponent, causal, complex_k):
    gbar, a, k, z = problem(2, 20, F32, complex_k=complex_k)
    s = 2.0**exponent
    G = gpu.forward(a * s, k * s * s, z * s, causal)[0]
    grad_a = gpu.backward(gbar, a * s, k * s * s, z * s, G, (), causal, False, False)[0]
    expected_G, D, _ = recurrence(gbar, a, k, z, causal)
    assert error(G.to(torch.complex128) * s, expected_G) < 1e-5
    assert error(grad_a.double() * s * s, D.real) < 1e-5
