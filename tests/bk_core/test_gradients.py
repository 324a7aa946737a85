"""Gradients: exact for a, b, c and z, the published directions and their blend, and derivatives of gradients."""

import pytest
import torch

from bklm.bk_core import reference, resolvent_diagonal

BACKENDS = ["reference", "torch", "cpu"]


def leaves(n, batch=(), complex_entries=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_entries else torch.float64
    a = torch.randn(*batch, n, dtype=dtype, generator=g)
    b, c = (torch.randn(*batch, n - 1, dtype=dtype, generator=g) for _ in "bc")
    if not complex_entries:
        b, c = b.abs(), c.abs()
    z = torch.randn(batch, dtype=torch.complex128, generator=g) + (6j if complex_entries else 1.5j)
    return [x.requires_grad_() for x in (a, b, c, z)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "complex_entries"), [(1, False), (2, False), (6, False), (5, True)])
def test_gradcheck_of_every_input(backend, causal, n, complex_entries):
    assert torch.autograd.gradcheck(
        lambda *x: resolvent_diagonal(*x, causal=causal, backend=backend),
        leaves(n, (2,), complex_entries),
        fast_mode=n > 5,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_through_dense_inversion(backend, causal):
    inputs = leaves(20, (3,))
    weight = torch.randn(3, 20, dtype=torch.complex128)
    dense = reference.dense_causal if causal else reference.dense
    for b_c_shared in (False, True):
        used = [inputs[0], *(x[0] if b_c_shared else x for x in inputs[1:3]), inputs[3]]
        G = resolvent_diagonal(*used, causal=causal, backend=backend)
        ours = torch.autograd.grad((weight * G).real.sum(), inputs)
        theirs = torch.autograd.grad((weight * dense(*used)).real.sum(), inputs)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (3,), (0, 2), (1, 3)])
