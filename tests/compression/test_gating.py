"""Blocks that skip positions: what is kept is computed as if the rest were not there, and no gate sees what comes later."""

import copy

import pytest
import torch

from bklm.compression.gating import GatedBlocks
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.models.leak import future_leak


@pytest.fixture
def gated(reading):
    torch.manual_seed(0)
    return GatedBlocks(copy.deepcopy(reading)).eval()


def test_where_every_position_is_kept_the_model_is_the_one_without_gates(reading, text):
    x = text[0][0]
    made = GatedBlocks(copy.deepcopy(reading), 1.0, seed=0).eval()
    assert torch.allclose(made(x), reading(x), atol=1e-5)
    assert made.kept_share(x) == 1.0


def test_a_block_over_kept_positions_is_the_block_of_these_alone_row_by_row(gated, text):
    block = gated.model.blocks[0]
    x = torch.randn(5, 13, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        kept, found = block.chosen(x) > 0.5, block(x)[0]
        assert 0 < kept.sum() < kept.numel()
        assert len(set(kept.sum(1).tolist())) > 1
        for row, keep, out in zip(x, kept, found, strict=True):
            assert torch.equal(out[~keep], row[~keep])
            assert torch.allclose(out[keep], block.block(row[keep].unsqueeze(0))[0][0], atol=1e-5)


def test_rows_that_keep_nothing_pass_on_and_a_batch_that_keeps_nothing_as_well(gated):
    block = gated.model.blocks[0]
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.bias.fill_(-1.0)
        x = torch.randn(2, 7, 32)
        assert torch.equal(block(x)[0], x)


@pytest.mark.parametrize("seed", [None, 3])
def test_no_position_hears_of_a_later_one(seed):
    torch.manual_seed(0)
    config = ResNetBKConfig(50, d_model=16, n_layers=2, mixer="solve", n_heads=2, num_experts=1)
    made = GatedBlocks(ResNetBK(config), seed=seed).double().eval()
    ids = torch.arange(36).view(3, 12)
    for place in (1, 4, 11):
        assert future_leak(made, ids, place).max() <= 1e-12
    found = []
    hook = made.model.embedding.register_forward_hook(lambda module, given, out: found.append(out))
    logits = made(ids)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, :6].square().sum(), found)
    assert (gradient[:, 6:] == 0).all()
    assert (gradient[:, :6] != 0).any()


def test_the_gate_learns_from_text_and_load_and_comes_to_keep_its_share(reading, text):
    torch.manual_seed(0)
    made = GatedBlocks(copy.deepcopy(reading), 0.25).train()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-2)
    losses = []
    for t in range(40):
        optimizer.zero_grad()
        loss = made.loss(*text[t % 3])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(b.gate.weight.grad.abs().sum() > 0 for b in made.model.blocks)
    assert losses[-1] < losses[0]
    assert made.eval().kept_share(text[0][0]) == pytest.approx(0.25, abs=0.12)


def test_by_chance_the_rate_is_the_share_and_the_seed_says_which(reading):
    one, two, again = (GatedBlocks(copy.deepcopy(reading), 0.5, seed=s) for s in (0, 1, 0))
    patterns = [torch.stack([b.pattern for b in m.model.blocks]) for m in (one, two, again)]
    # Exactly the rate, in every stretch; in training others each time, so that nothing adapts to them.
    assert (patterns[0].view(len(patterns[0]), -1, 32).sum(2) == 16).all()
    third = GatedBlocks(copy.deepcopy(reading), 1 / 3, seed=0).model.blocks[0].pattern
    assert third[:96].sum() == 32
    x = torch.zeros(64, 32, 32)
    first, second = (one.train().model.blocks[0].chosen(x) for _ in range(2))
    assert first.mean() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(one.eval().model.blocks[0].chosen(x)[0], one.model.blocks[0].pattern[:32].float())
    assert torch.equal(patterns[0], patterns[2])
    assert not torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0][0], patterns[0][1])
    assert one.auxiliary_loss() is None


def test_other_models_and_shares_are_refused_in_one_sentence(reading):
    with pytest.raises(ValueError, match=r"share: got 0; a block keeps"):
        GatedBlocks(copy.deepcopy(reading), 0)
    future = ResNetBK(ResNetBKConfig(20, d_model=16, n_layers=1, causal=False))
    with pytest.raises(TypeError, match="got a ResNetBK that sees the future; give a causal ResNetBK"):
        GatedBlocks(future)
