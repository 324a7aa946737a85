"""Second derivatives of whole models: those of differences of first gradients, or refused."""

import contextlib

import pytest
import torch
from every_model import MODELS, V, diagonal
from torch.nn import functional as F

from bklm.models import LanguageModel


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def products(function, inputs, direction):
    """Hessian-vector product by autograd.grad with inputs named."""
    g = torch.autograd.grad(function(*inputs), inputs, create_graph=True, materialize_grads=True)
    inner = sum((a * v).sum() for a, v in zip(g, direction, strict=True))
    return torch.autograd.grad(inner, inputs, materialize_grads=True)


# The gradient of a router whose gate is straight-through is no derivative: test_second_derivatives.py has a reference of it.
DIFFERENTIABLE = {
    name: make
    for name, make in MODELS.items()
    if name not in ("ResNetBK", "ResNetBK, two of three", "ResNetBK that reads")
}
DIFFERENTIABLE["ResNetBK, every expert"] = lambda: diagonal(2, 0.0, num_experts=3, top_k=3)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("road", ["loss", "logits"])
def test_a_models_hessian_is_that_of_differences_or_refused(name, road):
    model: LanguageModel = DIFFERENTIABLE[name]().double().eval()
    with torch.no_grad():  # away from the tiny first weights, where differences are ill-conditioned
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ids, y = torch.randint(0, V, (2, 5)), torch.randint(0, V, (2, 5))
    y[0, 3:] = -100

    def loss():
        return model.loss(ids, y) if road == "loss" else F.cross_entropy(model(ids).flatten(0, 1), y.flatten())

    ps = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in ps]
    if name == "GPT":  # torch's fused attention has no second derivative, and says so
        with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
            products(lambda *_: loss(), ps, direction)
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel if name == "GPT" else contextlib.nullcontext():
        found = products(lambda *_: loss(), ps, direction)
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, v in zip(ps, direction, strict=True):
                p.add_(sign * 2e-6 * v)
        ends.append(torch.autograd.grad(loss(), ps, materialize_grads=True))
    want = [(a - b) / 4e-6 for a, b in zip(*ends, strict=True)]
    scale = torch.stack([w.norm() for w in want]).norm()
    error = torch.stack([(a - b).norm() for a, b in zip(found, want, strict=True)]).norm()
    assert error / scale < 1e-5
