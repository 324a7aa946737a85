"""Conservative: its energy is one, its blocks undo, its backward is exact and keeps nothing, and it never sees the future."""

import dataclasses

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.autograd.graph import saved_tensors_hooks

from bklm.models import Conservative, ConservativeConfig, ResNetBK, ResNetBKConfig, future_leak
from bklm.models.potentials import FreeForce, PairPotential, Potential, energy
from bklm.models.reversible import leapfrog, run_blocks, undo_blocks
from bklm.models.sizing import conservative_of_size
from bklm.training.energy_drift import STEPS, TIME, block_energies, by_euler, compare_forces, drift, slope

V = 23


def model_of(seed=0, *, double=True, moved=0.1, **more):
    torch.manual_seed(seed)
    settings = {"d_model": 16, "n_layers": 3, "units": 20, "n_heads": 2, "dropout_p": 0.0, **more}
    model = Conservative(ConservativeConfig(V, **settings))
    model = model.double() if double else model
    with torch.no_grad():
        for x in model.parameters():
            x.add_(moved * torch.randn_like(x))
    return model.eval()


def ids_of(batch=3, length=11, seed=1):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_block_is_a_kick_a_drift_and_a_kick_of_the_force_written_out():
    model, ids = model_of(n_layers=1), ids_of()
    force, h = model.forces[0], model.config.step
    x = model.embedding.weight[ids]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, p = x[..., :8], x[..., 8:]

    def f(q):
        U = force.potential
        inside = q @ U.directions.t() + U.offsets
        pull = torch.einsum("bnk,k,kd->bnd", torch.sigmoid(inside), U.heights, U.directions)
        return force.mixer(force.norm(q))[0] - pull

    p = p + h / 2 * f(q)
    q = q + h * p
    p = p + h / 2 * f(q)
    want = model.norm(torch.cat((q, p), -1)) @ model.embedding.weight.t()
    torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Potential, PairPotential])
def test_the_force_is_the_gradient_of_its_potential_and_can_be_differentiated_twice(kind):
    torch.manual_seed(0)
    potential = kind(3, 5).double()
    q = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(potential(q).sum(), q)
    torch.testing.assert_close(potential.gradient(q), want, rtol=0, atol=1e-13)
    torch.autograd.gradcheck(potential.gradient, q)
    torch.autograd.gradgradcheck(potential.gradient, q)


def test_drift_falls_with_the_square_of_the_step_and_only_where_there_is_an_energy():
    own, pair, cut, euler = compare_forces()
    for found in (own, pair):
        assert found.slope == pytest.approx(2, abs=0.2)
        assert found.long < 1.5 * found.short
    assert euler.slope == pytest.approx(1, abs=0.2)
    assert euler.long > 1.5 * euler.short
    # Causal and coupling positions: smaller steps find no conserved energy.
    assert abs(cut.slope) < 0.1
    assert min(cut.drifts) > 100 * max(pair.drifts)


def test_the_energy_stays_bounded_over_a_thousand_leapfrog_steps_and_not_over_eulers():
    torch.manual_seed(3)
    potential = Potential(8, 40).double()
    start = torch.randn(2, 16, 2, 8, dtype=torch.float64).unbind(0)
    assert drift(potential, start, 0.2, 200) < 1.5 * drift(potential, start, 0.2, TIME) < 0.02
    assert drift(potential, start, 0.2, 200, by_euler) > 10 * drift(potential, start, 0.2, TIME, by_euler)


