"""ContextTokenLM: the published counts, no future, constant-state streaming, and what each freeze leaves to train."""

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.models import ContextTokenConfig, ContextTokenLM, future_leak

VOCABULARY = 23


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"embed_dim": 10, "context_dim": 10, "n_layers": 3, **changes}
    model = ContextTokenLM(ContextTokenConfig(VOCABULARY, **settings)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


KINDS = [{}, {"tied": False}, {"tied": False, "embed_dim": 7}, {"n_layers": 1}, {"token_to": "first"}]


# --- the architecture ------------------------------------------------------------------------------------------------


def block_count(context, other, out, layers):
    return layers * ((context + other) * out + out + 2 * out)


def test_parameter_counts_are_the_published_ones_and_follow_from_the_layout():
    with torch.device("meta"):
        model = ContextTokenLM(ContextTokenConfig())
        untied = ContextTokenLM(ContextTokenConfig(tied=False))
    embedding, norm, block = 50_257 * 768, 2 * 768, block_count(768, 768, 768, 6)
    assert sum(p.numel() for p in model.token_block.parameters()) == block == 7_091_712
    assert sum(p.numel() for p in model.context_block.parameters()) == block
    assert model.num_parameters() == embedding + norm + 2 * block == 52_782_336
    assert untied.num_parameters() == 52_782_336 + embedding
    model.freeze_context()
    assert model.num_parameters(trainable_only=True) == embedding + norm + block == 45_690_624
    model.freeze_embedding()
    assert model.num_parameters(trainable_only=True) == 7_091_712
    untied.freeze_context()
    untied.freeze_embedding()
    assert untied.num_parameters(trainable_only=True) == 7_091_712 + embedding  # the head of its own
    assert model.num_parameters() == 52_782_336


def test_unequal_widths_cost_a_projection():
    model = model_of(tied=False, embed_dim=7)
    blocks = block_count(10, 7, 10, 3) + block_count(10, 10, 10, 3)
    assert model.num_parameters() == VOCABULARY * 7 + 2 * 7 + blocks + (7 * 10 + 10) + VOCABULARY * 10


@pytest.mark.parametrize("changes", KINDS)
def test_logits_are_the_formula_written_token_by_token(changes):
    model, ids = model_of(**changes), ids_of(2, 6)
    context, token = model.context_block, model.token_block
    for row, logits in zip(ids, model(ids), strict=True):
        c = torch.zeros(10, dtype=torch.float64)
        for word, expected in zip(row, logits, strict=True):
            x = F.layer_norm(model.embedding.weight[word], (len(model.norm.weight),), *model.norm.parameters())
            h = token.project(x)
            for l in range(len(context)):
                read = x if l == 0 or model.config.token_to == "every" else torch.zeros_like(x)
                c = context.norms[l](
                    c + (context.linears[l].weight @ torch.cat([c, read]) + context.linears[l].bias).relu()
                )
                h = token.norms[l](
                    h + (token.linears[l].weight @ torch.cat([c, h]) + token.linears[l].bias).relu()
                )
            head = model.embedding.weight if model.output is None else model.output.weight
            torch.testing.assert_close(head @ h, expected, rtol=1e-10, atol=1e-10)


def test_fresh_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = ContextTokenLM(ContextTokenConfig(500, 64, 64, 2, tied=False))
    for block in (model.context_block, model.token_block):
        weights = torch.cat([linear.weight.flatten() for linear in block.linears])
        biases = torch.cat([linear.bias for linear in block.linears])
        assert abs(weights.std() - 0.1) < 0.002
        assert abs(biases.std() - 0.01) < 0.003
    assert abs(model.embedding.weight.std() - 0.02) < 0.001
    assert abs(model.output.weight.std() - 0.02) < 0.001


# --- the future ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_changing_later_tokens_leaves_earlier_logits_alone(changes):
    model, ids = model_of(**changes), ids_of(3, 12)
    for cut in (1, 6, 11):
        leak = future_leak(model, ids, cut)
        assert leak.shape == (cut,)
        assert leak.max() <= 1e-12
    altered = ids.clone()
    altered[:, 6] = (ids[:, 6] + 1) % VOCABULARY
    assert ((model(altered) - model(ids))[:, 6:].abs().amax((0, 2)) > 1e-6).all()  # and reaches every later one


def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero():
    require_no_gradient_to_the_future(model_of(), ids_of(2, 9), (0, 4, 7))


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_steps_and_prefill_give_the_logits_of_the_full_forward(changes):
    model, ids = model_of(**changes), ids_of(2, 11)
    whole, state = model(ids), model.init_state(2)
    for i in range(11):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=1e-12)
    logits, after = model.prefill(ids)
    torch.testing.assert_close(logits, whole[:, -1], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.context, state.context, rtol=0, atol=1e-12)
    assert after.position == state.position == 11
    assert after.context[0].nbytes == model.state_bytes(11) == model.state_bytes(10**6) == 10 * 8


