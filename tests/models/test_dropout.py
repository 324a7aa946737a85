"""Dropout of 16-bit draws: the right share is dropped, what stays is scaled, and the gradient is the mask's."""

import pytest
import torch
from torch.nn import functional as F

from bklm.models.dropout import add_dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_p_is_dropped_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 301)
    y = dropout(x, p, True)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-3)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    added = add_dropout(x, 2 * x, p, True) - 1
    assert added.mean().item() == pytest.approx(2.0, abs=0.03)
    assert (added == 0).double().mean().item() == pytest.approx(p, abs=0.005)


@pytest.mark.parametrize("function", [dropout, lambda x, p, t: add_dropout(torch.zeros_like(x), x, p, t)])
def test_the_gradient_is_that_of_the_mask(function):
    torch.manual_seed(1)
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    y = function(x, 0.3, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_the_stream_that_a_branch_is_added_to_passes_whole():
    x, branch = (torch.randn(5, 9, requires_grad=True) for _ in range(2))
    add_dropout(x, branch, 0.5, True).sum().backward()
    assert (x.grad == 1).all()


def test_outside_training_and_without_a_probability_nothing_is_drawn():
    x, state = torch.randn(4, 5), torch.random.get_rng_state()
    for p, training in ((0.5, False), (0.0, True)):
        assert torch.equal(dropout(x, p, training), x)
        assert torch.equal(add_dropout(x, x, p, training), 2 * x)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_under_compilation_it_is_torchs():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    want = F.dropout(x, 0.5, True)
    torch.manual_seed(3)
    got = torch.compile(lambda x: dropout(x, 0.5, True), backend="eager", fullgraph=True)(x)
    assert torch.equal(got, want)


def test_a_branch_of_another_shape_is_added_as_torch_does():
    torch.manual_seed(0)
    added = add_dropout(torch.ones(3), torch.ones(1000, 3), 0.5, True)
    assert set(added.unique().tolist()) == {1.0, 3.0}


def test_with_probability_1_nothing_is_left():
    assert dropout(torch.ones(100_000), 1.0, True).sum() == 0
