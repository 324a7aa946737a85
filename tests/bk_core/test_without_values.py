"""The operator and the layer where values cannot be asked for, or change under a compiler: meta, fake, traced, compiled."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bklm.bk_core import BKCore, available_backends, resolvent_diagonal


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def test_one_compiled_function_serves_layers_of_every_eta():
    compiled = torch.compile(lambda core, v: core(v), backend="eager", fullgraph=True)
    v = torch.randn(2, 5, 1)
    for eta in (1.0, 0.5, 0.25, 2, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0):
        core = BKCore(eta=eta)
        torch.testing.assert_close(compiled(core, v), core(v))


def test_a_compiled_layer_of_extreme_eta_is_computed_in_64_bits_as_the_eager_one():
    core, v = BKCore(eta=1e-15), torch.randn(2, 5, 1, requires_grad=True)
    compiled = torch.compile(core, backend="eager", fullgraph=True)
    want = torch.autograd.grad(core(v).sum(), v)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(v).sum(), v)[0], want)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_compiled_function_serves_numbers_that_change(dynamic):
    def call(a, b, c, z, blend):
        return resolvent_diagonal(a, b, c, z, grad_blend=blend)

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    for i, (b, c, z, blend) in enumerate([(1.0, 1.0, 1j, 0.5), (2.0, 0.5, 2j, 0.25), (3.0, -1.5, 3 + 1j, 0.1)]):
        a = torch.randn(3, 6 + i, requires_grad=True)
        found, want = compiled(a, b, c, z, blend), call(a, b, c, z, blend)
        torch.testing.assert_close(found, want)
        for x, y in zip(*(torch.autograd.grad(g.real.sum(), a) for g in (found, want)), strict=True):
            torch.testing.assert_close(x, y)


ARGUMENTS = {
    "numbers": lambda a: (1.0, 1.0, 1j),
    "z a tensor": lambda a: (1.0, 1.0, torch.full(a.shape[:-1], 1j, dtype=torch.complex64)),
    "b and c tensors": lambda a: (torch.ones_like(a[:, 1:]), torch.ones_like(a[:, 1:]) + 1, 1j),
    "all tensors, complex": lambda a: (
        a[:, 1:] * 1j,
        a[:, 1:] * (2 + 1j),
        torch.full((), 3j, dtype=torch.complex64),
    ),
    "b a vector": lambda a: (torch.ones(a.shape[-1] - 1), 1.0, 1j),
}


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("how", ["meta", "fake"])
def test_the_operator_has_shapes_and_gradients_without_values(how, kind, causal, pivot):
    mode = torch.device("meta") if how == "meta" else FakeTensorMode()
    with mode:
        a = torch.empty(2, 5, requires_grad=True)
        result = resolvent_diagonal(a, *ARGUMENTS[kind](a), causal=causal, return_min_pivot=pivot)
        G = result[0] if pivot else result
        assert (G.shape, G.dtype, G.device.type) == (
            (2, 5),
            torch.complex64,
            "meta" if how == "meta" else "cpu",
        )
        if pivot:
            assert (result[1].shape, result[1].dtype) == ((2,), torch.float32)
        (first,) = torch.autograd.grad(G.real.sum(), a)
        assert (first.shape, first.dtype) == ((2, 5), torch.float32)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_the_operator_is_traced(backend, causal):
    def call(a, b, z):
        return resolvent_diagonal(a, b, 0.5, z, causal=causal, backend=backend)

    def arguments():
        return torch.randn(2, 7), torch.rand(6), torch.randn(2) + 1j

    traced = torch.jit.trace(call, arguments(), check_trace=False)
    given = arguments()
    torch.testing.assert_close(traced(*given), call(*given))


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.complex32, torch.float16, torch.bfloat16])
def test_every_short_type_is_computed_in_32_bits(backend, dtype):
    a = (torch.randn(2, 5) + (1j if dtype.is_complex else 0)).to(dtype).requires_grad_()
    wide = a.detach().to(torch.complex64 if dtype.is_complex else torch.float32).requires_grad_()
    G, want = (resolvent_diagonal(x, 1.0, 0.5, 2j, backend=backend) for x in (a, wide))
    assert torch.equal(G, want)
    (found,), (right,) = (torch.autograd.grad(g.real.sum(), x) for g, x in ((G, a), (want, wide)))
    assert found.dtype == dtype
    assert torch.equal(found.to(right.dtype), right.to(dtype).to(right.dtype))
    z = torch.tensor(2j, dtype=torch.complex64).to(torch.complex32)
    assert torch.equal(resolvent_diagonal(wide, 1.0, 0.5, z, backend=backend), want)


@pytest.fixture
def other_default_device():
    """A default device on which nothing has a value, so that a tensor made there by mistake shows."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [9, 2000])
@pytest.mark.parametrize("complex_a", [False, True])
@pytest.mark.usefixtures("other_default_device")
def test_the_operator_on_the_cpu_does_not_mind_another_default_device(backend, causal, n, complex_a):
    with torch.device("cpu"):
        a = torch.randn(2, n, dtype=torch.complex64 if complex_a else torch.float32, requires_grad=True)
        b = torch.rand(n - 1, requires_grad=True)
    if backend == "reference" and n > 9:
        return
    G, pivot = resolvent_diagonal(a, b, 0.5, 2j, causal=causal, backend=backend, return_min_pivot=True)
    G.abs().sum().backward()
    assert {x.device.type for x in (G, pivot, a.grad, b.grad)} == {"cpu"}
    assert G.abs().sum().isfinite()
