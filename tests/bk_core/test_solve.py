"""resolvent_solve and solve_step: values, shapes, dtypes, causality, streaming, and what they refuse."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.bk_core import (
    BackendUnavailableError,
    SmallPivotError,
    SolveState,
    reference,
    resolvent_diagonal,
    resolvent_solve,
    solve_reference,
    solve_step,
)
from bklm.bk_core.cpu.solve_lines import CHUNK

BACKENDS = ["reference", "torch", "cpu"]
F32, F64 = torch.float32, torch.float64


def problem(n, columns, batch=(), dtype=F64, seed=0):
    """x, a, b, c, z with b != c, b c > 0 and Im z between 0.5 and 1.5."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, columns, dtype=dtype, generator=g)
    a = torch.randn(*batch, n, dtype=dtype, generator=g)
    b, c = (torch.rand(*batch, n - 1, dtype=dtype, generator=g) * 0.8 + 0.2 for _ in "bc")
    z = torch.complex(torch.randn(batch, generator=g), torch.rand(batch, generator=g) + 0.5)
    return x, a, b, c, z.to(torch.complex128 if dtype == F64 else torch.complex64)


def wide(x):
    return x.to(torch.complex128 if x.is_complex() else F64)


def error(y, expected):
    """Of the largest entry."""
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 3, 21])
@pytest.mark.parametrize("columns", [1, 3, 64])
def test_every_backend_equals_a_dense_solve(backend, n, columns, causal):
    inputs = problem(n, columns, (2, 3))
    y = resolvent_solve(*inputs, causal=causal, backend=backend)
    assert error(y, solve_reference.dense(*inputs, causal)) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("n", "columns"), [(127, 1), (127, 3), (127, 64), (300, 1), (65, 130), (700, 2), (1100, 1)]
)
@pytest.mark.parametrize("complex_x", [False, True])
def test_longer_rows_and_wider_blocks_equal_a_dense_solve(backend, n, columns, complex_x):
    x, *rest = problem(n, columns, (2,))
    x = torch.complex(x, x.flip(1)) if complex_x else x
    y = resolvent_solve(x, *rest, backend=backend)
    assert error(y, solve_reference.dense(x, *rest)) < 1e-12
    causal = resolvent_solve(x, *rest, causal=True, backend=backend)
    assert error(causal, solve_reference.sequential(x, *rest, causal=True)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 4])
def test_complex_entries_equal_a_dense_solve(backend, columns, causal):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 9, columns, dtype=torch.complex128, generator=g)
    a, b, c = (torch.randn(4, n, dtype=torch.complex128, generator=g) for n in (9, 8, 8))
    for upper, lower in ((b, c), (b.real.contiguous(), c), (b, 0.5), (0.5 + 1j, c)):
        y = resolvent_solve(x, a, upper, lower, 6j, causal=causal, backend=backend)
        assert error(y, solve_reference.dense(x, a, upper, lower, 6j, causal)) < 1e-12


def sequential(x, a, b, c, z, causal):
    """The recursions in numpy's complex128, for one row (N, D) of any length."""
    x, a = x.double().numpy(), a.double().numpy()
    n = len(a)
    y, factor, left = np.empty(x.shape, complex), np.empty(n, complex), 0j
    for i in range(n):
        left = 1 / (a[i] - z - (b * c * left if i else 0))
        factor[i] = left
        y[i] = left * (x[i] - (c * y[i - 1] if i else 0))
    if not causal:
        for i in range(n - 2, -1, -1):
            y[i] -= factor[i] * b * y[i + 1]
    return torch.from_numpy(y)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("columns", [1, 3, 64])