@pytest.mark.parametrize(("double", "most"), [(True, 1e-10), (False, 1e-3)])
def test_the_inputs_of_32_blocks_are_rebuilt_from_their_outputs(double, most):
    model = model_of(n_layers=32, double=double, moved=0.05)
    assert 0 < model.inverse_error(ids_of(2, 40)) < most


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backward", ["reversible", "checkpoint"])
def test_gradients_are_plain_autograds(backward, dropout_p, every):
    model, ids = model_of(every=every, n_layers=4).train(), ids_of()
    found = {}
    for way in ("plain", backward):
        model.config = dataclasses.replace(model.config, backward=way)
        for force in model.forces:
            force.dropout_p = dropout_p
        model.config = dataclasses.replace(model.config, dropout_p=dropout_p)
        torch.manual_seed(5)
        model.zero_grad()
        model.loss(ids, ids).backward()
        found[way] = {name: x.grad.clone() for name, x in model.named_parameters()}
    assert sum("potential" in name for name in found["plain"]) == 3 * (4 // every)
    for name, want in found["plain"].items():
        assert want.abs().max() > 0, name
        torch.testing.assert_close(found[backward][name], want, rtol=1e-8, atol=1e-12)


def test_dropout_draws_other_masks_each_time_and_the_same_for_one_seed():
    model, ids = model_of(dropout_p=0.5).train(), ids_of()

    def loss(seed):
        torch.manual_seed(seed)
        return model.loss(ids, ids).item()

    assert loss(1) == loss(1) != loss(2)


@pytest.mark.parametrize("backward", ["reversible", "checkpoint"])
def test_where_masks_cannot_be_drawn_again_none_is(backward, monkeypatch):
    """As while a CUDA graph is captured: a number would be the same at every replay."""
    monkeypatch.setattr("bklm.bk_core.pivots.is_capturing", lambda device: True)
    ids, found = ids_of(), []
    for way in ("plain", backward):
        model = model_of(dropout_p=0.5, backward=way).train()
        torch.manual_seed(5)
        model.loss(ids, ids).backward()
        found.append([x.grad for x in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_blocks_undo_with_their_dropout():
    model = model_of(dropout_p=0.4)
    q, p = model.start(ids_of())
    after = run_blocks(model.forces, q, p, 1.0, seed=77)
    for found, want in zip(undo_blocks(model.forces, *after, 1.0, seed=77), (q, p), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def kept_bytes(model, ids):
    """Bytes that autograd holds between a forward and its backward, weights and tokens left out."""
    own = {x.data_ptr() for x in model.parameters()} | {ids.data_ptr()}
    kept = {}

    def pack(x):
        if x.data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model.hidden(ids).sum()
    return sum(kept.values())


def test_what_is_kept_for_the_backward_does_not_grow_with_depth():
    ids = ids_of(2, 50)
    kept = {
        (way, layers): kept_bytes(model_of(n_layers=layers, backward=way).train(), ids)
        for way in ("reversible", "plain")
        for layers in (4, 32)
    }
    assert kept["reversible", 32] <= 1.3 * kept["reversible", 4]
    assert kept["plain", 32] > 5 * kept["plain", 4]
    residual = {
        n: kept_bytes(ResNetBK(ResNetBKConfig(V, 16, n, mixer="solve", num_experts=1, n_heads=2)).train(), ids)
        for n in (4, 32)
    }
    assert residual[32] > 5 * residual[4]


def test_the_past_does_not_move_when_the_future_changes():
    model, ids = model_of(), ids_of(2, 40)
    for position in (1, 20, 39):
        assert future_leak(model, ids, position).max() <= 1e-12
    require_no_gradient_to_the_future(model, ids_of(2, 9), (0, 4, 8))


def test_a_potential_that_couples_positions_fails_the_leak_test_and_says_that_it_sees_the_future():
    model = model_of(kind="coupled")
    assert model.sees_future
    assert not model.streams
    assert future_leak(model, ids_of(2, 12), 6)[-1] > 1e-6
    with pytest.raises(TypeError, match="does not stream"):
        model.init_state(1)


def test_streaming_gives_the_logits_of_the_whole_text():
    model, ids = model_of(every=2), ids_of(3, 14)
    whole = model(ids)
    logits, state = model.prefill(ids[:, :5])
    torch.testing.assert_close(logits, whole[:, 4], rtol=0, atol=1e-12)
    for t in range(5, 14):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-12)
    first, _ = model.step(ids[:, 0], model.init_state(3))
    torch.testing.assert_close(first, whole[:, 0], rtol=0, atol=1e-12)
    carried = sum(x.numel() * x.element_size() for pair in state.mixers for m in pair for x in m.solve)
    assert model.state_bytes(14) * 3 == carried


def test_a_blocks_energy_drifts_little_without_the_drive_and_is_worked_on_with_it():
    model = model_of(moved=0.0)
    with torch.no_grad():
        for force in model.forces:
            force.mixer.output.weight.mul_(500)
    ids = ids_of(8, 20)
    free, driven = (block_energies(model, ids, driven=driven) for driven in (False, True))
    assert free["spread"] == driven["spread"] > 0
    assert driven["ratio"] > 5 * free["ratio"] > 0
    assert free["ratio"] < 0.1


def test_sizes_meet_a_parameter_count():
    found = conservative_of_size(300_000, 1000, 64, n_layers=4)
    assert found.parameters == Conservative(found.config).num_parameters()
    assert abs(found.difference) < 0.02
    half = conservative_of_size(300_000, 1000, 64, n_layers=4, every=2)
    assert abs(half.difference) < 0.02
    assert half.config.units == pytest.approx(2 * found.config.units, rel=0.01)
    with pytest.raises(
        ValueError, match=r"^parameters: got 20000, but .* has at least \d+; ask for more\b.*\.$"
    ):
        conservative_of_size(20_000, 1000, 64)


def test_bad_settings_are_refused_in_one_sentence():
    for step in (0.0, -1.0, 4.0, float("nan")):
        with pytest.raises(
            ValueError, match=r"^step: got .*; it must be positive, and leapfrog is unstable from 4"
        ):
            ConservativeConfig(V, step=step)
    with pytest.raises(
        ValueError, match=r"^d_model: got 24; half of it is shared among n_heads = 8; .* of 16\.$"
    ):
        ConservativeConfig(V, d_model=24)
    with pytest.raises(ValueError, match=r"^backward: got 'magic'; allowed are"):
        ConservativeConfig(V, backward="magic")
    with pytest.raises(
        ValueError, match=r"^step: got 5; it must be positive, and leapfrog is unstable from 4 on"
    ):
        drift(Potential(2, 4), torch.zeros(2, 1, 1, 2).unbind(0), 5, 10)


def test_slope_is_that_of_a_power_law():
    assert slope(STEPS, [3 * h**1.5 for h in STEPS]) == pytest.approx(1.5)


def test_a_leapfrog_step_keeps_the_energy_of_a_pendulum_to_second_order():
    # H = p^2 / 2 + 1 - cos q, which knows nothing of the package's potentials.
    q, p = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    worst = {}
    for h in (0.1, 0.01):
        a, b, worst[h] = q, p, 0.0
        for _ in range(round(20 / h)):
            a, b = leapfrog(lambda x, kick: -torch.sin(x), a, b, h)
            worst[h] = max(worst[h], float((b**2 / 2 - torch.cos(a) - p**2 / 2 + torch.cos(q)).abs()))
    assert worst[0.1] / worst[0.01] == pytest.approx(100, rel=0.05)
    assert worst[0.1] < 2e-3
    assert energy(Potential(1, 3).double(), q[None, None], p[None, None]).item() > 0.045


def test_the_placebos_force_begins_as_a_potentials_and_has_no_energy():
    torch.manual_seed(0)
    free = FreeForce(3, 5).double()
    own = Potential(3, 5).double()
    own.load_state_dict(free.state_dict(), strict=False)
    q = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(free.gradient(q), own.gradient(q))
    with torch.no_grad():
        free.outgoing.add_(torch.randn_like(free.outgoing))
    jacobian = torch.autograd.functional.jacobian(free.gradient, q[0])
    assert (jacobian - jacobian.t()).abs().max() > 1e-2
    with pytest.raises(TypeError, match="is the gradient of nothing"):
        energy(free, q, q)
    model, ids = model_of(kind="free"), ids_of()
    assert model.inverse_error(ids) < 1e-10
    assert future_leak(model, ids, 5).max() <= 1e-12


def test_under_autocast_the_backward_computes_the_forces_of_the_forward():
    model, ids = model_of(double=False, n_layers=6, moved=0.5).train(), ids_of()
    found = {}
    for way in ("plain", "reversible"):
        model.config = dataclasses.replace(model.config, backward=way)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, ids)
        loss.backward()
        found[way] = torch.cat([x.grad.flatten() for x in model.parameters()])
    # Forces computed again in float32 would be others: off by more than the gradient's own size.
    assert (found["reversible"] - found["plain"]).norm() < 1e-2 * found["plain"].norm()


def test_frozen_parts_get_no_gradient_and_the_others_keep_theirs():
    model, ids = model_of().train(), ids_of()
    for x in [*model.embedding.parameters(), *model.forces[1].parameters()]:
        x.requires_grad_(False)
    found = {}
    for way in ("plain", "reversible"):
        model.config = dataclasses.replace(model.config, backward=way)
        model.zero_grad()
        model.loss(ids, ids).backward()
        found[way] = {name: None if x.grad is None else x.grad.clone() for name, x in model.named_parameters()}
    for name, want in found["plain"].items():
        if want is None:
            assert found["reversible"][name] is None, name
        else:
            torch.testing.assert_close(found["reversible"][name], want, rtol=1e-8, atol=1e-12)
