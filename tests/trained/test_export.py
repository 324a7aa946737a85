"""``bklm export``: what transformers loads is the model that was trained."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import pytest
import torch

import bklm
from bklm import models
from bklm.compression import quantise
from bklm.models.by_name import config_class
from bklm.trained import export, push
from bklm.trained.card import _without_place, _without_places, model_card
from bklm.trained.run import CLASSES

TEXT = "The dog likes <unk> x<unk>y zzz the fish ."


@pytest.fixture(scope="module", params=["baseline", "grad_blend"])
def trained(request, runs):
    return bklm.load(runs / request.param)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Where transformers copies an exported model's code to, and imports it from: one folder a process."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def folder(trained, tmp_path, modules):
    return export(trained, tmp_path / f"exported_{trained.name.replace(' ', '_').replace('.', '_')}")


def test_transformers_loads_model_tokeniser_and_pipeline_with_equal_logits(trained, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = trained.encode(TEXT)[:, :16]
    assert tokenizer(TEXT).input_ids[:16] == ids[0].tolist()
    torch.testing.assert_close(model(ids).logits, trained.model(ids), rtol=0, atol=1e-5)
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(
        float(trained.model.loss(ids[:, :-1], ids[:, 1:])), rel=1e-5
    )
    with pytest.raises(ValueError, match=r"^attention_mask: this model reads from the left"):
        model(ids, attention_mask=torch.tensor([[0] + [1] * (ids.shape[1] - 1)]))
    # Beyond the positions of the model that has some.
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)("the dog", max_new_tokens=36)
    assert written[0]["generated_text"].startswith("the dog" + " " * (trained.name == "resnet_bk"))
    assert len(trained.encode(written[0]["generated_text"])[0]) > (trained.model.n_seq or 16)


def test_the_card_names_text_measures_interval_and_baselines_and_no_place_of_this_machine(
    trained, folder, tmp_path
):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (
        f"trained on {trained.text_name}", trained.manifest["corpus"]["sha256"], f"| {trained.record['val_ppl']:.2f} |",
        "mean over 2 seeds (range)", "Kneser-Ney 3-gram", "trust_remote_code=True", "bklm.studies.",
    ):  # fmt: skip
        assert words in card
    assert "/tmp" not in card
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "configuration_bklm.py", "modeling_bklm.py",
    }  # fmt: skip


def test_the_card_of_a_changed_model_says_whose_perplexity_it_has(trained):
    small = quantise(quantise(trained, 8), 4)
    card = model_card(small)
    assert (
        f"| perplexity of {trained.name}, which this was made from | {trained.record['val_ppl']:.2f} |" in card
    )
    assert "of these weights" not in card
    assert "mean over" not in card


def test_the_card_has_the_rows_of_the_models_own_size_of_text_and_the_tokens_that_were_scored(trained):
    row = {"arm": "reads", "seeds": 3, "val_ppl_low": 1.0, "val_ppl_high": 3.0}
    table = [row | {"samples": 20, "val_ppl": 2.5}, row | {"samples": 40, "val_ppl": 1.5}]
    counted = [{"name": "unigram", "samples": n, "val_ppl": 100.0 + n} for n in (20, 40)]
    run = copy.copy(trained)
    run.record = {**run.record, "arm": "reads", "samples": 40, "model": None, "alpha": None}
    run.summary = {"table": table, "baselines": counted}
    card = model_card(run)
    assert "1.50 (1.00 to 3.00)" in card
    assert "140.00" in card
    assert "120.00" not in card
    assert "over every token of the split." in card
    run.manifest = {**run.manifest, "study": "dialogue"}
    assert "over every token of the replies" in model_card(run)


def test_places_are_cut_from_a_command_and_addresses_are_not():
    words = (
        r"--data_dir '/home/al smith/text' --a=/x/y --b 'C:\Users\al\own text' https://github.com/bklm/bklm 1/2"
    )
    assert _without_places(words) == "--data_dir text --a=y --b 'own text' https://github.com/bklm/bklm 1/2"
    source = "own.txt in /home/al smith/text, split 80/10/10 by paragraphs"
    assert _without_place(source) == "own.txt"
    assert _without_place("the hub, 1/2 in 3 parts") == "the hub, 1/2 in 3 parts"


def test_a_folder_with_other_files_is_refused_and_an_exported_one_written_again(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"^output: .*full holds other files"):
        export(trained, tmp_path / "full")
    with pytest.raises(ValueError, match=r"^format: got 'onnx'; allowed is one of 'transformers'\.$"):
        export(trained, tmp_path / "new", "onnx")
    assert export(export(trained, tmp_path / "new") and trained, tmp_path / "new") == tmp_path / "new"


def test_push_uploads_the_folder_with_the_token_of_the_environment(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))
            if repo_id == "me/refused":
                raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push(tmp_path, "me/model") == "https://huggingface.co/me/model"
    assert calls == ["hf_secret", ("me/model", True), ("me/model", str(tmp_path))]
    with pytest.raises(ValueError, match=r"^push: got 'model'; it must be user/name"):
        push(tmp_path, "model")
    with pytest.raises(
        OSError, match=r"^push: me/refused could not be uploaded \(401 Unauthorized\); set HF_TOKEN"
    ):
        push(tmp_path, "me/refused")


@pytest.mark.slow
def test_lm_evaluation_harness_gets_our_perplexity(runs, validation, tmp_path, modules):
    """On a local task: the validation text as one document, in windows of which each token is scored once."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval"
    )
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    trained = bklm.load(runs / "baseline")
    # Our score reads the first token without scoring it; a document that begins with the harness's own prefix scores all.
    folder = export(trained, tmp_path / "exported")
    text = " ".join(validation.read_text().lower().split())
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "text.jsonl").write_text(json.dumps({"page": text}) + "\n")
    (tmp_path / "task" / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'task' / 'text.jsonl'}\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        "doc_to_target: '{{page}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )
    length = 16
    model = HFLM(
        pretrained=str(folder),
        trust_remote_code=True,
        max_length=length,
        prefix_token_id=0,
        device="cpu",
        batch_size=1,
    )
    tasks = TaskManager(include_path=str(tmp_path / "task"))
    found = lm_eval.simple_evaluate(model=model, tasks=["own"], task_manager=tasks, bootstrap_iters=0)
    theirs = found["results"]["own"]["word_perplexity,none"]
    # The same windows: the prefix, then the text, 16 inputs each.
    ids = torch.cat([torch.zeros(1, 1, dtype=torch.int64), trained.encode(text)], 1)[0]
    nll, count = 0.0, len(ids) - 1
    for begin in range(0, count, length):
        end = min(begin + length, count)
        x, y = ids[end - length : end][None], ids[end - length + 1 : end + 1][None].clone()
        if end - length < 0:
            x, y = ids[:end][None], ids[1 : end + 1][None].clone()
        y[:, : y.shape[1] - (end - begin)] = -100
        nll += float(trained.model.loss(x, y, reduction="sum"))
    assert theirs == pytest.approx(float(torch.exp(torch.tensor(nll / count))), rel=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_model_is_loaded_by_transformers_with_equal_logits(name, runs, tmp_path, modules):
    from transformers import AutoModelForCausalLM

    trained = bklm.load(runs / "baseline")
    found = config_class(name)
    sizes = {
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "embed_dim": 8,
        "hidden_dim": 8,
        "context_dim": 8,
        "n_seq": 16,
    }
    known = {field.name for field in dataclasses.fields(found)}
    settings = found(vocab_size=trained.model.vocab_size, **{k: v for k, v in sizes.items() if k in known})
    trained.model = getattr(models, name)(settings).eval()
    trained.record = {**trained.record, "model_class": name, "model_config": dataclasses.asdict(settings)}
    loaded = AutoModelForCausalLM.from_pretrained(export(trained, tmp_path / "out"), trust_remote_code=True)
    ids = trained.encode(TEXT)[:, :16]
    torch.testing.assert_close(loaded(ids).logits, trained.model(ids), rtol=0, atol=1e-5)
