"""NewLLM: the published model to the last parameter, its fused loop equal to position-by-position autograd."""

import os
import time

import pytest
import torch
from comparing import assert_exceeds
from torch.nn import functional as F

from bklm.models import NewLLM, NewLLMConfig, future_leak, new_llm_loop, new_llm_steps, new_llm_windows
from bklm.models.dropout import keep_masks

VOCABULARY = 19


def model_of(seed=0, *, double=True, gain=6.0, **changes):
    """A small model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    settings = {
        "embed_dim": 5,
        "hidden_dim": 12,
        "context_dim": 7,
        "n_layers": 3,
        "dropout_p": 0.0,
        **changes,
    }
    model = NewLLM(NewLLMConfig(VOCABULARY, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * gain * torch.randn_like(p))
    return (model.double() if double else model).eval()


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def literal(model, ids, masks=None):
    """Hidden states (B, N, H) as section by section of the published description, one position at a time.

    masks: (N, layers, B, H), what dropout multiplies by.
    """
    c = torch.zeros(ids.shape[0], model.config.context_dim, dtype=model.norm.weight.dtype)
    hidden = []
    for t in range(ids.shape[1]):
        h = torch.cat((model.embedding(ids[:, t]), c), -1)
        for i, layer in enumerate(model.layers):
            h = torch.relu(layer(h))
            if masks is not None:
                h = h * masks[t][i]
        hidden.append(h)
        forget, write = torch.sigmoid(model.forget_gate(h)), torch.sigmoid(model.input_gate(h))
        c = torch.clamp(model.norm(forget * c + write * model.update(h)), -10, 10)
    return torch.stack(hidden, 1)


def loss_and_gradients(model, hidden, targets):
    loss = F.cross_entropy(model.output(hidden).flatten(0, 1), targets.flatten())
    # With one position the gates reach nothing: their gradient is zero.
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


# --- the published model ---------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert NewLLM(NewLLMConfig(1000)).num_parameters() == 2_739_432
        advanced = NewLLMConfig(1000, context_dim=512, n_layers=12)
        assert NewLLM(advanced).num_parameters() == 4_840_936
        assert advanced == NewLLMConfig.advanced(1000)


def test_first_weights_are_normal_with_std_002_and_biases_zero():
    torch.manual_seed(0)
    model = NewLLM(NewLLMConfig(500))
    for name, p in model.named_parameters():
        if name.startswith("norm."):
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all()
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name


# --- the fused loop --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["windows", "steps"])
def engine(request, monkeypatch):
    """What runs the recurrence: the CPU's engine, or that of all devices."""
    if request.param == "steps":
        monkeypatch.setattr(new_llm_loop, "_engine", lambda *_: new_llm_steps)


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_loss_and_every_gradient_equal_the_literal_implementation(n_layers, length, engine):
    model, ids, targets = model_of(n_layers=n_layers), ids_of(4, length), ids_of(4, length, seed=2)
    expected, gradients = loss_and_gradients(model, literal(model, ids), targets)
    loss = model.loss(ids, targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), got, want in zip(model.named_parameters(), ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_with_dropout_equal_the_literal_ones_with_the_same_masks(engine):
    model, ids, targets = model_of(dropout_p=0.3).train(), ids_of(4, 9), ids_of(4, 9, seed=2)
    torch.manual_seed(5)
    loss = model.loss(ids, targets)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(5)
    masks = [keep_masks((3, 4, 12), 0.3, torch.empty(0, dtype=torch.float64)) for _ in range(9)]
    expected, gradients = loss_and_gradients(model, literal(model, ids, masks), targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_masks_drop_with_the_probability_asked_for_and_keep_the_mean(p):
    torch.manual_seed(0)
    masks = keep_masks((3, 211, 1001), p, torch.empty(0, dtype=torch.float64))
    kept = 1 - round(p * 65536) / 65536 if p < 0.99 else 1 / 65536
    deviation = (p * kept / masks.numel()) ** 0.5  # of the share kept
    assert masks.unique().tolist() == pytest.approx([0, 1 / kept])
    assert (masks > 0).double().mean().item() == pytest.approx(kept, abs=4 * deviation)
    assert masks.mean().item() == pytest.approx(1, abs=4 * deviation / kept)
    for axis in range(3):  # neighbours, which may come from one 64-bit number, are independent
        a, b = (masks > 0).double().narrow(axis, 0, 1), (masks > 0).double().narrow(axis, 1, 1)
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].nan_to_num().abs() < 0.1


def test_gradients_are_right_where_the_context_is_clamped(engine):
    model, ids, targets = model_of(), ids_of(4, 9), ids_of(4, 9, seed=2)
    with torch.no_grad():
        model.norm.weight.mul_(30)
    _, state = model.prefill(ids)
    clamped = (state.context.abs() == 10).double().mean()
    assert 0.1 < clamped < 0.95
    _, gradients = loss_and_gradients(model, literal(model, ids), targets)
    ours = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_the_published_size_agrees_with_the_literal_implementation_in_float32():
    torch.manual_seed(0)
    model = NewLLM(NewLLMConfig(1000, dropout_p=0.0))
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(3)  # at the published 0.02 the context hardly reaches the loss
    ids, targets = torch.randint(0, 1000, (2, 4, 12))
    loss, gradients = loss_and_gradients(model, literal(model, ids), targets)
    torch.testing.assert_close(model.loss(ids, targets), loss, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    for got, want in zip(ours, gradients, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_frozen_weights_get_no_gradient_and_the_others_the_same_ones():
    model, ids, targets = model_of(), ids_of(3, 6), ids_of(3, 6, seed=2)
    model.loss(ids, targets).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    frozen = ("layers.1.", "forget_gate", "norm.bias", "layers.0.weight")
    model.zero_grad(set_to_none=True)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    model.loss(ids, targets).backward()
    for name, p in model.named_parameters():
        if name.startswith(frozen):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, before[name], msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_is_drawn_anew_in_each_training_pass_and_off_in_evaluation():
    model, ids = model_of(dropout_p=0.3), ids_of(2, 6)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    torch.manual_seed(3)
    first = model(ids)
    torch.manual_seed(3)
    assert torch.equal(first, model(ids))
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(first, model(ids))


def test_a_weight_that_is_not_a_number_shows_in_the_loss():
    model, ids = model_of(double=False), ids_of(2, 5)
    with torch.no_grad():
        model.layers[1].weight[0, 0] = torch.nan
        assert model.loss(ids, ids).isnan()
    assert model.loss(ids, ids).isnan()


def test_half_precision_is_as_close_to_exact_gradients_as_autograd_gets():
    model = model_of(double=False, hidden_dim=32, embed_dim=16, context_dim=16, gain=3.0)
    ids, targets = ids_of(4, 9), ids_of(4, 9, seed=2)
    exact = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(ids).dtype == torch.bfloat16
        loss = model.loss(ids, targets)
        _, plain = loss_and_gradients(model, literal(model, ids), targets)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in ours)

    def error(gradients):
        return torch.cat([(g - e).flatten() for g, e in zip(gradients, exact, strict=True)]).norm()

    assert 0 < error(ours) < 1.5 * error(plain)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes(monkeypatch):
    """The windows that are swept, as their first position and the one after their last."""
    found, sweep = [], new_llm_windows._Windows.sweep

    def recorded(self, first, last, *work):
        found.append((first, last))
        sweep(self, first, last, *work)

    monkeypatch.setattr(new_llm_windows._Windows, "sweep", recorded)
    return found


# With small weights the layers hardly hear the context, with large ones it is chaotic.
@pytest.mark.parametrize(("gain", "grows"), [(0.2, True), (18.0, False)])
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_grow_or_shrink_and_give_the_literal_losses_and_gradients(gain, grows, batch, sizes):
    model = model_of(gain=gain, dropout_p=0.2).train()
    ids, targets = ids_of(batch, 131), ids_of(batch, 131, seed=2)
    torch.manual_seed(5)
    loss = model.loss(ids, targets)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    assert (max(last - first for first, last in sizes) > new_llm_windows.FIRST_WINDOW) == grows
    assert (min(last - first for first, last in sizes[:3]) < new_llm_windows.FIRST_WINDOW) != grows
    torch.manual_seed(5)
    masks = [keep_masks((3, batch, 12), 0.2, torch.empty(0, dtype=torch.float64)) for _ in range(131)]
    expected, gradients = loss_and_gradients(model, literal(model, ids, masks), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for got, want in zip(ours, gradients, strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm()


def test_nan_in_one_sequence_stays_in_it_and_ends(sizes):
    model, ids = model_of(double=False), ids_of(3, 70)
    ids[ids == 18] = 0
    ids[1, 40] = 18
    with torch.no_grad():
        model.embedding.weight[18, 0] = torch.nan
        hidden = model.hidden(ids).isnan().flatten(2).any(-1)
    assert hidden[1].tolist() == [False] * 40 + [True] * 30
    assert not hidden[::2].any()


def test_inference_in_pieces_equals_the_whole(monkeypatch):
    model, ids = model_of(), ids_of(2, 50)
    whole, state = model(ids), model.prefill(ids)[1]
    monkeypatch.setattr(new_llm_loop, "INFERRED_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.prefill(ids)[1].context, state.context, rtol=0, atol=1e-12)


@pytest.mark.speed
@pytest.mark.skipif(
    "MKL_CBWR" in os.environ, reason="products of another processor than this one are not timed"
)
def test_one_long_sequence_is_faster_in_windows_than_position_by_position(monkeypatch):
    torch.manual_seed(0)
    model, ids = NewLLM(NewLLMConfig(50)), torch.randint(50, (1, 256))

    def ratio():
        seconds = {new_llm_windows: [], new_llm_steps: []}
        for _ in range(4):
            for engine, times in seconds.items():
                monkeypatch.setattr(new_llm_loop, "_engine", lambda *_, engine=engine: engine)
                start = time.perf_counter()
                model.loss(ids, ids).backward()
                times.append(time.perf_counter() - start)
        return min(seconds[new_llm_steps]) / min(seconds[new_llm_windows])

    # Four times on a quiet machine; where products are bound by arithmetic, as with those of an old processor, 1.1 times.
    assert_exceeds(ratio, 1)


# --- the future ------------------------------------------------------------------------------------------------------


def test_changing_later_tokens_leaves_earlier_logits_alone():
    model, ids = model_of(), ids_of(3, 16)
    for position in (1, 8, 15):
        assert future_leak(model, ids, position).max() <= 1e-12
    altered = ids.clone()
    altered[:, 4] = (ids[:, 4] + 1) % VOCABULARY
    difference = (model(altered) - model(ids)).abs().amax((0, 2))
    assert (difference[:4] <= 1e-12).all()
    assert (difference[4:] > 1e-6).all()  # the context carries it on


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero(training):
    model, ids = model_of(dropout_p=0.2).train(training), torch.arange(12)[None]  # each token once
    for position in (0, 5, 10):
        (g,) = torch.autograd.grad(model(ids)[:, position].square().sum(), model.embedding.weight)
        assert (g[position + 1 :] == 0).all()
        assert (g[: position + 1].abs().amax(-1) > 0).all()


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)])
def test_steps_and_prefill_give_the_logits_of_the_full_forward(double, tolerance):
    model, ids = model_of(double=double), ids_of(2, 20)
    whole, state = model(ids), model.init_state(2)
    for i in range(20):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=tolerance)
    logits, prefilled = model.prefill(ids)
    torch.testing.assert_close(logits, whole[:, -1], rtol=0, atol=tolerance)
    torch.testing.assert_close(prefilled.context, state.context, rtol=0, atol=tolerance)


def test_a_step_leaves_the_state_it_was_given_unchanged():
    model = model_of()
    _, state = model.prefill(ids_of(2, 5))
    before = state.context.clone()
    model.step(ids_of(2, 1)[:, 0], state)
    assert torch.equal(state.context, before)


def test_generation_is_greedy_decoding_of_the_full_forward():
    model, prompt = model_of(), ids_of(2, 3)
    out = model.generate(prompt, 12, temperature=0.0)
    assert torch.equal(out[:, 3:], model(out)[:, 2:-1].argmax(-1))


def test_the_state_has_one_size_at_every_position():
    model = model_of(double=False)
    for length in (1, 40):
        _, state = model.prefill(ids_of(1, length))
        assert state.context.nbytes == model.state_bytes(length) == 7 * 4


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("vocab_size", 1, ValueError),
        ("embed_dim", 0, ValueError),
        ("context_dim", 2.5, TypeError),
        ("n_layers", 0, ValueError),
        ("dropout_p", 1.0, ValueError),
    ],
)
def test_a_bad_field_is_named_with_its_value(field, value, error):
    with pytest.raises(error, match=f"{field}: got {value}"):
        NewLLMConfig(**{"vocab_size": 10, field: value})


def test_an_empty_sequence_has_no_logits_and_an_empty_prompt_is_refused():
    model = model_of()
    assert model(ids_of(2, 5)[:, :0]).shape == (2, 0, VOCABULARY)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(ids_of(2, 5)[:, :0], 3)
