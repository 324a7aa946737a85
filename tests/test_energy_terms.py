"""Energy terms: the formulas, what does not reach the logits, the placebos, what is measured, and resuming."""

import itertools

import pytest
import torch

from bklm.data import Pieces, make_loader, set_epoch, windows
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.energy_terms import (
    DepthEnergy,
    PublishedEnergy,
    Trace,
    WithEnergy,
    embedding_norm,
    gradient_share,
    measure_energy,
    measure_pairs,
)

V, D, LAYERS = 19, 8, 3


def plain(**more):
    torch.manual_seed(0)
    return ResNetBK(
        ResNetBKConfig(V, D, LAYERS, mixer="solve", num_experts=1, n_heads=2, dropout_p=0.0, **more)
    )


def ids_of(batch=4, length=9, seed=1):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def mlp(net, x):
    first, _, last = net
    return (torch.tanh(x @ first.weight.t() + first.bias) @ last.weight.t() + last.bias)[..., 0]


def test_the_published_term_is_its_formula_on_the_embeddings_of_this_batch_and_the_one_before():
    model, one, two = plain(), ids_of(seed=1), ids_of(seed=2)
    wrapped = WithTerm(model, PublishedEnergy(D, 2, weight=0.5), 1.0, apart=False).train()
    assert wrapped.loss(one, one) == model.loss(one, one)
    lambdas = wrapped.term.weights.detach().clone()
    extra = wrapped.loss(two, two) - model.loss(two, two)
    x, before = model.embedding(two), model.embedding(one)
    want = 0
    drifts = []
    for net, weight in zip(wrapped.term.nets, lambdas, strict=True):
        energy = mlp(net.t, x - before).sum(1) + mlp(net.v, x).sum(1)
        difference = energy - mlp(net.v, before).sum(1)
        want = want + weight * difference.square().mean() / 2
        drifts.append(difference.abs().mean())
    torch.testing.assert_close(extra, want, rtol=1e-4, atol=1e-6)
    raised = lambdas + 0.01 * (torch.stack(drifts) - 0.1)
    torch.testing.assert_close(wrapped.term.weights, raised.clamp(0.01, 10))


def test_no_logit_depends_on_an_energy_and_the_term_reaches_the_embedding_alone():
    model, ids = plain(), ids_of()
    wrapped = WithTerm(model, PublishedEnergy(D, 2), 1.0)
    wrapped.eval()
    logits = wrapped(ids)
    with torch.no_grad():
        for x in wrapped.term.parameters():
            x.zero_()
    assert torch.equal(wrapped(ids), logits)
    wrapped.term = PublishedEnergy(D, 2)
    wrapped.train()
    wrapped.loss(ids, ids)
    wrapped.hidden(ids_of(seed=3))
    wrapped.auxiliary_loss().backward()
    reached = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}
    assert reached == {"embedding.weight"}


def test_the_published_term_waits_for_its_start_and_forgets_the_batch_before_when_an_epoch_ends():
    term = PublishedEnergy(D, 1, start=2).train()
    states = [[torch.randn(2, 3, D)] for _ in range(6)]
    assert [float(term(s).detach()) > 0 for s in states[:3]] == [False, False, True]
    term.eval()
    term.train()
    assert term(states[3]) == 0
    assert term(states[4]) > 0
    # Another number of sequences: the last batch of an epoch may be smaller.
    assert term([states[5][0][:1]]) == 0


def test_the_placebo_sees_the_tokens_of_the_batch_before_in_another_order_and_draws_nothing_of_torchs():
    torch.manual_seed(0)
    own, placebo = PublishedEnergy(D, 1), PublishedEnergy(D, 1, shuffled=True)
    placebo.load_state_dict(own.state_dict())
    a, b = torch.randn(2, 3, 5, D)
    state = torch.get_rng_state()
    values = []
    for term in (own, placebo):
        term([a])
        values.append(float(term([b]).detach()))
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] != values[1]
    # Energies of tokens that are all alike have no order to lose.
    for term in (own, placebo):
        term.load_state_dict({**term.state_dict(), "weights": torch.ones(1)})
        term.eval().train()
        term([a[:1, :1].expand_as(a)])
    assert own([b]).item() == pytest.approx(placebo([b]).item(), rel=1e-6)


def test_the_mended_term_is_one_for_independent_energies_zero_for_conserved_ones_and_blind_to_their_size():
    torch.manual_seed(0)
    term = DepthEnergy(D, LAYERS)
    x = torch.randn(64, 20, D)
    with torch.no_grad():
        for p in term.nets.t.parameters():
            p.zero_()
    assert term([x] * 4).item() == pytest.approx(0.0, abs=1e-6)
    apart = [torch.randn(64, 20, D) for _ in range(4)]
    value = float(term(apart).detach())
    assert value == pytest.approx(1.0, abs=0.1)
    with torch.no_grad():
        for p in term.nets.v[-1].parameters():
            p.mul_(1e-3)
    assert term(apart).item() == pytest.approx(value, rel=1e-3)
    placebo = DepthEnergy(D, LAYERS, placebo=True)
    placebo.load_state_dict(term.state_dict())
    assert placebo([x] * 4).item() == pytest.approx(1.0, abs=0.1)


