"""Whatever looks into a model rather than running it: meta and fake tensors, torch.func, torch.compile, export, tracing."""

from __future__ import annotations

import copy

import pytest
import torch
from every_model import LEARNS_COMPRESSED, MODELS, WITH_STATE, V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from bklm.bk_core import resolvent_diagonal
from bklm.models import ResNetBK, future_leak, linear_cross_entropy
from bklm.moe.layer import AnalyticMoE

# torch.compile does not follow torch.nn.LSTM, nor an energy's record: the graph breaks around them.
BROKEN = ("LSTM",)
# Compiling takes long, and these have no part that another lacks.
COMPILED = [name for name in MODELS if "," not in name.removeprefix("ResNetBK, ") and " with " not in name]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def batch():
    ids, targets = torch.randint(0, V, (3, 6)), torch.randint(0, V, (3, 6))
    targets[1, 4:] = -100
    return ids, targets


def use_all(model, ids, targets):
    """Everything a model can be asked for; returns the shapes."""
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    shapes = [loss.shape, model(ids).shape, *(p.grad.shape for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        shapes += [model.loss(ids, targets, reduction="sum").shape, model(ids[:1, :1]).shape]
    scores = model.token_losses(ids, targets)
    return [*shapes, scores.nll.shape, scores.correct.shape]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_found_on_device_meta_without_memory(name, training, batch):
    real, (ids, targets) = MODELS[name](0.1).train(training), batch
    with torch.device("meta"):
        model = MODELS[name](0.1).train(training)
    assert use_all(model, ids.to("meta"), targets.to("meta")) == use_all(real, ids, targets)
    assert model.num_parameters() == real.num_parameters()
    assert model.expert_counts() == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_pass_through_a_model(name, training, batch):
    want = use_all(MODELS[name](0.1).train(training), *batch)
    with FakeTensorMode():
        model = MODELS[name](0.1).train(training)
        found = use_all(model, torch.randint(0, V, (3, 6)), torch.randint(0, V, (3, 6)))
    assert found == want


# Not GPT and LSTM: torch counts its fused attention and its LSTM, which are the CPU's, by other rules than the plain ones of
# other devices.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("GPT", "LSTM")])
def test_a_models_operations_are_counted_alike_with_and_without_values(name, batch):
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = MODELS[name]().eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model.loss(*(x.to(device) for x in batch)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (4, 4)])
def test_the_mixtures_operations_are_counted_by_the_experts_that_tokens_visit(experts, k):
    tokens, d = 40, 8
    moe, x = AnalyticMoE(d, experts, k, dropout_p=0.0).eval(), torch.randn(tokens, d, requires_grad=True)
    product, router = 2 * tokens * d * 2 * d, 0 if experts == 1 else 2 * tokens * d * experts
    with FlopCounterMode(display=False) as counter:
        y = moe(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == router + 2 * k * product
    # Hidden units and their gradients of every expert for the router, the rest of those that a token visits.
    assert counter.get_total_flops() - forward == 2 * router + (2 * experts + 3 * k) * product


class Loss(torch.nn.Module):
    """model.loss as a forward, which functional_call and torch.export ask for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets):
        return self.model.loss(ids, targets)


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("road", ["loss", "logits"])
def test_per_sample_gradients_are_those_of_each_sample_alone(name, road, batch):
    ids, targets = batch
    model = MODELS[name]().eval()
    module = Loss(model)

    def of_one(weights, x, y):
        if road == "loss":
            return functional_call(module, weights, (x[None], y[None]))
        logits = functional_call(model, {n.removeprefix("model."): w for n, w in weights.items()}, (x[None],))
        return torch.nn.functional.cross_entropy(logits[0], y)

    found = vmap(grad(of_one), (None, 0, 0))(weights_of(module), ids, targets)
    for i in range(len(ids)):
        module.zero_grad()
        model.loss(ids[i : i + 1], targets[i : i + 1]).backward()
        for n, p in module.named_parameters():
            want = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[n][i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_mode_draws_for_each_sample_where_vmap_is_told_to(name, batch):
    model = MODELS[name](0.5).train()
    module = Loss(model)
    ids, targets = (x[:1].expand(4, -1) for x in batch)

    def losses(randomness):
        return vmap(lambda x, y: module(x[None], y[None]), randomness=randomness)(ids, targets)

    with torch.no_grad():
        assert losses("same").unique().numel() == 1
        draws = name != "ContextTokenLM"
        assert (losses("different").unique().numel() > 1) == draws
    assert model.expert_counts() == []
    model.loss(ids, targets).backward()


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_gives_the_derivative_along_a_direction(name, batch):
    model = MODELS[name]().double().eval()
    module = Loss(model)
    weights = {n: p for n, p in weights_of(module).items() if dict(module.named_parameters())[n].requires_grad}
    direction = {n: torch.randn_like(p) for n, p in weights.items()}
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel:  # torch's fused attention has no forward mode, and says so
        _, found = jvp(lambda w: functional_call(module, w, batch), (weights,), (direction,))
    module.zero_grad()
    module(*batch).backward()
    if model.__class__ is ResNetBK and model.config.gradient != "exact":
        return  # its backward is no derivative
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    want = sum((gradients[n] * direction[n]).sum() for n in gradients)
    torch.testing.assert_close(found, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "road", "training"),
    [
        *((name, "loss", True) for name in COMPILED),
        ("GPT", "logits", False),
        ("ResNetBK that reads", "logits", False),
    ],
)
def test_dynamic_compilation_without_a_break_gives_the_eager_numbers(name, road, training, batch):
    # Compiled, the masks of some come in another order.
    draws = not name.startswith("ResNetBK") or "reads" in name or "with" in name
    model = MODELS[name](0.0 if draws else 0.1).train(training)
    twin = copy.deepcopy(model)
    call = (lambda m, x, y: m.loss(x, y)) if road == "loss" else (lambda m, x, y: m(x))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=name not in BROKEN, dynamic=True)
    for rows, length in ((3, 6), (2, 4)):
        x, y = (t[:rows, :length].contiguous() for t in batch)
        results = []
        for f, m in ((compiled, model), (call, twin)):
            m.zero_grad()
            torch.manual_seed(1)
            out = f(m, x, y)
            out.square().sum().backward()
            results.append([out, *(p.grad for p in m.parameters() if p.grad is not None)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.expert_counts() == twin.expert_counts()


# Not strictly of the loss: that is traced as a compiled one is, above.
@pytest.mark.slow
@pytest.mark.parametrize(("road", "strict"), [("loss", False), ("logits", False), ("logits", True)])
@pytest.mark.parametrize("name", COMPILED)
def test_export_with_gradients_on_gives_the_same_numbers(name, road, strict, batch):
    model = MODELS[name]().eval()
    module = Loss(model) if road == "loss" else model
    inputs = batch if road == "loss" else batch[:1]
    program = torch.export.export(module, inputs, strict=strict)
    others = tuple(x.flip(0).contiguous() for x in inputs)
    torch.testing.assert_close(program.module()(*others), module(*others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export_of_a_model_in_training_leaves_no_traces_in_it(name, batch):
    model = MODELS[name]().train()
    torch.export.export(model, batch[:1], strict=False)
    model.loss(*batch).backward()
    kept = [value for module in model.modules() for value in vars(module).values()]
    kept += [x for value in kept if isinstance(value, list | tuple) for x in value]
    assert all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in kept if isinstance(t, torch.Tensor))
    assert all(sum(layer) == 18 * (2 if "two" in name else 1) for layer in model.expert_counts())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_term_with_a_state_is_refused_in_one_sentence_where_its_numbers_cannot_be_read(name, batch):
    model = WITH_STATE[name]().train()
    model.loss(*batch).backward()
    sentence = r"^Published\w+: this term reads numbers that it keeps.* call eval\(\) before, or take .*\.$"
    with torch.device("meta"):
        blind = WITH_STATE[name]().train()
    weights = weights_of(Loss(model))
    roads = {
        "meta": lambda: blind.loss(*(x.to("meta") for x in batch)),
        "torch.func": lambda: grad(lambda w: functional_call(Loss(model), w, batch))(weights),
        "export": lambda: torch.export.export(model, batch[:1], strict=False),
        "trace": lambda: torch.jit.trace(model, batch[:1], check_trace=False),
    }
    for road in roads.values():
        with pytest.raises(RuntimeError, match=sentence):
            road()
    with FakeTensorMode(), pytest.raises(RuntimeError, match=sentence):
        WITH_STATE[name]().train().loss(
            torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
        )
    model.loss(*batch).backward()
    use_all(blind.eval(), *(x.to("meta") for x in batch))


@pytest.mark.parametrize("name", LEARNS_COMPRESSED)
def test_a_model_that_learns_under_compression_is_refused_in_one_sentence_where_there_are_no_numbers(
    name, batch
):
    model = LEARNS_COMPRESSED[name]().train()
    weights = weights_of(Loss(model))
    sentence = r"^\w+: this .* give (no numbers|none); .*\.$"
    with pytest.raises(RuntimeError, match=sentence):
        grad(lambda w: functional_call(Loss(model), w, batch))(weights)
    with pytest.raises(RuntimeError, match=sentence):
        LEARNS_COMPRESSED[name]().train().to("meta").loss(*(x.to("meta") for x in batch))
    model.loss(*batch).backward()


def test_what_is_no_step_is_not_in_an_energys_record(batch):
    model = MODELS["ResNetBK with an energy"]().train()
    module, trace = Loss(model), model.term.trace
    vmap(grad(lambda w, x, y: functional_call(module, w, (x[None], y[None]))), (None, 0, 0))(
        weights_of(module), *batch
    )
    assert trace.state.tolist() == [0, 0, 1]
    model.loss(*batch).backward()
    assert trace.state.tolist() == [1, 1, 1]


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_gives_the_models_numbers_for_other_text(name, grad_mode, batch):
    model = MODELS[name]().eval()
    others = batch[0].flip(0).contiguous()
    with torch.set_grad_enabled(grad_mode):
        traced = torch.jit.trace(model, batch[:1], check_trace=False)
        torch.testing.assert_close(traced(others), model(others), rtol=1e-4, atol=1e-5)


def test_a_compiled_mixture_has_the_second_derivative_of_the_eager_one():
    moe, x = AnalyticMoE(8, 4, 4, dropout_p=0.0).double().eval(), torch.randn(5, 8, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for f in (torch.compile(moe, backend="eager"), moe):
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_checks_of_values_are_off_where_values_cannot_be_asked_for_and_on_elsewhere(batch):
    model, (ids, _) = MODELS["ContextTokenLM"]().eval(), batch
    vmap(lambda x: model(x[None]))(ids)
    with pytest.raises(ValueError, match="got 20; a vocabulary of 20 has ids 0 to 19"):
        model(torch.full_like(ids, V))
    with pytest.raises(ValueError, match="all 3 are -100"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), None, torch.full((3,), -100))
    with pytest.raises(ValueError, match="every z must be finite with Im z != 0"):
        resolvent_diagonal(torch.randn(2, 5), 1.0, 1.0, torch.zeros(2, dtype=torch.complex64))


@pytest.fixture
def other_default_device():
    """A default device on which nothing has a value, so that a tensor made there by mistake shows."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


# One of each kind of mixer: what a model makes on a device is asked of all of them, below.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT", "NewLLM", "ResNetBK", "ResNetBK that reads"])
def test_a_model_compiles_whole_where_a_default_device_is_set(name, batch):
    model = MODELS[name]().eval()
    want = model.loss(*batch)
    torch.set_default_device("cpu")
    try:
        found = torch.compile(lambda: model.loss(*batch), fullgraph=name not in BROKEN, backend="aot_eager")()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", [*MODELS, *WITH_STATE])
@pytest.mark.usefixtures("other_default_device")
def test_a_model_on_the_cpu_does_not_mind_another_default_device(name):
    with torch.device("cpu"):
        model = {**MODELS, **WITH_STATE}[name](0.1)
        ids = torch.randint(0, V, (3, 6))
    for training in (True, False):
        use_all(model.train(training), ids, ids)
    assert model.loss(ids, ids).isfinite()
    assert model.generate(ids[:, :2], 4).device.type == "cpu"
    assert future_leak(model, ids, 3).device.type == "cpu"
    model.reset_expert_counts([[1, 2]])
    assert model.expert_counts() in ([], [[1, 2]])
