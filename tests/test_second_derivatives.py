"""Second derivatives of every backward written by hand, on every road by which they can be asked for.

Right means: as autograd finds them through an independent form of the same function, or by differences of first gradients.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import bklm
from bklm.bk_core import resolvent_diagonal, resolvent_solve
from bklm.bk_core.reference import left_right
from bklm.compression.retraining import rounded
from bklm.models.dropout import add_dropout, keep_masks, numbered_dropout
from bklm.models.loss import linear_cross_entropy
from bklm.models.new_llm_loop import recurrence
from bklm.models.normalised_gate import EPS, normalised_gate
from bklm.models.reversible import run_blocks
from bklm.models.short_convolution import short_convolution
from bklm.models.solve_features import is_fused, plain_features, solve_features
from bklm.moe.analytic import Settings
from bklm.moe.ops import draw, mixture
from bklm.moe.reference import balance_loss, dense_moe, gates
from bklm.training.auxiliary import _LimitGradient

D, H, V = 3, 5, 11


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def mixtures(k, experts, router_gradient, dropout_p=0.3):
    """(function, reference, inputs) of one setting of the mixture, the balance counted in where the router learns."""
    inputs = (
        leaf(6, D), leaf(experts, D), leaf(experts), leaf(experts, H, D), leaf(experts, H), leaf(experts, D, H),
        leaf(experts, D),
    )  # fmt: skip
    noisy = k < experts and router_gradient != "none"
    noise, keep, keep_p = draw(inputs[0].detach(), experts if noisy else 0, H, dropout_p)
    settings = Settings(k, 0.7, router_gradient, keep_p, torch.float64)
    weight = torch.randn(6, D, dtype=torch.float64)
    share = 0.0 if router_gradient == "none" else 0.4

    def complete(tensors):
        return tensors if experts > 1 else (tensors[0], None, None, *tensors[1:])

    def function(*tensors):
        y, balance, _ = mixture(*complete(tensors), noise, keep, settings)
        return (y * weight).sin().sum() + share * balance

    def reference(*tensors):
        tensors = complete(tensors)
        _, selected, p = gates(*tensors[:3], noise, settings)
        return (dense_moe(*tensors, noise, keep, settings) * weight).sin().sum() + share * balance_loss(
            selected, p
        )

    return function, reference, inputs if experts > 1 else (inputs[0], *inputs[3:])


def head(bias, reduction):
    targets = torch.randint(0, V, (7,))
    targets[2] = targets[5] = -100
    inputs = (leaf(7, D), leaf(V, D), *((leaf(V),) if bias else ()))

    def function(h, w, b=None):
        return linear_cross_entropy(h.tanh(), w, b, targets, reduction=reduction, chunk_rows=2) ** 2

    def reference(h, w, b=None):
        return F.cross_entropy(F.linear(h.tanh(), w, b), targets, reduction=reduction) ** 2

    return function, reference, inputs


def loop(dropout_p):
    """The recurrence against its formulas, written out; where units are dropped they are read off the fused forward."""
    length, batch, width, size, depth = 4, 2, 6, 3, 2
    inputs = (
        leaf(length, batch, D), leaf(batch, size), leaf(3 * size, width), leaf(3 * size), leaf(size), leaf(size),
        leaf(width, D + size), leaf(width), leaf(width, width), leaf(width),
    )  # fmt: skip
    weight = torch.randn(length, batch, width, dtype=torch.float64)

    def function(e, c, gw, gb, gain, shift, *layers):
        norm = torch.nn.LayerNorm(size)
        del norm.weight, norm.bias
        norm.weight, norm.bias = gain, shift
        torch.manual_seed(7)
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        hidden, context = recurrence(e, c, pairs, gw, gb, norm, dropout_p)
        return (hidden * weight).sin().sum() + context.exp().sum()

    def reference(e, c, gw, gb, gain, shift, *layers):
        torch.manual_seed(7)
        total = 0.0
        for t in range(length):
            keep = (
                keep_masks((depth, batch, width), dropout_p, weight) if dropout_p else torch.ones(depth, 1, 1)
            )
            h = torch.cat((e[t], c), 1)
            for i in range(depth):
                h = torch.relu(h @ layers[2 * i].t() + layers[2 * i + 1]) * keep[i]
            total = total + (h * weight[t]).sin().sum()
            f, i, u = (h @ gw.t() + gb).chunk(3, 1)
            c = F.layer_norm(torch.sigmoid(f) * c + torch.sigmoid(i) * u, (size,), gain, shift)
        return total + c.exp().sum()

    return function, reference, inputs


def core(causal):
    inputs = (leaf(2, 6), leaf(2, 5), leaf(2, 5))

    def value(G):
        return (G.real.sin() + G.imag * G.real).sum()

    def function(a, b, c):
        return value(resolvent_diagonal(a, b, c, 0.3 + 1.2j, causal=causal))

    def reference(a, b, c):
        return value(left_right(a, b, c, torch.tensor(0.3 + 1.2j, dtype=torch.complex128), causal))

    return function, reference, inputs


def core_of_numbers(causal):
    """All but a is known: the shortest road."""
    _, reference, (a, b, c) = core(causal)
    b, c = torch.full_like(b, 0.8).detach(), torch.full_like(c, 0.9).detach()

    def short(a):
        G = resolvent_diagonal(a, 0.8, 0.9, 0.3 + 1.2j, causal=causal)
        return (G.real.sin() + G.imag * G.real).sum()

    return short, lambda a: reference(a, b, c), (a,)


def solve(causal):
    """Columns of the resolvent against the inverse of the dense matrix, or of each of its leading blocks."""
    n, shift = 5, 0.3 + 1.2j
    inputs = (leaf(2, n, 2), leaf(2, n), leaf(2, n - 1), leaf(2, n - 1))

    def value(y):
        return (y.real.sin() + y.imag * y.real).sum()

    def function(x, a, b, c):
        return value(resolvent_solve(x, a, b, c, shift, causal=causal))

    def reference(x, a, b, c):
        T = torch.diag_embed(a) + torch.diag_embed(b, 1) + torch.diag_embed(c, -1)
        T = T - shift * torch.eye(n, dtype=torch.float64)
        x = x.to(T.dtype)
        if not causal:
            return value(torch.linalg.solve(T, x))
        rows = [torch.linalg.solve(T[:, :i, :i], x[:, :i])[:, -1] for i in range(1, n + 1)]
        return value(torch.stack(rows, 1))

    return function, reference, inputs


def gate():
    inputs = (leaf(2, 3, 4, 2, 2), leaf(2, 4, 6))  # (B, H, N, w) as pairs, (B, N, H w)
    weight = torch.randn(2, 4, 2, 6, dtype=torch.float64)

    def function(y, gates):
        return (normalised_gate(torch.view_as_complex(y), gates) * weight).sin().sum()

    def reference(y, gates):
        y = y / (y.pow(2).sum((-2, -1), keepdim=True) / 4 + EPS).sqrt()
        parts = torch.stack([y[..., k].permute(0, 2, 1, 3).reshape(2, 4, 6) for k in range(2)], 2)
        return (parts * (gates / (1 + (-gates).exp())).unsqueeze(2) * weight).sin().sum()

    return function, reference, inputs


def features():
    """Two heads of two channels: values, gates (4 each), potentials, bonds (2 each)."""
    inputs = (leaf(2, 4, 12), leaf(2))
    weight = torch.randn(2, 4, 2, 4, dtype=torch.float64)

    def function(read, log_eta):
        found = solve_features(read, log_eta)[0] if is_fused(read, log_eta) else plain_features(read, log_eta)
        return (found * weight).sin().sum()

    def reference(read, log_eta):
        x, g, v, beta = read[..., :4].unflatten(-1, (2, 2)), read[..., 4:8], read[..., 8:10], read[..., 10:]
        bond, eta, rows, left, y = 1 / (1 + (-beta).exp()), log_eta.exp(), [], 0, 0
        for n in range(4):
            couple = bond[:, n] if n else torch.zeros_like(eta)
            left = 1 / (v[:, n] - 1j * eta - couple**2 * left)
            y = left[..., None] * (x[:, n] - couple[..., None] * y)
            size = (y.real.square() + y.imag.square()).sum(-1, keepdim=True) / 4
            scaled = y / (size + EPS).sqrt() * (g[:, n] / (1 + (-g[:, n]).exp())).unflatten(-1, (2, 2))
            rows.append(torch.stack([scaled.real.flatten(1), scaled.imag.flatten(1)], 1))
        return (torch.stack(rows, 1) * weight).sin().sum()

    return function, reference, inputs


def dropped():
    inputs = (leaf(3, 6), leaf(3, 6))

    def value(x):
        return (x**2).sin().sum()

    def function(x, branch):
        torch.manual_seed(4)
        return value(add_dropout(x, branch, 0.3, True))

    def reference(x, branch):
        torch.manual_seed(4)
        return value(x + branch * keep_masks((3, 6), 0.3, branch.detach()))

    return function, reference, inputs


def convolution(before):
    inputs = (leaf(2, 5, D), leaf(D, 1, 3), leaf(D))
    weight = torch.randn(2, 5, D, dtype=torch.float64)

    def function(x, w, b):
        return (short_convolution(x, w, b, before) * weight).sin().sum()

    def reference(x, w, b):
        found = b.expand_as(x)
        for k in range(3):
            reach = [n + k - before for n in range(5)]
            row = torch.stack([x[:, i] if 0 <= i < 5 else torch.zeros_like(x[:, 0]) for i in reach], 1)
            found = found + row * w[:, 0, k]
        return (found * weight).sin().sum()

    return function, reference, inputs


class Pull(torch.nn.Module):
    """A force with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(D, D, dtype=torch.float64))

    def forward(self, q, kick=None):
        return numbered_dropout(torch.tanh(q @ self.weight), 0.0 if kick is None else 0.3, kick or 0)


