"""LSTM and LinearContext: what they compute, no future, and a constant state that gives the full forward's logits."""

import math

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.models import LSTM, LinearContext, LinearContextConfig, LSTMConfig, future_leak
from bklm.models.linear_context import linear_scan

VOCABULARY = 19
KINDS = [
    (LSTM, LSTMConfig, {}),
    (LSTM, LSTMConfig, {"n_layers": 1, "tied": False}),
    (LinearContext, LinearContextConfig, {}),
    (LinearContext, LinearContextConfig, {"n_layers": 1, "tied": False}),
]


def model_of(kind, seed=0, *, double=True, **more):
    torch.manual_seed(seed)
    model_class, config_class, changes = kind
    model = model_class(
        config_class(VOCABULARY, **{"d_model": 12, "n_layers": 2, "dropout_p": 0.0, **changes, **more})
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return (model.double() if double else model).eval()


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_lstm_is_hochreiter_and_schmidhubers_with_forget_gates_and_a_tied_head():
    model, ids = model_of(KINDS[0]), ids_of(2, 7)
    rows = list(model.embedding.weight[ids].transpose(0, 1))
    for layer in range(2):
        w, u = (getattr(model.lstm, f"weight_{k}_l{layer}") for k in ("ih", "hh"))
        bias = sum(getattr(model.lstm, f"bias_{k}_l{layer}") for k in ("ih", "hh"))
        h = c = torch.zeros(2, 12, dtype=torch.float64)
        for t, x in enumerate(rows):
            write, forget, update, read = (x @ w.t() + h @ u.t() + bias).chunk(4, 1)
            c = torch.sigmoid(forget) * c + torch.sigmoid(write) * torch.tanh(update)
            h = torch.sigmoid(read) * torch.tanh(c)
            rows[t] = h
    torch.testing.assert_close(
        model(ids), torch.stack(rows, 1) @ model.embedding.weight.t(), rtol=0, atol=1e-12
    )


def test_linear_context_is_its_recurrence_written_out():
    model, ids = model_of(KINDS[2]), ids_of(2, 11)
    x = model.embedding.weight[ids]
    for block in model.blocks:
        values, gates, decay = block.inputs(block.mixer_norm(x)).chunk(3, -1)
        keep = torch.sigmoid(decay)
        h, rows = torch.zeros(2, 12, dtype=torch.float64), []
        for t in range(11):
            h = keep[:, t] * h + (1 - keep[:, t]) * values[:, t]
            rows.append(h)
        x = x + block.mixer_output(torch.stack(rows, 1) * F.silu(gates))
        u = block.up(block.mlp_norm(x))
        gelu = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        x = x + block.down(gelu)
    want = model.norm(x) @ model.embedding.weight.t()
    torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 127])
def test_the_scan_and_its_gradient_are_those_of_a_loop(length):
    g = torch.Generator().manual_seed(length)
    decay = torch.rand(2, length, 3, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, length, 3, generator=g, dtype=torch.float64, requires_grad=True)
    h, rows = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        h = decay[:, t] * h + x[:, t]
        rows.append(h)
    want, got = torch.stack(rows, 1), linear_scan(decay, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, length, 3, generator=g, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (decay, x), allow_unused=True, materialize_grads=True),
        torch.autograd.grad((want * weights).sum(), (decay, x)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_changing_later_tokens_leaves_earlier_logits_alone(kind):
    model, ids = model_of(kind), ids_of(3, 20)
    for position in (1, 10, 19):
        assert future_leak(model, ids, position).max() <= 1e-12
    altered = ids.clone()
    altered[:, 4] = (ids[:, 4] + 1) % VOCABULARY
    assert ((model(altered) - model(ids)).abs().amax((0, 2))[4:8] > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero(kind):
    require_no_gradient_to_the_future(model_of(kind), ids_of(2, 12), (0, 5, 10))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_prefill_and_steps_give_the_logits_of_the_full_forward(kind, prompt, double, tolerance):
    model, ids = model_of(kind, double=double), ids_of(2, 24)
    whole = model(ids)
    tolerance *= max(1.0, whole.abs().max().item())
    if prompt:
        logits, state = model.prefill(ids[:, :prompt])
        torch.testing.assert_close(logits, whole[:, prompt - 1], rtol=0, atol=tolerance)
    else:
        state = model.init_state(2)
    for i in range(prompt, 24):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_as_large_as_it_says_at_any_position(kind):
    model = model_of(kind, double=False)
    for length in (1, 300):
        _, state = model.prefill(ids_of(1, length))
        parts = state.contexts if isinstance(model, LinearContext) else (state.output, state.cell)
        assert sum(t.numel() * t.element_size() for t in parts) == model.state_bytes(length)


@pytest.mark.parametrize("kind", KINDS)
def test_step_leaves_the_given_state_unchanged(kind):
    model, ids = model_of(kind), ids_of(1, 6)
    _, state = model.prefill(ids)
    assert torch.equal(model.step(ids[:, 0], state)[0], model.step(ids[:, 0], state)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_dropout_acts_in_training_only(kind):
    model, ids = model_of(kind, double=False, dropout_p=0.2), ids_of(8, 24)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.loss(ids, ids.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_trains_under_bfloat16_autocast_with_float32_gradients(kind):
    model, ids = model_of(kind, double=False).train(), ids_of(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_first_memories_are_one_position_to_64():
    block = LinearContext(LinearContextConfig(10, 64, 1)).blocks[0]
    memory = 1 / (1 - torch.sigmoid(block.inputs.bias[128:]))
    assert memory.min().item() == pytest.approx(10**0.1, rel=1e-4)
    assert memory.max().item() == pytest.approx(64.0, rel=1e-3)


@pytest.mark.parametrize("config_class", [LSTMConfig, LinearContextConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 1), ("d_model", 0), ("n_layers", 0), ("dropout_p", 1.0), ("tied", "yes")],
)
def test_a_bad_field_is_named_with_its_value(config_class, field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value!r}"):
        config_class(**{"vocab_size": 10, field: value})
