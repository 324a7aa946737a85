"""The operator inside torch: torch.library, torch.compile, torch.func, autocast, inference mode, deep copies of flags."""

import pytest
import torch

from bklm.bk_core import BKCore, ops, resolvent_diagonal

DIRECTIONS = [("exact", 0.0), ("exact", 0.4), ("local", 0.3), ("original", 1.0)]


def rows(causal, gradient, grad_blend):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, dtype=torch.float64, generator=g).requires_grad_()
    k = torch.rand(3, 4, dtype=torch.float64, generator=g).requires_grad_(gradient == "exact")
    z = (torch.randn(3, dtype=torch.complex128, generator=g) + 2j).requires_grad_(gradient == "exact")
    return a, k, z, causal, gradient, grad_blend, "auto"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("gradient", "grad_blend"), DIRECTIONS)
def test_opcheck_of_the_operator(causal, gradient, grad_blend):
    torch.library.opcheck(ops.resolvent_diagonal, rows(causal, gradient, grad_blend))


def check_backward(causal, gradient, grad_blend, **which):
    arguments = rows(causal, gradient, grad_blend)
    G = ops.resolvent_diagonal(*arguments).detach()
    gbar = torch.randn(3, 5, dtype=torch.complex128)
    needs = (gradient == "exact",) * 2
    torch.library.opcheck(
        ops.resolvent_diagonal_backward, (gbar, *arguments[:3], G, *arguments[3:], *needs), **which
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("gradient", "grad_blend"), DIRECTIONS)
def test_opcheck_of_the_backward(causal, gradient, grad_blend):
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    check_backward(causal, gradient, grad_blend, test_utils=quick)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "grad_blend", "causal"),
    [("exact", 0.4, False), ("exact", 0.4, True), ("local", 0.3, False), ("original", 1.0, True)],
)
def test_opcheck_of_the_backward_traces_its_own_derivatives(causal, gradient, grad_blend):
    check_backward(causal, gradient, grad_blend)


@pytest.mark.parametrize("causal", [False, True])
def test_compile_without_a_graph_break_and_with_equal_gradients(causal):
    def f(a, b, z):
        return (resolvent_diagonal(a, b, b, z, causal=causal).conj() * (1 + 2j)).real.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for call in (f, compiled):
        a, b, z = torch.linspace(-1, 1, 12).view(2, 6), torch.linspace(0.2, 1, 5), torch.tensor([1j, 0.3 + 2j])
        inputs = [x.clone().requires_grad_() for x in (a, b, z)]
        value = call(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_a_compiled_layer_equals_the_eager_one_with_inductor(causal):
    core = BKCore(2, causal=causal)
    compiled = torch.compile(core, fullgraph=True)
    v = torch.randn(2, 9, 2, requires_grad=True)
    eager = torch.autograd.grad(core(v).square().sum(), v)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(v).square().sum(), v)[0], eager)


def test_compiled_calls_refuse_bad_values_too():
    compiled = torch.compile(
        lambda a, z: resolvent_diagonal(a, 1.0, 1.0, z), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="Im z != 0"):
        compiled(torch.zeros(2, 3), torch.tensor([1j, 1.0]))


def pivots_of(a, b, causal):
    return resolvent_diagonal(a, b, -1.0, 1j, causal=causal, return_min_pivot=True)


@pytest.mark.parametrize("causal", [False, True])
def test_smallest_pivots_are_returned_under_vmap_and_compile_and_raise_nothing(causal):
    a, b = torch.full((4, 3, 5), 3.0), torch.ones(4)
    a[2, 1] = 0.0  # k = -1, z = i: the second pivot vanishes
    expected = pivots_of(a, b, causal)
    assert (expected[1] == 0).sum() == 1
    mapped = torch.func.vmap(lambda x: pivots_of(x, b, causal))(a)
    compiled = torch.compile(lambda a, b: pivots_of(a, b, causal), fullgraph=True, backend="aot_eager")(a, b)
    for found in (mapped, compiled):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_numbers_of_every_type_are_compiled():
    f = torch.compile(lambda a: resolvent_diagonal(a, 2, 0.5, 1j), fullgraph=True, backend="aot_eager")
    a = torch.randn(2, 5)
    torch.testing.assert_close(f(a), resolvent_diagonal(a, 1.0, 1.0, 1j))


@pytest.mark.parametrize("causal", [False, True])
def test_vmap_equals_the_batched_call(causal):
    a, z = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, dtype=torch.complex128) + 2j
    b = torch.rand(4, 6, dtype=torch.float64)
    mapped = torch.func.vmap(
        lambda a, b, z: resolvent_diagonal(a, b, 0.5, z, causal=causal), in_dims=(0, 1, 0)
    )(a, b, z)
    torch.testing.assert_close(mapped, resolvent_diagonal(a, b.T[:, None], 0.5, z[:, None], causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_per_sample_gradients_by_vmap_of_grad(causal):
    a, b = torch.randn(4, 2, 5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def loss(a, b):
        return resolvent_diagonal(a, b, b, 1j, causal=causal).abs().sum()

    grad_a, grad_b = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(a, b)
    for i in range(4):
        one_a, one_b = a[i].clone().requires_grad_(), b.clone().requires_grad_()
        expected = torch.autograd.grad(loss(one_a, one_b), (one_a, one_b))
        torch.testing.assert_close((grad_a[i], grad_b[i]), expected)


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_hessians_in_forward_and_reverse_mode(transform, causal):
    x = torch.linspace(0.2, 1.3, 9, dtype=torch.float64)

    def loss(x):
        return resolvent_diagonal(x[:5], x[5:], x[5:], 1j, causal=causal).abs().sum()

    torch.testing.assert_close(transform(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_autocast_does_not_lower_the_precision():
    a = torch.randn(2, 50)
    expected = resolvent_diagonal(a, 1.0, 1.0, 1j)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resolvent_diagonal(a, 1.0, 1.0, 1j), expected)
        assert BKCore()(a[..., None].bfloat16()).dtype == torch.float32


def test_constants_made_in_inference_mode_do_not_spoil_training():
    a = torch.randn(1, 77)
    with torch.inference_mode():
        resolvent_diagonal(a, 0.625, 0.75, 0.125 + 0.3j)
    leaf = a.clone().requires_grad_()
    resolvent_diagonal(leaf, 0.625, 0.75, 0.125 + 0.3j).abs().sum().backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("flagged", [torch.conj, lambda x: torch.complex(x.conj().imag, x.real)])
def test_lazily_conjugated_gradients_are_read_correctly(flagged):
    a = torch.randn(2, 40, dtype=torch.float64)
    gbar = torch.randn(2, 40, dtype=torch.complex128)
    grads = []
    for weight in (flagged(gbar), flagged(gbar).resolve_conj().clone()):
        leaf = a.clone().requires_grad_()
        resolvent_diagonal(leaf, 1.0, 1.0, 1j).backward(weight)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_repeated_calls_give_the_same_bits():
    a = torch.randn(5, 3000, requires_grad=True)
    first, second = (
        torch.autograd.grad(resolvent_diagonal(a, 1.0, 1.0, 1j).abs().sum(), a)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
