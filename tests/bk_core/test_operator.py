"""resolvent_diagonal: values, shapes, dtypes, causality, and what it refuses."""

import fractions
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.bk_core import (
    BackendUnavailableError,
    SmallPivotError,
    available_backends,
    reference,
    resolvent_diagonal,
)

BACKENDS = ["reference", "torch", "cpu"]


def hermitian(n, batch=(), dtype=torch.float64, seed=0):
    """a, b, c, z with b != c, b c > 0 and Im z between 0.5 and 1.5."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(*batch, n, dtype=dtype, generator=g)
    b = torch.rand(*batch, n - 1, dtype=dtype, generator=g) + 0.1
    c = torch.rand(*batch, n - 1, dtype=dtype, generator=g) + 0.1
    z = torch.complex(torch.randn(batch, generator=g), torch.rand(batch, generator=g) + 0.5)
    return a, b, c, z.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def exact(a, b, c, z, causal):
    return (reference.dense_causal if causal else reference.dense)(a, b, c, z)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 33])
def test_every_backend_equals_dense_inversion(backend, n, causal):
    inputs = hermitian(n, (2, 3))
    G = resolvent_diagonal(*inputs, causal=causal, backend=backend)
    torch.testing.assert_close(G, exact(*inputs, causal), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_entries_equal_dense_inversion(backend, causal):
    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(4, n, dtype=torch.complex128, generator=g) for n in (9, 8, 8))
    G = resolvent_diagonal(a, b, c, 6j, causal=causal, backend=backend)
    torch.testing.assert_close(G, exact(a, b, c, 6j, causal), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_complex64_at_128_positions_has_six_correct_digits(causal):
    a, b, c, z = hermitian(128, (32,), torch.float32)
    G = resolvent_diagonal(a, b, c, z, causal=causal)
    wide = resolvent_diagonal(
        a.double(), b.double(), c.double(), z.to(torch.complex128), causal=causal, backend="reference"
    )
    assert G.dtype == torch.complex64
    assert ((G - wide).abs() / wide.abs()).max() < 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [127, 4096, 1_000_000])
def test_no_length_overflows(n, causal):
    a = torch.linspace(-4, 4, n) + torch.sin(torch.arange(n) * 0.7)
    G = resolvent_diagonal(a, 1.0, 1.0, 1j, causal=causal)
    assert torch.isfinite(torch.view_as_real(G)).all()
    assert G.abs().max() <= 1 + 1e-6
    assert (G.imag > 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), batch=st.lists(st.integers(1, 3), max_size=3), causal=st.booleans())
def test_b_c_and_z_broadcast_like_torch(data, n, batch, causal):
    def cut(shape):
        """A shape that broadcasts to ``shape``: leading dimensions dropped, others set to 1."""
        shape = shape[data.draw(st.integers(0, len(shape))) :]
        return [1 if data.draw(st.booleans()) else size for size in shape]

    a = torch.randn(*batch, n, dtype=torch.float64)
    b, c = (torch.rand(cut([*batch, n - 1]) if n > 2 else [*batch, n - 1], dtype=torch.float64) for _ in "bc")
    z = torch.complex(*torch.randn(2, *cut(batch), dtype=torch.float64).unbind()) + 4j
    G = resolvent_diagonal(a, b, c, z, causal=causal)
    assert G.shape == a.shape
    full = (
        torch.broadcast_to(b, (*batch, n - 1)),
        torch.broadcast_to(c, (*batch, n - 1)),
        torch.broadcast_to(z, batch),
    )
    torch.testing.assert_close(G, exact(a, *full, causal), rtol=1e-12, atol=1e-14)


def test_numbers_may_stand_for_b_c_and_z():
    a = torch.randn(3, 5)
    G = resolvent_diagonal(a, 0.5, 2, 1j)
    torch.testing.assert_close(
        G, resolvent_diagonal(a, torch.full((4,), 0.5), torch.full((4,), 2.0), torch.tensor(1j))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_lazily_conjugated_inputs_are_read_correctly(backend):
    g = torch.Generator().manual_seed(3)
    big = torch.randn(12, 2, 4, dtype=torch.complex128, generator=g)
    a = big.conj().imag.permute(1, 2, 0)[..., ::2]  # strides, and a pending negation
    b = (big[:5, 0, 0].conj() + 0.2).abs()
    complex_b = big[:5, 1, 1].conj()  # a pending conjugation
    for upper in (b, complex_b):
        G = resolvent_diagonal(a, upper, 1.0, 4j, backend=backend)
        plain = [x.clone().resolve_conj().resolve_neg().contiguous() for x in (a, upper)]
        torch.testing.assert_close(G, reference.dense(*plain, torch.ones(5), 4j), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("given_types", "result"),
    [
        ((torch.float32, torch.float32), torch.complex64),
        ((torch.float64, torch.float64), torch.complex128),
        ((torch.float32, torch.float64), torch.complex128),
        ((torch.complex64, torch.float32), torch.complex64),
        ((torch.bfloat16, torch.float16), torch.complex64),
    ],
)
def test_precision_follows_the_widest_of_a_b_c(given_types, result):
    a, b = torch.ones(2, 3, dtype=given_types[0]), torch.ones(2, dtype=given_types[1])
    assert resolvent_diagonal(a, b, 1.0, 1j).dtype == result
    assert resolvent_diagonal(a, b, 1.0, torch.tensor(1j, dtype=torch.complex128)).dtype == result


@pytest.mark.parametrize(
    ("number", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.complex64(1 + 2j), 1 + 2j),
        (fractions.Fraction(1, 4), 0.25),
    ],
)
def test_numpys_scalars_are_numbers(number, plain):
    a = torch.randn(2, 5)
    expected = resolvent_diagonal(a, plain, 1.0, 4j)
    for b, c in ((number, 1.0), (1.0, number), (number, torch.ones(4))):
        assert torch.equal(resolvent_diagonal(a, b, c, 4j), expected)
    shift = plain + 1j
    assert torch.equal(resolvent_diagonal(a, 1, 1, np.complex64(shift)), resolvent_diagonal(a, 1.0, 1.0, shift))


def test_an_empty_batch_keeps_the_graph_to_every_input():
    shapes = (0, 3, 5), (4,), (3, 1), (0, 1)
    inputs = [torch.ones(s, dtype=torch.complex64 if i == 3 else torch.float32) for i, s in enumerate(shapes)]
    for x in inputs:
        x.requires_grad_()
    G = resolvent_diagonal(*inputs)
    assert G.shape == (0, 3, 5)
    grads = torch.autograd.grad(G.real.sum(), inputs)
    assert [tuple(g.shape) for g in grads] == list(shapes)
    assert not any(g.any() for g in grads)


def test_empty_batch_gives_empty_result():
    a = torch.zeros(0, 5, requires_grad=True)
    G = resolvent_diagonal(a, 1.0, 1.0, 1j)
    assert G.shape == (0, 5)
    assert G.dtype == torch.complex64
    G.real.sum().backward()
    assert a.grad.shape == (0, 5)


# --- causality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "n"), [(2, 5), (33, 200), (3, 1000), (1, 20_000)])
def test_the_past_does_not_move_by_one_bit_when_the_future_changes(backend, m, n):
    if backend == "reference" and n > 1000:
        pytest.skip("the reference loops over positions in Python")
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(n))
    b = torch.ones(m, n - 1)
    before = resolvent_diagonal(a, b, 1.0, 0.3 + 0.05j, causal=True, backend=backend)
    for place in (1, n // 3, n // 2, n - 1):
        a_changed, b_changed = a.clone(), b.clone()
        a_changed[0, place:] = torch.randn(n - place) * 50
        b_changed[0, place:] = 3.0
        after = resolvent_diagonal(a_changed, b_changed, 1.0, 0.3 + 0.05j, causal=True, backend=backend)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[0, place:], after[0, place:])
        assert torch.equal(before[1:], after[1:])


def test_bidirectional_core_sees_the_future():
    a = torch.zeros(1, 6)
    changed = a.clone()
    changed[0, -1] = 1.0
    G, moved = (resolvent_diagonal(x, 1.0, 1.0, 1j) for x in (a, changed))
    assert (G - moved).abs()[0, 0] > 1e-3


# --- NaN, infinities, pivots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [9, 600])
def test_nan_reaches_every_output_that_depends_on_it_and_no_other(backend, n):
    a = torch.randn(3, n)
    a[1, 4] = float("nan")
    causal = resolvent_diagonal(a, 1.0, 1.0, 1j, causal=True, backend=backend)
    both = resolvent_diagonal(a, 1.0, 1.0, 1j, backend=backend)
    assert torch.isnan(both[1]).all()
    assert torch.isnan(causal[1, 4:]).all()
    assert torch.isfinite(torch.view_as_real(causal[1, :4])).all()
    for other in (0, 2):
        assert torch.isfinite(torch.view_as_real(both[other])).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_an_infinite_entry_gives_nan_or_the_limit_never_another_number(backend, causal):
    a = torch.randn(2, 300, dtype=torch.float64)
    limit = a.clone()
    a[1, 4], limit[1, 4] = float("inf"), 1e12
    G, expected = (resolvent_diagonal(x, 1.0, 1.0, 1j, causal=causal, backend=backend) for x in (a, limit))
    assert (torch.isnan(G) | ((G - expected).abs() < 1e-9)).all()
    assert torch.isfinite(torch.view_as_real(G[0])).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_couplings_work_where_pivots_stay_away_from_zero(backend):
    a = torch.full((2, 50), 3.0, dtype=torch.float64)
    G, pivot = resolvent_diagonal(a, 1.0, -1.0, 0.1j, backend=backend, return_min_pivot=True)
    torch.testing.assert_close(G, reference.dense(a, torch.ones(49), -torch.ones(49), 0.1j))
    assert (pivot > 2).all()
    assert torch.equal(G, resolvent_diagonal(a, 1.0, -1.0, 0.1j, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vanishing_pivot_is_an_error_that_names_row_and_pivot(backend):
    a = torch.full((2, 3, 4), 3.0)
    a[1, 1] = 0.0  # k = -1, a = 0, z = i: the second pivot of the sweep is exactly zero
    with pytest.raises(SmallPivotError, match=r"row 4.*modulus 0,.*return_min_pivot") as caught:
        resolvent_diagonal(a, 1.0, -1.0, 1j, backend=backend)
    assert caught.value.row == 4
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.row, again.pivot) == (str(caught.value), 4, 0.0)
    _, pivot = resolvent_diagonal(a, 1.0, -1.0, 1j, backend=backend, return_min_pivot=True)
    assert pivot.shape == (2, 3)
    assert pivot[1, 1] == 0
    assert (pivot[0] > 1).all()


@pytest.mark.parametrize("place", [0, 3])
def test_a_large_entry_elsewhere_in_the_row_does_not_make_pivots_small(place):
    a = torch.full((1, 7), 3.0)
    a[0, place] = 1e5
    G = resolvent_diagonal(a, 1.0, -0.1, 1j)
    exact = reference.dense(a.double(), torch.ones(6), torch.full((6,), -0.1, dtype=torch.float64), 1j)
    assert ((G - exact).abs() / exact.abs()).max() < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_a_pivot_lost_in_cancellation_is_an_error_that_names_its_position(causal):
    a = torch.full((2, 9), 3.0, dtype=torch.float64)
    # About; what the sweep has reached there, from the left, for k = -1 and a small shift.
    a[1, 4] = 1 / (3 + 1 / 3.0)
    left = resolvent_diagonal(a[1:, :4], 1.0, -1.0, 1e-9j, causal=True)[0, 3].real
    a[1, 4] = -left + 1e-14
    with pytest.raises(SmallPivotError, match=r"row 1 .* at position 4 ") as caught:
        resolvent_diagonal(a, 1.0, -1.0, 1e-13j, causal=causal)
    assert 0 < caught.value.pivot < 1e-8


def test_smallest_pivot_is_that_of_the_sweeps():
    a, b, c, z = hermitian(12, (3,))
    L = reference.left_right(a, b, c, z, causal=True)
    R = reference.left_right(a.flip(-1), c.flip(-1), b.flip(-1), z, causal=True)
    G, pivot = resolvent_diagonal(a, b, c, z, return_min_pivot=True)
    expected = 1 / torch.stack([x.abs().amax(-1) for x in (L, R, G)]).amax(0)
    torch.testing.assert_close(pivot, expected)


# --- refusals ----------------------------------------------------------------------------------------------------------

A = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("x", 1.0, 1.0, 1j), {}, TypeError, "a must be a torch tensor"),
        ((torch.zeros(2, 0), 1.0, 1.0, 1j), {}, ValueError, "at least one position"),
        ((torch.tensor(1.0), 1.0, 1.0, 1j), {}, ValueError, "at least one position"),
        ((torch.zeros(2, 4, dtype=torch.int64), 1.0, 1.0, 1j), {}, TypeError, "a has dtype torch.int64"),
        ((A, torch.ones(3, dtype=torch.bool), 1.0, 1j), {}, TypeError, "b has dtype torch.bool"),
        ((A, "1", 1.0, 1j), {}, TypeError, "b must be a tensor or a number"),
        ((A, True, 1.0, 1j), {}, TypeError, "b must be a tensor or a number"),
        (
            (A, torch.ones(4), 1.0, 1j),
            {},
            ValueError,
            r"b has shape \(4,\): it must broadcast to .* = \(2, 3\)",
        ),
        ((A, 1.0, torch.ones(5, 2, 3), 1j), {}, ValueError, "c has shape"),
        ((A, 1.0, 1.0, 1.0), {}, ValueError, "Im z != 0"),
        ((A, 1.0, 1.0, complex(1, float("nan"))), {}, ValueError, "finite with Im z != 0"),
        ((A, 1.0, 1.0, torch.tensor([1j, 2.0])), {}, ValueError, r"entry 1.*Im z != 0"),
        ((A, 1.0, 1.0, torch.tensor([1j, 1j, 1j])), {}, ValueError, "z has shape"),
        ((A, 1.0, 1.0, torch.tensor([1, 2])), {}, TypeError, "z has dtype torch.int64"),
        ((A, 1.0, 1.0, None), {}, TypeError, "z must be a tensor or a number"),
        ((A, 1.0, 1.0, 1j), {"causal": 1}, TypeError, "causal=1: True or False is needed, got int"),
        ((A.to_sparse(), 1.0, 1.0, 1j), {}, TypeError, r"a has layout torch.sparse_coo: .*a.to_dense\(\)"),
        ((A, 1.0, 1.0, 1j), {"gradient": "exakt"}, ValueError, "gradient='exakt' is unknown"),
        ((A, 1.0, 1.0, 1j), {"grad_blend": 1.5}, ValueError, r"outside \[0, 1\]"),
        ((A, 1.0, 1.0, 1j), {"grad_blend": float("nan")}, ValueError, r"outside \[0, 1\]"),
        ((A, 1.0, 1.0, 1j), {"grad_blend": "x"}, TypeError, "grad_blend='x': a real number"),
        ((A, np.bool_(True), 1.0, 1j), {}, TypeError, "b must be a tensor or a number"),
        ((A, 1.0, 1.0, 1e-50j), {}, ValueError, "Im z vanishes in 32 bits"),
        ((A, 1.0, 1.0, 1j), {"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
        ((A.to(torch.complex64), 1.0, 1.0, 1j), {"gradient": "original"}, ValueError, "real a only"),
    ],
)
def test_bad_input_gets_one_clear_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        resolvent_diagonal(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="b is on meta and a on cpu"):
        resolvent_diagonal(A, torch.ones(3, device="meta"), 1.0, 1j)
    with pytest.raises(ValueError, match="z is on meta and a on cpu"):
        resolvent_diagonal(A, 1.0, 1.0, torch.tensor(1j, device="meta"))


@pytest.mark.parametrize("gradient", ["local", "original"])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_directions_without_a_gradient_for_b_c_z_refuse_one(gradient, which):
    inputs = [A, torch.ones(3), torch.ones(3), torch.tensor(1j)]
    inputs[which] = inputs[which].clone().requires_grad_()
    with pytest.raises(ValueError, match="defined for a alone"):
        resolvent_diagonal(*inputs, gradient=gradient)
    with torch.no_grad():
        resolvent_diagonal(*inputs, gradient=gradient)


def test_an_unusable_backend_is_refused_with_the_usable_ones():
    assert set(BACKENDS) <= set(available_backends())
    if "triton" not in available_backends():
        with pytest.raises(BackendUnavailableError, match="use one of"):
            resolvent_diagonal(A, 1.0, 1.0, 1j, backend="triton")
    with pytest.raises(BackendUnavailableError, match="needs CPU tensors"):
        resolvent_diagonal(torch.zeros(2, 4, device="meta"), 1.0, 1.0, 1j, backend="cpu")
