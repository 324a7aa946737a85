"""ResNet-BK with the mixer "solve": it reads, sees no future, and streams with constant state."""

import copy
import dataclasses
import math

import pytest
import torch
from causality import require_no_gradient_to_the_future
from torch.nn import functional as F

from bklm.bk_core import resolvent_solve
from bklm.models import ResNetBK, ResNetBKConfig, future_leak, reading_settings
from bklm.models.normalised_gate import gated, normalised, normalised_gate
from bklm.models.resnet_bk_mixers import SolveMixer

VOCABULARY = 23


def model_of(seed=0, *, double=True, **changes):
    """A small model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    settings = {
        "d_model": 12,
        "n_layers": 2,
        "n_heads": 3,
        "dropout_p": 0.0,
        "num_experts": 1,
        "convolution": 0,
    }
    settings |= changes
    model = ResNetBK(ResNetBKConfig(VOCABULARY, mixer="solve", **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return (model.double() if double else model).eval()


def ids_of(batch, length, seed=1):
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


KINDS = [{}, {"num_experts": 3}, {"convolution": 3}, {"n_heads": 1}, {"tied": False}]


def literal_mixer(mixer, u):
    """Output of one mixer by dense inverses of the leading blocks."""
    heads, d = mixer.config.n_heads, mixer.config.d_model
    batch, length, _ = u.shape
    read = u @ mixer.inputs.weight.t() + mixer.inputs.bias
    v, b = read[..., 2 * d : 2 * d + heads], torch.sigmoid(read[..., 2 * d + heads :])
    values = read[..., :d].reshape(batch, length, heads, -1)
    eta = mixer.log_eta.exp()
    y = torch.zeros(batch, length, heads, d // heads, dtype=torch.complex128)
    for s in range(batch):
        for head in range(heads):
            for i in range(length):
                t = torch.diag(v[s, : i + 1, head])
                if i:
                    bonds = b[s, 1 : i + 1, head]
                    t = t + torch.diag(bonds, 1) + torch.diag(bonds, -1)
                inverse = torch.linalg.inv(t - 1j * eta[head] * torch.eye(i + 1, dtype=v.dtype))
                y[s, i, head] = inverse[-1] @ values[s, : i + 1, head].to(inverse.dtype)
    size = (y.real.square() + y.imag.square()).mean(-1, keepdim=True) / 2
    y = y / torch.sqrt(size + 1e-5)
    gate = F.silu(read[..., d : 2 * d])
    features = torch.cat((y.real.flatten(2) * gate, y.imag.flatten(2) * gate), -1)
    return features @ mixer.output.weight.t() + mixer.output.bias


def test_the_mixer_is_the_last_row_of_the_resolvent_of_each_leading_block_applied_to_values():
    mixer = model_of().blocks[0].mixer
    u = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(u)[0], literal_mixer(mixer, u), rtol=0, atol=1e-11)


def test_the_mixer_has_the_exact_gradient():
    mixer = model_of(d_model=6, n_heads=2, convolution=2).blocks[0].mixer
    u = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*mixer.named_parameters(), strict=True)

    def output(u, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (u,))[0]

    assert torch.autograd.gradcheck(output, (u, *weights), fast_mode=False)


@pytest.mark.parametrize(("heads", "width", "length"), [(1, 1, 1), (3, 5, 7), (8, 28, 64)])
@pytest.mark.parametrize("road", ["kernel", "torch"])
def test_normalising_and_gating_in_few_passes_is_the_formula_and_its_gradient(
    road, heads, width, length, monkeypatch
):
    if road == "torch":
        monkeypatch.setattr("bklm.models.normalised_gate._has_kernel", lambda y: False)
    torch.manual_seed(length)
    # As from a solve whose rows of y lie apart, and gates that are a slice.
    y = torch.randn(2, heads, length, width, dtype=torch.complex128).mul_(torch.rand(2, heads, length, 1) * 50)
    g = torch.randn(2, length, 3 * heads * width, dtype=torch.float64)
    results = []
    for function in (normalised_gate, lambda y, gates: gated(normalised(y), gates)):
        given = [y.clone().requires_grad_(), g.clone().requires_grad_()]
        out = function(given[0], given[1][..., : heads * width])
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        first = torch.autograd.grad((out * weights).sum(), given, retain_graph=True)
        again = torch.autograd.grad((out * weights).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(t.abs().square().sum() for t in again), given)
        results.append([out, *first, *again, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# --- the future ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_changing_later_tokens_leaves_earlier_logits_alone(changes):
    model, ids = model_of(**changes), ids_of(3, 20)
    for position in (1, 10, 19):
        assert future_leak(model, ids, position).max() <= 1e-12
    altered = ids.clone()
    altered[:, 4] = (ids[:, 4] + 1) % VOCABULARY
    moved = (model(altered) - model(ids)).abs().amax((0, 2))
    assert (moved[4:8] > 1e-6).all()


@pytest.mark.parametrize("changes", KINDS)
def test_gradient_of_past_logits_with_respect_to_future_embeddings_is_exactly_zero(changes):
    require_no_gradient_to_the_future(model_of(**changes), ids_of(2, 12), (0, 5, 10))


def test_a_mixer_that_is_not_causal_sees_the_future_and_does_not_stream():
    model, ids = model_of(causal=False, convolution=3), ids_of(2, 20)
    assert future_leak(model, ids, 19)[18] > 1e-3
    assert not model.streams
    for call in (lambda: model.init_state(1), lambda: model.prefill(ids), lambda: model.step(ids[:, 0], None)):
        with pytest.raises(TypeError, match="does not stream"):
            call()


def test_a_closed_bond_forgets_all_that_lies_before():
    mixer = model_of().blocks[0].mixer
    u = torch.randn(1, 10, 12, dtype=torch.float64)
    with torch.no_grad():
        # The bond reads one channel, which is open everywhere and closed at position 6.
        mixer.inputs.weight[27:] = 0
        mixer.inputs.bias[27:] = 0
        mixer.inputs.weight[27:, 0] = 1.0
    u[..., 0] = 3.0
    u[:, 6, 0] = -800.0
    changed = u.clone()
    changed[:, :6, 1:] += 1.0
    difference = (mixer(u)[0] - mixer(changed)[0]).abs().amax((0, 2))
    assert (difference[:6] > 1e-4).all()
    assert (difference[6:] == 0).all()


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_prefill_and_steps_give_the_logits_of_the_full_forward(prompt, double, tolerance, changes):
    model, ids = model_of(double=double, **changes), ids_of(2, 24)
    whole = model(ids)
    # These weights are large, so a layer multiplies the rounding of its products, which differ for one row and for many: the
    # whole pass itself may be further than 1e-5 from the numbers of double precision. Then steps are as close to it as that.
    exact = copy.deepcopy(model).double()(ids)
    tolerance = max(tolerance * whole.abs().max().item(), 2 * (whole - exact).abs().max().item())
    if prompt:
        logits, state = model.prefill(ids[:, :prompt])
        torch.testing.assert_close(logits, whole[:, prompt - 1], rtol=0, atol=tolerance)
    else:
        state = model.init_state(2)
    for i in range(prompt, 24):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=tolerance)
    assert state.position == 24


@pytest.mark.parametrize(("heads", "length"), [(8, 400), (1, 200)])
@torch.no_grad()
def test_steps_of_a_whole_model_agree_to_1e_5_over_a_long_text(heads, length):
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(1000, 64, 3, mixer="solve", n_heads=heads, num_experts=1)).eval()
    ids = torch.randint(0, 1000, (2, length))
    whole, state = model(ids), model.init_state(2)
    for i in range(length):
        logits, state = model.step(ids[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("convolution", [0, 4])
def test_the_state_is_as_large_as_it_says_at_any_position(convolution):
    model = model_of(double=False, convolution=convolution)
    for length in (1, 2, 300):
        _, state = model.prefill(ids_of(1, length))
        parts = [t for mixer in state.resolvents for t in (*mixer.solve, mixer.recent)]
        held = sum(t.numel() * t.element_size() for t in parts)
        assert held == model.state_bytes(length)
    # Per layer: L of 3 heads and y of 12 channels, complex, and 3 past inputs of the convolution of 4.
    assert model.state_bytes(1) == 2 * 4 * (2 * 3 + 2 * 12 + max(0, convolution - 1) * 12)


def test_step_leaves_the_given_state_unchanged():
    model, ids = model_of(convolution=2), ids_of(1, 6)
    _, state = model.prefill(ids)
    first, _ = model.step(ids[:, 0], state)
    again, _ = model.step(ids[:, 0], state)
    assert torch.equal(first, again)


def test_generation_is_greedy_decoding_of_the_full_forward_without_an_end():
    model, prompt = model_of(), ids_of(2, 3)
    out = model.generate(prompt, 200, temperature=0.0)
    assert torch.equal(out[:, 3:], model(out)[:, 2:-1].argmax(-1))


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_blend_changes_the_gradient_and_nothing_else():
    ids, found = ids_of(2, 12), {}
    for alpha in (0.0, 0.5, 1.0):
        model = model_of(grad_blend=alpha)
        loss = model.loss(ids, ids.roll(-1, 1))
        found[alpha] = loss.item(), torch.autograd.grad(loss, model.blocks[1].mixer.inputs.weight)[0]
    assert found[0.0][0] == pytest.approx(found[0.5][0], rel=1e-12) == found[1.0][0]
    assert (found[0.0][1] - found[1.0][1]).abs().max() > 1e-6
    # Values, gates and bonds of the last block keep their exact gradient; the potential's is the blend of the ends.
    potential = slice(24, 27)
    for alpha in (0.5, 1.0):
        difference = found[alpha][1] - found[0.0][1]
        torch.testing.assert_close(difference[:24], torch.zeros_like(difference[:24]), rtol=0, atol=1e-12)
        torch.testing.assert_close(difference[27:], torch.zeros_like(difference[27:]), rtol=0, atol=1e-12)
    half = (found[0.0][1] + found[1.0][1]) / 2
    torch.testing.assert_close(found[0.5][1][potential], half[potential], rtol=1e-10, atol=1e-12)


def test_every_parameter_learns():
    for changes in KINDS:
        model, ids = model_of(double=False, **changes).train(), ids_of(8, 24)
        model.loss(ids, ids.roll(-1, 1)).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


def test_it_learns_what_stood_three_positions_before():
    """A text whose next token is the one of three positions before: no model without memory gets below log 8."""
    torch.manual_seed(0)
    model = ResNetBK(ResNetBKConfig(8, 32, 2, mixer="solve", n_heads=4, num_experts=1, dropout_p=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        x = torch.randint(0, 8, (32, 24))
        loss = model.loss(x[:, 3:], x[:, :-3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Targets of the first three positions of a window are unknown to it.
    assert loss.item() < 0.6 * math.log(8)


def test_untrained_heads_remember_one_position_to_hundreds():
    torch.manual_seed(0)
    config = ResNetBKConfig(50, 64, 1, mixer="solve", n_heads=8, num_experts=1)
    mixer = ResNetBK(config).double().blocks[0].mixer
    u = torch.randn(1, 400, 64, dtype=torch.float64, requires_grad=True)
    reach = []
    for head in range(8):
        values, _, potential, bond = mixer._parts(mixer._inputs(u))
        z = mixer._shift()
        y = resolvent_solve(
            values.detach().requires_grad_().transpose(1, 2), potential.transpose(1, 2),
            bond.transpose(1, 2)[..., 1:], bond.transpose(1, 2)[..., 1:], z, causal=True,
        )  # fmt: skip
        (weights,) = torch.autograd.grad(y[0, head, -1, 0].real + y[0, head, -1, 0].imag, u)
        share = weights[0].norm(dim=-1).flip(0).cumsum(0)
        reach.append(int((share < 0.9 * share[-1]).sum()))
    assert min(reach) <= 5
    assert max(reach) >= 100


def test_first_energies_and_bonds_are_the_configs():
    config = ResNetBKConfig(50, 64, 1, mixer="solve", n_heads=4, energy_span=1.5, hopping=0.9, least_eta=0.1)
    mixer = ResNetBK(config).blocks[0].mixer
    torch.testing.assert_close(mixer.inputs.bias[128:132], torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    torch.testing.assert_close(torch.sigmoid(mixer.inputs.bias[132:]), torch.full((4,), 0.9))
    eta = mixer.log_eta.exp()
    torch.testing.assert_close(eta, torch.tensor([0.1, 0.1 ** (2 / 3), 0.1 ** (1 / 3), 1.0]))


def test_every_second_head_can_begin_at_the_bands_edge():
    size = {"mixer": "solve", "n_heads": 4}
    model, plain = (
        ResNetBK(ResNetBKConfig(50, 64, 1, **size, **more)).blocks[0].mixer.inputs
        for more in ({"edge_energy": -1.8, "potential_scale": 0.1}, {})
    )
    assert (
        reading_settings(64).items() >= {"edge_energy": -1.8, "potential_scale": 0.1, "least_eta": 0.1}.items()
    )
    torch.testing.assert_close(model.bias[128:132], torch.tensor([-1.8, 0.0, -1.8, 0.0]))
    assert 0.07 < model.weight[128:132].std() / plain.weight[128:132].std() < 0.14
    assert 0.9 < model.weight[132:].std() / plain.weight[132:].std() < 1.1


def test_a_head_at_the_bands_edge_sums_and_one_at_its_middle_turns_by_a_quarter():
    """What the comments of the settings say, of the weight that a position back has on the last one."""
    x, bonds = torch.eye(64, dtype=torch.complex128), torch.full((63,), 0.95, dtype=torch.float64)
    turns = []
    for energy in (-1.9, 0.0):
        diagonal = torch.full((64,), energy, dtype=torch.float64)
        weights = resolvent_solve(x, diagonal, bonds, bonds, torch.tensor(0.05j), causal=True)[-1]
        turns.append((weights[30:40] / weights[31:41]).angle().abs())
    assert turns[0].max() < 0.2
    torch.testing.assert_close(turns[1], torch.full((10,), math.pi / 2, dtype=torch.float64), atol=0.02, rtol=0)


def test_dropout_acts_in_training_only():
    model, ids = model_of(dropout_p=0.3), ids_of(2, 6)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_trains_under_bfloat16_autocast_with_float32_gradients():
    model, ids = model_of(double=False).train(), ids_of(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss - model.eval().loss(ids, ids.roll(-1, 1))) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_experts": 3, "convolution": 2}])
def test_compiles_whole_and_gives_the_eager_numbers(changes):
    # Eager runs a kernel that adds in another order: in float32 that is seen.
    model, ids = model_of(**changes).train(), ids_of(2, 24)
    y = ids.roll(-1, 1)
    compiled = torch.compile(lambda: model.loss(ids, y), fullgraph=True, backend="aot_eager")
    results = []
    for loss in (model.loss, lambda *_: compiled()):
        torch.manual_seed(3)
        value = loss(ids, y)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager)


@pytest.mark.slow
def test_the_model_of_03_streams_through_4096_positions_as_it_reads_them():
    """At its real size in float32; weights grown, so that no branch is too quiet to be wrong."""
    torch.manual_seed(0)
    config = ResNetBKConfig(1000, 224, 4, n_heads=8, dropout_p=0.0, **reading_settings(64))
    model = ResNetBK(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0)
        ids = torch.randint(1000, (1, 4096), generator=torch.Generator().manual_seed(1))
        whole = model(ids)[0]
        state, streamed = model.init_state(1), []
        for token in ids.T:
            logits, state = model.step(token, state)
            streamed.append(logits[0])
    assert whole.std() > 0.3
    torch.testing.assert_close(torch.stack(streamed), whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_fresh_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        model.reset_parameters()
        return {k: v.clone() for k, v in model.state_dict().items()}

    model = model_of(convolution=2)
    first, second, other = weights(4), weights(4), weights(5)
    assert all(torch.equal(first[k], second[k]) for k in first)
    changed = [k for k in first if not torch.equal(first[k], other[k])]
    assert "embedding.weight" in changed
    assert any(k.startswith("blocks.") for k in changed)


def test_it_has_no_position_embedding_and_no_last_position():
    config = ResNetBKConfig(10, mixer="solve", n_seq=16)
    assert config.n_seq is None
    assert ResNetBK(config).positions is None
    assert ResNetBK(config)(torch.zeros(1, 40, dtype=torch.int64)).shape == (1, 40, 10)


def test_the_head_is_tied_unless_it_is_not_wanted():
    assert ResNetBKConfig(10, mixer="solve").tied is True
    assert ResNetBKConfig(10).tied is False
    tied, free = (ResNetBK(ResNetBKConfig(10, mixer="solve", tied=t)) for t in (True, False))
    assert free.num_parameters() - tied.num_parameters() == 10 * 64 + 10
    config = ResNetBKConfig(10, mixer="solve")
    assert ResNetBKConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "d_model: got 64; the mixer 'solve' shares it among n_heads = 5"),
        ({"gradient": "original"}, "gradient: got 'original'; the mixer 'solve' .* has gradient='exact' only"),
        ({"grad_blend": 0.5, "causal": False}, "grad_blend: got 0.5; the mixer 'solve' with causal=False"),
        ({"clamps": True}, "clamps: got True; the mixer 'solve'"),
        ({"least_eta": 2.0}, "least_eta: got 2.0; it must be positive and at most eta"),
        ({"least_eta": 0.0}, "least_eta: got 0.0"),
        ({"energy_span": -1.0}, "energy_span: got -1.0"),
        ({"edge_energy": float("nan")}, "edge_energy: got nan; it must be a finite number"),
        ({"potential_scale": -1.0}, "potential_scale: got -1.0; it must be 0 or a positive, finite number"),
        ({"hopping": 1.0}, "hopping: got 1.0"),
        ({"convolution": -1}, "convolution: got -1"),
        ({"dense_width": 0}, "dense_width: got 0; it must be at least 1 or None for 4 d_model"),
        ({"mixer": "attention"}, "mixer: got 'attention'; allowed are 'diagonal', 'solve'"),
        ({"tied": "yes"}, "tied: got 'yes'"),
    ],
)
def test_config_refuses_a_bad_field_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        ResNetBKConfig(**{"vocab_size": 10, "mixer": "solve", **changes})


def test_output_of_the_mixer_before_a_change_is_the_same_bit_for_bit():
    mixer = model_of(convolution=3).blocks[0].mixer
    assert isinstance(mixer, SolveMixer)
    u = torch.randn(2, 70, 12, dtype=torch.float64)
    changed = u.clone()
    changed[:, 50:] = torch.randn(2, 20, 12, dtype=torch.float64)
    assert torch.equal(mixer(u)[0][:, :50], mixer(changed)[0][:, :50])


def test_first_memories_of_eight_heads_are_what_reading_settings_says():
    """By the weights of what lies before a stretch of one potential, to 90%."""
    torch.manual_seed(0)
    mixer = ResNetBK(ResNetBKConfig(10, 16, 1, n_heads=8, **reading_settings(64))).blocks[0].mixer
    energies, bonds = mixer.inputs.bias[2 * 16 :].detach().double().split(8)
    etas = mixer.log_eta.detach().double().exp()

    def memory(energy, bond, eta):
        x = torch.zeros(400, 1, dtype=torch.float64)
        x[200] = 1.0
        entries = (
            torch.full((400,), float(energy), dtype=torch.float64),
            float(bond),
            float(bond),
            1j * float(eta),
        )
        y = resolvent_solve(x, *entries, causal=True)[:, 0].abs()
        return math.log(10) * 50 / float((y[250] / y[300]).log())

    found = [memory(*head) for head in zip(energies, bonds.sigmoid(), etas, strict=True)]
    assert found.index(max(found)) == 1
    assert found[1] == pytest.approx(64 / 2, rel=0.05)
    middle = memory(0.0, bonds[0].sigmoid(), etas[0])
    assert middle == pytest.approx(4.6 / float(etas[0]), rel=0.06)
    assert middle == pytest.approx(3 / 4 * 64, rel=0.1)
    assert middle / found[0] == pytest.approx(3, rel=0.1)
