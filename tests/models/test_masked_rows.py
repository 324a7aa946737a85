"""A target of -100 leaves its row out whatever the row holds: loss, gradients, scores and evaluation are those without it."""

import pytest
import torch
from every_model import MODELS, V
from torch.nn import functional as F

from bklm.models import linear_cross_entropy, linear_token_losses
from bklm.training.evaluation import evaluate

D, M = 6, 9
SPOILS = {"NaN": float("nan"), "infinity": float("inf"), "an overflow": 3e38, "minus infinity": -float("inf")}
MASKS = {"one": [3], "first and last": [0, 8], "most": [0, 1, 2, 4, 5, 7, 8], "none": []}
BOTH = "ResNetBK that reads, dense, both directions"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def problem(masked, value):
    """(hidden, weight, bias, targets, which rows count), the rows left out spoilt."""
    hidden, weight, bias = (
        torch.randn(M, D),
        torch.randn(V, D).requires_grad_(),
        torch.randn(V).requires_grad_(),
    )
    targets = torch.randint(0, V, (M,))
    kept = torch.tensor([i for i in range(M) if i not in masked])
    targets[masked], hidden[masked] = -100, value
    return hidden.requires_grad_(), weight, bias, targets, kept


def expected(hidden, weight, bias, targets, kept, reduction):
    rows = hidden.detach()[kept].requires_grad_()
    loss = F.cross_entropy(F.linear(rows, weight, bias), targets[kept], reduction=reduction)
    inputs = (rows, weight) if bias is None else (rows, weight, bias)
    d_rows, *others = torch.autograd.grad(loss, inputs)
    d_hidden = torch.zeros_like(hidden)
    d_hidden[kept] = d_rows
    return loss, [d_hidden, *others]


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_are_those_of_the_other_rows(with_bias, spoil, masked, reduction, chunk_rows):
    hidden, weight, bias, targets, kept = problem(MASKS[masked], SPOILS[spoil])
    bias = bias if with_bias else None
    want, right = expected(hidden, weight, bias, targets, kept, reduction)
    options = {"reduction": reduction, "chunk_rows": chunk_rows}
    loss = linear_cross_entropy(hidden, weight, bias, targets, **options)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, inputs), right, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, targets, **options), want)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoilt_row_changes_no_bit_of_what_a_sound_one_would_give(spoil):
    found = []
    for value in (1.0, SPOILS[spoil]):
        torch.manual_seed(0)
        hidden, weight, bias, targets, _ = problem([2, 5], value)
        loss = linear_cross_entropy(hidden, weight, bias, targets)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("spoil", SPOILS)
def test_second_derivatives_and_transforms_leave_the_row_out_too(spoil):
    hidden, weight, bias, targets, kept = problem([3, 8], SPOILS[spoil])
    rows = hidden.detach()[kept]

    def products(function):
        g = torch.autograd.grad(function(), (weight, bias), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in g), (weight, bias))

    found = products(lambda: linear_cross_entropy(hidden, weight, bias, targets))
    want = products(lambda: F.cross_entropy(F.linear(rows, weight, bias), targets[kept]))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    by_row = torch.func.vmap(
        torch.func.grad(
            lambda w, h, t: linear_cross_entropy(h[None], w, bias.detach(), t[None], reduction="sum")
        ),
        (None, 0, 0),
    )(weight.detach(), hidden.detach(), targets)
    assert not by_row[[3, 8]].any()
    torch.testing.assert_close(
        by_row.sum(0), expected(hidden, weight, bias, targets, kept, "sum")[1][1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spoil", SPOILS)
def test_half_precision_leaves_the_row_out_too(spoil):
    hidden, weight, bias, targets, kept = problem([3], SPOILS[spoil])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    want, right = expected(hidden, weight, bias, targets, kept, "mean")
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0.05)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight, bias)), right, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


def test_a_word_that_a_bias_forbids_does_not_spoil_rows_that_are_left_out():
    """Word 0 stands in for a target that is left out."""
    hidden, weight, bias, targets, kept = problem([2], 1.0)
    with torch.no_grad():
        bias[0] = -float("inf")
    targets[kept] = targets[kept].clamp_min(1)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    want, right = expected(hidden, weight, bias, targets, kept, "mean")
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight, bias)), right, strict=True):
        torch.testing.assert_close(a, b)
    assert linear_token_losses(hidden, weight, bias, targets).nll.isfinite().all()


@pytest.mark.parametrize("spoil", ["NaN", "an overflow"])
@pytest.mark.parametrize("name", MODELS)
def test_every_models_loss_and_scores_leave_the_row_out(name, spoil):
    model = MODELS[name]().eval()
    ids, targets = torch.randint(0, V, (3, 6)), torch.randint(0, V, (3, 6))
    targets[0, 4:] = targets[2, 0] = -100
    valid, body = targets != -100, model.hidden

    def spoilt(ids):
        hidden = body(ids)
        left_out = (targets if len(ids) == 3 else targets[:0])[:, : ids.shape[1]] == -100
        return hidden.masked_fill(left_out.unsqueeze(-1), SPOILS[spoil]) if len(ids) == 3 else hidden

    want_loss = model.loss(ids, targets)
    learning = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(want_loss, learning, allow_unused=True)
    want_scores = model.token_losses(ids, targets)
    want_evaluation = evaluate(model, [(ids, targets)], 1)
    model.hidden = spoilt
    loss = model.loss(ids, targets)
    assert torch.equal(loss, want_loss)
    for a, b in zip(torch.autograd.grad(loss, learning, allow_unused=True), want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    scores = model.token_losses(ids, targets)
    assert all(torch.equal(a, b) for a, b in zip(scores, want_scores, strict=True))
    assert not scores.nll[~valid].any()
    assert not scores.correct[~valid].any()
    assert evaluate(model, [(ids, targets)], 1) == want_evaluation


def test_a_model_that_sees_the_future_is_scored_without_padding_behind_the_text():
    """The last window of a text is padded; what the padding is must not show in the score, nor that it is there."""
    model = MODELS[BOTH]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ids, targets = torch.randint(0, V, (4, 6)), torch.randint(0, V, (4, 6))
    targets[1, 4:] = targets[3, 2:] = -100
    targets[0, 1] = -100  # in the middle: text, not padding
    lengths = {0: 6, 1: 4, 2: 6, 3: 2}
    pieces = [(ids[r : r + 1, :n], targets[r : r + 1, :n]) for r, n in lengths.items()]
    alone = evaluate(model, pieces, 1)
    for padding in (0, 7):
        ids[1, 4:] = ids[3, 2:] = padding
        found = evaluate(model, [(ids, targets)], 1)
        assert found.tokens == alone.tokens == 17
        assert found.correct == alone.correct
        assert found.nll == pytest.approx(alone.nll, rel=1e-6)
    shown = model.token_losses(ids, targets).nll.sum()
    assert abs(float(shown) - alone.nll) > 1e-4


def test_a_row_of_padding_alone_is_no_row():
    model = MODELS[BOTH]().eval()
    ids, targets = torch.randint(0, V, (2, 6)), torch.randint(0, V, (2, 6))
    one = evaluate(model, [(ids[:1], targets[:1])], 1)
    targets[1] = -100
    assert evaluate(model, [(ids, targets)], 1) == one
