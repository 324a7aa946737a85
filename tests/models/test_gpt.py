"""GPT: GPT-2's function, no future, and a key-value cache that gives the full forward's logits."""

import math

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.models import GPT, GPTConfig, future_leak

VOCABULARY = 19


def model_of(seed=0, *, double=True, **changes):
    torch.manual_seed(seed)
    settings = {"d_model": 12, "n_layers": 2, "n_heads": 3, "n_seq": 24, "dropout_p": 0.0, **changes}
    model = GPT(GPTConfig(VOCABULARY, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return (model.double() if double else model).eval()


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def literal(model, ids):
    """Logits of GPT-2 with attention written out: scores, mask, softmax."""
    length, heads = ids.shape[1], model.config.n_heads
    x = model.embedding.weight[ids] + model.positions.weight[:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for block in model.blocks:
        q, k, v = block.qkv(block.attention_norm(x)).view(*ids.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(x.shape)
        x = x + block.attention_output(mixed)
        u = block.up(block.mlp_norm(x))
        gelu = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        x = x + block.down(gelu)
    return model.norm(x) @ model.embedding.weight.t()


def test_logits_and_gradients_are_those_of_gpt2_written_out():
    model, ids, targets = model_of(), ids_of(3, 11), ids_of(3, 11, seed=2)
    torch.testing.assert_close(model(ids), literal(model, ids), rtol=0, atol=1e-11)
    expected = F.cross_entropy(literal(model, ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_parameter_count_is_gpt2s():
    with torch.device("meta"):
        assert GPT(GPTConfig(50_257, 768, 12, 12, 1024)).num_parameters() == 124_439_808


def test_first_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 128, 8, 4, 64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            last = "attention_output" in name or "down" in name
            assert p.std().item() == pytest.approx(0.005 if last else 0.02, rel=0.04), name
    assert model.loss(*torch.randint(0, 500, (2, 4, 32))).item() == pytest.approx(math.log(500), rel=0.02)


def test_dropout_never_keeps_the_fused_attention_kernel_away(monkeypatch):
    model, ids, given = model_of(dropout_p=0.3).train(), ids_of(2, 6), []
    real = F.scaled_dot_product_attention

    def attention(*tensors, **options):
        given.append(options.get("dropout_p", 0.0))
        return real(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model.loss(ids, ids).backward()
    assert given == [0.0, 0.0]


def test_dropout_acts_in_training_only():
    model, ids = model_of(dropout_p=0.3), ids_of(2, 6)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# --- the future ------------------------------------------------------------------------------------------------------


def test_changing_later_tokens_leaves_earlier_logits_alone():
    model, ids = model_of(), ids_of(3, 16)
    for position in (1, 8, 15):
        assert future_leak(model, ids, position).max() <= 1e-12
    altered = ids.clone()
    altered[:, 4] = (ids[:, 4] + 1) % VOCABULARY
    assert ((model(altered) - model(ids)).abs().amax((0, 2))[4:] > 1e-6).all()


def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero():
    require_no_gradient_to_the_future(model_of(), ids_of(2, 12), (0, 5, 10))


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_prefill_and_steps_give_the_logits_of_the_full_forward(prompt, double, tolerance):
    model, ids = model_of(double=double), ids_of(2, 24)
    whole = model(ids)
    tolerance *= whole.abs().max().item()
    if prompt:
        logits, state = model.prefill(ids[:, :prompt])
        torch.testing.assert_close(logits, whole[:, prompt - 1], rtol=0, atol=tolerance)
    else:
        state = model.init_state(2)
    for i in range(prompt, 24):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=tolerance)
    assert state.position == 24


def test_a_state_can_be_continued_in_two_ways():
    model, ids = model_of(), ids_of(2, 8)
    _, shared = model.prefill(ids[:, :4])
    _, shared = model.step(ids[:, 4], shared)
    other = (ids[:, 5:] + 1) % VOCABULARY
    left, right = shared, shared
    for i in range(3):  # in turn, so that each would overwrite the other's keys
        a, left = model.step(ids[:, 5 + i], left)
        b, right = model.step(other[:, i], right)
    torch.testing.assert_close(a, model(ids)[:, -1])
    torch.testing.assert_close(b, model(torch.cat((ids[:, :5], other), 1))[:, -1])


def test_generation_is_greedy_decoding_of_the_full_forward():
    model, prompt = model_of(), ids_of(2, 3)
    out = model.generate(prompt, 21, temperature=0.0)
    assert torch.equal(out[:, 3:], model(out)[:, 2:-1].argmax(-1))


def test_the_state_grows_by_a_key_and_a_value_per_layer_and_token():
    model = model_of(double=False)
    for length in (1, 7, 24):
        _, state = model.prefill(ids_of(1, length))
        held = sum(x.numel() * 4 for cache in state.caches for x in cache.read(state.position))
        assert held == model.state_bytes(length) == length * 2 * 2 * 12 * 4


def test_the_model_ends_at_its_last_position():
    model = model_of()
    _, state = model.prefill(ids_of(1, 24))
    with pytest.raises(ValueError, match="got 25 positions, but this model has n_seq = 24"):
        model.step(ids_of(1, 1)[:, 0], state)
    with pytest.raises(ValueError, match="got 25 positions"):
        model(ids_of(1, 25))
    with pytest.raises(ValueError, match="26 positions, but this model has n_seq = 24"):
        model.generate(ids_of(1, 20), 6)
    with pytest.raises(ValueError, match="got 25 positions"):
        model.state_bytes(25)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("vocab_size", 1, ValueError),
        ("d_model", 10, ValueError),
        ("n_heads", 0, ValueError),
        ("n_seq", None, TypeError),
        ("dropout_p", -0.1, ValueError),
    ],
)
def test_a_bad_field_is_named_with_its_value(field, value, error):
    settings = {"vocab_size": 10, "d_model": 12, "n_layers": 1, "n_heads": 3, "n_seq": 8, field: value}
    with pytest.raises(error, match=f"{field}: got {value}"):
        GPTConfig(**settings)
