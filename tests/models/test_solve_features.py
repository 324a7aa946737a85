"""The mixer's features in one pass equal those of the operator and torch, with every gradient to any order."""

import time

import pytest
import torch
from comparing import assert_exceeds

from bklm.bk_core.cpu.jit import SUMS
from bklm.models import solve_features as module
from bklm.models.exponential import exponential
from bklm.models.solve_features import is_fused, plain_features, solve_features

# Sequences, positions, heads, channels of a head.
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 130, 2, 16), (3, 40, 8, 28)]


def inputs_of(batch, length, heads, width, dtype=torch.float64):
    torch.manual_seed(0)
    read = 2 * torch.randn(batch, length, 2 * heads * width + 2 * heads, dtype=dtype)
    return read.requires_grad_(), (3 * torch.rand(heads, dtype=dtype) - 3).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("threads", [1, 2])
def test_features_and_gradients_equal_the_plain_ones(shape, dtype, tolerance, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = inputs_of(*shape, dtype)
    out, _ = solve_features(*given)
    exact = [t.detach().double().requires_grad_() for t in given]
    want = plain_features(*exact)
    o = torch.randn_like(out)
    found = torch.autograd.grad(out, given, o)
    expected = torch.autograd.grad(want, exact, o.double())
    for a, b in zip((out, *found), (want, *expected), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_the_state_is_what_the_operator_ends_with():
    read, log_eta = inputs_of(2, 9, 3, 4)
    _, state = solve_features(read, log_eta)
    short, longer = (solve_features(read[:, :n], log_eta)[1] for n in (8, 9))
    assert torch.equal(state.y, longer.y)
    bond = torch.sigmoid(read[:, 8, -3:])
    z = 1j * log_eta.exp()
    left = 1 / (read[:, 8, -6:-3] - z - bond**2 * short.left)
    torch.testing.assert_close(state.left, left)
    values = read[:, 8, :12].view(2, 3, 4)
    torch.testing.assert_close(state.y, left[..., None] * (values - bond[..., None] * short.y))


def test_second_derivatives_are_right():
    given = inputs_of(2, 4, 2, 3)
    assert torch.autograd.gradgradcheck(lambda *t: solve_features(*t)[0], given)


def test_batched_and_transformed_calls_take_the_plain_road(monkeypatch):
    read, log_eta = inputs_of(2, 5, 2, 3)
    out, _ = solve_features(read, log_eta)
    o = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, read, o, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = torch.stack([torch.autograd.grad(out, read, g, retain_graph=True)[0] for g in o])
    torch.testing.assert_close(batched, one_by_one)
    assert not is_fused(read.bfloat16(), log_eta)
    assert not is_fused(read.float(), log_eta)
    monkeypatch.setattr(module.kernels, "forward", None)
    seen = torch.vmap(lambda r: torch.tensor(1.0) if is_fused(r, log_eta) else torch.tensor(0.0))(read)
    assert seen.sum() == 0


@pytest.mark.parametrize("fastmath", [False, SUMS], ids=["strict", "sums"])
def test_the_kernels_exponential_is_within_two_rounding_errors(fastmath):
    numba = pytest.importorskip("numba")

    @numba.njit(fastmath=fastmath)
    def all_of(x, out):
        for i in range(len(x)):
            out[i] = exponential(x[i])

    x = torch.linspace(-87, 87, 100_001)
    out = torch.empty_like(x)
    all_of(x.numpy(), out.numpy())
    assert (out / x.double().exp() - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps
    edges = torch.tensor([-torch.inf, -1e4, 1e4, torch.nan])
    all_of(edges.numpy(), out[:4].numpy())
    assert out[0] < 1e-37
    assert out[1] < 1e-37
    assert out[2] > 1e38
    assert out[3].isnan()


@pytest.mark.speed
def test_one_pass_is_faster_than_the_operator_and_torch():
    given = inputs_of(4, 256, 8, 28, torch.float32)
    roads = {"fused": lambda *t: solve_features(*t)[0], "plain": plain_features}

    def ratio():
        seconds = {name: [] for name in roads}
        for _ in range(6):
            for name, road in roads.items():
                start = time.perf_counter()
                out = road(*given)
                torch.autograd.grad(out, given, out)
                seconds[name].append(time.perf_counter() - start)
        return min(seconds["plain"]) / min(seconds["fused"])

    # Four times on a quiet machine.
    assert_exceeds(ratio, 1.5)


def test_a_batch_without_rows_has_features_and_gradients():
    read, log_eta = torch.randn(0, 3, 12, requires_grad=True), torch.zeros(2, requires_grad=True)
    features, _ = solve_features(read, log_eta)
    assert features.shape == plain_features(read, log_eta).shape
    features.sum().backward()
    assert torch.equal(log_eta.grad, torch.zeros(2))