class Blocks(torch.nn.Module):
    def __init__(self, backward, seed):
        super().__init__()
        self.forces, self.backward, self.seed = torch.nn.ModuleList([Pull(), Pull()]), backward, seed

    def forward(self, q, p):
        # The first force at two depths: what it learns from both adds up.
        return run_blocks([*self.forces, self.forces[0]], q, p, 0.7, seed=self.seed, backward=self.backward)


def leapfrogs(backward, seed=None):
    blocks, inputs = Blocks(backward, seed), (leaf(2, D), leaf(2, D), leaf(D, D), leaf(D, D))
    weight = torch.randn(2, D, dtype=torch.float64)

    def function(q, p, *weights):
        named = {f"forces.{i}.weight": w for i, w in enumerate(weights)}
        q, p = torch.func.functional_call(blocks, named, (q.sin(), p))
        return (q * weight + p**2).sin().sum()

    def reference(q, p, *weights):
        q, scales = q.sin(), None
        if seed is not None:
            scales = iter(
                [numbered_dropout(torch.ones(2, D, dtype=torch.float64), 0.3, seed + i) for i in range(6)]
            )
        for w in (*weights, weights[0]):
            p = p + 0.35 * torch.tanh(q @ w) * (next(scales) if scales else 1)
            q = q + 0.7 * p
            p = p + 0.35 * torch.tanh(q @ w) * (next(scales) if scales else 1)
        return (q * weight + p**2).sin().sum()

    return function, reference, inputs


