"""Int8 copies: near the float model, smaller on disk, loadable, and honest about what they cannot do."""

import copy as copying
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import bklm.models
from bklm.compression.int8 import (
    MODELS,
    load_quantised,
    quantisation_report,
    quantised,
    save_quantised,
    with_float_products,
)
from bklm.compression.int8_modules import with_modules
from bklm.models import (
    GPT,
    LSTM,
    Conservative,
    ConservativeConfig,
    ContextTokenConfig,
    ContextTokenLM,
    GPTConfig,
    LanguageModel,
    LinearContext,
    LinearContextConfig,
    LSTMConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
)
from bklm.training.evaluation import evaluate

VOCABULARY = 40

MAKERS = {
    "NewLLM": lambda: NewLLM(
        NewLLMConfig(VOCABULARY, embed_dim=24, hidden_dim=32, context_dim=24, n_layers=2, dropout_p=0.1)
    ),
    "GPT": lambda: GPT(GPTConfig(VOCABULARY, d_model=32, n_layers=2, n_heads=2, n_seq=16)),
    "ResNetBK": lambda: ResNetBK(ResNetBKConfig(VOCABULARY, d_model=24, n_layers=2, n_seq=None)),
    "ResNetBK that reads": lambda: ResNetBK(
        ResNetBKConfig(VOCABULARY, d_model=32, n_layers=2, mixer="solve", n_heads=4, num_experts=1)
    ),
    "LinearContext": lambda: LinearContext(LinearContextConfig(VOCABULARY, d_model=32, n_layers=2)),
    "LRU": lambda: LinearContext(LinearContextConfig(VOCABULARY, d_model=32, n_layers=2, recurrence="lru")),
    "LSTM": lambda: LSTM(LSTMConfig(VOCABULARY, d_model=32, n_layers=2)),
    "LSTM untied": lambda: LSTM(LSTMConfig(VOCABULARY, d_model=24, n_layers=1, tied=False)),
    "ContextTokenLM": lambda: ContextTokenLM(ContextTokenConfig(VOCABULARY, 24, 24, 2)),
    "Conservative": lambda: Conservative(
        ConservativeConfig(VOCABULARY, d_model=48, n_layers=2, n_heads=4, units=16)
    ),
}


