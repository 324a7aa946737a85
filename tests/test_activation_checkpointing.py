"""Activation checkpointing: the same gradients, tokens of experts counted once, no loss of a gradient in silence."""

import copy
import functools

import pytest
import torch
from every_model import LEARNS_COMPRESSED, MODELS, WITH_STATE, V
from torch.utils.checkpoint import checkpoint

from bklm.models import linear_cross_entropy
from bklm.moe.layer import AnalyticMoE, total_balance_loss


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def step(model, road, ids, targets, reentrant):
    torch.manual_seed(1)
    if road == "loss":
        loss = (
            checkpoint(model.loss, ids, targets, use_reentrant=reentrant)
            if reentrant is not None
            else model.loss(ids, targets)
        )
    else:
        # A reentrant checkpoint wants an input with a gradient.
        dummy = torch.ones((), requires_grad=True)
        body = model.hidden

        def hidden(x, one):
            return body(x) * one

        h = hidden(ids, dummy) if reentrant is None else checkpoint(hidden, ids, dummy, use_reentrant=reentrant)
        loss = linear_cross_entropy(h, *model.head(), targets)
        extra = model.auxiliary_loss()
        loss = loss if extra is None else loss + extra
    loss.backward()
    return loss


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("road", ["hidden", "loss"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_counts_are_those_without_it(name, road, compiled):
    # Compiled, many draw their masks otherwise.
    model = MODELS[name](0.0 if compiled else 0.2).train()
    twin, (ids, targets) = copy.deepcopy(model), torch.randint(0, V, (2, 3, 9))
    if compiled:
        for method in ("hidden", "loss"):
            setattr(model, method, torch.compile(getattr(model, method), backend="eager"))
    for reentrant in (False, False):  # twice: counts add up over steps
        model.zero_grad()
        twin.zero_grad()
        loss, want = step(model, road, ids, targets, reentrant), step(twin, road, ids, targets, None)
        torch.testing.assert_close(loss, want)
        for a, b in zip(gradients(model), gradients(twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model.expert_counts() == twin.expert_counts()
    for a, b in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(a, AnalyticMoE):
            assert a.expert_counts.tolist() == b.expert_counts.tolist()


@pytest.mark.parametrize("name", [name for name in MODELS if "two" not in name and "with" not in name])
def test_the_reentrant_kind_counts_once_too(name):
    model = MODELS[name](0.2).train()
    twin, (ids, targets) = copy.deepcopy(model), torch.randint(0, V, (2, 3, 9))
    step(model, "hidden", ids, targets, True)
    step(twin, "hidden", ids, targets, None)
    for a, b in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(a, b)
    assert model.expert_counts() == twin.expert_counts()


def test_a_balance_loss_that_the_reentrant_kind_leaves_without_a_gradient_says_so():
    model, (ids, targets) = MODELS["ResNetBK, two of three"](0.1).train(), torch.randint(0, V, (2, 3, 9))
    with pytest.raises(RuntimeError, match=r"use checkpoint\(\.\.\., use_reentrant=False\)"):
        step(model, "hidden", ids, targets, True)
    with torch.no_grad():
        assert float(total_balance_loss(model)) > 0
        model.loss(ids, targets)
    model.loss(ids, targets).backward()
    model.blocks[0].moe.router.requires_grad_(False)
    model.requires_grad_(False)
    assert total_balance_loss(model) > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 2), (3, 3), (1, 1)])
def test_a_compiled_mixture_is_checkpointed(experts, k, backend):
    moe, x = AnalyticMoE(8, experts, k, dropout_p=0.0).eval(), torch.randn(5, 8, requires_grad=True)
    want = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()], allow_unused=True)
    compiled = torch.compile(moe, backend=backend)
    checkpoint(compiled, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, want[0])
    for p, g in zip(moe.parameters(), want[1:], strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.allclose(p.grad, g, atol=1e-6)


@pytest.mark.parametrize("around", ["hidden", "model"])
@pytest.mark.parametrize("name", [name for name in MODELS if "with" in name])
def test_an_auxiliary_term_that_the_reentrant_kind_leaves_without_a_gradient_says_so(name, around):
    model, (ids, targets) = MODELS[name]().train(), torch.randint(0, V, (2, 3, 9))
    if around == "model":
        body, one = model.model.hidden, torch.ones((), requires_grad=True)
        model.model.hidden = lambda ids: checkpoint(lambda x, y: body(x) * y, ids, one, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"^the auxiliary term has no gradient.*use_reentrant=False"):
        step(model, "hidden", ids, targets, True if around == "hidden" else None)
    with torch.no_grad():
        model.hidden(ids)
        assert float(model.auxiliary_loss()) > 0


def steps_counted(model):
    trace = getattr(model.term, "trace", None)
    return int(model.term.counts[0]) if trace is None else int(trace.state[0])


@pytest.mark.parametrize("road", ["hidden", "loss"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_term_with_a_state_refuses_to_be_computed_twice_for_one_step(name, road):
    model, (ids, targets) = WITH_STATE[name]().train(), torch.randint(0, V, (2, 3, 9))
    with pytest.raises(
        RuntimeError, match=r"^Published\w+: .* checkpoint the model's blocks, not its hidden or loss\.$"
    ):
        step(model, road, ids, targets, False)
    assert steps_counted(model) == 1


@pytest.mark.parametrize("name", ["ResNetBK with an energy", *WITH_STATE])
def test_checkpointed_blocks_leave_a_terms_steps_and_gradients_as_they_are(name):
    model = {**MODELS, **WITH_STATE}[name](0.0).train()
    twin, (ids, targets) = copy.deepcopy(model), torch.randint(0, V, (2, 3, 9))
    for block in model.model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for _ in range(3):
        for m in (model, twin):
            m.zero_grad()
            step(m, "loss", ids, targets, None)
        for a, b in zip(gradients(model), gradients(twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert steps_counted(model) == steps_counted(twin) == 3
    copy.deepcopy(twin)


def test_a_model_is_copied_after_a_forward_in_training():
    for make in (*MODELS.values(), *WITH_STATE.values()):
        model = make(0.1).train()
        model.hidden(torch.randint(0, V, (2, 5))).sum().backward()
        copy.deepcopy(model)


@pytest.mark.parametrize("name", LEARNS_COMPRESSED)
def test_a_model_that_learns_under_compression_counts_a_step_once(name):
    model = LEARNS_COMPRESSED[name](0.2).train()
    twin, (ids, targets) = copy.deepcopy(model), torch.randint(0, V, (2, 3, 9))
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()
        torch.testing.assert_close(
            step(model, "loss", ids, targets, False), step(twin, "loss", ids, targets, None)
        )
        for a, b in zip(gradients(model), gradients(twin), strict=True):
            torch.testing.assert_close(a, b)
    if name != "distilled":
        assert int(model.steps) == int(twin.steps) == 3