KINDS = {
    **{
        f"mixture, {k} of {e}, {r}": (lambda k=k, e=e, r=r: mixtures(k, e, r))
        for k, e in ((1, 4), (2, 4), (4, 4), (1, 1))
        for r in ("exact", "selected", "none")
    },
    "loss": lambda: head(True, "mean"),
    "loss, sum, no bias": lambda: head(False, "sum"),
    "recurrence": lambda: loop(0.0),
    "recurrence with dropout": lambda: loop(0.3),
    "core, causal": lambda: core(True),
    "core, both directions": lambda: core(False),
    "core of numbers, causal": lambda: core_of_numbers(True),
    "core of numbers, both directions": lambda: core_of_numbers(False),
    "solve, causal": lambda: solve(True),
    "solve, both directions": lambda: solve(False),
    "gate": gate,
    "features": features,
    "dropout": dropped,
    "convolution, causal": lambda: convolution(2),
    "convolution, both directions": lambda: convolution(1),
    "leapfrog, reversible": lambda: leapfrogs("reversible"),
    "leapfrog, reversible with dropout": lambda: leapfrogs("reversible", 17),
    "leapfrog, checkpoint": lambda: leapfrogs("checkpoint"),
}
# Within torch.func's transforms these draw other masks, and a batch of gradients cannot have those of the forward.
LEFT_OUT = {
    "recurrence with dropout": ("torch.func", "forward over reverse"),
    "dropout": ("torch.func", "forward over reverse"),
    "leapfrog, reversible with dropout": ("torch.func", "forward over reverse", "batched"),
}


def products(function, inputs, direction):
    """Hessian-vector product by autograd.grad with inputs named."""
    g = torch.autograd.grad(function(*inputs), inputs, create_graph=True, materialize_grads=True)
    inner = sum((a * v).sum() for a, v in zip(g, direction, strict=True))
    return torch.autograd.grad(inner, inputs, materialize_grads=True)