def test_step_leaves_the_given_state_unchanged():
    model, ids = model_of(), ids_of(1, 6)
    _, state = model.prefill(ids)
    kept = state.context.clone()
    first, _ = model.step(ids[:, 0], state)
    again, _ = model.step(ids[:, 0], state)
    assert torch.equal(first, again)
    assert torch.equal(kept, state.context)


def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward():
    model, ids = model_of(), ids_of(2, 5)
    out = model.generate(ids, 8, temperature=0.0)
    assert torch.equal(out[:, 5:], model(out)[:, 4:-1].argmax(-1))


def test_known_left_neighbours_give_all_positions_at_once_what_the_sweep_gives():
    model, ids = model_of(), ids_of(2, 8)
    swept = model.contexts(ids)
    previous = torch.cat([torch.zeros(2, 1, 10, dtype=torch.float64), swept[:, :-1, -1]], 1)
    at_once = model.context_block(previous, model.embed(ids))
    torch.testing.assert_close(at_once, swept, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.context_block.final(previous, model.embed(ids)), swept[..., -1, :])


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_embedding_takes_its_norm_and_a_tied_head_with_it(tied):
    model, ids = model_of(tied=tied), ids_of(2, 7)
    model.freeze_embedding()
    model.freeze_context()
    model.loss(ids, ids.roll(-1, 1)).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == ({"token_block"} if tied else {"token_block", "output"})


def test_a_trained_tied_embedding_gets_a_gradient_from_input_and_head():
    model, ids = model_of(), ids_of(1, 4)
    targets = torch.full_like(ids, 5)
    ids[ids == 5] = 6
    model.loss(ids, targets).backward()
    rows = model.embedding.weight.grad.abs().amax(1)
    assert (rows > 0).all()  # the head's softmax reaches every row
    model.zero_grad()
    whole = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    whole.backward()
    expected = model.embedding.weight.grad.clone()
    model.zero_grad()
    model.loss(ids, targets).backward()
    torch.testing.assert_close(model.embedding.weight.grad, expected)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"embed_dim": 8, "context_dim": 4},
            ValueError,
            "width embed_dim = 8; make the two equal, or give tied=False",
        ),
        ({"vocab_size": 1}, ValueError, "vocab_size: got 1"),
        ({"n_layers": 0}, ValueError, "n_layers: got 0"),
        ({"embed_dim": 8.0}, TypeError, "embed_dim: got 8.0"),
        ({"tied": "yes"}, ValueError, "tied: got 'yes'"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        ContextTokenConfig(**changes)


def test_an_empty_prompt_and_an_id_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        model_of().prefill(ids_of(1, 0))
    with pytest.raises(ValueError, match=f"input_ids: got {VOCABULARY}"):
        model_of()(torch.full((1, 3), VOCABULARY))
