"""What torch.func and torch.compile make of both operators, on each backend by name: plain autograd's numbers.

test_gpu.py runs this file, too, where Triton is usable.
"""

import pytest
import torch

from bklm.bk_core import available_backends, resolvent_diagonal, resolvent_solve

F64 = torch.float64


def problem(operator, backend, causal):
    """(f, inputs): the operator of a (2, 5) and b (4,), real, and for the solve of x (2, 5, 3) besides."""
    g = torch.Generator().manual_seed(3)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    drawn = torch.randn(2, 5, generator=g), torch.rand(4, generator=g), torch.randn(2, 5, 3, generator=g)
    a, b, x = (t.to(device, F64) for t in drawn)
    options = {"causal": causal, "backend": backend}
    if operator == "diagonal":
        return lambda a, b: resolvent_diagonal(a, b, 0.5, 0.3 + 1j, **options), (a, b)
    return lambda a, b, x: resolvent_solve(x, a, b, 0.5, 0.3 + 1j, **options), (a, b, x)


def loss_of(f):
    return lambda *inputs: torch.view_as_real(f(*inputs)).square().sum()


def plain(f, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss_of(f)(*leaves), leaves)


@pytest.fixture(
    params=[(o, b, c) for o in ("diagonal", "solve") for b in available_backends() for c in (False, True)],
    ids=str,
)
def case(request):
    operator, _, causal = request.param
    expected = plain(*problem(operator, "auto", causal))
    f, inputs = problem(*request.param)
    return f, inputs, tuple(t.to(inputs[0].device) for t in expected)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_grad_of_torch_func(case):
    f, inputs, expected = case
    assert_close(torch.func.grad(loss_of(f), argnums=tuple(range(len(inputs))))(*inputs), expected)


def test_compiled_gradients(case):
    f, inputs, expected = case
    assert_close(plain(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs), expected)


def test_vmap_of_grad_gives_each_rows_gradient(case):
    f, (a, b, *more), expected = case
    per_row = torch.func.vmap(
        torch.func.grad(loss_of(f), argnums=(0, 1)), in_dims=(0, None, *(0 for _ in more))
    )
    of_a, of_b = per_row(a, b, *more)
    assert_close((of_a, of_b.sum(0)), expected[:2])


def test_jacobians_by_forward_and_by_reverse_mode(case):
    f, inputs, _ = case

    def real(*inputs):
        return torch.view_as_real(f(*inputs))

    which = tuple(range(len(inputs)))
    assert_close(torch.func.jacrev(real, which)(*inputs), torch.func.jacfwd(real, which)(*inputs))


def test_hessian_against_finite_differences_of_the_gradient(case):
    f, (a, *more), _ = case
    direction, step = torch.randn_like(a), 1e-6

    def gradient(a):
        return torch.func.grad(loss_of(f))(a, *more)

    _, product = torch.func.jvp(gradient, (a,), (direction,))
    moved = gradient(a + step * direction) - gradient(a - step * direction)
    torch.testing.assert_close(product, moved / (2 * step), rtol=1e-5, atol=1e-6)


def test_vmap_over_no_rows_is_empty(case):
    f, (a, b, *more), _ = case
    mapped = torch.func.vmap(torch.func.grad(loss_of(f)), in_dims=(0, None, *(0 for _ in more)))
    assert mapped(a[:0, None], b, *(t[:0, None] for t in more)).shape == (0, 1, 5)
