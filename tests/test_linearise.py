"""The Koopman terms, and blocks replaced by operators: what they say must be so on cases whose answer is known."""

from __future__ import annotations

import pytest
import torch

from bklm.models import ResNetBK, ResNetBKConfig
from bklm.models.leak import future_leak
from bklm.models.mixing import replacing
from bklm.training.auxiliary import WithTerm
from bklm.training.evaluation import evaluate
from bklm.training.koopman import (
    RING,
    KoopmanTerm,
    PublishedTerm,
    describe_lifting,
    koopman_forward,
    published_dmd,
    unexplained,
)
from bklm.training.linearise import collect_states, fit_blocks, score_blocks

D, LAYERS, WORDS = 8, 2, 23


def solve_model() -> ResNetBK:
    return ResNetBK(ResNetBKConfig(WORDS, D, LAYERS, mixer="solve", num_experts=1, n_heads=2, dropout_p=0.0))


def published(lift=16, **more) -> WithTerm:
    model = ResNetBK(ResNetBKConfig.original(WORDS, d_model=D, n_layers=LAYERS, n_seq=12, num_experts=2))
    settings = {"most": 0.5, "start": 1, "epochs": 1, "steps": 1000, **more}
    return WithTerm(model, PublishedTerm(D, LAYERS, lift, **settings), 1.0, apart=False)


def states_of(count=6, length=10):
    return [torch.randn(count, length, D) for _ in range(LAYERS + 1)]