def test_the_mended_term_has_gradients_in_all_its_parameters_and_in_the_blocks():
    model = plain()
    wrapped = WithTerm(model, DepthEnergy(D, LAYERS), 1.0).train()
    wrapped.hidden(ids_of())
    wrapped.auxiliary_loss().backward()
    for name, x in wrapped.term.named_parameters():
        # The last biases cancel in a difference.
        assert x.grad.abs().max() > 0 or name.endswith("v.2.bias"), name
    assert model.blocks[0].mixer.output.weight.grad.abs().max() > 0


def test_drift_is_told_in_units_of_the_energys_own_spread():
    e = torch.tensor([0.0, 2.0, 4.0])
    drift, spread, ratio = measure_pairs([(e, e + 1), (10 * e, 10 * e + 10)])
    assert (drift, spread, ratio) == pytest.approx((5.5, 11.0, 0.5))
    # One number for all states: nothing to measure a drift by, and no division by zero.
    assert measure_pairs([(e * 0, e * 0 + 1), (e, e)]) == (0.5, 1.0, None)
    wrapped = WithTerm(plain(), PublishedEnergy(D, 2), 1.0).train()
    found = measure_energy(wrapped, ids_of())
    assert wrapped.training
    assert found["ratio"] > 0
    assert found["spread"] > 0


def test_the_share_of_the_gradient_leaves_the_term_as_it_was_and_grows_with_its_weight():
    model, x = plain(), ids_of()
    shares = []
    for weight in (1e-3, 1.0, 1e3):
        wrapped = WithTerm(model, PublishedEnergy(D, 2, weight=1.0, start=5), weight)
        before = {k: v.clone() for k, v in wrapped.state_dict().items()}
        state = torch.get_rng_state()
        shares.append(gradient_share(wrapped, x, x))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())
        assert wrapped.term.start == 5
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert shares[2] > 0.9
    assert embedding_norm(model) == pytest.approx(
        float(model.embedding.weight.detach().square().mean().sqrt()), rel=1e-5
    )


def test_the_share_of_the_gradient_is_logged_over_the_training_and_changes_nothing_of_it():
    x = [ids_of(seed=n) for n in range(6)]

    def trained(every):
        torch.manual_seed(2)
        made = WithEnergy(plain(), PublishedEnergy(D, 2, start=1), 1.0, every=every, apart=False).train()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        losses = []
        for batch in x:
            optimizer.zero_grad()
            loss = made.loss(batch, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return made, losses

    (often, losses), (once, others) = trained(2), trained(99)
    assert losses == others
    assert [row["step"] for row in often.shares.to_list()] == [1, 3, 5]
    assert [row["step"] for row in once.shares.to_list()] == [1]
    assert often.shares.to_list()[0] == once.shares.to_list()[0]
    assert all(0 < row["gradient_share"] < 1 for row in often.shares.to_list())
    fresh = WithEnergy(plain(), PublishedEnergy(D, 2), 1.0, every=1)
    fresh.load_state_dict(often.state_dict())
    assert fresh.shares.to_list() == often.shares.to_list()


def test_a_term_that_the_model_does_not_hear_of_takes_no_share_of_its_clip_and_one_with_a_limit_no_more_than_that():
    x = ids_of()
    detached = WithEnergy(plain(), DepthEnergy(D, LAYERS), 1.0, every=1, detached=True)
    assert gradient_share(detached, x, x) == 0.0
    torch.manual_seed(4)
    free = WithEnergy(plain(), DepthEnergy(D, LAYERS), 100.0, every=1)
    torch.manual_seed(4)
    limited = WithEnergy(plain(), DepthEnergy(D, LAYERS), 100.0, every=1, limit=1e-3)
    assert gradient_share(limited, x, x) < 0.1 < gradient_share(free, x, x)


def test_a_trace_keeps_evenly_spread_rows_and_travels_in_a_state_dict():
    trace = Trace(8)
    for _ in range(100):
        step, is_wanted = trace.count()
        if is_wanted:
            trace.add(step, 1.0, 2.0, 3.0, 4.0)
    steps = [int(row["step"]) for row in trace.to_list()]
    assert 4 < len(steps) <= 8
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert steps[-1] >= 80
    other = Trace(8)
    other.load_state_dict(trace.state_dict())
    assert other.to_list() == trace.to_list()


def test_energies_between_blocks_need_two_blocks():
    with pytest.raises(
        ValueError, match=r"^n_layers: got 1; an energy that blocks conserve needs 2 blocks or more\.$"
    ):
        DepthEnergy(D, 1)


def test_a_pass_in_pieces_gives_its_batches_once_each_in_the_order_of_the_whole_pass():
    data = windows(torch.arange(1, 90).numpy(), 4)
    whole, cut = (make_loader(data, 2, shuffle=True, seed=3) for _ in range(2))
    pieces = Pieces(cut, 3)
    for run in (1, 2):
        set_epoch(whole, run)
        want = [x for x, _ in whole][: 3 * len(pieces)]
        found = []
        for piece in range(3):
            set_epoch(pieces, 3 * (run - 1) + piece + 1)
            part = list(pieces)
            assert len(part) == len(pieces)
            found += [x for x, _ in part]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(
        ValueError, match=r"^pieces: got 99, but a pass has 11 batches; .* as many pieces or fewer\.$"
    ):
        Pieces(cut, 99)