def batches_of(count, seed=0):
    """Text in which each word is three times as likely followed by its successor as by all else together."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        words = torch.randint(VOCABULARY, (8, 13), generator=g)
        for t in range(1, 13):
            follows = torch.rand(8, generator=g) < 0.75
            words[:, t] = torch.where(follows, (words[:, t - 1] + 1) % VOCABULARY, words[:, t])
        batches.append((words[:, :-1], words[:, 1:]))
    return batches


@pytest.fixture(scope="module", params=MAKERS)
def trained(request):
    """A model that has learned something, so that a perplexity has room to get worse."""
    torch.manual_seed(0)
    model = MAKERS[request.param]()
    if isinstance(model, NewLLM):  # its first weights are meant for widths of hundreds
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0 if p.ndim == 2 else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in batches_of(150 if isinstance(model, LSTM) else 50):
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
    model.eval()
    assert evaluate(model, batches_of(2, seed=1), None).perplexity < 0.5 * VOCABULARY
    return model


def test_an_int8_copy_predicts_almost_as_the_float_model_which_stays_as_it_was(trained):
    before = {name: p.clone() for name, p in trained.named_parameters()}
    copy, (x, y) = quantised(trained), batches_of(1, seed=2)[0]
    assert isinstance(copy, type(trained))
    difference = (copy(x) - trained(x)).abs()
    assert difference.max() > 0  # it is another model
    assert difference.mean() < 0.05 * trained(x).std()
    nll, correct = copy.token_losses(x, y)
    want = torch.nn.functional.cross_entropy(copy(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(nll.mean(), want)
    assert torch.equal(correct, copy(x).argmax(-1) == y)
    assert abs(nll.mean() - trained.token_losses(x, y).nll.mean()) < 0.03
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())


def test_masked_targets_do_not_count(trained):
    copy, (x, y) = quantised(trained), batches_of(1, seed=2)[0]
    y = y.clone()
    y[:, ::2] = -100
    nll, correct = copy.token_losses(x, y)
    assert (nll[:, ::2] == 0).all()
    assert not correct[:, ::2].any()
    torch.testing.assert_close(copy.loss(x, y), nll.sum() / (y != -100).sum())
    torch.testing.assert_close(copy.loss(x, y, reduction="sum"), nll.sum())
    with pytest.raises(ValueError, match="no loss to average"):
        copy.loss(x, torch.full_like(y, -100))


def test_an_int8_copy_streams_and_generates(trained):
    copy, x = quantised(trained), batches_of(1, seed=3)[0][0]
    whole, state = copy(x), copy.init_state(len(x))
    for t in range(x.shape[1]):
        logits, state = copy.step(x[:, t], state)
        # Activations are scaled by what is in the call: one position's range is not that of all.
        assert (logits - whole[:, t]).abs().mean() < 0.1 * whole.std()
    out = copy.generate(x[:, :3], 8, temperature=0.0)
    assert out.shape == (8, 11)
    assert (out[:, 3:] == trained.generate(x[:, :3], 8, temperature=0.0)[:, 3:]).double().mean() > 0.8


def test_weights_are_rounded_to_the_nearest_of_255_steps_per_output():
    model = MAKERS["NewLLM"]()
    integers, scale, _ = quantised(model).layers[1].weight_and_bias()
    float_weight, rounded = model.layers[1].weight, integers * scale[:, None]
    assert ((rounded - float_weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (scale <= float_weight.abs().amax(1) / 127 * 1.01).all()


def test_parameters_are_counted_as_before_and_none_trains(trained):
    copy = quantised(trained)
    assert copy.num_parameters() == trained.num_parameters()
    assert copy.num_parameters(trainable_only=True) == 0
    with pytest.raises(TypeError, match="not trained"):
        copy.train()
    assert not copy.eval().training


def test_a_saved_copy_comes_back_the_same_and_is_smaller(trained, tmp_path):
    copy, x = quantised(trained), batches_of(1, seed=4)[0][0]
    save_quantised(copy, tmp_path / "int8.safetensors")
    torch.manual_seed(9)
    fresh = type(trained)(trained.config)
    loaded = load_quantised(fresh, tmp_path / "int8.safetensors")
    assert torch.equal(loaded(x), copy(x))
    state = load_file(tmp_path / "int8.safetensors")
    integers = sum(t.numel() for t in state.values() if t.dtype == torch.int8)
    assert 0 < integers <= trained.num_parameters()
    if not isinstance(trained, ResNetBK | Conservative):  # whose experts or potentials are no linear modules
        assert integers > 0.7 * trained.num_parameters()


def test_a_file_of_an_int8_copy_that_is_none_is_one_sentence(tmp_path):
    model = NewLLM(NewLLMConfig(20, embed_dim=16, hidden_dim=16, context_dim=16, n_layers=1))
    (tmp_path / "damaged").write_bytes(b"no tensors")
    for name, error, said in (
        ("damaged", ValueError, "is damaged .*; save the copy again"),
        ("none", FileNotFoundError, "does not exist; give a file that save_quantised wrote"),
    ):
        with pytest.raises(error, match=said):
            load_quantised(model, tmp_path / name)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("NewLLM", "LSTM untied", "ResNetBK")])
def test_a_tied_model_holds_one_int8_matrix_and_looks_embeddings_up_in_it(name, tmp_path):
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    table = model.embedding.weight
    assert model.head()[0] is table
    with torch.no_grad():  # rows of every size, one of zeros
        table *= torch.logspace(-9, 3, VOCABULARY)[:, None]
        table[7] = 0.0
    copy = quantised(model)
    integers, scales, _ = copy.int8_head.weight_and_bias()
    ids = torch.arange(VOCABULARY).view(2, -1)
    assert torch.equal(copy.embedding(ids), (integers * scales[:, None])[ids])
    assert ((copy.embedding.weight - table).abs() <= 0.5001 * table.abs().amax(1, keepdim=True) / 127).all()
    save_quantised(copy, tmp_path / "int8.safetensors")
    state = load_file(tmp_path / "int8.safetensors")
    large = [n for n, t in state.items() if t.numel() >= table.numel() and len(t) == VOCABULARY]
    assert large == ["int8_head.int8"]
    # A file that is loaded changes what was looked up before.
    other = load_quantised(MAKERS[name](), tmp_path / "int8.safetensors")
    assert torch.equal(other.embedding(ids), copy.embedding(ids))
    plain = with_float_products(copy)
    assert plain.embedding.weight is plain.int8_head.weight
    save_file({**state, "embedding.weight": table.detach()}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="as older versions wrote it; write it again"):
        load_quantised(model, tmp_path / "old.safetensors")


def test_a_tied_models_int8_file_takes_about_a_quarter(tmp_path):
    model = GPT(GPTConfig(14_000, d_model=64, n_layers=1, n_heads=2, n_seq=16))
    copy = quantised(model)
    copy.embedding(torch.zeros(1, 1, dtype=torch.int64))
    save_quantised(copy, tmp_path / "int8.safetensors")
    size = (tmp_path / "int8.safetensors").stat().st_size
    assert size < 0.28 * 4 * model.num_parameters()
    # What the lookup keeps in memory is not pickled.
    torch.save(copy, tmp_path / "int8.pt")
    assert (tmp_path / "int8.pt").stat().st_size < 0.32 * 4 * model.num_parameters()


@pytest.mark.parametrize("name", ["LSTM", "LSTM untied", "ContextTokenLM"])
def test_modules_in_place_of_weights_leave_the_function_as_it_is(name):
    torch.manual_seed(0)
    model = MAKERS[name]().double().eval()
    other = copying.deepcopy(model)
    with_modules(other)
    ids = torch.randint(VOCABULARY, (3, 9))
    torch.testing.assert_close(other(ids), model(ids), rtol=1e-11, atol=1e-12)
    logits, state = other.prefill(ids[:, :4])
    torch.testing.assert_close(logits, model(ids)[:, 3], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(other.step(ids[:, 4], state)[0], model(ids)[:, 4], rtol=1e-11, atol=1e-12)


def test_a_file_of_another_configuration_is_refused_naming_what_differs(tmp_path):
    path = tmp_path / "int8.safetensors"
    save_quantised(quantised(MAKERS["NewLLM"]()), path)
    other = NewLLMConfig(VOCABULARY, embed_dim=24, hidden_dim=32, context_dim=24, n_layers=3)
    with pytest.raises(ValueError, match=r"holds nothing for layers\.2\.bias where this NewLLM has \(32,\)"):
        load_quantised(NewLLM(other), path)


def test_the_report_compares_size_perplexity_and_speed_with_the_plan(trained):
    batches = batches_of(3, seed=5)
    plain, with_adam, int8, mixed, *plan = quantisation_report(trained, batches, new_tokens=20, rounds=1)
    assert (plain.weights, int8.weights) == ("float32", "int8")
    assert mixed.weights == "int8, products in float32"
    assert mixed.file_bytes == int8.file_bytes
    assert plain.perplexity == pytest.approx(evaluate(trained, batches, None).perplexity)
    assert int8.perplexity == pytest.approx(evaluate(quantised(trained), batches, None).perplexity)
    assert int8.perplexity_change == pytest.approx(int8.perplexity / plain.perplexity - 1)
    assert plain.perplexity_change == 0
    assert with_adam.file_bytes == plain.file_bytes + 8 * trained.num_parameters()
    assert int8.file_bytes < plain.file_bytes
    assert min(plain.scored_tokens_per_second, int8.generated_tokens_per_second) > 0
    assert [row.file_bytes for row in plan] == [31_000_000, 8_000_000]
    assert all(math.isfinite(v) for row in (plain, int8) for k, v in row.to_dict().items() if k != "weights")


def test_without_int8_products_only_the_weights_are_rounded(trained):
    copy, (x, y) = quantised(trained), batches_of(1, seed=2)[0]
    mixed = with_float_products(copy)
    head, rounded = trained.head()[0], mixed.int8_head.weight
    step = head.abs().amax(1, keepdim=True) / 127
    assert 0 < ((rounded - head).abs() / step).max() <= 0.51
    assert (mixed(x) - trained(x)).abs().mean() < 0.03 * trained(x).std()
    # An int8 product scales its activations by the largest in the batch, these do not.
    torch.testing.assert_close(mixed(x[:1]), mixed(x)[:1], rtol=1e-4, atol=1e-4)
    assert (copy(x[:1]) - copy(x)[:1]).abs().max() > 1e-3
    torch.testing.assert_close(mixed.token_losses(x, y).nll.mean(), mixed.loss(x, y))


def test_models_that_cannot_be_quantised_are_named():
    with pytest.raises(TypeError, match="got Linear; it takes a float ResNetBK, NewLLM, GPT"):
        quantised(torch.nn.Linear(16, 16))
    known = {
        kind
        for kind in vars(bklm.models).values()
        if isinstance(kind, type) and issubclass(kind, LanguageModel)
    }
    assert set(MODELS) == known - {LanguageModel}
    copy = quantised(MAKERS["GPT"]())
    with pytest.raises(TypeError, match="got QuantisedGPT"):
        quantised(copy)
    with pytest.raises(TypeError, match="not an int8 copy"):
        save_quantised(MAKERS["GPT"](), "nowhere")


def test_a_report_without_rounds_or_targets_is_refused():
    model, (x, y) = MAKERS["GPT"](), batches_of(1)[0]
    with pytest.raises(ValueError, match="rounds and new_tokens: got 0 and 64"):
        quantisation_report(model, [(x, y)], rounds=0)
    with pytest.raises(ValueError, match="no target to score"):
        quantisation_report(model, [(x, torch.full_like(y, -100))])


def test_a_torch_without_int8_kernels_is_named(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "engine", "none")
    with pytest.raises(RuntimeError, match="no int8 kernels"):
        quantised(MAKERS["GPT"]())
