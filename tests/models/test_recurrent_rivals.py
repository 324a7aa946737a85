"""LSTM and LinearContext: what they compute, no future, and a constant state that gives the full forward's logits."""

import dataclasses
import math

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.models import LSTM, LinearContext, LinearContextConfig, LSTMConfig, future_leak
from bklm.models.by_name import built
from bklm.models.linear_scan import linear_scan
from bklm.training.weights import load_weights, save_weights

VOCABULARY = 19
KINDS = [
    (LSTM, LSTMConfig, {}),
    (LSTM, LSTMConfig, {"n_layers": 1, "tied": False}),
    (LinearContext, LinearContextConfig, {}),
    (LinearContext, LinearContextConfig, {"n_layers": 1, "tied": False}),
    (LinearContext, LinearContextConfig, {"recurrence": "lru"}),
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


def test_the_lru_is_its_equations_written_out():
    model, ids = model_of(KINDS[4]), ids_of(2, 11)
    x = model.embedding.weight[ids]
    for block in model.blocks:
        u = block.mixer_norm(x)
        decay = torch.exp(torch.complex(-block.log_rate.exp(), block.log_phase.exp()))
        gamma = (1 - decay.abs() ** 2).sqrt()
        b, c = block.inputs.weight, block.mixer_output.weight
        b, c = torch.complex(b[:12], b[12:]), torch.complex(c[:, :12], -c[:, 12:])
        z, rows = torch.zeros(2, 12, dtype=torch.complex128), []
        for t in range(11):
            z = decay * z + gamma * (u[:, t].to(b) @ b.t())
            rows.append((z @ c.t()).real + block.direct * u[:, t])
        gate, value = block.up(torch.stack(rows, 1)).split(24, -1)
        x = x + block.down(gate * torch.sigmoid(gate) * value)
    want = model.norm(x) @ model.embedding.weight.t()
    torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-11)


def test_the_lru_begins_on_its_ring_and_keeps_its_states_as_large_as_their_input():
    torch.manual_seed(0)
    block = LinearContext(LinearContextConfig(10, 256, 1, 0.0, recurrence="lru")).blocks[0]
    decay, gamma = block.operator()
    assert 0.9 <= decay.abs().min() < 0.91
    assert 0.998 < decay.abs().max() <= 0.999
    assert 0 < decay.angle().min() < 0.01 < 0.3 < decay.angle().max() <= math.pi / 10
    torch.testing.assert_close(gamma.square() + decay.abs().square(), torch.ones(256))
    # Even spread of |Lambda|^2 means an even spread over the ring's area.
    assert decay.abs().square().mean().item() == pytest.approx((0.81 + 0.998) / 2, abs=0.01)
    z = block(torch.randn(8, 2000, 256))[1]
    assert 0.5 < z.unflatten(-1, (2, -1)).square().sum(1).mean().item() < 2


@pytest.mark.parametrize("length", [1, 2, 3, 64, 127])
@pytest.mark.parametrize(
    ("constant", "dtype", "begun"),
    [(False, torch.float64, False), (True, torch.complex128, True), (False, torch.complex128, True)],
)
def test_the_scan_and_its_gradient_are_those_of_a_loop(length, constant, dtype, begun):
    g = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    decay = draw(*(() if constant else (2, length)), 3)
    # Within the unit circle, and near it.
    shrunk = 0.99 * decay / decay.abs().clamp_min(1)
    x, before = draw(2, length, 3), draw(2, 3) if begun else None
    h, rows = torch.zeros(2, 3, dtype=dtype) if before is None else before, []
    for t in range(length):
        h = (shrunk if constant else shrunk[:, t]) * h + x[:, t]
        rows.append(h)
    want, got = torch.stack(rows, 1), linear_scan(shrunk, x, before)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights, given = torch.randn(2, length, 3, generator=g, dtype=dtype), (decay, x, before)[: 2 + begun]
    for ours, theirs in zip(
        *(
            torch.autograd.grad(
                (found * weights).sum().abs(),
                given,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for found in (got, want)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # What comes later moves no bit of what was.
    if length > 2:
        assert torch.equal(linear_scan(shrunk, x + F.pad(torch.ones_like(x)[:, :1], (0, 0, length - 1, 0)), before)[:, :-1],
                           got[:, :-1])  # fmt: skip


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


@pytest.mark.parametrize("kind", KINDS[2:])
def test_settings_and_weights_give_the_model_again(kind, tmp_path):
    model, ids = model_of(kind, double=False), ids_of(2, 9)
    save_weights(model, tmp_path / "w.safetensors")
    again = built("LinearContext", dataclasses.asdict(model.config)).eval()
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("config_class", [LSTMConfig, LinearContextConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 1), ("d_model", 0), ("n_layers", 0), ("dropout_p", 1.0), ("tied", "yes")],
)
def test_a_bad_field_is_named_with_its_value(config_class, field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value!r}"):
        config_class(**{"vocab_size": 10, field: value})


def test_a_recurrence_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"^recurrence: got 'linear'; .*'gated'.*'lru'"):
        LinearContextConfig(10, recurrence="linear")
