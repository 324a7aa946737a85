"""Parts removed: what is left computes what it did, and is the smaller for it. Students: the loss as the formula has it."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from bklm.compression import (
    Distilled,
    distil,
    file_sizes,
    load_compressed,
    narrower,
    remove_experts,
    save_compressed,
    skip_blocks,
)
from bklm.compression.structure import WIDTHS, expert_use
from bklm.data import IGNORED
from bklm.models import (
    GPT,
    ContextTokenConfig,
    ContextTokenLM,
    GPTConfig,
    NewLLM,
    NewLLMConfig,
    ResNetBK,
    ResNetBKConfig,
)
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings


@pytest.fixture(params=["diagonal", "solve"])
def mixture(request):
    torch.manual_seed(0)
    settings = {"mixer": "solve", "n_heads": 4} if request.param == "solve" else {"n_seq": 16}
    return ResNetBK(ResNetBKConfig(120, d_model=16, n_layers=2, num_experts=4, **settings)).eval()


def test_experts_that_nothing_goes_to_leave_without_a_trace(mixture, text, tmp_path):
    with torch.no_grad():
        for block in mixture.blocks:
            block.moe.router.bias[torch.tensor([0, 2])] = -50.0
    assert [[use[0], use[2]] for use in expert_use(mixture, text)] == [[0, 0]] * 2
    made = remove_experts(mixture, 2, text)
    x = text[0][0]
    assert torch.allclose(made(x), mixture(x), atol=1e-5)
    assert made.num_parameters() < mixture.num_parameters()
    assert file_sizes(made)[0] < file_sizes(mixture)[0]
    again = load_compressed(save_compressed(made, tmp_path / "small"))
    assert torch.equal(again(x), made(x))


def test_use_counts_every_position_once_a_layer(mixture, text):
    positions = sum(x.numel() for x, _ in text)
    assert [sum(use) for use in expert_use(mixture, text)] == [positions] * 2
    x, y = text[0]
    y = y.clone()
    y[:, 7:] = IGNORED  # padding, as of short lines
    assert [sum(use) for use in expert_use(mixture, [(x, y)])] == [7 * len(x)] * 2


def test_one_expert_may_be_left_where_it_is_the_same_layer(text):
    model = ResNetBK(ResNetBKConfig(120, d_model=16, n_layers=2, n_seq=16, num_experts=3, balance=0.1)).eval()
    assert remove_experts(model, 1, text).blocks[0].moe.router is None
    with pytest.raises(ValueError, match="keep: got 4; each mixture can keep 1 to 3 experts"):
        remove_experts(model, 4, text)
    with pytest.raises(ValueError, match="remove_experts: calibration holds no text; give some batches"):
        remove_experts(model, 1, [])
    with pytest.raises(TypeError, match="this GPT has no mixture of experts"):
        remove_experts(GPT(GPTConfig(120, 16, 1, 2, 16)), 1, text)


def test_the_block_that_does_nothing_is_the_one_that_goes(reading, text, tmp_path):
    model = copy.deepcopy(reading)
    with torch.no_grad():
        for weight in (model.blocks[0].mixer.output, model.blocks[0].dense.down):
            weight.weight.zero_()
            weight.bias.zero_()
    made = skip_blocks(model, 1, text)
    assert made.config.n_layers == 1
    x = text[0][0]
    assert torch.allclose(made(x), model(x), atol=1e-5)
    again = load_compressed(save_compressed(made, tmp_path / "small"))
    assert torch.equal(again(x), made(x))
    with pytest.raises(ValueError, match="count: got 2; of 2 blocks 1 to 1 can be skipped"):
        skip_blocks(model, 2, text)
    with pytest.raises(TypeError, match="this NewLLM has no residual blocks"):
        skip_blocks(NewLLM(NewLLMConfig(120, 8, 8, 8, 2)), 1, text)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_a_narrower_model_is_one_of_its_kind(any_model, share):
    config = narrower(any_model.config, share)
    assert type(config) is type(any_model.config)
    widths = [n for n in WIDTHS if getattr(any_model.config, n, None) is not None]
    assert widths
    for name in widths:
        width, whole = getattr(config, name), getattr(any_model.config, name)
        assert width % 2 == 0
        assert abs(width - share * whole) <= 1 or width == 2
    # What is one number a word or less stays: most is as many times smaller as the width, or more.
    assert type(any_model)(config).num_parameters() < 1.4 * share * any_model.num_parameters()


def test_layers_of_a_narrower_model_and_bad_shares():
    config = ResNetBKConfig(50, d_model=24, n_layers=4, n_heads=8, mixer="solve", num_experts=1)
    half = narrower(config, 0.5, layers=2)
    assert (half.d_model, half.n_layers, half.n_heads) == (12, 2, 2)
    with pytest.raises(ValueError, match=r"share: got 1\.5; a narrower model"):
        narrower(config, 1.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_a_students_loss_is_that_of_the_formula_with_its_gradient(reading, text, temperature, weight):
    torch.manual_seed(1)
    student = ResNetBK(ResNetBKConfig(120, 16, 1, None, mixer="solve", n_heads=4, num_experts=1, dropout_p=0.0))
    x, y = text[0]
    y = y.clone()
    y[0, :5] = -100
    y[3] = -100
    made = Distilled(student, reading, temperature, weight).train()
    loss = made.loss(x, y)
    loss.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    # In double precision, word by word: sum of p_T (log p_T - log p_S).
    scored = y != -100
    p = torch.softmax(reading(x)[scored].double() / temperature, -1).detach()
    q = student(x)[scored].double()
    near = (p * (p.log() - F.log_softmax(q / temperature, -1))).sum(-1).mean()
    hard = -F.log_softmax(q, -1).gather(1, y[scored].unsqueeze(1)).mean()
    expected = weight * temperature**2 * near + (1 - weight) * hard
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for gradient, p in zip(found, student.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-6)
    assert made.loss(x, y, reduction="sum").item() == pytest.approx(loss.item() * int(scored.sum()), rel=1e-5)


def test_the_teacher_is_in_no_count_and_no_checkpoint_and_stays(reading, text):
    student = ResNetBK(narrower(reading.config, 0.5))
    made = Distilled(student, reading)
    assert made.num_parameters() == student.num_parameters()
    # It leaves out weights that count for nothing.
    silent = ContextTokenLM(ContextTokenConfig(120, 16, 16, 2, token_to="first"))
    assert Distilled(silent, reading).num_parameters() == silent.num_parameters()
    assert all(name.startswith("model.") for name in made.state_dict())
    before = {n: p.clone() for n, p in reading.named_parameters()}
    trained = distil(reading, student, text, text, TrainingSettings(2, learning_rate=1e-2))
    assert trained is student
    assert not trained.training
    assert all(torch.equal(before[n], p) for n, p in reading.named_parameters())
    assert evaluate(trained, text, None).loss < evaluate(ResNetBK(student.config), text, None).loss


def test_a_students_training_loss_is_of_no_text_alone_and_so_no_perplexity(reading, text):
    records = {}
    for name, student in (("alone", ResNetBK(narrower(reading.config, 0.5))), ("taught", None)):
        model = student or Distilled(ResNetBK(narrower(reading.config, 0.5)), reading)
        settings = TrainingSettings(1, learning_rate=1e-3)
        records[name] = train(model, text, text, settings, accelerator=Accelerator(cpu=True))[-1]
    assert records["alone"].trained_in_words == f"PPL {math.exp(records['alone'].train_loss):.1f}"
    assert records["taught"].train_perplexity is None
    assert records["taught"].trained_in_words == f"loss {records['taught'].train_loss:.3f} (no perplexity)"
    assert records["taught"].val_perplexity > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0; it must be positive"),
        ({"weight": 1.5}, "weight: got 1.5; the teacher's share"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(reading, change, words):
    with pytest.raises(ValueError, match=words):
        Distilled(ResNetBK(narrower(reading.config, 0.5)), reading, **change)
    with pytest.raises(ValueError, match="it has 50 words and the teacher 120"):
        Distilled(ResNetBK(ResNetBKConfig(50, 16, 1)), reading)
    with pytest.raises(ValueError, match="student: it is the teacher itself"):
        Distilled(reading, reading)


def test_windows_that_the_teacher_cannot_read_are_refused_and_scored_by_the_student_alone():
    teacher = GPT(GPTConfig(50, 16, 1, 2, n_seq=8))
    made = Distilled(ResNetBK(ResNetBKConfig(50, 16, 1)), teacher)
    x = torch.arange(18).view(2, 9)
    with pytest.raises(ValueError, match="got 9 positions, but the teacher has n_seq = 8"):
        made.train().loss(x, x)
    assert made.eval().loss(x, x).isfinite()
