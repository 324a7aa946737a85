"""Weights in few bits: near the float model, in a file of the size that its bits are, which loads again to equal logits."""

import copy
import json

import pytest
import torch

from bklm.compression import file_sizes, load_compressed, low_rank, quantise, save_compressed, saving
from bklm.compression.coded_model import matrices
from bklm.compression.int8 import load_quantised, quantised, save_quantised
from bklm.models import (
    GPT,
    ContextTokenConfig,
    ContextTokenLM,
    GPTConfig,
    LanguageModel,
    ResNetBK,
    ResNetBKConfig,
)
from bklm.models.koopman import tie_blocks
from bklm.training.auxiliary import WithTerm
from bklm.training.evaluation import evaluate


def test_eight_bits_cost_no_perplexity_to_speak_of_and_the_model_stays(any_model, text, tmp_path):
    before = copy.deepcopy(any_model.state_dict())
    small = quantise(any_model, 8)
    score, rounded = (evaluate(m, text, None) for m in (any_model, small))
    assert abs(rounded.loss - score.loss) < 0.01
    assert all(torch.equal(before[name], value) for name, value in any_model.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in small.state_dict().items())
    again = load_compressed(save_compressed(small, tmp_path / "small.safetensors"))
    assert type(again) is type(any_model)
    x = text[0][0]
    assert torch.equal(small(x), again(x))
    # Saved once more it is the same file: nothing is rounded twice.
    save_compressed(again, tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 128), (3, 32)])
