"""``bklm.load``: what a run trained writes, scores and shows as the run itself did."""

from __future__ import annotations

import json
import shutil
import zipfile

import matplotlib.image
import numpy as np
import pytest
import torch

import bklm
from bklm.bk_core.reference import dense
from bklm.compression import distil, narrower, prune, quantise, with_int8_products
from bklm.compression.pruning import scoped
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training.schedules import TrainingSettings


@pytest.fixture(scope="module", params=["baseline", "grad_blend"])
def trained(request, runs):
    return bklm.load(runs / request.param)


def wide_config(vocab_size):
    """Of a model with matrices that are worth coding."""
    return ResNetBKConfig(vocab_size, d_model=32, n_layers=1, mixer="solve", n_heads=4, num_experts=1)


def test_a_zip_and_a_folder_hold_the_same_model(runs):
    zipped, folder = bklm.load(runs / "baseline.zip"), bklm.load(str(runs / "baseline"), "resnet_bk")
    assert zipped.models == folder.models == ["resnet_bk"]
    assert zipped.generate("The cat", 8) == folder.generate("The cat", 8)
    assert zipped.generate("The cat", 8, seed=1) != folder.generate("The cat", 8)


def test_the_validation_text_gets_the_perplexity_that_the_run_reported(trained, validation):
    score = trained.score(validation)
    assert score.perplexity == pytest.approx(trained.record["val_ppl"], rel=1e-6)
    assert score.perplexity_without_unk == pytest.approx(trained.record["val_ppl_without_unk"], rel=1e-6)
    assert score.accuracy == pytest.approx(trained.record["val_accuracy"])
    assert trained.perplexity(validation.read_text()) == score.perplexity


def test_a_prompt_stays_as_typed_and_writing_goes_on_where_the_positions_end(trained):
    prompt = "The Cat  sees"
    written = trained.generate(prompt, 40)
    assert written.startswith(prompt)
    assert len(trained.encode(written)[0]) >= 40
    assert trained.generate(prompt, 0) == prompt


def test_an_earlier_run_without_tokenizer_json_or_model_class_is_read_all_the_same(runs, tmp_path, validation):
    old = tmp_path / "baseline"
    shutil.copytree(runs / "baseline", old)
    (old / "tokenizer.json").unlink()
    for record in old.glob("runs/*/result.json"):
        found = json.loads(record.read_text())
        record.write_text(json.dumps({k: v for k, v in found.items() if k != "model_class"}))
    assert bklm.load(old).perplexity(validation) == bklm.load(runs / "baseline").perplexity(validation)


def test_what_was_saved_is_loaded_again(trained, tmp_path, validation):
    saved = trained.save(tmp_path / "mine")
    again = bklm.load(saved)
    assert (again.name, again.perplexity(validation)) == (trained.name, trained.perplexity(validation))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"^save: .*full holds other files; choose a new or empty folder\.$"):
        trained.save(tmp_path / "full")


def test_features_are_the_last_resolvent_entries_of_the_dense_matrices_and_know_no_later_word(trained):
    found = trained.features("the dog likes the fish .")
    words = (
        ["the", "dog", "likes", "the", "fish", "."]
        if trained.name == "resnet_bk"
        else list("the dog likes the fish .")
    )
    assert found.words == words
    layers, heads, count = found.potential.shape
    assert (layers, count) == (trained.record["model_config"]["n_layers"], len(words))
    assert len(found.rows()) == layers * heads * count
    if trained.name != "resnet_bk":  # the published model: H = tridiag(1, v - 2, 1), z = i
        a, ones = torch.from_numpy(found.potential - 2), torch.ones(count - 1, dtype=torch.float64)
        for n in (1, 2, count):
            last = dense(a[..., :n], ones[: n - 1], ones[: n - 1], 1j)[..., -1]
            np.testing.assert_allclose(
                found.real[..., n - 1] + 1j * found.imaginary[..., n - 1], last, atol=1e-6
            )
    assert (found.imaginary > 0).all()
    other = trained.features("the dog likes the tree ,")
    same = words.index("fish") if "fish" in words else len("the dog likes the ")
    np.testing.assert_allclose(found.real[..., :same], other.real[..., :same], atol=1e-6)
    assert np.abs(found.real[..., same:] - other.real[..., same:]).max() > 1e-6


