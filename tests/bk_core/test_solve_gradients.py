"""resolvent_solve: exact gradients to any order and in every mode, and its place in torch.library, compile and func."""

import pytest
import torch
from torch.autograd import forward_ad

from bklm.bk_core import resolvent_diagonal, resolvent_solve, solve_ops, solve_reference
from bklm.bk_core.cpu import solve as cpu_solve
from bklm.bk_core.cpu.solve_lines import CHUNK

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of its own vmap
BACKENDS = ["reference", "torch", "cpu"]
F64 = torch.float64


def leaves(n, columns=2, batch=(2,), complex_entries=False, complex_x=False, seed=0):
    """x, a, b, c, z: b of every row, c shared by the rows."""
    g = torch.Generator().manual_seed(seed + n)
    dtype = torch.complex128 if complex_entries else F64
    x = torch.randn(*batch, n, columns, dtype=torch.complex128 if complex_x else F64, generator=g)
    a = torch.randn(*batch, n, dtype=dtype, generator=g)
    b = torch.randn(*batch, n - 1, dtype=dtype, generator=g)
    c = torch.randn(n - 1, dtype=dtype, generator=g)
    if not complex_entries:
        b, c = b.abs(), c.abs()
    z = torch.randn(batch, dtype=torch.complex128, generator=g) + (6j if complex_entries else 1.5j)
    return [t.requires_grad_() for t in (x, a, b, c, z)]


KINDS = [(1, False, False), (2, False, True), (4, False, False), (4, True, True)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize(("n", "complex_entries", "complex_x"), KINDS)
def test_gradcheck_of_every_input(n, complex_entries, complex_x, columns, backend, causal):
    assert torch.autograd.gradcheck(
        lambda *t: resolvent_solve(*t, causal=causal, backend=backend),
        leaves(n, columns, (2,), complex_entries, complex_x),
        fast_mode=columns > 1,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 64, 130])
@pytest.mark.parametrize(("n", "complex_x"), [(20, False), (150, True), (700, False)])
def test_gradients_equal_those_through_the_sequential_solve(n, complex_x, columns, causal):
    inputs = leaves(n, columns, (3,), complex_x=complex_x)
    weight = torch.randn(3, n, columns, dtype=torch.complex128)
    ours = torch.autograd.grad((weight * resolvent_solve(*inputs, causal=causal)).real.sum(), inputs)
    y = solve_reference.sequential(*inputs, causal=causal)
    theirs = torch.autograd.grad((weight * y).real.sum(), inputs)
    for x, expected in zip(ours, theirs, strict=True):
        assert x.dtype == expected.dtype
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "columns"), [(500, 1), (500, 24), (2 * CHUNK + 77, 1), (2 * CHUNK + 77, 3)])
def test_gradients_in_32_bits_have_five_correct_digits(n, columns, causal):
    """Beyond a chunk, too, where what enters one is computed anew."""
    inputs = [t.detach() for t in leaves(n, columns, (2,))]
    single = [t.to(torch.complex64 if t.is_complex() else torch.float32).requires_grad_() for t in inputs]
    double = [t.detach().to(torch.complex128 if t.is_complex() else F64).requires_grad_() for t in single]
    weight = torch.randn(2, n, columns, dtype=torch.complex128)
    grads = []
    for t, backend in ((single, "cpu"), (double, "torch")):
        y = resolvent_solve(*t, causal=causal, backend=backend)
        grads.append(torch.autograd.grad((weight.to(y.dtype) * y).real.sum(), t))
    for ours, exact in zip(*grads, strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 3)])
@pytest.mark.parametrize("columns", [1, 9])
def test_only_the_needed_gradients_are_formed_and_they_do_not_depend_on_each_other(needed, columns, causal):
    everything = leaves(200, columns)
    weight = torch.randn(2, 200, columns, dtype=torch.complex128)
    resolvent_solve(*everything, causal=causal).backward(weight)
    inputs = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(everything)]
    resolvent_solve(*inputs, causal=causal).backward(weight)
    for i, t in enumerate(inputs):
        assert (t.grad is not None) == (i in needed)
        if i in needed:
            assert torch.equal(t.grad, everything[i].grad)


