"""The chunked loss is the whole-logits cross-entropy: value, gradients, masking, precision, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bklm.models import linear_cross_entropy, linear_token_losses
from bklm.models import loss as loss_module


def problem(rows, width, vocabulary, *, dtype=torch.float64, ignored=0.0, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g, dtype=dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=g, dtype=dtype).requires_grad_() if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    return hidden, weight, offset, targets


def whole(hidden, weight, bias, targets, reduction="mean"):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)


def leaves(*tensors):
    return [t for t in tensors if t is not None]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    chunk_rows=st.integers(1, 80),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_equals_cross_entropy_of_whole_logits_with_its_gradients(
    rows, width, vocabulary, chunk_rows, ignored, bias, reduction, seed
):
    h, w, b, t = problem(rows, width, vocabulary, ignored=ignored, bias=bias, seed=seed)
    if (t == -100).all():
        t[0] = 0
    expected = whole(h, w, b, t, reduction)
    got = linear_cross_entropy(h, w, b, t, reduction=reduction, chunk_rows=chunk_rows)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves(h, w, b)),
        torch.autograd.grad(expected, leaves(h, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck_against_finite_differences():
    h, w, b, t = problem(7, 3, 5, ignored=0.3)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, t, chunk_rows=2), (h, w, b))


def test_incoming_gradient_scales_the_result_and_a_kept_graph_can_be_used_twice():
    h, w, b, t = problem(9, 4, 11)
    total = 1024.0 * linear_cross_entropy(h, w, b, t)
    first = torch.autograd.grad(total, (h, w, b), retain_graph=True)
    second = torch.autograd.grad(total, (h, w, b))
    expected = torch.autograd.grad(1024.0 * whole(h, w, b, t), (h, w, b))
    for a, c, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen):
    h, w, b, t = problem(6, 3, 5)
    named = {"hidden": h, "weight": w, "bias": b}
    named[frozen].requires_grad_(False)
    linear_cross_entropy(h, w, b, t, chunk_rows=4).backward()
    expected = {n: x.grad for n, x in named.items()}
    for x in named.values():
        x.grad = None
    whole(h, w, b, t).backward()
    assert expected[frozen] is None
    for name, x in named.items():
        if name != frozen:
            torch.testing.assert_close(expected[name], x.grad)


def test_finite_where_the_probability_of_the_target_underflows():
    h = torch.tensor([[200.0]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]])
    t = torch.tensor([1])
    got = linear_cross_entropy(h, w, None, t)
    assert got.item() == 400.0
    got.backward()
    assert h.grad.item() == 2.0


def test_float32_gradients_are_those_of_double_to_rounding():
    h, w, b, t = problem(500, 16, 300, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    reference = torch.autograd.grad(whole(*exact, t), exact)
    ours = torch.autograd.grad(linear_cross_entropy(h, w, b, t, chunk_rows=64), (h, w, b))
    for r, a in zip(reference, ours, strict=True):
        assert (a - r).norm() <= 1e-6 * r.norm()


@pytest.mark.parametrize("under_autocast", [True, False])
def test_half_precision_products_leave_sums_and_gradients_in_float32(under_autocast):
    h, w, b, t = problem(300, 16, 50, dtype=torch.float32, ignored=0.2)
    if not under_autocast:
        h = h.detach().bfloat16().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    reference = whole(*exact, t)
    expected = torch.autograd.grad(reference, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
        got = linear_cross_entropy(h, w, b, t, chunk_rows=37)
    grads = torch.autograd.grad(got, (h, w, b))
    assert got.dtype == torch.float32
    assert abs(got.item() - reference.item()) < 2e-3 * reference.item()
    for x, g, e in zip((h, w, b), grads, expected, strict=True):
        assert g.dtype == x.dtype
        assert (g.double() - e).norm() < 1e-2 * e.norm()


def test_autocast_leaves_double_alone():
    h, w, b, t = problem(20, 4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(h, w, b, t)
    torch.testing.assert_close(got, whole(h, w, b, t))


def test_no_allocation_comes_near_the_size_of_the_logits():
    rows, vocabulary = 2048, 4096
    h, w, b, t = problem(rows, 8, vocabulary, dtype=torch.float32)

    def largest_allocation(step):
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        return max(e.self_cpu_memory_usage for e in profile.events())

    logits_bytes = rows * vocabulary * 4
    assert largest_allocation(lambda: whole(h, w, b, t).backward()) >= logits_bytes
    assert (
        largest_allocation(lambda: linear_cross_entropy(h, w, b, t, chunk_rows=64).backward())
        <= logits_bytes / 16
    )


def test_default_chunk_stays_within_its_budget_and_keeps_some_rows():
    for vocabulary in (2, 30_000, 50_257, 10_000_000):
        rows = loss_module._rows_per_chunk(torch.empty(vocabulary, 1))
        assert rows >= 16
        assert rows == 16 or rows * vocabulary * 4 <= loss_module.CPU_CHUNK_BYTES


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_token_losses_are_the_terms_of_the_loss(shape):
    h, w, b, t = problem(12, 4, 9, ignored=0.3)
    h, t = h.detach().view(*shape, 4), t.view(shape)
    nll, correct = linear_token_losses(h, w, b, t, chunk_rows=5)
    logits = F.linear(h, w, b)
    expected = F.cross_entropy(logits.flatten(0, -2), t.flatten(), reduction="none").view(shape)
    assert nll.shape == correct.shape == shape
    assert not nll.requires_grad
    torch.testing.assert_close(nll, expected)
    assert torch.equal(correct, logits.argmax(-1) == t)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(h, w, b, t, chunk_rows=5), whole(h.flatten(0, -2), w, b, t.flatten())
        )


def test_sum_over_no_target_is_zero_and_the_mean_is_refused():
    h, w, b, t = problem(5, 3, 4)
    t[:] = -100
    total = linear_cross_entropy(h, w, b, t, reduction="sum")
    assert total.item() == 0.0
    assert all((g == 0).all() for g in torch.autograd.grad(total, (h, w, b)))
    with pytest.raises(ValueError, match="all 5 are -100"):
        linear_cross_entropy(h, w, b, t)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "int64"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, ValueError, "shape"),
        ({"weight": torch.zeros(4, 2, dtype=torch.float64)}, ValueError, "head"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, ValueError, "head"),
        ({"reduction": "none"}, ValueError, "'mean' and 'sum'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    h, w, b, t = problem(5, 3, 4)
    given = {"hidden": h, "weight": w, "bias": b, "targets": t, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("outside", [-1, 10])
def test_a_target_outside_the_vocabulary_is_refused(outside):
    targets = torch.zeros(20, dtype=torch.int64)
    targets[3] = outside
    with pytest.raises(IndexError, match=f"targets: got {outside}; a vocabulary of 10 has 0 to 9"):
        linear_cross_entropy(
            torch.randn(20, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True), None, targets
        )