def test_the_features_figure_is_a_picture_that_says_what_it_shows(trained, tmp_path):
    path = trained.features("the dog $ likes fish .").figure(tmp_path / "f.png")
    assert matplotlib.image.imread(path).std() > 0.05
    assert "potential of every word" in path.read_bytes().decode("latin-1")


def _damage(archive, to, member):
    """The zip with the packed bytes of a member overwritten."""
    raw = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        info = next(i for i in opened.infolist() if i.filename.endswith(member))
    begin = info.header_offset + 30 + len(info.filename)
    raw[begin : begin + info.compress_size] = b"\xff" * info.compress_size
    to.write_bytes(raw)


def _rewrite(run, to, pattern, change):
    shutil.copytree(run, to)
    for path in to.glob(pattern):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_what_cannot_be_loaded_is_one_sentence(runs, tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    _damage(runs / "baseline.zip", tmp_path / "b.zip", "table.csv")
    _rewrite(
        runs / "baseline",
        tmp_path / "runs" / "foreign",
        "manifest.json",
        lambda found: {"name": "another tool's"},
    )
    _rewrite(
        runs / "baseline", tmp_path / "runs" / "newer", "runs/*/result.json",
        lambda found: found | {"model_config": found["model_config"] | {"telepathy": 1}, "model_class": "ResNetBK"},
    )  # fmt: skip
    for path, model, words in (
        (runs / "none.zip", None, r"none.zip does not exist; .*baseline.zip"),
        (runs, None, r"holds several runs; give one of .*baseline, .*grad_blend\.$"),
        (tmp_path / "empty", None, r"holds no manifest.json: it is no finished run"),
        (tmp_path / "a.zip", None, r"is no zip, or a damaged one"),
        (tmp_path / "b.zip", None, r"is no zip, or a damaged one"),
        (tmp_path / "runs" / "foreign", None, r"foreign holds a manifest.json that no run of bklm wrote"),
        (
            tmp_path / "runs" / "newer",
            None,
            r"settings that bklm .* does not know .*telepathy.*; update bklm\.$",
        ),
        (runs / "baseline", "gpt", r"^model: got 'gpt'; .* holds 'resnet_bk'\.$"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            bklm.load(path, model)


def test_what_cannot_be_used_is_one_sentence(trained, tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    for use, words in (
        (
            lambda: trained.generate("  "),
            r"^prompt: got .*holds no token" if trained.name == "resnet_bk" else None,
        ),
        (lambda: trained.generate("a", -1), r"max_new_tokens"),
        (lambda: trained.score("a"), r"^text: got 1 token; a perplexity needs 2"),
        (lambda: trained.score("missing.txt"), r"^text: there is no file 'missing.txt'"),
        (lambda: trained.score("my notes.tokens "), r"^text: there is no file 'my notes.tokens '"),
        (lambda: trained.score(""), r"^text: got 0 tokens; a perplexity needs 2"),
        (lambda: trained.score(tmp_path / "latin.txt"), r"is not UTF-8"),
        (lambda: trained.features(""), r"^features: the text holds no token"),
    ):
        if words:
            with pytest.raises((ValueError, OSError), match=words):
                use()


def test_a_model_without_a_potential_says_which_ones_have_one(runs):
    from bklm.models import LSTM, LSTMConfig
    from bklm.trained.features import read_features

    with pytest.raises(ValueError, match=r"^features: lstm is a LSTM, which has no potential .*resnet_bk"):
        read_features(LSTM(LSTMConfig(9, 4, 1)), [1], ["a"], "lstm")


def test_a_sample_of_pieces_or_characters_ends_at_the_last_position(runs, small_text, monkeypatch):
    from bklm.harness.text import prepare_text
    from bklm.studies import GradBlendConfig

    trained = bklm.load(runs / "grad_blend")
    text = prepare_text(GradBlendConfig(**trained.manifest["config"]))
    write, ids = trained.model.generate, []
    monkeypatch.setattr(trained.model, "generate", lambda *given: ids.append(write(*given)) or ids[0])
    written = text.generate(trained.model, "the cat sees the dog and the bird", 60)
    assert ids[0].shape == (1, trained.model.n_seq)
    assert written == text.tokens.decode(ids[0][0].tolist())


def test_a_long_line_and_one_that_begins_like_a_home_folder_are_texts(trained):
    for text in ("the dog likes the fish . " * 25, "~nobody the dog likes the fish ."):
        assert trained.score(text).tokens > 2


def test_a_runs_own_folder_and_a_file_are_not_saved_over(trained, runs, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(runs / "grad_blend", other)
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    (tmp_path / "file").touch()
    for place in (other, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"^save: .* holds other files; choose a new or empty folder\.$"):
            trained.save(place)
    assert before == {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    assert trained.save(trained.save(tmp_path / "mine")) == tmp_path / "mine"


def test_a_loaded_run_stays_one_and_keeps_its_small_model(runs, validation, tmp_path):
    run = bklm.load(runs / "baseline")
    small = quantise(run, 8)
    assert run.model is not small.model
    assert small.perplexity(validation) == pytest.approx(run.perplexity(validation), rel=0.02)
    again = bklm.load(small.save(tmp_path / "small"))
    assert again.perplexity(validation) == small.perplexity(validation)
    assert again.generate("the cat", 5) == small.generate("the cat", 5)


def test_a_pruned_run_and_a_student_of_a_run_are_runs_that_are_saved_and_loaded(runs, validation, tmp_path):
    run = bklm.load(runs / "baseline")
    run.model = ResNetBK(wide_config(run.model.vocab_size)).eval()
    zeros = prune(run, 0.5)
    body = scoped(zeros.model, "body").values()
    assert sum(int((w == 0).sum()) for w in body) == round(0.5 * sum(w.numel() for w in body))
    torch.manual_seed(0)
    batches = [tuple(torch.randint(3, run.model.vocab_size, (4, 8)) for _ in range(2)) for _ in range(2)]
    small = ResNetBK(narrower(run.model.config, 0.5))
    student = distil(run, small, batches, batches, TrainingSettings(1, learning_rate=1e-2))
    assert student.model is small
    assert run.model.num_parameters() > small.num_parameters()
    assert student.record["model_class"] == "ResNetBK"
    for k, made in enumerate((zeros, student)):
        again = bklm.load(made.save(tmp_path / str(k)))
        # What the study measured is of the model before.
        assert f"not measured, made from one of validation PPL {run.record['val_ppl']:.1f} on" in repr(again)
        assert not {"val_ppl", "test_ppl", "context_gain"} & again.record.keys()
        assert again.perplexity(validation) == made.perplexity(validation)
        assert again.generate("the cat", 5) == made.generate("the cat", 5)


def test_a_run_whose_products_are_int8_is_saved_and_loaded_and_not_exported(runs, validation, tmp_path):
    run = bklm.load(runs / "baseline")
    run.model = ResNetBK(wide_config(run.model.vocab_size)).eval()
    small = with_int8_products(run)
    again = bklm.load(small.save(tmp_path / "small"))
    assert again.perplexity(validation) == small.perplexity(validation)
    assert again.perplexity(validation) == pytest.approx(run.perplexity(validation), rel=0.05)
    with pytest.raises(ValueError, match="multiplies in int8, which no other library knows of"):
        bklm.trained.export(small, tmp_path / "out")
