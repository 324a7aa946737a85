"""BKCore: the layer, its channels, and its streaming form."""

import pytest
import torch

from bklm.bk_core import BKCore, reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_channels_are_all_real_parts_then_all_imaginary_parts_of_the_heads(causal, eta):
    v = torch.randn(2, 10, 3, dtype=torch.float64)
    features = BKCore(3, causal=causal, eta=eta)(v)
    assert features.shape == (2, 10, 6)
    assert features.dtype == torch.float64
    dense = reference.dense_causal if causal else reference.dense
    for head in range(3):
        G = dense(v[..., head] - 2, torch.ones(9), torch.ones(9), complex(0, eta))
        torch.testing.assert_close(features[..., head], G.real)
        torch.testing.assert_close(features[..., 3 + head], G.imag)


def test_default_layer_never_sees_the_future():
    v = torch.randn(2, 300, 2)
    changed = v.clone()
    changed[:, 150:] += 1.0
    before, after = BKCore(2)(v), BKCore(2)(changed)
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150], after[:, 150])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_streaming_equals_the_whole_sequence(dtype):
    core = BKCore(2, eta=0.5)
    v = torch.randn(3, 400, 2).to(dtype)
    whole, state, steps = core(v), None, []
    for position in range(v.shape[1]):
        features, state = core.step(v[:, position], state)
        steps.append(features)
    assert state.shape == (3, 2)
    streamed = torch.stack(steps, dim=1)
    assert streamed.dtype == whole.dtype
    torch.testing.assert_close(streamed, whole)


def test_directions_reach_the_operator():
    v = torch.randn(1, 20, 1)
    grads = []
    for options in ({}, {"gradient": "local"}, {"gradient": "original"}, {"grad_blend": 0.5}):
        leaf = v.clone().requires_grad_()
        BKCore(1, **options)(leaf).sum().backward()
        grads.append(leaf.grad)
    for i, x in enumerate(grads):
        for y in grads[:i]:
            assert not torch.allclose(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 0}, "n_heads=0"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"eta": float("inf")}, "eta=inf"),
        ({"gradient": "none"}, "gradient='none'"),
        ({"grad_blend": -0.1}, "grad_blend=-0.1"),
        ({"eta": 1e-19}, "eta=1e-19: .* between 1e-18 and"),
        ({"n_heads": 1.5}, "n_heads=1.5: a whole number"),
        ({"n_heads": True}, "n_heads=True"),
        ({"causal": "no"}, "causal='no'"),
        ({"eta": None}, "eta=None: a real number"),
        ({"grad_blend": "x"}, "grad_blend='x': a real number"),
    ],
)
def test_bad_settings_are_refused_when_the_layer_is_built(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        BKCore(**options)
    assert "\n" not in str(caught.value)


def test_the_smallest_eta_still_gives_finite_features_and_gradients():
    v = torch.tensor([2.0, 2.5, 1.0, -3.0]).view(1, 4, 1).requires_grad_()
    features = BKCore(causal=False, eta=1e-18)(v)
    features.sum().backward()
    assert torch.isfinite(features).all()
    assert torch.isfinite(v.grad).all()


def test_wrong_shapes_and_bidirectional_streaming_are_refused():
    with pytest.raises(ValueError, match=r"potential has shape \(2, 5\)"):
        BKCore(1)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="n_heads=2"):
        BKCore(2)(torch.zeros(2, 5, 1))
    with pytest.raises(ValueError, match="needs causal=True"):
        BKCore(1, causal=False).step(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="n_heads=1"):
        BKCore(1).step(torch.zeros(2, 3))