def test_a_file_has_the_bits_that_were_asked_for(bits, group):
    torch.manual_seed(0)
    model = GPT(GPTConfig(3000, d_model=64, n_layers=2, n_heads=2, n_seq=32))
    size, _ = file_sizes(quantise(model, bits, group))
    coded = matrices(model)
    numbers = sum(p.numel() for p in coded.values())
    scales = sum(p.numel() // p.shape[-1] * -(-p.shape[-1] // (group or p.shape[-1])) for p in coded.values())
    vectors = model.num_parameters() - numbers
    assert size == pytest.approx(numbers * bits / 8 + scales + 2 * vectors, rel=0.05)
    assert file_sizes(model)[0] == pytest.approx(4 * model.num_parameters(), rel=0.05)


def test_a_tied_matrix_is_in_the_file_once_and_remains_tied(reading, tmp_path):
    assert reading.config.tied
    again = load_compressed(save_compressed(quantise(reading), tmp_path / "tied"))
    assert again.head()[0] is again.embedding.weight


def test_embeddings_and_head_may_have_bits_of_their_own():
    model = GPT(GPTConfig(500, d_model=32, n_layers=2, n_heads=2, n_seq=16))
    codes = quantise(model, 4, 32, outer_bits=8).__dict__["codes"]
    assert codes["embedding.weight"].bits == 8
    assert {
        c.bits
        for n, c in codes.items()
        if n.startswith("blocks") and n.endswith("weight") and hasattr(c, "bits")
    } == {4}


def test_a_head_of_full_rank_is_the_head_and_one_of_low_rank_a_smaller_file(any_model, text, tmp_path):
    whole = min(any_model.head()[0].shape)
    assert evaluate(low_rank(any_model, whole), text, None).loss == pytest.approx(
        evaluate(any_model, text, None).loss, abs=0.01
    )
    small = low_rank(any_model, 4)
    assert torch.linalg.matrix_rank(small.head()[0], atol=1e-3, rtol=0.0) <= 4
    assert file_sizes(small)[0] < file_sizes(any_model)[0]
    again = load_compressed(save_compressed(small, tmp_path / "small"))
    assert torch.equal(again.head()[0], small.head()[0])


def test_a_model_that_went_on_learning_is_not_saved_under_its_old_codes(reading, tmp_path):
    small = quantise(reading)
    with torch.no_grad():
        small.embedding.weight[0, 0] += 1.0
    with pytest.raises(
        ValueError, match=r"embedding\.weight was changed since it was coded; compress the model again"
    ):
        save_compressed(small, tmp_path / "small")


def wrapped(model: LanguageModel) -> LanguageModel:
    return WithTerm(model, torch.nn.Identity(), 0.1)


def diverged(model: LanguageModel, value: float = torch.nan) -> LanguageModel:
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.head()[0][0, 0] = value
    return made


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, p: quantise("model"), TypeError, "got str; give a language model of bklm.models, or a run"),
        (lambda m, p: quantise(wrapped(m)), TypeError, "got a WithTerm; it takes a plain"),
        (lambda m, p: quantise(m, rest="bfloat16"), ValueError, "rest: got 'bfloat16'; allowed are"),
        (lambda m, p: low_rank(m, 33), ValueError, "rank: got 33"),
        (lambda m, p: low_rank(m, 2.5), ValueError, "rank: got 2.5"),
        (lambda m, p: low_rank(diverged(m), 2), ValueError, "hold NaN or infinity, so the model has diverged"),
        (lambda m, p: low_rank(diverged(m, 1e12), 2), ValueError, "beyond half precision; give bits 2 to 8"),
        (lambda m, p: quantise(diverged(m), 16), ValueError, "hold NaN or infinity, so the model has diverged"),
        (lambda m, p: quantise(m, "8"), ValueError, "bits: got '8'; a weight is rounded"),
        (lambda m, p: quantise(m, 4, 2.5), ValueError, "group: got 2.5; give the number of inputs"),
        (lambda m, p: quantise(m, outer_bits=0), ValueError, "bits: got 0; a weight is rounded"),
        (
            lambda m, p: quantise(m, 16, -5),
            ValueError,
            "bits: got 16 with group -5 and outer_bits None; half precision",
        ),
        (
            lambda m, p: save_compressed(tie_blocks(copy.deepcopy(m)), p / "x"),
            ValueError,
            "where its configuration",
        ),
        (lambda m, p: load_compressed(p / "none"), FileNotFoundError, "does not exist"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(reading, tmp_path, call, error, words):
    with pytest.raises(error, match=words):
        call(reading, tmp_path)


def test_files_of_others_and_damaged_ones_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="holds no compressed model of bklm"):
        load_compressed(tmp_path / "other")
    model = ResNetBK(ResNetBKConfig(20, d_model=16, n_layers=1))
    whole = save_compressed(quantise(model), tmp_path / "whole").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_compressed(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="is a folder; give a file that save_compressed wrote"):
        load_compressed(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["tensors"].pop("norm.weight"), "no norm.weight"),
        (lambda h: h["config"].update(later=1), "later"),
        (lambda h: h["tensors"]["embedding.weight"].update(kind="later"), "later"),
        (lambda h: h["joined"].clear(), ""),
    ],
)
def test_a_file_that_lacks_a_tensor_or_is_of_a_later_version_is_refused_in_one_sentence(tmp_path, change, said):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_compressed(quantise(ResNetBK(ResNetBKConfig(20, d_model=16, n_layers=1))), tmp_path / "whole")
    with safe_open(str(tmp_path / "whole"), "pt") as file:
        header = saving._unpack(file.metadata()[saving.HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    save_file(tensors, str(tmp_path / "changed"), {saving.HEADER: saving._pack(header)})
    with pytest.raises(ValueError, match=rf"changed is damaged, or of a version .*{said}"):
        load_compressed(tmp_path / "changed")


def test_how_a_context_block_was_trained_is_kept_in_the_file(tmp_path):
    model = ContextTokenLM(ContextTokenConfig(20, 16, 16, 2))
    model.context_block.fixed_point_iterations.fill_(5)
    for k, made in enumerate((model, quantise(model, 8))):
        again = load_compressed(save_compressed(made, tmp_path / str(k)))
        assert int(again.context_block.fixed_point_iterations) == 5
    fresh = ContextTokenLM(model.config)
    again = load_quantised(fresh, save_quantised(quantised(model), tmp_path / "int8"))
    assert (
        int(again.context_block.fixed_point_iterations),
        int(fresh.context_block.fixed_point_iterations),
    ) == (5, 0)


def test_tables_of_eight_columns_are_coded_so_that_int8_is_no_half_precision():
    model = ResNetBK(ResNetBKConfig(600, d_model=8, n_layers=2, mixer="solve", n_heads=4, num_experts=1))
    float_bytes, half_bytes, int8_bytes = (
        file_sizes(m)[0] for m in (model, quantise(model, 16), quantise(model))
    )
    assert int8_bytes < 0.75 * half_bytes
    assert int8_bytes < 0.36 * float_bytes


def test_a_file_whose_header_an_earlier_version_wrote_as_plain_words_loads_to_equal_logits(
    reading, text, tmp_path
):
    from safetensors import safe_open
    from safetensors.torch import save_file

    small = quantise(reading)
    save_compressed(small, tmp_path / "new")
    with safe_open(str(tmp_path / "new"), "pt") as file:
        header = saving._unpack(file.metadata()[saving.HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    saving._part(tensors, header.pop("joined"))
    save_file(
        {name: t.clone() for name, t in tensors.items()},
        str(tmp_path / "old"),
        {saving.HEADER: json.dumps(header)},
    )
    assert (tmp_path / "new").stat().st_size < (tmp_path / "old").stat().st_size
    x = text[0][0]
    assert torch.equal(load_compressed(tmp_path / "old")(x), load_compressed(tmp_path / "new")(x))
