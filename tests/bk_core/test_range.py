"""Moduli far from 1: right at the edges that resolvent_diagonal states, and never a wrong number in silence beyond them.

diag((T - z)^-1) = diag((T / s - z / s)^-1) / s, exactly so in binary floating point for s a power of two: what is expected at
any scale follows from dense inversion at scale 1.
"""

import math

import mpmath
import numpy as np
import pytest
import torch

from bklm.bk_core import BKCore, pivots, reference, resolvent_diagonal, resolvent_solve
from bklm.bk_core.cpu import backend as cpu
from bklm.bk_core.cpu import tiles as cpu_tiles
from bklm.bk_core.cpu.scratch import SCRATCH_LENGTH

BACKENDS = ["reference", "torch", "cpu"]
F32, F64 = torch.float32, torch.float64


def at_scale_one(n=33, seed=0):
    """a, b, c, z in 64 bits, b c > 0; every number fits into 32 bits."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(2, n, generator=g), *(torch.rand(2, n - 1, generator=g) + 0.3 for _ in "bc")
    return a.double(), b.double(), c.double(), torch.tensor([0.25 + 1j, -0.5 + 0.75j], dtype=torch.complex128)


def derivatives(inputs, weight, function):
    """The result, and the gradients of a, b, c and z, for dL/dG = weight."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    G = function(*leaves)
    return G.detach(), *torch.autograd.grad(G, leaves, weight.to(G.dtype))


def wide(x):
    return x.to(torch.complex128 if x.is_complex() else F64)