@pytest.mark.parametrize("shared", ["x", "a", "b", "c", "z"])
@pytest.mark.parametrize("causal", [False, True])
def test_an_input_shared_by_rows_receives_the_sum_of_their_gradients(shared, causal):
    inputs = dict(zip("xabcz", (t.detach() for t in leaves(9, 3, (2, 2))), strict=True))
    inputs["c"] = inputs["b"] + 0.1
    inputs[shared] = inputs[shared][:1].clone()
    weight = torch.randn(2, 2, 9, 3, dtype=torch.complex128)

    def gradient(value):
        leaf = value.clone().requires_grad_()
        y = resolvent_solve(*(inputs | {shared: leaf}).values(), causal=causal)
        return torch.autograd.grad((weight * y).real.sum(), leaf)[0]

    whole = gradient(inputs[shared].expand(2, *inputs[shared].shape[1:]))
    torch.testing.assert_close(gradient(inputs[shared]), whole.sum(0, keepdim=True))


def test_no_gradient_flows_from_the_past_to_the_future():
    x, a, b, c, z = leaves(150, 3, (1,))
    y = resolvent_solve(x, a, b, c, z, causal=True)
    for t in torch.autograd.grad(y[0, :80].abs().sum(), (x, a, b)):
        assert (t[0, 80:] == 0).all()
        assert (t[0, :79] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("complex_entries", "complex_x"), [(False, False), (True, True)])
def test_gradgradcheck_of_every_input(complex_entries, complex_x, backend, causal):
    assert torch.autograd.gradgradcheck(
        lambda *t: resolvent_solve(*t, causal=causal, backend=backend),
        leaves(3, 2, (2,), complex_entries, complex_x),
        fast_mode=complex_x,
    )


def test_gradcheck_of_the_returned_left_beside_the_solution():
    def f(*inputs):
        return resolvent_solve(*inputs, causal=True, return_left=True)

    assert torch.autograd.gradcheck(f, leaves(4))
    assert torch.autograd.gradgradcheck(f, leaves(3), fast_mode=True)


# --- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "complex_entries", "complex_x"), KINDS)
def test_gradcheck_in_forward_mode_and_with_batched_cotangents(n, complex_entries, complex_x, causal):
    assert torch.autograd.gradcheck(
        lambda *t: resolvent_solve(*t, causal=causal),
        leaves(n, 2, (2,), complex_entries, complex_x),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_forward_over_reverse_agrees_with_finite_differences(causal):
    assert torch.autograd.gradgradcheck(
        lambda *t: resolvent_solve(*t, causal=causal), leaves(3), check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("causal", [False, True])
def test_a_tangent_of_one_input_alone_is_carried(which, causal):
    inputs = [t.detach() for t in leaves(70, 3)]
    direction = torch.randn_like(inputs[which])
    with forward_ad.dual_level():
        dual = list(inputs)
        dual[which] = forward_ad.make_dual(inputs[which], direction)
        found = forward_ad.unpack_dual(resolvent_solve(*dual, causal=causal)).tangent

    def moved(step):
        changed = [t + step * direction if i == which else t for i, t in enumerate(inputs)]
        return resolvent_solve(*changed, causal=causal)

    torch.testing.assert_close(found, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
    _, tangent = torch.func.jvp(
        lambda t: resolvent_solve(*inputs[:which], t, *inputs[which + 1 :], causal=causal),
        (inputs[which],),
        (direction,),
    )
    torch.testing.assert_close(tangent, found)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_batched_cotangents_give_what_one_at_a_time_gives(causal, create_graph):
    inputs = leaves(5)
    y = resolvent_solve(*inputs, causal=causal)
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in cotangents]
    found = torch.autograd.grad(
        y, inputs, cotangents, retain_graph=True, is_grads_batched=True, create_graph=create_graph
    )
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True))(cotangents)
    for one, batched, vmapped in zip(zip(*expected, strict=True), found, mapped, strict=True):
        torch.testing.assert_close(batched, torch.stack(one))
        torch.testing.assert_close(vmapped, torch.stack(one))


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
@pytest.mark.parametrize("causal", [False, True])
def test_hessians_in_forward_and_reverse_mode(transform, causal):
    v = torch.linspace(0.2, 1.3, 9, dtype=F64)

    def loss(v):
        return resolvent_solve(v[:5, None] ** 2, v[:5], v[5:], 2 * v[5:], 1j, causal=causal).abs().sum()

    torch.testing.assert_close(transform(loss)(v), torch.autograd.functional.hessian(loss, v))


