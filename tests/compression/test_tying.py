"""A tied head: the nearest that the embedding allows, kept as one small matrix, and what it becomes in training."""

import copy

import numpy as np
import pytest
import torch

from bklm.compression import (
    TiedModel,
    baked,
    file_sizes,
    load_compressed,
    quantise,
    save_compressed,
    tie_head,
    with_int8_products,
)
from bklm.training.evaluation import evaluate


def test_the_head_is_the_nearest_that_is_the_embedding_times_a_matrix_and_only_that_is_kept(
    untied, tmp_path, text
):
    made = tie_head(untied)
    e, w = untied.embedding.weight.detach().numpy(), untied.output.weight.detach().numpy()
    expected = e @ np.linalg.lstsq(e.astype(np.float64), w, rcond=None)[0]
    assert np.allclose(made.output.weight.detach().numpy(), expected, atol=2e-3 * np.abs(w).max())
    assert torch.equal(made.embedding.weight, untied.embedding.weight)
    kept = 2 * e.shape[1] * w.shape[1]
    assert file_sizes(untied)[0] - file_sizes(made)[0] == pytest.approx(4 * w.size - kept, abs=600)
    again = load_compressed(save_compressed(made, tmp_path / "small"))
    assert torch.equal(again(text[0][0]), made(text[0][0]))
    assert file_sizes(again) == file_sizes(made)


def test_rounded_next_the_head_follows_the_rounded_embedding(untied, tmp_path, text):
    small = quantise(tie_head(untied), 4)
    right = small.__dict__["codes"]["output.weight"].right.float()
    assert torch.equal(small.output.weight, small.embedding.weight @ right)
    assert not torch.equal(small.embedding.weight, untied.embedding.weight)
    assert file_sizes(small)[0] < file_sizes(quantise(untied, 4))[0]
    for model in (small, copy.deepcopy(small)):
        again = load_compressed(save_compressed(model, tmp_path / "small"))
        assert torch.equal(again(text[0][0]), small(text[0][0]))


def test_an_embedding_that_changed_since_is_not_saved_beside_the_head_of_before(untied, tmp_path):
    made = copy.deepcopy(tie_head(untied))
    with torch.no_grad():
        made.embedding.weight[0] += 1
    with pytest.raises(ValueError, match=r"output.weight was changed since it was coded"):
        save_compressed(made, tmp_path / "small")


def test_in_training_a_tied_head_learns_and_is_then_what_it_was_scored_as(untied, text, tmp_path):
    made = TiedModel(copy.deepcopy(untied))
    before = evaluate(made, text, None).loss
    assert before == pytest.approx(evaluate(tie_head(untied), text, None).loss, abs=1e-4)
    made.train()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    for i in range(12):
        optimizer.zero_grad()
        made.loss(*text[i % 3]).backward()
        assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
        optimizer.step()
    assert not made.model.output.weight.requires_grad
    after = evaluate(made, text, None).loss
    assert after < before - 0.02
    plain = baked(made)
    assert evaluate(plain, text, None).loss == pytest.approx(after, abs=1e-4)
    again = load_compressed(save_compressed(plain, tmp_path / "small"))
    assert torch.equal(again(text[0][0]), plain(text[0][0]))
    assert file_sizes(plain)[0] < file_sizes(untied)[0]
    assert made.double().loss(*text[0]).dtype == torch.float64


@pytest.mark.parametrize("untied", ["NewLLM"], indirect=True)
def test_a_tied_copy_multiplies_in_int8_too_with_a_head_of_its_own(untied):
    made, x = tie_head(untied), torch.arange(8).view(1, 8)
    expected = made(x).detach()
    assert torch.allclose(
        with_int8_products(made, head=True)(x), expected, atol=0.05 * float(expected.abs().max())
    )


def test_a_head_that_cannot_be_tied_is_refused_in_one_sentence(reading, untied):
    for call in (tie_head, TiedModel):
        with pytest.raises(TypeError, match=r"the head of this ResNetBK is its embedding already"):
            call(reading)
    lost = copy.deepcopy(untied)
    with torch.no_grad():
        lost.output.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="hold NaN or infinity, so the model has diverged"):
        tie_head(lost)
    with torch.no_grad():
        lost.output.weight[0, 0] = 0.0
        lost.embedding.weight.mul_(1e-9)
    with pytest.raises(ValueError, match="by numbers beyond half precision; keep the head"):
        tie_head(lost)