def test_only_the_needed_gradients_are_formed_and_they_do_not_depend_on_each_other(causal, needed):
    inputs = [x.detach() for x in leaves(300, (2,))]
    everything = [x.clone().requires_grad_() for x in inputs]
    resolvent_diagonal(*everything, causal=causal).abs().sum().backward()
    for i in needed:
        inputs[i].requires_grad_()
    resolvent_diagonal(*inputs, causal=causal).abs().sum().backward()
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i in needed)
        if i in needed:
            torch.testing.assert_close(x.grad, everything[i].grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_past_outputs_with_respect_to_future_entries(causal):
    a = torch.randn(1, 700, requires_grad=True)
    G = resolvent_diagonal(a, 1.0, 1.0, 1j, causal=causal)
    G[0, :400].abs().sum().backward()
    future = a.grad[0, 400:]
    assert bool((future == 0).all()) is causal
    assert (a.grad[0, :400] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradgradcheck_of_every_input(causal):
    assert torch.autograd.gradgradcheck(lambda *x: resolvent_diagonal(*x, causal=causal), leaves(4, (2,)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("gradient", "grad_blend"), [("local", 0.0), ("local", 0.4), ("original", 0.3), ("exact", 0.4)]
)
def test_second_derivatives_are_those_of_the_chosen_direction(gradient, grad_blend, causal):
    a = leaves(4, (2,))[0]
    assert torch.autograd.gradgradcheck(
        lambda x: resolvent_diagonal(x, 1.0, 0.5, 1j, causal=causal, gradient=gradient, grad_blend=grad_blend),
        a,
    )


def test_third_derivatives_exist():
    a = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    value = resolvent_diagonal(a, 1.0, 1.0, 1j).real.sum()
    expected = reference.left_right(a, torch.ones(1), torch.ones(1), 1j).real.sum()
    for _ in range(3):
        value = torch.autograd.grad(value, a, create_graph=True)[0].sum()
        expected = torch.autograd.grad(expected, a, create_graph=True)[0].sum()
    torch.testing.assert_close(value, expected)


# --- directions --------------------------------------------------------------------------------------------------------


def direction(a, gbar, **options):
    leaf = a.clone().requires_grad_()
    G = resolvent_diagonal(leaf, 1.0, 0.7, 0.8j, **options)
    G.backward(gbar)
    return leaf.grad, G.detach()


@pytest.fixture
def a_and_gbar():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 40, dtype=torch.float64, generator=g), torch.randn(
        3, 40, dtype=torch.complex128, generator=g
    )


@pytest.mark.parametrize("causal", [False, True])
def test_local_gradient_is_the_diagonal_term_of_the_exact_one(a_and_gbar, causal):
    a, gbar = a_and_gbar
    local, G = direction(a, gbar, causal=causal, gradient="local")
    torch.testing.assert_close(local, reference.local_gradient(gbar, G))
    # With a gradient at one output only, the exact gradient of the same entry is the local one.
    for i in (
        0,
        17,
        39,
    ):
        single = torch.zeros_like(gbar)
        single[:, i] = gbar[:, i]
        exact, _ = direction(a, single, causal=causal)
        torch.testing.assert_close(exact[:, i], local[:, i])


def test_exact_direction_equals_autograd_through_the_recursion(a_and_gbar):
    a, gbar = a_and_gbar
    exact, _ = direction(a, gbar)
    k = torch.ones(39, dtype=torch.float64)
    torch.testing.assert_close(exact, reference.exact_gradient(gbar, a, k, 0.7 * k, 0.8j))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gradient", ["exact", "local"])
def test_blend_is_linear_between_theory_and_hypothesis7(a_and_gbar, gradient, alpha):
    a, gbar = a_and_gbar
    theory, G = direction(a, gbar, gradient=gradient)
    blended, _ = direction(a, gbar, gradient=gradient, grad_blend=alpha)
    other = -(gbar.conj() / G**2).real  # |G^2| is above the floor everywhere here
    assert (G.abs() ** 2).min() > reference.HYPOTHESIS7_FLOOR
    torch.testing.assert_close(blended, (1 - alpha) * theory + alpha * other)


def test_hypothesis7_floors_the_modulus_and_keeps_the_phase():
    G = torch.tensor([1e-3 + 0j, 1e-3j, 0j, 2j], dtype=torch.complex128)
    gbar = torch.ones(4, dtype=torch.complex128)
    expected = torch.tensor([-1000.0, 1000.0, -1000.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(reference.hypothesis7_gradient(gbar, G), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_original_direction_leaves_the_conjugate_out_and_clamps(a_and_gbar, alpha):
    a, gbar = a_and_gbar
    gbar = gbar * 3000
    found, G = direction(a, gbar, gradient="original", grad_blend=alpha)
    expected = (1 - alpha) * -(gbar * G**2).real + alpha * -(gbar / G**2).real
    assert expected.abs().max() > 1000
    torch.testing.assert_close(found, expected.clamp(-1000, 1000))


def test_original_direction_has_the_imaginary_part_reversed(a_and_gbar):
    a, gbar = a_and_gbar
    local, _ = direction(a, gbar, gradient="local")
    original, _ = direction(a, gbar.conj().resolve_conj(), gradient="original")
    torch.testing.assert_close(local, original)


def test_blending_leaves_the_gradients_of_b_c_z_exact():
    inputs, blended = leaves(6), leaves(6)
    resolvent_diagonal(*inputs).abs().sum().backward()
    resolvent_diagonal(*blended, grad_blend=0.5).abs().sum().backward()
    assert not torch.allclose(inputs[0].grad, blended[0].grad)
    for x, y in zip(inputs[1:], blended[1:], strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_local_direction_of_a_complex_diagonal_is_the_conjugate_of_the_formula():
    a = leaves(5, complex_entries=True)[0].detach().requires_grad_()
    gbar = torch.randn(5, dtype=torch.complex128)
    G = resolvent_diagonal(a, 0.5, 0.5, 6j, gradient="local")
    G.backward(gbar)
    torch.testing.assert_close(a.grad, (-gbar.conj() * G.detach() ** 2).conj().resolve_conj())
