"""The short convolution: torch's conv1d in one pass over rows."""

import pytest
import torch

from bklm.bk_core.cpu import threads
from bklm.models import short_convolution as module
from bklm.models.short_convolution import BLOCK, plain_convolution, short_convolution


@pytest.mark.parametrize(
    ("shape", "width", "before"),
    [((2, 1, 3), 4, 3), ((1, 2 * BLOCK + 5, 2), 4, 3), ((2, 9, 5), 3, 1), ((2, 7, 4), 1, 0), ((1, 3, 2), 5, 2)],
)
def test_it_is_conv1d_with_its_gradients_to_second_order(shape, width, before):
    torch.manual_seed(0)
    d = shape[2]
    given = torch.randn(shape), torch.randn(d, 1, width), torch.randn(d)
    results = []
    for function in (short_convolution, plain_convolution):
        leaves = [t.double().requires_grad_() for t in given]
        # A slice, whose rows lie apart.
        x = torch.cat((leaves[0], leaves[0]), -1)[..., :d]
        out = function(x, *leaves[1:], before)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        first = torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)
        again = torch.autograd.grad((out.square() * weights).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in again), leaves)
        results.append([out, *first, *again, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_many_threads_and_one_give_the_same_bits(monkeypatch):
    x, weight, bias = torch.randn(3, 300, 40), torch.randn(40, 1, 4), torch.randn(40)
    before, results, shares = torch.get_num_threads(), [], []
    split = threads.split

    def counted(kernel, n, worth_it):
        parts = []
        split(lambda first, last: parts.append(first) or kernel(first, last), n, worth_it)
        shares.append(len(parts))

    monkeypatch.setattr(threads, "split", counted)
    monkeypatch.setattr(module, "THREADS_FROM", 0)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = weight.clone().requires_grad_()
            out = short_convolution(x, leaf, bias, 3)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    finally:
        torch.set_num_threads(before)
    assert shares[:2] == [1, 1]
    assert min(shares[2:]) >= 3, "the work was not shared"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
