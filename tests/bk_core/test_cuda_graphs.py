"""While a CUDA graph is captured no value may be asked for: the guards, which a CPU can test, and the capture on a GPU."""

import pytest
import torch

from bklm.bk_core import BKCore, arguments, pivots, resolvent_diagonal
from bklm.moe.layer import AnalyticMoE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def capturing(monkeypatch):
    """As if a graph were captured, on whatever device."""
    monkeypatch.setattr(pivots, "is_capturing", lambda device: True)


def test_only_a_gpu_captures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pivots.is_capturing(CUDA)
    assert not pivots.is_capturing(CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not pivots.is_capturing(CUDA)


class Unreadable(torch.Tensor):
    """A tensor whose values may not be asked for."""

    def __bool__(self):
        raise AssertionError("a value was asked for")

    __int__ = __float__ = item = tolist = __bool__


def unreadable(x):
    return x.as_subclass(Unreadable)


@pytest.mark.usefixtures("capturing")
def test_checks_ask_for_no_value_while_a_graph_is_captured():
    z = unreadable(torch.zeros(2, dtype=torch.complex64))
    assert pivots.check_shift(z)
    a, k = unreadable(torch.zeros(2, 5)), unreadable(-torch.ones(1, 4))
    pivots.check(a, k, z, z, True, None)


def test_the_stand_in_for_a_captured_tensor_does_refuse_to_be_read():
    for check in (
        lambda: pivots.check_shift(unreadable(torch.zeros(2, dtype=torch.complex64))),
        lambda: pivots.check(
            unreadable(torch.zeros(2, 5)), unreadable(-torch.ones(1, 4)), None, None, True, None
        ),
    ):
        with pytest.raises(AssertionError, match="a value was asked for"):
            check()


@pytest.mark.usefixtures("capturing")
def test_constants_made_while_a_graph_is_captured_are_not_kept():
    arguments._cached_constant.cache_clear()
    resolvent_diagonal(torch.randn(2, 5), 1.0, 1.0, 1j)
    assert arguments._cached_constant.cache_info().currsize == 0


def test_the_mixture_says_in_a_sentence_that_it_cannot_be_captured(monkeypatch):
    monkeypatch.setattr("bklm.moe.analytic.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*torch\.compile") as caught:
        AnalyticMoE(8)(torch.randn(3, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_a_captured_layer_gives_the_eager_numbers_for_new_input(kind):
    core = BKCore(2)
    v = torch.randn(3, 40, 2, device="cuda")
    z = torch.full((3,), 1j, dtype=torch.complex64, device="cuda")
    b = torch.rand(39, device="cuda")

    def call():
        return core(v) if kind == "numbers" else torch.view_as_real(resolvent_diagonal(v[..., 0], b, b + 1, z))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    arguments._cached_constant.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    v.copy_(torch.randn_like(v))
    graph.replay()
    torch.testing.assert_close(out, call())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_mixture_is_refused_on_a_gpu():
    moe, x = AnalyticMoE(8).cuda().eval(), torch.randn(30, 8, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        moe(x)