def by_backward(function, inputs, direction):
    for p in inputs:
        p.grad = None
    function(*inputs).backward(create_graph=True)
    first = [p.grad for p in inputs]
    for p in inputs:
        p.grad = None
    sum((a * v).sum() for a, v in zip(first, direction, strict=True) if a is not None).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in inputs]
    for p in inputs:
        p.grad = None
    return found


def by_reverse_over_reverse(function, inputs, direction):
    names = tuple(range(len(inputs)))
    _, pull = torch.func.vjp(torch.func.grad(function, argnums=names), *(p.detach() for p in inputs))
    return pull(direction)


def by_forward_over_reverse(function, inputs, direction):
    names = tuple(range(len(inputs)))
    inputs = tuple(p.detach() for p in inputs)
    return torch.func.jvp(torch.func.grad(function, argnums=names), inputs, direction)[1]


def by_batched_gradients(function, inputs, direction):
    """The second derivative of a batch of directions at once, of which the second is the one asked for."""
    g = torch.autograd.grad(function(*inputs), inputs, create_graph=True, materialize_grads=True)
    cotangents = [torch.stack((torch.zeros_like(v), v)) for v in direction]
    kept = [(a, c) for a, c in zip(g, cotangents, strict=True) if a.requires_grad]
    found = torch.autograd.grad(
        [a for a, _ in kept], inputs, [c for _, c in kept], is_grads_batched=True, allow_unused=True
    )
    return [torch.zeros_like(p) if x is None else x[1] for p, x in zip(inputs, found, strict=True)]


ROADS = {
    "grad": products,
    "backward": by_backward,
    "torch.func": by_reverse_over_reverse,
    "forward over reverse": by_forward_over_reverse,
    "batched": by_batched_gradients,
}