# --- torch.library, compile, vmap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("complex_x", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_causal_op(reverse, complex_x):
    x, _, b, _, _ = leaves(5, complex_x=complex_x)
    left = torch.randn(2, 5, dtype=torch.complex128).requires_grad_()
    torch.library.opcheck(solve_ops.causal_solve, (x, left, b, reverse, "auto"))


@pytest.mark.parametrize("complex_x", [False, True])
def test_opcheck_of_the_bidirectional_op(complex_x):
    x, a, b, c, z = leaves(5, complex_x=complex_x)
    shared = c.detach()[None].clone().requires_grad_()
    with torch.no_grad():
        left = resolvent_diagonal(a, b, c, z, causal=True)
    torch.library.opcheck(solve_ops.tridiagonal_solve, (x, a, b, shared, z, left, "auto"))


@pytest.mark.parametrize("causal", [False, True])
def test_compile_without_a_graph_break_and_with_equal_gradients(causal):
    def f(x, a, b, c, z):
        return (resolvent_solve(x, a, b, c, z, causal=causal).conj() * (1 + 2j)).real.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for call in (f, compiled):
        inputs = leaves(6)
        value = call(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_inductor_gives_the_eager_numbers_and_gradients(causal):
    def f(x, a):
        return torch.view_as_real(resolvent_solve(x, a, 1.0, 0.5, 1j, causal=causal)).square().sum()

    x, a = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, requires_grad=True)
    eager = torch.autograd.grad(f(x, a), (x, a))
    torch.testing.assert_close(torch.autograd.grad(torch.compile(f, fullgraph=True)(x, a), (x, a)), eager)


@pytest.mark.parametrize("causal", [False, True])
def test_vmap_equals_the_batched_call(causal):
    x, a = torch.randn(5, 2, 6, dtype=F64), torch.randn(6, 3, 5, dtype=F64)
    b, z = torch.rand(4, 6, dtype=F64), torch.randn(6, dtype=torch.complex128) + 2j
    mapped = torch.func.vmap(
        lambda x, a, b, z: resolvent_solve(x, a, b, 0.5, z, causal=causal), in_dims=(2, 0, 1, 0)
    )(x, a, b, z)
    expected = resolvent_solve(x.permute(2, 0, 1)[:, None], a, b.T[:, None], 0.5, z[:, None], causal=causal)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_per_sample_gradients_by_vmap_of_grad(causal):
    x, a, b = torch.randn(4, 5, 3, dtype=F64), torch.randn(4, 2, 5, dtype=F64), torch.rand(4, dtype=F64)

    def loss(x, a, b):
        return resolvent_solve(x, a, b, 2 * b, 1j, causal=causal).abs().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, None))(x, a, b)
    for i in range(4):
        one = [t.clone().requires_grad_() for t in (x[i], a[i], b)]
        for mapped, expected in zip(found, torch.autograd.grad(loss(*one), one), strict=True):
            torch.testing.assert_close(mapped[i], expected)


def test_autocast_does_not_lower_the_precision():
    x, a = torch.randn(2, 50, 4), torch.randn(2, 50)
    expected = resolvent_solve(x, a, 1.0, 1.0, 1j, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resolvent_solve(x, a, 1.0, 1.0, 1j, causal=True), expected)


@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_lazily_conjugated_gradients_are_read_correctly(causal, columns):
    inputs = [t.detach() for t in leaves(40, columns)]
    gbar = torch.randn(2, 40, columns, dtype=torch.complex128)
    grads = []
    for weight in (gbar.conj(), gbar.conj().resolve_conj().clone()):
        leaf = inputs[0].clone().requires_grad_()
        resolvent_solve(leaf, *inputs[1:], causal=causal).backward(weight)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# --- the cpu solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "n", "columns"), [(40, 100, 24), (3, 30_000, 1), (33, 400, 5)])