def assert_right_at_scale(dtype, exponent, causal, backend, weight_size=1.0):
    inputs, s = at_scale_one(), 2.0**exponent
    weight = torch.randn(2, 33, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    dense = reference.dense_causal if causal else reference.dense
    expected = derivatives(inputs, weight, dense)
    scaled = [
        (x * s).to(dtype if not x.is_complex() else (torch.complex64 if dtype == F32 else torch.complex128))
        for x in inputs
    ]
    found = derivatives(
        scaled, weight * weight_size, lambda *x: resolvent_diagonal(*x, causal=causal, backend=backend)
    )
    tolerance = 2e-5 if dtype == F32 else 1e-12
    for power, x, y in zip((1, 2, 2, 2, 2), found, expected, strict=True):
        back = wide(x) * s if power == 1 else wide(x) * s * (s / weight_size)
        torch.testing.assert_close(back, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exponent", [-120, -64, -41, -40, 39, 41, 63, 64, 66, 120])
def test_32_bit_results_and_gradients_are_right_at_any_scale_of_the_shift(exponent, causal, backend):
    assert_right_at_scale(F32, exponent, causal, backend, weight_size=2.0**exponent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exponent", [-338, -200, 200, 338])
def test_64_bit_results_and_gradients_are_right_between_the_stated_edges(exponent, causal, backend):
    assert_right_at_scale(F64, exponent, causal, backend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "z"),
    [(F32, 1e20j), (F32, 1e-20j), (F32, 1e37j), (F32, 1e-37j), (F64, 1e160j), (F64, 1e-160j), (F64, 1e300j)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_alone_has_its_reciprocal(backend, dtype, z, causal):
    G = resolvent_diagonal(torch.zeros(2, 5, dtype=dtype), 0.0, 0.0, z, causal=causal, backend=backend)
    expected = torch.full((2, 5), -1 / z, dtype=torch.complex128)
    torch.testing.assert_close(wide(G), expected, rtol=1e-6, atol=0.0)
    zeros, shift = torch.zeros(2, 5, dtype=dtype), torch.tensor(z, dtype=G.dtype)
    as_tensor = resolvent_diagonal(zeros, 0.0, 0.0, shift, causal=causal, backend=backend)
    torch.testing.assert_close(wide(as_tensor), expected, rtol=1e-6, atol=0.0)


def exactly(a, k, z, causal):
    """The recursion in 60 digits."""
    with mpmath.workdps(60):
        d, n, left, right = [mpmath.mpf(x) - mpmath.mpc(z) for x in a], len(a), [], [0] * (len(a) + 1)
        for i in range(n):
            left.append(1 / (d[i] - (k * left[-1] if i else 0)))
        for i in reversed(range(n)):
            right[i] = 1 / (d[i] - k * right[i + 1])
        both = [1 / (d[i] - (k * left[i - 1] if i else 0) - k * right[i + 1]) for i in range(n)]
        return [complex(x) for x in (left if causal else both)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "large"), [(F32, 3e19), (F32, 1e30), (F32, -5e37), (F64, 1e160), (F64, -1e300)]
)
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_diagonal_gives_small_results_not_zero(backend, everywhere, dtype, large, causal):
    a = torch.linspace(-2, 2, 9, dtype=dtype)
    a = a * large if everywhere else a.index_fill(0, torch.tensor([3, 6]), large)
    G = resolvent_diagonal(a, 1.0, 1.0, 0.5j, causal=causal, backend=backend)
    expected = torch.tensor(exactly(a.tolist(), 1.0, 0.5j, causal), dtype=torch.complex128)
    assert ((wide(G) - expected).abs() <= (1e-6 if dtype == F32 else 1e-13) * expected.abs()).all()


@pytest.mark.parametrize("complex_a", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [9, 700])
def test_gradients_beside_a_large_entry_are_those_of_64_bits(n, causal, complex_a):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(2, n, generator=g) + (0j if complex_a else 0)
    a[0, 4], a[1, n // 2] = 1e25, -4e19
    b, c = (torch.rand(n - 1, generator=g) + 0.3 for _ in "bc")
    weight = torch.randn(2, n, dtype=torch.complex64, generator=g)
    weight[0, 4] *= 1e25
    weight[1, n // 2] *= 1e15
    z = torch.tensor([0.5 + 1j, -0.2 + 2j])
    ours = derivatives((a, b, c, z), weight, lambda *x: resolvent_diagonal(*x, causal=causal))
    theirs = derivatives(
        [wide(x) for x in (a, b, c, z)],
        wide(weight),
        lambda *x: resolvent_diagonal(*x, causal=causal, backend="reference"),
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(wide(x), y, rtol=2e-5, atol=2e-6 * float(y.abs().max()))
    for row, place in ((0, 4), (1, n // 2)):  # small numbers, but not lost ones
        torch.testing.assert_close(wide(ours[1])[row, place], theirs[1][row, place], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("m", "n"), [(2, 5), (33, 200), (3, 1000), (1, 20_000)])
def test_large_numbers_in_the_future_or_in_another_row_move_no_bit(m, n, dtype):
    large = 1e25 if dtype == F32 else 1e200
    a = torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    before = resolvent_diagonal(a, 1.0, 1.0, 0.3 + 0.05j, causal=True)
    for place in (1, n // 2, n - 1):
        changed = a.clone()
        changed[0, place:] = large
        after = resolvent_diagonal(changed, 1.0, 1.0, 0.3 + 0.05j, causal=True)
        assert torch.equal(before[:, :place], after[:, :place])
        assert torch.equal(before[1:], after[1:])
        assert (after[0, place:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_product_b_c_that_overflows_shows_as_nan(causal, backend):
    b = torch.ones(8)
    b[3] = 1e30
    G = resolvent_diagonal(torch.randn(9), b, b, 1j, causal=causal, backend=backend)
    assert torch.isnan(G[4:]).all()
    assert torch.isfinite(torch.view_as_real(G[:4])).all() if causal else torch.isnan(G).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e20, torch.float32), (1e39, torch.float32), (math.inf, torch.float32), (1e200, torch.float64)],
)
def test_numbers_whose_product_overflows_show_as_nan_like_tensors(backend, value, dtype):
    a, x = torch.zeros(4, dtype=dtype), torch.tensor(value, dtype=torch.float64).to(dtype)
    found = resolvent_diagonal(a, value, value, 1j, causal=True, backend=backend)
    wanted = resolvent_diagonal(a, x, x, 1j, causal=True, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.isnan(found[1:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_couplings_that_32_bits_do_not_hold_but_for_their_product_are_no_error_of_torchs(backend):
    x, a = torch.ones(4, 2), torch.zeros(4)
    found = resolvent_solve(x, a, 1e40, 1e-40, 1j, causal=True, backend=backend)
    wanted = resolvent_solve(x.double(), a.double(), 1e40, 1e-40, 1j, causal=True, backend=backend)
    finite = torch.isfinite(torch.view_as_real(found)).all(-1)
    assert finite[0].all()
    torch.testing.assert_close(found[finite], wanted[finite].to(torch.complex64), rtol=1e-3, atol=1e-6)


def test_numbers_beyond_64_bits_are_refused_and_large_shifts_are_not():
    with pytest.raises(ValueError, match=r"^b is beyond the range of 64 bits"):
        resolvent_diagonal(torch.zeros(4), 10**400, 1.0, 1j)
    far = resolvent_diagonal(torch.zeros(4, dtype=torch.float64), 1.0, 1.0, complex(1.5e308, 1.5e308))
    assert (far.abs() < 1e-307).all()
    with pytest.raises(ValueError, match=r"1 / \|z\| vanishes in 32 bits"):
        resolvent_diagonal(torch.zeros(4), 1.0, 1.0, complex(1.5e308, 1.5e308))
    with pytest.raises(TypeError, match=r"^z has layout torch.sparse_coo: a dense tensor is needed"):
        resolvent_diagonal(torch.zeros(2, 4), 1.0, 1.0, torch.tensor([1j, 2j]).to_sparse())


def test_a_number_as_large_as_32_bits_hold_reaches_as_far_as_on_the_other_backend():
    """Rows longer than a chunk: 150 positions lie between the large number and where a thread begins anew."""
    n = 20_000
    places = torch.arange(n)
    for at in (n // 4, n // 2, 3 * n // 4, 16_384):
        x = torch.ones(n, 1)
        x[at - 150] = 1e37
        found, wanted = (
            resolvent_solve(x, torch.zeros(n), 1.0, 1.0, 1j, backend=backend) for backend in ("cpu", "torch")
        )
        near = (places - at).abs() < 1000
        torch.testing.assert_close(found[near], wanted[near], rtol=1e-3, atol=1e-3)


def test_a_shift_whose_reciprocal_32_bits_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"1 / \|z\| vanishes in 32 bits; use 64-bit inputs") as caught:
        resolvent_diagonal(torch.zeros(2, 3), 1.0, 1.0, 1e39j)
    assert "\n" not in str(caught.value)


def test_the_smallest_pivot_of_an_extreme_shift_is_returned_in_32_bits():
    G, pivot = resolvent_diagonal(torch.zeros(2, 3), 0.0, 0.0, 2e20j, return_min_pivot=True)
    assert (G.dtype, pivot.dtype) == (torch.complex64, F32)
    torch.testing.assert_close(pivot, torch.full((2,), 2e20))


@pytest.mark.parametrize("eta", [1e-18, 1e18])
def test_the_layer_is_right_at_both_ends_of_its_eta(eta):
    v = torch.tensor([2.0, 2.5, 1.0, -3.0]).view(1, 4, 1)
    for causal in (False, True):
        features = BKCore(causal=causal, eta=eta)(v.clone().requires_grad_())
        wide_features = BKCore(causal=causal, eta=eta)(v.double())
        torch.testing.assert_close(features.double(), wide_features, rtol=1e-5, atol=1e-30 / eta)


@pytest.mark.parametrize("large", [None, 1e25, float("nan")])
def test_only_numbers_out_of_range_take_the_slow_sweep(large):
    """Padding, unused lanes and what scratch held before must not look like such numbers."""
    scratch = np.full(SCRATCH_LENGTH, np.nan, np.float32)  # leftovers
    a, k, z = torch.randn(3, 41), torch.ones(1, 40), torch.full((3,), 1j)
    if large is not None:
        a[1, 7] = large
    G = torch.empty(3, 41, dtype=torch.complex64)
    again = cpu_tiles.forward_tiles(
        scratch, 0, 1, *cpu._inputs(a, k, z), G.data_ptr(), 0, 0, 3, 41, 41, 1, False
    )
    assert again == (large is not None)


@pytest.mark.parametrize(
    ("z", "dtype"), [(3e38 + 3e38j, torch.complex64), (1.7e308 + 1.7e308j, torch.complex128)]
)
def test_a_shift_whose_modulus_leaves_the_range_is_widened_in_silence(z, dtype):
    """A warning of numpy's would be an error here (pyproject.toml)."""
    assert not pivots.check_shift(torch.tensor([z], dtype=dtype))


def test_the_op_takes_a_shift_that_is_a_pending_conjugate_and_wants_a_gradient():
    a, k = torch.randn(2, 5), torch.ones(1, 4)
    z = torch.full((2,), 0.5 - 1j).requires_grad_()
    G = torch.ops.bklm.resolvent_diagonal(a, k, z.conj(), False, "exact", 0.0, "auto")
    assert torch.allclose(G, resolvent_diagonal(a, 1.0, 1.0, 0.5 + 1j))
    G.abs().sum().backward()
    assert z.grad.isfinite().all()
