"""Forward mode, batched cotangents and their mixtures with reverse mode, as torch.autograd itself asks for them."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from bklm.bk_core import resolvent_diagonal

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of its own vmap


def leaves(n, complex_entries=False):
    g = torch.Generator().manual_seed(n)
    dtype = torch.complex128 if complex_entries else torch.float64
    a = torch.randn(2, n, dtype=dtype, generator=g)
    b, c = (torch.randn(n - 1, dtype=dtype, generator=g) for _ in "bc")
    if not complex_entries:
        b, c = b.abs(), c.abs()
    z = torch.randn(2, dtype=torch.complex128, generator=g) + (6j if complex_entries else 1.5j)
    return [x.requires_grad_() for x in (a, b, c, z)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "complex_entries"), [(1, False), (2, False), (5, False), (4, True)])
def test_gradcheck_in_forward_mode_and_with_batched_cotangents(causal, n, complex_entries):
    assert torch.autograd.gradcheck(
        lambda *x: resolvent_diagonal(*x, causal=causal),
        leaves(n, complex_entries),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=n > 2,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_forward_over_reverse_agrees_with_finite_differences(causal):
    assert torch.autograd.gradgradcheck(
        lambda *x: resolvent_diagonal(*x, causal=causal), leaves(3), check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize("bond", [0.7, -0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_with_numbers_for_all_but_a_every_derivative_is_that_with_tensors(causal, bond):
    """Such a call takes the shortest road, unless pivots are to be checked (a negative product)."""
    a, b, c, z = leaves(7)
    rest = bond, 0.9, 0.3 + 1.5j

    def with_numbers(x):
        return resolvent_diagonal(x, *rest, causal=causal)

    options = {"check_batched_grad": True, "check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(with_numbers, [a], **options)
    assert torch.autograd.gradgradcheck(with_numbers, [a], check_fwd_over_rev=True, fast_mode=True)
    tensors = [torch.full_like(x.detach(), value) for x, value in zip((b, c, z), rest, strict=True)]
    gbar = torch.randn(2, 7, dtype=torch.complex128)
    found, expected = (
        torch.autograd.grad(resolvent_diagonal(a, *k, causal=causal), a, gbar)[0] for k in (rest, tensors)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_tangents_are_those_of_torch_func_at_lengths_the_scan_cuts_unevenly(causal, requires_grad):
    for n, dtype, tolerance in (
        (1, torch.float64, 1e-12),
        (37, torch.float64, 1e-12),
        (37, torch.float32, 1e-5),
    ):
        a, a_dot = torch.randn(2, 3, n, dtype=dtype).unbind()

        def f(x):
            return resolvent_diagonal(x, 1.0, 0.5, 0.3 + 1j, causal=causal)

        expected = torch.func.jvp(f, (a,), (a_dot,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a.clone().requires_grad_(requires_grad), a_dot)
            found = forward_ad.unpack_dual(f(dual))
        torch.testing.assert_close(tuple(found), expected, rtol=tolerance, atol=tolerance)


def test_a_tangent_of_b_c_or_z_alone_is_carried():
    inputs = [x.detach() for x in leaves(6)]
    for i in (1, 2, 3):
        direction = torch.randn_like(inputs[i])
        with forward_ad.dual_level():
            dual = list(inputs)
            dual[i] = forward_ad.make_dual(inputs[i], direction)
            found = forward_ad.unpack_dual(resolvent_diagonal(*dual)).tangent
        step = 1e-6 * direction
        moved = [resolvent_diagonal(*inputs[:i], inputs[i] + s, *inputs[i + 1 :]) for s in (step, -step)]
        torch.testing.assert_close(found, (moved[0] - moved[1]) / 2e-6, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_jacobians_and_hessians_agree_by_every_strategy(causal):
    x = torch.linspace(0.2, 1.3, 7, dtype=torch.float64)

    def features(x):
        return torch.view_as_real(resolvent_diagonal(x[:4], x[4:], x[4:], 1j, causal=causal))

    def loss(x):
        return features(x).square().sum() + features(x)[2, 0]

    expected = jacobian(features, x), hessian(loss, x)
    strategies = {"vectorize": True}, {"strategy": "forward-mode", "vectorize": True}
    for options in strategies:
        torch.testing.assert_close(jacobian(features, x, **options), expected[0])
        outer = {k.replace("strategy", "outer_jacobian_strategy"): v for k, v in options.items()}
        torch.testing.assert_close(hessian(loss, x, **outer), expected[1])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("gradient", "grad_blend"), [("exact", 0.0), ("exact", 0.4), ("local", 0.0), ("original", 1.0)]
)
def test_batched_cotangents_give_what_one_at_a_time_gives(gradient, grad_blend, create_graph):
    a, b, c, z = leaves(5)
    wanted = (a, b, c, z) if gradient == "exact" else (a,)
    others = (b, c, z) if gradient == "exact" else (b.detach(), c.detach(), z.detach())
    G = resolvent_diagonal(a, *others, gradient=gradient, grad_blend=grad_blend)
    cotangents = torch.randn(3, *G.shape, dtype=G.dtype)
    grad = lambda x, **options: torch.autograd.grad(G, wanted, x, retain_graph=True, **options)  # noqa: E731
    expected = [torch.stack(x) for x in zip(*map(grad, cotangents), strict=True)]
    found = grad(cotangents, is_grads_batched=True, create_graph=create_graph)
    mapped = torch.func.vmap(grad)(cotangents)
    for x, y, z_ in zip(expected, found, mapped, strict=True):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(z_, x)
    if create_graph:
        second = torch.autograd.grad(sum(x.abs().sum() for x in found), wanted, retain_graph=True)
        singly = [torch.autograd.grad(G, wanted, x, create_graph=True) for x in cotangents]
        total = sum(x.abs().sum() for x in itertools.chain(*singly))
        for x, y in zip(second, torch.autograd.grad(total, wanted), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("gradient", "grad_blend"), [("local", 0.0), ("exact", 0.5)])
def test_forward_over_reverse_differentiates_the_chosen_direction(gradient, grad_blend):
    a = leaves(4)[0].detach()
    direction = torch.randn_like(a)

    def grad(x):
        G = resolvent_diagonal(x, 1.0, 0.5, 1j, gradient=gradient, grad_blend=grad_blend)
        return torch.autograd.grad(G.abs().sum(), x)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(
            grad(forward_ad.make_dual(a.clone().requires_grad_(), direction))
        ).tangent
    moved = [grad((a + s * direction).requires_grad_()) for s in (1e-6, -1e-6)]
    torch.testing.assert_close(found, (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-8)