def test_number_of_threads_does_not_change_one_bit(m, n, columns, causal):
    assert m * n * columns >= cpu_solve.THREADS_FROM
    g = torch.Generator().manual_seed(1)
    x, a = torch.randn(m, n, columns, generator=g), torch.randn(m, n, generator=g)
    gbar = torch.randn(m, n, columns, dtype=torch.complex64, generator=g)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_(), a.clone().requires_grad_()]
            y = resolvent_solve(*leaves, 0.5, 1.0, 1j, causal=causal)
            results.append((y, *torch.autograd.grad(y, leaves, gbar)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_one_row_does_not_change_with_the_other_rows():
    g = torch.Generator().manual_seed(2)
    for columns in (1, 9):
        x, a = torch.randn(20, 150, columns, generator=g), torch.randn(20, 150, generator=g)
        y = resolvent_solve(x, a, 1.0, 1.0, 1j)
        x[1:] = float("nan")
        assert torch.equal(resolvent_solve(x, a, 1.0, 1.0, 1j)[0], y[0])


@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_growing_solutions_pass_through_many_tiles_unharmed(causal, columns):
    """b and c far apart: the resolvent itself grows along the row, far beyond 1 / |Im z|."""
    x, a, *_ = (t.detach() for t in leaves(500, columns))
    inputs = x, a, 0.4, 3.0, torch.tensor([1j, 2j], dtype=torch.complex128)
    y = resolvent_solve(*inputs, causal=causal)
    expected = solve_reference.sequential(
        x, a, *(torch.tensor(t, dtype=F64) for t in inputs[2:4]), inputs[4], causal
    )
    assert expected.abs().max() > 1e50
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_beside_a_large_entry_are_those_of_64_bits(causal, columns, backend):
    x, a, b, c, z = (
        t.detach().to(torch.complex64 if t.is_complex() else torch.float32) for t in leaves(70, columns)
    )
    a[0, 4], a[1, 35] = 1e25, -4e19  # their squares leave the range of 32 bits
    weight = torch.randn(2, 70, columns, dtype=torch.complex64)
    results = []
    for wide in (False, True):
        inputs = [t.to(torch.promote_types(t.dtype, F64)) if wide else t.clone() for t in (x, a, b, c, z)]
        inputs = [t.requires_grad_() for t in inputs]
        y = resolvent_solve(*inputs, causal=causal, backend="reference" if wide else backend)
        results.append((y, *torch.autograd.grad((weight.to(y.dtype) * y).real.sum(), inputs)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 5, 130])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_blend_is_the_diagonals_behind_the_exact_derivative_of_the_rest(n, alpha, backend):
    x, a, b, c, z = leaves(n, columns=3)
    weight = torch.randn(2, n, 3, dtype=torch.complex128)

    def gradients(**options):
        y = resolvent_solve(x, a, b, c, z, causal=True, backend=backend, **options)
        return torch.autograd.grad((weight * y).real.sum(), (x, a, b, c, z))

    exact, blended = gradients(), gradients(grad_blend=alpha)
    # The cotangent of L, by a solve that is written out with L given.
    left = resolvent_diagonal(a, b, c, z, causal=True).detach().requires_grad_()
    rows = []
    for i in range(n):
        before = c[i - 1].detach() * rows[-1] if i else 0.0
        rows.append(left[:, i, None] * (x[:, i].detach() - before))
    (cotangent,) = torch.autograd.grad((weight * torch.stack(rows, 1)).real.sum(), left)
    fixed = (t.detach() for t in (b, c, z))
    G = resolvent_diagonal(a, *fixed, causal=True, grad_blend=alpha)
    (want,) = torch.autograd.grad(G, a, cotangent)
    torch.testing.assert_close(blended[1], want, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(blended[:1] + blended[2:], exact[:1] + exact[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_blend_outside_its_range_or_of_the_bidirectional_solve_is_refused():
    inputs = leaves(4)
    with pytest.raises(ValueError, match=r"grad_blend=1\.5 is outside \[0, 1\]"):
        resolvent_solve(*inputs, causal=True, grad_blend=1.5)
    with pytest.raises(ValueError, match=r"grad_blend=0\.5 needs causal=True"):
        resolvent_solve(*inputs, grad_blend=0.5)