def test_a_row_of_4096_equals_the_banded_and_the_sequential_solve(columns, dtype):
    g = torch.Generator().manual_seed(5)
    n, b, c, z = 4096, 0.7, 1.3, 0.2 + 1j
    x, a = torch.randn(n, columns, generator=g, dtype=dtype), torch.randn(n, generator=g, dtype=dtype)
    bands = np.stack([np.full(n, b + 0j), a.double().numpy() - z, np.full(n, c + 0j)])
    expected = torch.from_numpy(scipy.linalg.solve_banded((1, 1), bands, x.double().numpy() + 0j))
    tolerance = 2e-6 if dtype == F32 else 1e-13
    assert error(resolvent_solve(x, a, b, c, z), expected) < tolerance
    causal = resolvent_solve(x, a, b, c, z, causal=True)
    assert error(causal, sequential(x, a, b, c, z, True)) < tolerance


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_below_the_axis_and_negative_entries_give_the_dense_solve(backend, causal):
    x, a, b, c, z = problem(21, 3, (2,))
    inputs = x, a, -b, -c, z.conj().resolve_conj()
    y = resolvent_solve(*inputs, causal=causal, backend=backend)
    assert error(y, solve_reference.dense(*inputs, causal)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("wide_ones", "result"), [("b", torch.complex128), ("c", torch.complex128), ("z", torch.complex64)]
)
def test_wide_bonds_widen_the_result_and_a_wide_shift_does_not(wide_ones, result, causal):
    given = dict(zip("xabcz", problem(40, 2, (2,), F32), strict=True))
    given |= {name: wide(given[name]) for name in wide_ones}
    y = resolvent_solve(*given.values(), causal=causal)
    assert y.dtype == result
    assert error(y, solve_reference.dense(*map(wide, given.values()), causal)) < (
        1e-13 if result == torch.complex128 else 1e-5
    )


@pytest.mark.parametrize(("eta", "broken"), [(1.0, False), (1e-3, False), (1.0, True)])
def test_a_row_of_several_chunks_is_the_banded_solve_whatever_it_remembers(eta, broken):
    n, z = 2 * CHUNK + 77, 0.2 + 1j * eta
    g = torch.Generator().manual_seed(7)
    x, a = (torch.randn(2, n, generator=g, dtype=F64) for _ in range(2))
    a[1] *= 0.05  # a row in the band remembers as far as 1 / eta
    x[0, CHUNK + 9] = float("nan") if broken else 1.0
    found = resolvent_solve(x[..., None], a, 0.9, 0.9, z)[..., 0]
    assert torch.isnan(found[0]).all() == broken
    for row in (1,) if broken else (0, 1):
        bands = np.stack([np.full(n, 0.9 + 0j), a[row].numpy() - z, np.full(n, 0.9 + 0j)])
        expected = torch.from_numpy(scipy.linalg.solve_banded((1, 1), bands, x[row].numpy() + 0j))
        assert error(found[row], expected) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "columns"), [("cpu", 1), ("cpu", 3), ("cpu", 16), ("cpu", 64), ("torch", 1), ("torch", 3)]
)
def test_a_million_positions_equal_the_banded_and_the_sequential_solve(columns, backend):
    g = torch.Generator().manual_seed(6)
    n, z = 1_000_000, 0.1 + 0.5j
    x, a = torch.randn(n, columns, generator=g), torch.randn(n, generator=g)
    bands = np.stack([np.full(n, 1 + 0j), a.double().numpy() - z, np.full(n, 1 + 0j)])
    expected = torch.from_numpy(scipy.linalg.solve_banded((1, 1), bands, x.double().numpy() + 0j))
    assert error(resolvent_solve(x, a, 1.0, 1.0, z, backend=backend), expected) < 5e-6
    causal = resolvent_solve(x, a, 1.0, 1.0, z, causal=True, backend=backend)
    assert error(causal, sequential(x, a, 1.0, 1.0, z, True)) < 5e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "columns"), [(127, 24), (4096, 3), (200_000, 1)])