def test_every_part_of_the_mended_term_gets_a_gradient_and_so_does_the_model():
    model = WithTerm(solve_model(), KoopmanTerm(D, LAYERS, 16), 1.0)
    ids = torch.randint(WORDS, (4, 9))
    model.loss(ids, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, name
    model.zero_grad()
    model.hidden(ids)
    model.auxiliary_loss().backward()
    assert model.model.blocks[0].mixer.inputs.weight.grad.norm() > 0


def test_a_constant_phi_does_not_win():
    term, states = KoopmanTerm(D, 1, 16), states_of()[:2]
    with torch.no_grad():
        for layer in term.liftings[0].phi[::2]:
            layer.weight.zero_()
        reconstruction, _, prediction = term.liftings[0].parts(*states)
        assert float(reconstruction) >= 1 - 1e-6
        assert float(prediction) >= 1 - 1e-6
        # The best a constant can do is the mean.
        mean = states[0].mean((0, 1))
        assert float(unexplained(mean.expand_as(states[0]), states[0])) == pytest.approx(1, abs=1e-5)
        # The original's loss is 0 there.
        theirs = PublishedTerm(D, 1, 16, most=1.0, start=1, epochs=1, steps=10)
        theirs.liftings.load_state_dict(term.liftings.state_dict())
        theirs.liftings[0].matrix.copy_(torch.eye(16))
        assert float(theirs(states)) == 0.0


def test_the_mended_term_is_zero_for_a_linear_block_with_the_identity_as_lifting():
    term = KoopmanTerm(D, 1, D)
    lifting = term.liftings[0]
    lifting.phi = lifting.psi = torch.nn.Identity()
    x = torch.randn(5, 7, D)
    with torch.no_grad():
        lifting.matrix.copy_(torch.randn(D, D))
    assert float(term([x, x @ lifting.matrix]).detach()) == pytest.approx(0, abs=1e-6)
    assert float(KoopmanTerm(D, 1, D, placebo=True)([x, x]).detach()) > 1


def test_the_published_term_gives_psi_no_gradient_and_its_weight_follows_the_epochs():
    model, ids = published(), torch.randint(WORDS, (4, 9))
    model.loss(ids, ids).backward()
    assert all(p.grad is None for p in model.term.liftings[0].psi.parameters())
    assert model.term.liftings[0].phi[0].weight.grad.norm() > 0
    term = PublishedTerm(D, LAYERS, 16, most=0.5, start=3, epochs=4, steps=10)
    assert [term.weight(f) for f in (0, 19, 20, 29, 30, 39)] == [0, 0, 0.25, 0.25, 0.5, 0.5]


def test_the_published_average_moves_k_once_the_ring_is_full_and_never_below_a_hundred_dimensions():
    for lift, moves in ((RING, True), (16, False)):
        term = PublishedTerm(D, 1, lift, most=1.0, start=1, epochs=1, steps=1000)
        before = term.liftings[0].matrix.detach().clone()
        for step in range(RING + 1):
            if step == RING:
                assert torch.equal(term.liftings[0].matrix, before)
                ring = term.ring.clone()
            with torch.no_grad():
                term(states_of(2, 3)[:2])
        pulled = term.liftings[0].matrix.detach()
        assert torch.equal(pulled, before) is not moves
        if moves:
            assert torch.allclose(pulled, 0.9 * before + 0.1 * published_dmd(*ring[0]), rtol=1e-3, atol=1e-4)


def test_a_large_published_loss_makes_the_weight_a_hundredth_for_ten_batches():
    term = PublishedTerm(D, 1, 16, most=1.0, start=1, epochs=1, steps=1000, threshold=1e-9)
    states = states_of()[:2]
    with torch.no_grad():
        found = [float(term(states)) for _ in range(12)]
    assert found[1:11] == pytest.approx([0.01 * found[0]] * 10)
    assert found[11] == pytest.approx(found[0])
    with torch.no_grad():
        assert float(term([states[0], states[1] * float("nan")])) == 0.0
        assert float(term(states)) == 0.0


def test_the_published_koopman_mode_mixes_no_positions_and_its_standard_mode_sees_the_future():
    model, ids = published(), torch.randint(WORDS, (1, 12))
    model.eval()
    assert float(future_leak(model.model.double(), ids, position=11).max()) > 1e-9
    model.model.float()
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % WORDS
    with koopman_forward(model.model, model.term), torch.no_grad():
        moved = (model(ids) != model(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [5]


def test_a_lifting_is_described_by_its_fit_beside_persistence_and_least_squares():
    model = WithTerm(solve_model(), KoopmanTerm(D, LAYERS, 16), 1.0)
    found = describe_lifting(model.model, model.term, torch.randint(WORDS, (6, 12)))
    assert found["r2_least_squares"] >= max(found["r2"], found["r2_persistence"]) - 1e-9
    assert found["r2_least_squares"] <= 1
    assert found["phi_variance"] > 0
    assert found["psi_error"] > 0


class LinearMixer(torch.nn.Module):
    """A block that is linear in this and the position before."""

    def __init__(self):
        super().__init__()
        from bklm.models.mixing import MixingPoint

        self.mixed = MixingPoint()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("before", torch.randn(D, D, generator=random) * 0.5)
        self.register_buffer("own", torch.randn(D, D, generator=random) * 0.3)

    def forward(self, x):
        shifted = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]
        return x + x @ self.own + self.mixed(shifted @ self.before) + 0.1, None


@pytest.fixture(scope="module")
def scored():
    """(model, batches, rows) of a model whose blocks are linear with one delay, replaced."""
    torch.manual_seed(0)
    model = solve_model().eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
    for i in range(LAYERS):
        model.blocks[i] = LinearMixer()
    # The targets are the model's own: it is the better for what it hears of the position before.
    with torch.no_grad():
        batches = [(ids, model(ids).argmax(-1)) for ids in torch.randint(WORDS, (3, 16, 12))]
    states = collect_states(model, batches[:2], 10_000)
    fitted = fit_blocks(states, units=12, taps=(1, 2))
    return model, batches, fitted, score_blocks(model, fitted, batches[:2], batches[2:], 150)


def row(rows, block, replacement):
    return next(r for r in rows if (r["block"], r["replacement"]) == (block, replacement))


def test_a_linear_block_with_a_delay_is_linearised_whole_and_one_position_is_not_enough(scored):
    model, batches, _, rows = scored
    plain = evaluate(model, batches[2:], None).loss
    for block in ("1", "2", "all"):
        assert row(rows, block, "original")["val_loss"] == pytest.approx(plain)
        whole = row(rows, block, "affine, 2 positions")
        assert whole["r2"] > 0.9999
        assert whole["context_gain_kept"] == pytest.approx(1, abs=1e-2)
        assert row(rows, block, "affine")["r2"] < 0.9
        assert row(rows, block, "skip")["r2"] == pytest.approx(0, abs=1e-6)
        alone = [row(rows, block, kind) for kind in ("mixer off", "skip", "affine", "EDMD", "MLP")]
        assert max(r["context_gain_kept"] for r in alone) == 0
        best = min(r["val_loss"] for r in alone)
        assert whole["context_gain_nats"] == pytest.approx(best - plain)
    assert {r["replacement"] for r in rows} == {
        "original", "mixer off", "skip", "affine", "affine, 2 positions", "EDMD", "EDMD, 2 positions", "MLP",
    }  # fmt: skip


def test_the_mixer_off_is_off_at_every_mixing_point_of_its_blocks():
    """A block with a short convolution has two."""
    torch.manual_seed(0)
    model = solve_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batches = [(ids, ids.roll(-1, 1)) for ids in torch.randint(WORDS, (2, 16, 12))]
    rows = score_blocks(model, {}, batches[:1], batches[1:], 50)
    with model.recording_mixing() as recorded:
        evaluate(model, batches[:1], None)
    means, points = recorded.means(), model.mixing_points()
    assert len(points) == 2 * LAYERS
    with model.without_mixing(means):
        assert row(rows, "all", "mixer off")["val_loss"] == pytest.approx(
            evaluate(model, batches[1:], None).loss
        )
    with replacing(points[2:], means[2:]):
        assert row(rows, "2", "mixer off")["val_loss"] == pytest.approx(evaluate(model, batches[1:], None).loss)


def test_a_replacement_of_one_position_moves_no_other_positions_logits(scored):
    model, batches, fitted, _ = scored
    from bklm.models.koopman import replaced

    ids = batches[0][0][:1]
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % WORDS
    for kind, reach in (("EDMD", 1), ("affine", 1), ("MLP", 1), ("EDMD, 2 positions", 1 + LAYERS)):
        with replaced(model, dict(enumerate(fitted[kind]))), torch.no_grad():
            moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero().flatten().tolist() == list(range(4, 4 + reach)), kind


def test_states_are_collected_up_to_a_number_of_positions_and_a_rank_above_them_is_refused():
    model = solve_model()
    batches = [(ids, ids) for ids in torch.randint(WORDS, (3, 4, 6))]
    states = collect_states(model, batches, 30)
    assert [tuple(x.shape) for x in states] == [(5, 6, D)] * 3
    assert model.training
    with pytest.raises(ValueError, match=r"^rank: got 40 with 30 snapshots of 9 features; it can be 1 to 9: "):
        fit_blocks(states, units=2, taps=(1,), rank=40)
    with pytest.raises(ValueError, match=r"^states: got no batch"):
        collect_states(model, [], 30)