@pytest.mark.filterwarnings(
    "ignore:Using backward\\(\\) with create_graph", "ignore:There is a performance drop"
)
@pytest.mark.parametrize(
    ("kind", "road"),
    [(k, r) for k in KINDS for r in ROADS if r not in LEFT_OUT.get(k, ())],
)
def test_a_second_derivative_is_that_of_the_reference_on_every_road(kind, road):
    function, reference, inputs = KINDS[kind]()
    direction = tuple(torch.randn_like(p) for p in inputs)
    assert torch.allclose(function(*inputs), reference(*inputs), rtol=1e-10)
    want = products(reference, inputs, direction)
    found = ROADS[road](function, inputs, direction)
    assert any(w.abs().max() > 0.01 for w in want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_may_be_differentiated_again_is_the_ordinary_one(kind):
    function, _, inputs = KINDS[kind]()
    once = torch.autograd.grad(function(*inputs), inputs, materialize_grads=True)
    again = torch.autograd.grad(function(*inputs), inputs, create_graph=True, materialize_grads=True)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixture, 4 of 4, exact", "loss", "recurrence", "core, causal"])
def test_differences_of_first_gradients_agree(kind):
    function, _, inputs = KINDS[kind]()
    assert torch.autograd.gradgradcheck(lambda *x: function(*x), inputs)


# One input alone cannot be frozen beside others.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("core of numbers")])
def test_frozen_inputs_stay_out_of_it(kind):
    function, reference, inputs = KINDS[kind]()
    for frozen in range(len(inputs)):
        for i, p in enumerate(inputs):
            p.requires_grad_(i != frozen)
        kept = [p for p in inputs if p.requires_grad]
        direction = [torch.randn_like(p) for p in kept]

        def by(f, kept=kept, direction=direction):
            g = torch.autograd.grad(f(*inputs), kept, create_graph=True, materialize_grads=True)
            inner = sum((a * v).sum() for a, v in zip(g, direction, strict=True))
            return torch.autograd.grad(inner, kept, materialize_grads=True)

        for a, b in zip(by(function), by(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_an_input_made_of_another_is_not_counted_twice():
    """Hidden states made with the weight of the head, as a tied model's are, and tokens made with an expert's weight."""
    weight, targets = leaf(V, D), torch.randint(0, V, (6,))
    results = []
    for tied in (
        lambda w: linear_cross_entropy(w[:6].sin(), w, None, targets),
        lambda w: F.cross_entropy(w[:6].sin() @ w.t(), targets),
    ):
        g = torch.autograd.grad(tied(weight), weight, create_graph=True)[0]
        results.append(torch.autograd.grad(g.square().sum(), weight)[0])
    torch.testing.assert_close(*results)
    function, reference, inputs = KINDS["mixture, 2 of 4, exact"]()
    results = []
    for f in (function, reference):

        def tied(up, f=f):
            return f(up.flatten()[: 6 * D].view(6, D).sin(), *inputs[1:3], up, *inputs[4:])

        g = torch.autograd.grad(tied(inputs[3]), inputs[3], create_graph=True)[0]
        results.append(torch.autograd.grad(g.square().sum(), inputs[3])[0])
    torch.testing.assert_close(*results)


def test_a_batch_of_gradients_of_a_reversible_backward_with_dropout_is_refused_in_one_sentence():
    function, _, inputs = KINDS["leapfrog, reversible with dropout"]()
    with pytest.raises(RuntimeError, match=r"^run_blocks: .*; take backward='plain', or eval\(\)\.$"):
        torch.autograd.grad(function(*inputs), inputs, torch.ones(2), is_grads_batched=True)


def test_weights_that_functional_call_puts_in_get_their_gradients_after_its_end():
    """The backward comes when the module has its own weights back: it must not take those."""
    for backward in ("reversible", "checkpoint"):
        function, reference, inputs = leapfrogs(backward)
        made = [*inputs[:2], inputs[2], inputs[2] @ inputs[3]]
        want = torch.autograd.grad(reference(*made), inputs, retain_graph=True)
        for a, b in zip(torch.autograd.grad(function(*made), inputs), want, strict=True):
            torch.testing.assert_close(a, b)


FUNCTIONS = {
    "_Eager", "_Known", "Transformable", "TransformableBackward",  # core
    "_Causal", "_Tridiagonal", "CausalSolve", "TridiagonalSolve",  # solve
    "_Mixture", "_ChunkedCrossEntropy", "_Recurrence", "_NormalisedGate", "_ShortConvolution", "_Reversible",
    "_SolveFeatures", "_Dropout",
    "_Linear",  # of single precision alone: tests/test_products.py
    "_LimitGradient", "_Rounded",  # below: their backwards are rules, no derivatives
}  # fmt: skip


def test_no_backward_written_by_hand_escapes_this_file():
    """A new one is added to KINDS, with a reference, and to the names above."""
    source = "\n".join(f.read_text() for f in Path(bklm.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"class (\w+)\(\S*\bFunction\):", source)) == FUNCTIONS
    assert "once_differentiable\n" not in source
    differentiable = set(re.findall(r"^(\w+)\.register_autograd\(", source, re.MULTILINE))
    assert differentiable == {
        "resolvent_diagonal", "resolvent_diagonal_backward", "causal_solve", "tridiagonal_solve", "_forward_op",
    }  # fmt: skip


def test_a_gradient_with_a_limit_is_differentiated_as_its_rule_says():
    x, direction = leaf(3, D), torch.randn(3, D, dtype=torch.float64)

    def limited(x):
        return _LimitGradient.apply(x, 0.5).pow(3).sum()

    def rule(x):
        g = 3 * x**2
        return g * (0.5 / g.norm())

    (g,) = torch.autograd.grad(limited(x), x, create_graph=True)
    torch.testing.assert_close(g, rule(x))
    want = torch.autograd.functional.vjp(rule, x.detach(), direction)[1]
    torch.testing.assert_close(torch.autograd.grad((g * direction).sum(), x)[0], want)
    torch.testing.assert_close(torch.func.vjp(torch.func.grad(limited), x.detach())[1](direction)[0], want)
    each = torch.func.vmap(torch.func.grad(limited))(x.detach())
    torch.testing.assert_close(each, torch.stack([rule(row) for row in x.detach()]))


def test_rounding_passes_every_gradient_straight_through_on_every_road():
    w, scale = leaf(2, D, scale=4.0), torch.ones(2, D, dtype=torch.float64)
    direction = torch.randn(2, D, dtype=torch.float64)

    def function(w):
        return rounded(w, scale, 3).pow(3).sum()

    inside = (w.detach().round().abs() <= 3).double()
    assert 0 < inside.sum() < inside.numel()
    r = w.detach().round().clamp(-3, 3)
    (g,) = torch.autograd.grad(function(w), w, create_graph=True)
    torch.testing.assert_close(g, 3 * r**2 * inside)
    want = 6 * r * inside * direction
    torch.testing.assert_close(torch.autograd.grad((g * direction).sum(), w)[0], want)
    torch.testing.assert_close(torch.func.vjp(torch.func.grad(function), w.detach())[1](direction)[0], want)
    each = torch.func.vmap(torch.func.grad(lambda x: rounded(x, scale[0], 3).pow(3).sum()))(w.detach())
    torch.testing.assert_close(each, 3 * r**2 * inside)