@pytest.mark.parametrize("eta", [1.0, 1e-2])
def test_no_length_overflows_and_solutions_are_bounded(n, columns, eta, causal):
    a = torch.linspace(-4, 4, n) + torch.sin(torch.arange(n) * 0.7)
    x = torch.zeros(n, columns)
    x[n // 3] = 1.0
    y = resolvent_solve(x, a, 1.0, 1.0, complex(0, eta), causal=causal)
    assert torch.isfinite(torch.view_as_real(y)).all()
    # one column of a resolvent: its norm is at most 1 / |Im z|; the causal rows hold one entry of another block each
    assert y.abs().max() <= (1 + 1e-5) / eta


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), columns=st.integers(1, 3), causal=st.booleans())
def test_x_a_b_c_and_z_broadcast_like_torch(data, n, columns, causal):
    batch = data.draw(st.lists(st.integers(1, 3), max_size=3))

    def cut(shape):
        """A shape that broadcasts to ``shape``: leading dimensions dropped, others set to 1."""
        shape = shape[data.draw(st.integers(0, len(shape))) :]
        return [1 if data.draw(st.booleans()) else size for size in shape]

    x = torch.randn(*cut(batch), n, columns, dtype=F64)
    a = torch.randn(*cut(batch), n, dtype=F64)
    whole = torch.broadcast_shapes(x.shape[:-2], a.shape[:-1])
    b, c = (torch.rand(cut([*whole, n - 1]) if n > 2 else [*whole, n - 1], dtype=F64) for _ in "bc")
    z = torch.complex(*torch.randn(2, *cut(whole), dtype=F64).unbind()) + 4j
    y = resolvent_solve(x, a, b, c, z, causal=causal)
    assert y.shape == (*whole, n, columns)
    assert error(y, solve_reference.dense(x, a, b, c, z, causal)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_strided_and_lazily_conjugated_inputs_are_read_correctly(backend, causal):
    g = torch.Generator().manual_seed(3)
    big = torch.randn(5, 2, 12, 4, dtype=torch.complex128, generator=g)
    x = big.conj().permute(1, 0, 2, 3)[:, :, ::2, 1:]  # strides, and a pending conjugation
    a = big[0, :, ::2, 0].conj().imag  # a pending negation
    b = big[0, 0, :5, 1].conj()
    y = resolvent_solve(x.transpose(0, 1), a, b, 0.5, 6j, causal=causal, backend=backend)
    plain = [t.clone().resolve_conj().resolve_neg().contiguous() for t in (x.transpose(0, 1), a, b)]
    assert error(y, solve_reference.dense(*plain, torch.tensor(0.5), 6j, causal)) < 1e-12


@pytest.mark.parametrize(
    ("given_types", "result"),
    [
        ((F32, F32, F32), torch.complex64),
        ((F64, F32, F32), torch.complex128),
        ((F32, F64, F32), torch.complex128),
        ((torch.complex64, F32, F64), torch.complex128),
        ((torch.bfloat16, torch.float16, F32), torch.complex64),
        ((torch.complex128, torch.bfloat16, F32), torch.complex128),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_precision_follows_the_widest_input_and_widening_keeps_its_digits(given_types, result, causal):
    x, a, b, c, z = problem(40, 2, (2,), F32)
    x, a, b = (t.to(dtype) for t, dtype in zip((x, a, b), given_types, strict=True))
    y = resolvent_solve(x, a, b, c, z, causal=causal)
    assert y.dtype == result
    expected = resolvent_solve(*(wide(t) for t in (x, a, b, c, z)), causal=causal)
    assert error(y, expected) < (1e-6 if result == torch.complex64 else 1e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("z", [3e13j, 1e-13j, 1e20 + 1e20j])
def test_extreme_shifts_are_computed_in_64_bits_and_returned_in_32(z, causal):
    x, a, b, c, _ = problem(9, 2, (2,), F32)
    y = resolvent_solve(x, a, b, c, z, causal=causal)
    assert y.dtype == torch.complex64
    assert error(wide(y), resolvent_solve(*(wide(t) for t in (x, a, b, c)), z, causal=causal)) < 1e-6
    as_tensor = resolvent_solve(x, a, b, c, torch.tensor(z), causal=causal)
    torch.testing.assert_close(as_tensor, y, rtol=1e-6, atol=0.0)


def test_the_solve_of_unit_vectors_has_the_diagonal_and_the_causal_diagonal_on_its_own():
    _, a, b, c, z = problem(12, 1)
    identity = torch.eye(12, dtype=F64)
    for causal in (False, True):
        y = resolvent_solve(identity, a, b, c, z, causal=causal)
        torch.testing.assert_close(y.diagonal(), resolvent_diagonal(a, b, c, z, causal=causal))


def test_returned_left_is_the_causal_diagonal():
    x, a, b, c, z = problem(300, 2, (3,))
    y, left = resolvent_solve(x, a, b, c, z, causal=True, return_left=True)
    assert torch.equal(y, resolvent_solve(x, a, b, c, z, causal=True))
    assert torch.equal(left, resolvent_diagonal(a, b, c, z, causal=True))


@pytest.mark.parametrize("return_left", [False, True])
def test_an_empty_batch_keeps_the_graph_to_every_input(return_left):
    shapes = (0, 3, 5, 2), (3, 5), (4,), (3, 1), (0, 1)
    inputs = [
        torch.ones(s, dtype=torch.complex64 if i == 4 else F32).requires_grad_() for i, s in enumerate(shapes)
    ]
    y = resolvent_solve(*inputs, causal=True, return_left=return_left)
    y, left = y if return_left else (y, torch.zeros(0, 3, 5))
    assert (y.shape, left.shape, y.dtype) == ((0, 3, 5, 2), (0, 3, 5), torch.complex64)
    grads = torch.autograd.grad(y.real.sum(), inputs)
    assert [tuple(g.shape) for g in grads] == list(shapes)
    assert not any(g.any() for g in grads)


# --- causality, streaming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("m", "n", "columns"), [(2, 5, 3), (33, 200, 1), (3, 700, 5), (2, 3000, 1), (1, 20_000, 1)]
)
def test_the_past_does_not_move_by_one_bit_when_the_future_changes(backend, m, n, columns):
    if backend == "reference" and n > 1000:
        pytest.skip("the reference loops over positions in Python")
    g = torch.Generator().manual_seed(n)
    x, a, b, c = (
        torch.randn(m, n, columns, generator=g),
        torch.randn(m, n, generator=g),
        torch.ones(m, n - 1),
        0.7,
    )
    before = resolvent_solve(x, a, b, c, 0.3 + 0.05j, causal=True, backend=backend)
    for place in (1, n // 3, n // 2, n - 1):
        changed = [t.clone() for t in (x, a, b)]
        changed[0][0, place:] = torch.randn(n - place, columns) * 1e20
        changed[1][0, place:] = torch.randn(n - place) * 50
        changed[2][0, place:] = 3.0
        after = resolvent_solve(*changed, c, 0.3 + 0.05j, causal=True, backend=backend)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[0, place:], after[0, place:])
        assert torch.equal(before[1:], after[1:])


def test_the_bidirectional_solve_sees_the_future():
    x, a, b, c, z = problem(6, 1)
    changed = x.clone()
    changed[-1] += 1.0
    assert (resolvent_solve(changed, a, b, c, z) - resolvent_solve(x, a, b, c, z)).abs()[0] > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "columns"), [(9, 3), (900, 1)])
def test_nan_reaches_every_output_that_depends_on_it_and_no_other(backend, n, columns):
    x, a, b, c, z = problem(n, columns, (3,), F32)
    x[1, 4, 0] = float("nan")
    y = resolvent_solve(x, a, b, c, z, causal=True, backend=backend)
    both = resolvent_solve(x, a, b, c, z, backend=backend)
    assert torch.isnan(y[1, 4:, 0]).all()
    assert torch.isnan(both[1, :, 0]).all()
    y[1, 4:, 0] = both[1, :, 0] = 0
    assert torch.isfinite(torch.view_as_real(y)).all()
    assert torch.isfinite(torch.view_as_real(both)).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_steps_equal_the_whole_pass_to_rounding(n, dtype):
    x, a, b, c, z = problem(n, 3, (2, 4), dtype)
    y, left = resolvent_solve(x, a, b, c, z, causal=True, return_left=True)
    for begin in {0, n // 2}:
        state = SolveState(left[..., begin - 1], y[..., begin - 1, :]) if begin else None
        for i in range(begin, n):
            between = [t[..., max(i - 1, 0)] if n > 1 else 0.0 for t in (b, c)]
            row, state = solve_step(x[..., i, :], a[..., i], *between, z, state)
            assert row.dtype == y.dtype
            assert error(row, y[..., i, :]) < (5e-6 if dtype == F32 else 1e-13)
            assert error(state.left, left[..., i]) < (5e-6 if dtype == F32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_multiplies_couplings_of_16_bits_in_the_precision_of_the_pass(dtype):
    x, a = torch.ones(3, 2, dtype=dtype), torch.zeros(3, dtype=dtype)
    b = torch.full((2,), 300.0, dtype=dtype)  # b c is beyond float16
    y, left = resolvent_solve(x, a, b, b, 1j, causal=True, return_left=True)
    row, state = solve_step(x[2], a[2], b[1], b[1], 1j, SolveState(left[1], y[1]))
    assert error(row, y[2]) < 5e-5
    assert error(state.left, left[2]) < 5e-5


def test_a_step_refuses_couplings_of_another_shape():
    x, a = torch.ones(2, 3), torch.zeros(2)
    state = solve_step(x, a, 1.0, 1.0, 1j)[1]
    with pytest.raises(ValueError, match=r"c has shape \(3,\): it must broadcast to \(\.\.\.\) = \(2,\)"):
        solve_step(x, a, 1.0, torch.ones(3), 1j, state)


def test_steps_are_differentiable_and_agree_with_the_whole_pass():
    inputs = [t.requires_grad_() for t in problem(5, 2, (3,))]
    x, a, b, c, z = inputs
    weight = torch.randn(3, 2, dtype=torch.complex128)
    whole = torch.autograd.grad((weight * resolvent_solve(*inputs, causal=True)[:, -1]).real.sum(), inputs)
    state = None
    for i in range(5):
        y, state = solve_step(x[:, i], a[:, i], b[:, max(i - 1, 0)], c[:, max(i - 1, 0)], z, state)
    for ours, theirs in zip(torch.autograd.grad((weight * y).real.sum(), inputs), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_at_an_extreme_shift_keeps_its_digits():
    x, a = torch.ones(2, 3), torch.zeros(2)
    for z in (1e25j, 1e-25j):
        y, state = solve_step(x, a, 1.0, 1.0, z)
        torch.testing.assert_close(y, torch.full((2, 3), -1 / z, dtype=torch.complex64), rtol=1e-6, atol=0.0)
        assert state.left.dtype == torch.complex64


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_vanishing_pivot_is_an_error_that_names_its_row(backend, causal):
    a = torch.full((2, 3, 4), 3.0)
    a[1, 1] = 0.0  # k = -1, a = 0, z = i: the second pivot of the sweep is exactly zero
    with pytest.raises(SmallPivotError, match=r"row 4.*modulus 0,") as caught:
        resolvent_solve(torch.ones(4, 2), a, 1.0, -1.0, 1j, causal=causal, backend=backend)
    assert caught.value.row == 4


X, A = torch.zeros(2, 4, 3), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("x", A, 1.0, 1.0, 1j), {}, TypeError, "x must be a torch tensor"),
        ((X, [1.0], 1.0, 1.0, 1j), {}, TypeError, "a must be a torch tensor"),
        (
            (torch.zeros(4), A, 1.0, 1.0, 1j),
            {},
            ValueError,
            r"x has shape \(4,\).*one column is x\[..., None\]",
        ),
        ((torch.zeros(2, 0, 3), torch.zeros(2, 0), 1.0, 1.0, 1j), {}, ValueError, "N and D >= 1"),
        ((torch.zeros(2, 4, 0), A, 1.0, 1.0, 1j), {}, ValueError, "N and D >= 1"),
        ((X, torch.zeros(2, 5), 1.0, 1.0, 1j), {}, ValueError, r"a must be \(..., N\) = \(..., 4\)"),
        ((X, torch.tensor(1.0), 1.0, 1.0, 1j), {}, ValueError, r"a must be"),
        ((X, torch.zeros(3, 4), 1.0, 1.0, 1j), {}, ValueError, r"\(3,\) and \(2,\) do not broadcast"),
        ((X.long(), A, 1.0, 1.0, 1j), {}, TypeError, "x has dtype torch.int64"),
        ((X, A.long(), 1.0, 1.0, 1j), {}, TypeError, "a has dtype torch.int64"),
        ((X, A, torch.ones(3, dtype=torch.bool), 1.0, 1j), {}, TypeError, "b has dtype torch.bool"),
        ((X, A, "1", 1.0, 1j), {}, TypeError, "b must be a tensor or a number"),
        ((X, A, torch.ones(4), 1.0, 1j), {}, ValueError, r"b has shape \(4,\): .* = \(2, 3\) for x of shape"),
        ((X, A, 1.0, torch.ones(5, 2, 3), 1j), {}, ValueError, "c has shape"),
        ((X, A, 1.0, 1.0, 1.0), {}, ValueError, "Im z != 0"),
        ((X, A, 1.0, 1.0, torch.tensor([1j, 2.0])), {}, ValueError, r"entry 1.*Im z != 0"),
        ((X, A, 1.0, 1.0, torch.ones(2)), {}, ValueError, "Im z != 0"),
        ((X, A, 1.0, 1.0, torch.tensor([1j, 1j, 1j])), {}, ValueError, "z has shape"),
        ((X, A, 1.0, 1.0, 1j), {"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
        ((X, A, 1.0, 1.0, 1j), {"causal": "no"}, TypeError, "causal='no': True or False is needed, got str"),
        ((X, A, 1.0, 1.0, 1j), {"causal": None}, TypeError, "causal=None"),
        (
            (X[0].to_sparse(), A, 1.0, 1.0, 1j),
            {},
            TypeError,
            r"x has layout torch.sparse_coo: .*x.to_dense\(\)",
        ),
        ((X, A, 1.0, 1.0, 1j), {"return_left": True}, ValueError, "return_left=True needs causal=True"),
    ],
)
def test_bad_input_gets_one_clear_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        resolvent_solve(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, A, 1.0, 1.0, 1j), TypeError, "x must be a torch tensor"),
        ((torch.tensor(1.0), A, 1.0, 1.0, 1j), ValueError, "one row"),
        ((torch.ones(3, 2), torch.ones(2), 1.0, 1.0, 1j), ValueError, "do not broadcast"),
        ((torch.ones(3, 2), torch.ones(3), 1.0, 1.0, 1.0), ValueError, "Im z != 0"),
    ],
)
def test_a_step_refuses_bad_input_too(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        solve_step(*arguments)
    assert "\n" not in str(caught.value)


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="a is on meta and x on cpu"):
        resolvent_solve(X, A.to("meta"), 1.0, 1.0, 1j)
    with pytest.raises(ValueError, match="b is on meta and x on cpu"):
        resolvent_solve(X, A, torch.ones(3, device="meta"), 1.0, 1j)
    with pytest.raises(ValueError, match="c is on meta and x on cpu"):
        resolvent_solve(X, A, 1.0, torch.ones(3, device="meta"), 1j)
    with pytest.raises(ValueError, match="z is on meta and x on cpu"):
        resolvent_solve(X, A, 1.0, 1.0, torch.tensor(1j, device="meta"))


def test_an_unusable_backend_is_refused():
    with pytest.raises(BackendUnavailableError, match="needs CPU tensors"):
        resolvent_solve(X.to("meta"), A.to("meta"), 1.0, 1.0, 1j, backend="cpu")


def test_the_dense_forms_are_right_after_torch_was_given_another_number_of_threads():
    """torch's own of a batch are not (docs/compatibility.md): these take one matrix after the other."""
    before = torch.get_num_threads()
    inputs = problem(300, 2, (2,))
    try:
        torch.set_num_threads(2)
        dense, diagonal = solve_reference.dense(*inputs), reference.dense(*inputs[1:])
    finally:
        torch.set_num_threads(before)
    assert error(resolvent_solve(*inputs, backend="torch"), dense) < 1e-12
    assert error(reference.left_right(*inputs[1:]), diagonal) < 1e-12
