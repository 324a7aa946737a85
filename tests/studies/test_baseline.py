"""The baseline study, end to end on a tiny text."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import shutil
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from matplotlib.figure import Figure

from bklm.harness.progress import Progress
from bklm.studies.baseline import costs as baseline_measure
from bklm.studies.baseline import figures as baseline_figures
from bklm.studies.baseline import run as baseline_run
from bklm.studies.baseline import tables
from bklm.studies.baseline import train as baseline_runner
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.models import (
    COMPETITORS,
    CONTEXT_LENGTHS,
    active_parameters,
    build_model,
    count_parameters,
    model_names,
)
from bklm.studies.baseline.run import estimated_minutes, fields_of_models, prepare_text, run_baseline
from bklm.studies.baseline.samples import (
    checkpoints_table,
    choose_checkpoint,
    continue_text,
    load_checkpoint,
    write_sample,
)
from bklm.studies.baseline.tables import (
    MODELS,
    bigram_models,
    claims_table,
    model_table,
    readable_contexts,
    readable_cost,
    readable_quality,
)
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.evaluation import evaluate
from bklm.training.non_finite import NonFiniteError

# A checkpoint that an error names, and that nobody may be sent to look for.
GONE = "epoch_0007"


def leave_out_figures_and_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing and measuring take most of a tiny study's time; one test has them for real."""
    cost = {"tokens_per_second": 1.0, "training_bytes": None, "memory_reason": "left out", "generation": []}
    monkeypatch.setattr(baseline_figures, "save_figure", lambda path, *a, **k: path)
    monkeypatch.setattr(baseline_run, "measure_models", lambda runs, *a, **k: {r["model"]: cost for r in runs})


@pytest.fixture(autouse=True)
def no_figures_and_costs(request, monkeypatch):
    if "draws" not in request.keywords:
        leave_out_figures_and_costs(monkeypatch)


def tiny_config(text: Path, folder: Path, **changes) -> BaselineConfig:
    """One NewLLM of a thousand parameters, one seed, one learning rate."""
    settings = {
        "profile": "smoke", "model": "newllm", "data_dir": str(text), "output_dir": str(folder / "results"),
        "device": "cpu", "seeds": (0,), "epochs": 3, "learning_rates": (1e-2,), "search_tokens": 200, "batch_size": 8,
        "seq_len": 8, "vocab_size": 100, "embed_dim": 8, "hidden_dim": 16, "context_dim": 8, "n_layers": 1,
        "max_train_tokens": 300, "generate_tokens": 3, "context_tokens": 0, "checkpoint_every": 2,
    }  # fmt: skip
    return BaselineConfig(**{**settings, **changes})


@pytest.fixture
def tiny(small_text: Path, tmp_path: Path) -> BaselineConfig:
    return tiny_config(small_text, tmp_path)


@pytest.fixture(scope="module")
def checkpoint(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny study after one epoch, on disk for tests that are refused it."""
    config = tiny_config(small_text, tmp_path_factory.mktemp("checkpoint"), epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures_and_costs(patch)
        run_baseline(config)
    (place,) = CheckpointFolder(config.checkpoint_folder() / "newllm_seed_0").all()
    return place


def curve(result) -> list[list[float]]:
    return [[e[k] for k in ("train_loss", "val_loss")] for r in result.runs for e in r["epochs"]]


@pytest.mark.slow
@pytest.mark.draws
def test_all_models_are_searched_trained_measured_and_reported_in_one_zip(tiny, monkeypatch):
    monkeypatch.setattr(baseline_measure, "POSITIONS", (4, 40))
    monkeypatch.setattr(baseline_measure, "GPT_POSITIONS", 16)
    config = dataclasses.replace(tiny, model="all", seeds=(0, 1), epochs=2, learning_rates=(1e-3, 1e-2))
    drawn = []
    result = run_baseline(config, on_figure=drawn.append)
    assert [r["model"] for r in result.table] == list(COMPETITORS)
    # Drawing takes longer than a tiny training, so it is not done after each.
    assert 1 <= len(drawn) < 10
    assert list(result.tables()) == ["quality", "search", "contexts", "cost", "claims"]
    assert [row["model"] for row in result.tables()["quality"]()][:5] == [
        "NewLLM", "GPT", "LSTM", "ResNetBK", "ResNetBK diagonal"
    ]  # fmt: skip
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {n.removeprefix("baseline/") for n in archive.namelist()}
        summary = json.loads(archive.read("baseline/summary.json"))
        manifest = json.loads(archive.read("baseline/manifest.json"))
    assert {
        "table.csv", "epochs.csv", "learning_rates.csv", "training_curves.png", "context_lengths.png", "run.log",
        "vocabulary.json", "runs/gpt_seed_0/best_model.safetensors",
    } <= names  # fmt: skip
    assert not any("epoch_" in n for n in names)  # checkpoints would swell the zip
    assert manifest["config"] == json.loads(json.dumps(config.resolved().to_dict()))
    assert summary["finding"] == result.finding
    assert len({r["steps"] for r in result.runs}) == 1
    sizes = [r["parameters"] for r in result.table]
    assert max(sizes) < 1.5 * min(sizes)  # so small a model has few sizes to choose from
    mixers = {r["model"]: r["model_config"].get("mixer") for r in result.runs}
    assert (mixers["resnet_bk"], mixers["resnet_bk_diagonal"]) == ("solve", "diagonal")
    for name in COMPETITORS:
        tried = {r["learning_rate"]: r["val_ppl"] for r in result.search if r["model"] == name}
        assert set(tried) == {1e-3, 1e-2}
        taken = next(r["learning_rate"] for r in result.table if r["model"] == name)
        assert taken == min(tried, key=tried.get)
    rows = {r["model"]: r for r in result.table}
    assert rows["newllm"]["val_ppl_low"] < rows["newllm"]["val_ppl"] < rows["newllm"]["val_ppl_high"]
    assert rows["newllm"]["training_bytes"] > 12 * rows["newllm"]["parameters"]
    # GPT ends where its positions end, the others go on; its state grows, theirs does not.
    assert rows["gpt"]["val_ppl_context_16"] is None
    for name in COMPETITORS:
        assert (rows[name]["val_ppl_mixer_off"] is None) == (name == "lstm")
        assert rows[name]["val_ppl_context_1"] > 1
        assert rows[name]["context_gain"] < 1
    assert rows["newllm"]["val_ppl_context_128"] > 0
    assert rows["gpt"]["generate_seconds_4"] > 0
    assert rows["gpt"]["generate_seconds_40"] is None
    assert rows["resnet_bk"]["state_bytes_4"] == rows["resnet_bk"]["state_bytes_40"] > 0
    for model in ("", "gpt"):
        assert len(write_sample(result, prepare_text(config.resolved()), model, "The cat", 0).split()) > 2


@pytest.mark.slow
def test_a_result_that_lacks_what_is_needed_is_set_aside_and_made_again(tiny):
    first = run_baseline(tiny)
    path = first.folder / "runs" / "newllm_seed_0" / "result.json"
    path.write_text('{"model": "newllm", "learning_rate": 0.01}')
    second = run_baseline(tiny)
    assert [r["val_ppl"] for r in second.runs] == [r["val_ppl"] for r in first.runs]
    assert path.with_name("result.json.damaged-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["newllm", "resnet_bk", "lstm", "linear_context"])
def test_after_ctrl_c_the_study_goes_on_and_ends_with_the_numbers_of_an_undisturbed_one(
    tiny, tmp_path, monkeypatch, model
):
    tiny = dataclasses.replace(tiny, model=model)
    undisturbed = run_baseline(dataclasses.replace(tiny, output_dir=str(tmp_path / "undisturbed")))
    steps = undisturbed.runs[0]["steps"]
    done = []

    def press(n):
        done.append(n)
        if len(done) == steps - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "step", lambda self, n: press(n))
    with pytest.raises(KeyboardInterrupt):
        run_baseline(tiny)
    resumed = run_baseline(tiny)
    assert curve(resumed) == curve(undisturbed)
    assert len(done) == steps - 1 + steps // 3  # the third epoch was trained again, and no other


def test_checkpoints_go_where_they_are_wanted_and_tell_which_model_they_hold(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, checkpoint_dir=str(tmp_path / "drive"), epochs=5, keep_checkpoints=1
    ).resolved()
    result = run_baseline(config)
    rows = checkpoints_table(result)
    assert {r["epoch"] for r in rows} == {4, 5, result.runs[0]["best_epoch"]}
    assert all(Path(r["path"]).is_relative_to(tmp_path / "drive") for r in rows)
    text = prepare_text(config)
    for row in rows:
        score = evaluate(load_checkpoint(row["path"]), text.val_loader(), text.unk_id)
        assert score.perplexity == pytest.approx(row["val PPL"], abs=2e-3)
        assert score.perplexity == pytest.approx(
            result.runs[0]["epochs"][row["epoch"] - 1]["val_perplexity"], rel=1e-6
        )
    best = evaluate(result.load(), text.val_loader(), text.unk_id).perplexity
    assert best == pytest.approx(result.best_perplexity, rel=1e-6)
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_checkpoint(tmp_path)
    assert choose_checkpoint(rows, 0, text).num_parameters() == result.table[0]["parameters"]
    first = continue_text(load_checkpoint(rows[0]["path"]), text, "the", 0)
    assert write_sample(result, text, prompt="the", temperature=0, checkpoint=0) == first
    assert write_sample(result, text, prompt="the", temperature=0.8) != first
    for number in (-1, len(rows)):
        with pytest.raises(ValueError, match=rf"number: got {number}; the list has 0 to {len(rows) - 1}"):
            choose_checkpoint(rows, number, text)
    with pytest.raises(ValueError, match="there are no checkpoints yet"):
        choose_checkpoint([], 0, text)
    other = prepare_text(dataclasses.replace(config, vocab_size=10))
    with pytest.raises(
        ValueError, match=r"another vocabulary \(\d+ words, SHA-256 .*\) than this text's \(10 words"
    ):
        choose_checkpoint(rows, 0, other)


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_checkpoint_of_a_shorter_one(tiny, tmp_path):
    short = dataclasses.replace(tiny, epochs=2)
    (place,) = [r["path"] for r in checkpoints_table(run_baseline(short)) if r["epoch"] == 2]
    longer = run_baseline(dataclasses.replace(tiny, output_dir=str(tmp_path / "longer"), resume_from=place))
    whole = run_baseline(dataclasses.replace(tiny, output_dir=str(tmp_path / "whole")))
    assert curve(longer) == curve(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "gpt"}, r"model \('newllm' there, 'gpt' now\)"),
        ({"hidden_dim": 12}, r"hidden_dim \(16 there, 12 now\)"),
        ({"vocab_size": 10}, r"vocabulary \('\d+ words, SHA-256 .*' there, '10 words"),
        ({"seq_len": 4}, r"seq_len \(8 there, 4 now\)"),
    ],
)
def test_a_checkpoint_of_another_model_config_or_vocabulary_is_refused_naming_the_fields(
    tiny, checkpoint, change, named
):
    with pytest.raises(ValueError, match=named):
        run_baseline(dataclasses.replace(tiny, **change, resume_from=str(checkpoint)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patience": 0}, "patience: got 0; allowed is an integer of at least 1|in \\[1,"),
        ({"clip": "0.5@1, 1@4"}, "last stage begins at epoch 4, but the run has 3 epochs"),
        ({"clip": "low"}, "clip: got 'low'"),
        ({"protocol": "original"}, "seq_len, lowercase: got 8 and True"),
        ({"protocol": "original", "seq_len": None, "model": "resnet_bk"}, "take that, or protocol 'corrected'"),
        ({"resume_from": "nowhere"}, "resume_from: nowhere is no checkpoint"),
        (
            {"resume_from": "x", "model": "all", "seeds": (0, 1)},
            r"several are asked for \(model all; seeds \(0, 1\)",
        ),
        ({"processes": 9}, "processes: got 9"),
        ({"seq_len": 5000}, "longer than the text"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates: got"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_trained(tiny, monkeypatch, change, message):
    monkeypatch.setattr(baseline_runner, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        run_baseline(dataclasses.replace(tiny, **change))
    assert not (Path(tiny.output_dir) / "baseline" / "config.json").exists()


def test_a_disk_too_small_for_the_checkpoints_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(baseline_runner.shutil, "disk_usage", lambda path: SimpleNamespace(free=250_000_000))
    config = dataclasses.replace(tiny, embed_dim=2000, hidden_dim=2000, context_dim=2000)
    with pytest.raises(OSError, match=r"checkpoint_dir: .* has 250 MB left; the checkpoints take up to \d+ MB"):
        run_baseline(config)


def test_the_checkpoints_of_the_whole_wikitext2_fit_a_free_drive_and_those_that_lie_there_are_counted(
    tiny, monkeypatch, tmp_path
):
    config = BaselineConfig(protocol="field", profile="full", data_dir=tiny.data_dir, workers=1).resolved()
    fields = baseline_run.fields_of_models(config, config.vocab_size)
    needed = baseline_run._checkpoint_bytes(config, fields, len(config.seeds))
    assert 5e9 < needed < 10e9, "GB of the 15 that a Drive has"
    free = needed - 4e6
    monkeypatch.setattr(baseline_runner.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="the checkpoints take up to"):
        baseline_runner.require_room(tmp_path / "drive", needed)
    (tmp_path / "drive" / "run").mkdir()
    (tmp_path / "drive" / "run" / "state.pt").write_bytes(bytes(5_000_000))
    baseline_runner.require_room(tmp_path / "drive", needed)


@pytest.mark.slow
def test_with_no_checkpoints_to_keep_a_finished_run_leaves_its_best_alone(tiny):
    result = run_baseline(dataclasses.replace(tiny, seeds=(0, 1), keep_checkpoints=0))
    left = [(r["seed"], r["epoch"]) for r in checkpoints_table(result)]
    assert sorted(left) == [(run["seed"], run["best_epoch"]) for run in result.runs]
    assert result.load("newllm").num_parameters() == result.table[0]["parameters"]


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_an_answer_and_not_taken(tiny, monkeypatch):
    real = baseline_runner.train

    def train(model, loader, val, settings, **options):
        if settings.learning_rate >= 1:
            raise NonFiniteError("the loss was nan")
        return real(model, loader, val, settings, **options)

    monkeypatch.setattr(baseline_runner, "train", train)
    result = run_baseline(dataclasses.replace(tiny, learning_rates=(1e-2, 1.0), epochs=1))
    assert [r["val_ppl"] is None for r in result.search] == [False, True]
    assert result.table[0]["learning_rate"] == 1e-2
    with pytest.raises(
        RuntimeError, match=r"learning_rates: newllm diverged with each of .*; add smaller ones"
    ):
        run_baseline(dataclasses.replace(tiny, learning_rates=(1.0, 2.0), output_dir=tiny.output_dir + "2"))


def test_a_run_that_diverges_is_recorded_and_the_others_are_reported_without_it(tiny, monkeypatch):
    real = baseline_runner.train

    def train(model, loader, val, settings, **options):
        if settings.seed == 0:
            raise NonFiniteError("NewLLM, seed 0: the loss was nan", f"; the last good checkpoint is {GONE}.")
        return real(model, loader, val, settings, **options)

    monkeypatch.setattr(baseline_runner, "train", train)
    config = dataclasses.replace(tiny, seeds=(0, 1), epochs=1)
    result = run_baseline(config)
    assert [r["seed"] for r in result.runs] == [1]
    assert [(r["seed"], r["reason"]) for r in result.diverged] == [(0, "NewLLM, seed 0: the loss was nan.")]
    assert [r["learning_rate"] for r in result.diverged] == [0.01]
    assert GONE not in (result.folder / "summary.json").read_text()
    log = (result.folder / "run.log").read_text()
    assert log.count("seed 0: the loss was nan; it is repeated, to tell a divergence from a fault") == 1
    assert "seed 0: the loss was nan; it is recorded as diverged" in log
    assert "Diverged, and in none of these numbers: NewLLM, seed 0." in result.finding
    quality = readable_quality(result.table, [])
    assert quality[0]["val PPL (95%)"].endswith("; diverged: 1 of 2 seeds")
    assert result.load().num_parameters() == result.table[0]["parameters"]  # the seed that did not diverge
    monkeypatch.setattr(baseline_runner, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run_baseline(config).table == result.table


def test_when_every_run_diverges_one_sentence_says_so(tiny, monkeypatch):
    def train(*arguments, **options):
        raise NonFiniteError("NewLLM, seed 0: the loss was nan", f"; the last good checkpoint is {GONE}.")

    monkeypatch.setattr(baseline_runner, "train", train)
    with pytest.raises(
        RuntimeError, match=r"every training diverged, .*the loss was nan\. Take another output_dir"
    ):
        run_baseline(tiny)


def test_training_stops_early_and_the_best_epoch_is_the_model(tiny):
    config = dataclasses.replace(tiny, learning_rates=(1e-12,), epochs=9, patience=2)
    (run,) = run_baseline(config).runs
    assert len(run["epochs"]) == 3
    assert run["best_epoch"] == min(run["epochs"], key=lambda e: e["val_loss"])["epoch"]


def test_the_originals_protocol_trains_on_its_windows_and_says_so(small_text, tiny, tmp_path):
    config = dataclasses.replace(
        tiny, protocol="original", seq_len=None, learning_rates=None, epochs=1, max_train_tokens=200
    )
    text = prepare_text(config.resolved())
    assert config.resolved().learning_rates == (1e-4,)
    assert set(COMPETITORS) - set(model_names("all", "original")) == {"resnet_bk", "linear_context"}
    x, y = next(iter(text.val_loader()))
    assert x.shape[1] == 63
    assert int(y[0, (y[0] != -100).sum() - 1]) == 3  # a line ends with EOS
    assert text.val_targets == sum(int((y != -100).sum()) for _, y in text.val_loader())
    result = run_baseline(config)
    assert (
        "as published: the original's windows" in json.loads(result.paths["summary.json"].read_text())["note"]
    )
    assert result.baselines[0]["val_ppl"] > result.baselines[1]["val_ppl"] > 1
    assert "context_lengths.png" not in result.paths


def test_the_fields_protocol_keeps_case_adds_linear_context_and_sets_published_numbers_beside_wikitext_2(
    small_text, tiny, tmp_path, monkeypatch
):
    leave_out_figures_and_costs(monkeypatch)
    folder = shutil.copytree(small_text, tmp_path / "wikitext-2")
    config = dataclasses.replace(
        tiny,
        protocol="field",
        model="all",
        data_dir=str(folder),
        lowercase=None,
        patience=None,
        schedule=None,
        epochs=1,
    ).resolved()
    assert (config.lowercase, config.patience, config.schedule) == (False, 2, "cosine")
    fresh = BaselineConfig(profile="full", protocol="field").resolved()
    assert (fresh.vocab_size, fresh.epochs, fresh.seq_len, fresh.max_train_tokens) == (30_000, 10, 128, 0)
    # A folder of that name is not enough for the numbers of the whole.
    assert not prepare_text(config).is_whole_wikitext2
    monkeypatch.setattr("bklm.studies.baseline.text.OFFICIAL_WORDS", prepare_text(config).train_tokens)
    result = run_baseline(config)
    assert {row["model"] for row in result.table} == set(COMPETITORS)
    assert "Animals" in prepare_text(config).tokens.vocab.words
    assert all(row["test_ppl"] for row in result.table)
    counted = [row for row in readable_quality(result.table, result.baselines) if "Kneser-Ney" in row["model"]]
    assert counted
    assert all(float(row["test PPL"]) > 1 for row in counted), (
        "whether a model beats counting is asked of test, too"
    )
    assert "AWD-LSTM (Merity et al. 2017)" in [row["published"] for row in result.tables()["published"]()]
    # What the original reported is of words in lower case; the contest is judged on test, in pairs.
    judged = [row["claim"] for row in result.claims]
    assert "ResNetBK better than GPT, test PPL" in judged
    assert len(judged) in (len(result.table) - 1, len(result.table))
    assert not any("original" in row["model"] for row in result.tables()["quality"]())


def test_a_rival_is_judged_on_test_over_all_seeds_and_not_where_one_diverged():
    def trials(model, *scores):
        found = [{"model": model, "seed": s, "val_ppl": p, "test_ppl": p} for s, p in enumerate(scores)]
        return [
            t if p is None or model != "gpt" else t | {"val_ppl": 2 * p}
            for t, p in zip(found, scores, strict=True)
        ]

    def found(*rival):
        rows = tables.rival_claims(trials("resnet_bk", 30.0, 30.3, 30.6) + trials("gpt", *rival))
        goal = rows[1]["measured here"].partition(":")[0] if len(rows) > 1 else "-"
        verdict, _, validation = rows[0]["measured here"].rsplit(": ", 1)[1].partition("; ")
        if verdict == "better":
            assert validation.startswith("on validation x2."), "twice as high there, and no verdict hangs on it"
        return verdict, goal

    assert found(32.0, 32.3, 32.7) == ("better", "not reached")
    assert found(34.0, 34.3, 34.7) == ("better", "reached")
    assert found(27.0, 27.3, 27.5) == ("worse", "not reached")
    assert found(28.0, 37.0, 33.0) == ("no difference", "not shown")
    assert found(33.0, 33.3) == ("no verdict", "-")
    assert found(33.0, 33.3, None) == ("no verdict", "-")
    assert tables.rival_claims(trials("gpt", 30.0, 31.0, 32.0)) == []


def test_every_token_after_the_first_is_a_target_once_and_words_are_lower_case(tiny):
    text = prepare_text(tiny.resolved())
    words = [w.lower() for line in text.corpus.valid for w in line.split()]
    targets = torch.cat([y[y != -100] for _, y in text.val_loader()])
    assert text.tokens.decode(targets.tolist()).split() == words[1:]
    both = prepare_text(dataclasses.replace(tiny, validation="valid+test").resolved())
    assert both.val_targets == len(words) + sum(len(line.split()) for line in both.corpus.test) - 1
    assert not both.has_test_split
    cased = prepare_text(dataclasses.replace(tiny, lowercase=False).resolved())
    assert "Animals" in cased.tokens.vocab.words
    assert "Animals" not in text.tokens.vocab.words


def test_a_study_that_validates_on_the_test_split_too_says_so(tiny):
    result = run_baseline(dataclasses.replace(tiny, validation="valid+test", epochs=1))
    note = json.loads(result.paths["summary.json"].read_text())["note"]
    assert "validation holds the test split too" in note
    assert "299 training targets an epoch" in note
    assert result.table[0]["test_ppl"] is None


def test_a_text_handed_in_is_not_prepared_again(tiny, monkeypatch):
    text = prepare_text(tiny.resolved())
    monkeypatch.setattr(baseline_run, "make_text", lambda *a, **k: pytest.fail("prepared again"))
    assert run_baseline(dataclasses.replace(tiny, epochs=1), text=text).baselines == text.baselines


@pytest.mark.slow
def test_a_fault_of_the_moment_leaves_no_trace_in_the_numbers(tiny, tmp_path, monkeypatch):
    undisturbed = run_baseline(dataclasses.replace(tiny, output_dir=str(tmp_path / "undisturbed")))
    real, faults = baseline_runner.train, []

    def train(*arguments, **options):
        records = real(*arguments, **options)
        if not faults:
            faults.append("a loss was nan")
            raise NonFiniteError(faults[0])
        return records

    monkeypatch.setattr(baseline_runner, "train", train)
    result = run_baseline(tiny)
    assert faults
    assert result.diverged == []
    assert curve(result) == curve(undisturbed)


@pytest.mark.slow
def test_a_record_without_weights_is_reported_and_only_a_sample_of_it_is_refused(tiny):
    """What a database brings of another machine's runs: its records, and none of its weights."""
    config = dataclasses.replace(tiny, seeds=(0, 1), epochs=1)
    first = run_baseline(config)
    places = [config.checkpoint_folder() / f"newllm_seed_{seed}" for seed in (0, 1)]
    kept = [first.folder / "runs" / f"newllm_seed_{seed}" / "best_model.safetensors" for seed in (0, 1)]
    assert [file.exists() for file in kept] == [True, False]
    shutil.rmtree(places[0])
    kept[0].unlink()
    second = run_baseline(config)
    assert [file.exists() for file in kept] == [False, True]
    assert kept[1].read_bytes() == next(places[1].glob("epoch_*/model.safetensors")).read_bytes()
    assert second.load().num_parameters() == first.load().num_parameters()
    # A checkpoint of the same run that scored otherwise is another training's.
    kept[1].unlink()
    (place,) = places[1].glob("epoch_*")
    place.rename(place.with_name("epoch_0001_ppl_1.234"))
    third = run_baseline(config)
    assert third.table == first.table
    assert not any(file.exists() for file in kept)
    log = (third.folder / "run.log").read_text()
    assert log.count("NewLLM: no weights of it are here") == 1
    with pytest.raises(
        FileNotFoundError, match=r"model: the weights of NewLLM are gone from .*runs, or were never"
    ):
        third.load()
    with pytest.raises(ValueError, match=r"model: got 'gpt'; this study trained newllm\."):
        third.load("gpt")


@pytest.mark.slow
def test_two_workers_on_one_machine_give_the_numbers_of_one_and_costs_are_measured_without_them(
    tiny, tmp_path, monkeypatch
):
    config = dataclasses.replace(tiny, seeds=(0, 1), learning_rates=(1e-3, 1e-2), epochs=40, patience=40)
    alone = run_baseline(config)
    state = []

    def measure(runs, *arguments, **options):
        helpers = [p for p in psutil.Process().children() if "bklm.harness.workers" in p.cmdline()]
        state.append((torch.get_num_threads(), helpers))
        # Time for a helper that is still there to end by itself.
        time.sleep(3)
        return {
            run["model"]: {"tokens_per_second": 1.0, "training_bytes": None, "generation": []} for run in runs
        }

    monkeypatch.setattr(baseline_run, "measure_models", measure)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run_baseline(dataclasses.replace(config, workers=2, output_dir=str(tmp_path / "two")))
    finally:
        torch.set_num_threads(threads)
    assert state == [(2, [])]
    log = (together.folder / "run.log").read_text()
    assert "2 trials run at once, 1 thread each" in log
    assert "ended early" not in log
    assert [r["learning_rate"] for r in together.runs] == [r["learning_rate"] for r in alone.runs]
    for found, expected in zip(curve(together), curve(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert together.load().num_parameters() == alone.load().num_parameters()


def test_all_context_lengths_score_the_same_targets(tiny):
    text = prepare_text(tiny.resolved())
    lengths = (1, 7, 64, 150)
    targets = [torch.cat([y[y != -100] for _, y in text.context_loader(n, 0)]).tolist() for n in lengths]
    assert all(t == targets[0] for t in targets)
    assert text.context_loader(100_000, 0) is None
    assert text.context_loader(16, 50).dataset.num_targets == 49


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("newllm", 2_739_432),
        ("newllm_advanced", 4_840_936),
        *((name, None) for name in ("gpt", "lstm", "resnet_bk", "resnet_bk_diagonal", "linear_context")),
    ],
)
def test_the_full_profile_has_the_originals_sizes_and_competitors_within_one_percent(name, parameters):
    config = BaselineConfig(profile="full").resolved()
    with torch.device("meta"):
        ((_, fields),) = fields_of_models(dataclasses.replace(config, model=name), 1000).items()
        model = build_model(name, fields)
    assert model.num_parameters() == (parameters or pytest.approx(2_739_432, rel=0.01))


def test_the_fields_competitors_are_within_one_percent_at_30000_words():
    config = BaselineConfig(profile="full", protocol="field").resolved()
    sizes = {
        name: count_parameters(name, fields)
        for name, fields in fields_of_models(config, config.vocab_size).items()
    }
    assert set(sizes) == set(COMPETITORS)
    assert max(sizes.values()) < 1.01 * min(sizes.values())


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit():
    settings = {"vocab_size": 11, "d_model": 4, "n_layers": 1, "n_seq": None, "num_experts": 4, "top_k": 1}
    model = build_model("resnet_bk", settings)
    one = build_model("resnet_bk", {**settings, "num_experts": 1})
    router = 4 * 4 + 4  # the router of four experts; one expert needs none
    assert active_parameters(model) - active_parameters(one) in (router, router - 5)


def test_an_estimate_grows_with_the_work(tiny):
    small = estimated_minutes(tiny.resolved())
    large = estimated_minutes(dataclasses.replace(tiny, epochs=300).resolved())
    assert 0 < small < large < 100 * small + 1


def test_the_config_in_the_package_is_the_one_in_the_module():
    from bklm import studies

    assert studies.BaselineConfig is BaselineConfig
    assert studies.run_baseline is run_baseline


def run_of(model: str, seed: int, perplexity: float | None) -> dict:
    if perplexity is None:
        return {
            "model": model,
            "seed": seed,
            "val_ppl": None,
            "learning_rate": 1e-3,
            "reason": "nan",
            "seconds": 1.0,
        }
    return {
        "model": model, "seed": seed, "val_ppl": perplexity, "val_ppl_without_unk": 2 * perplexity, "test_ppl": None,
        "val_accuracy": 0.3, "best_epoch": 2, "parameters": 10, "active_parameters": 8, "learning_rate": 1e-3, "steps": 4,
        "val_ppl_by_context": {
            **dict.fromkeys(map(str, CONTEXT_LENGTHS)), "16": perplexity, "64": None if model == "gpt" else perplexity - 1,
        },
        "model_config": {"n_seq": 32} if model == "gpt" else {},
        "epochs": [{"seconds": 30.0}],
    }  # fmt: skip


def test_a_difference_inside_its_interval_is_called_none_and_one_outside_worse():
    runs = [run_of("newllm", 0, 50.0), run_of("newllm", 1, 55.0), run_of("newllm", 2, 52.4)]
    same = [*runs, run_of("gpt", 0, 56.0), run_of("gpt", 1, 50.0), run_of("gpt", 2, 52.5)]
    assert MODELS.finding(same).startswith("Lowest validation PPL: NewLLM, 52.4 (")
    assert "not told apart by the 95% interval: GPT x" in MODELS.finding(same)
    assert "no other is worse" in MODELS.headline(same)
    worse = [*runs, run_of("gpt", 0, 60.0), run_of("gpt", 1, 66.1), run_of("gpt", 2, 62.9)]
    assert "worse over 3 paired seeds: GPT x1.201 (" in MODELS.finding(worse)
    assert "1 of 1 others is worse" in MODELS.headline(worse)
    lost = [run_of("resnet_bk", 0, None), run_of("resnet_bk", 1, None)]
    quality = readable_quality(model_table([*worse, *lost], {}), [])
    words = [(r["val PPL (95%)"], r["learning rate"]) for r in quality if r["model"] == "ResNetBK"]
    assert words == [("diverged", "0.001")]
    one = [runs[0], run_of("gpt", 0, 90.0)]
    assert "no verdict" in MODELS.finding(one)
    assert "no interval" in MODELS.headline(one)


def test_the_search_marks_what_was_taken_at_an_edge_and_nothing_where_all_diverged():
    table = [{"model": "gpt", "learning_rate": 1e-3}]
    tried = [{"model": "gpt", "learning_rate": rate, "val_ppl": p} for rate, p in ((1e-3, 30.0), (3e-3, 28.0))]
    whole = [
        {"model": "gpt", "learning_rate": 3e-3, "dropout": d, "val_ppl": p}
        for d, p in ((0.0, 27.0), (0.1, 25.0), (0.3, 26.0))
    ]
    (row,) = tables.readable_search(tables.search_rows([*tried, *whole], 7), table)
    assert row == {
        "model": "GPT", "rate 0.001": "30.0", "rate 0.003": "28.0 (taken, at the edge)",
        "dropout 0": "27.0", "dropout 0.1": "25.0 (taken)", "dropout 0.3": "26.0",
    }  # fmt: skip
    lost = [t | {"val_ppl": None} for t in whole]
    assert [r["steps"] for r in tables.search_rows([*tried, *lost], 7)] == [7, 7, None, None, None]
    (row,) = tables.readable_search(tables.search_rows(lost, 7), table)
    assert set(row.values()) == {"GPT", "diverged", "taken, no search"}


def test_a_model_that_does_not_need_its_context_is_called_a_bigram_model_and_others_are_not():
    measured = {"val_ppl_mixer_off": 50.01, "context_gain": 0.0002}
    runs = [{**run_of("resnet_bk_diagonal", seed, 50.0), **measured} for seed in (0, 1)]
    runs += [
        {**run_of("gpt", 0, 40.0), "val_ppl_mixer_off": 80.0, "context_gain": 0.5},
        run_of("newllm", 0, 60.0),
    ]
    table = model_table(runs, {})
    words = {r["model"]: r["gain from context"] for r in readable_quality(table, [])}
    assert words["ResNetBK diagonal"] == "0.02%: a bigram model"
    assert words["GPT"] == "50.0%"
    assert words["NewLLM"] == "not measured"  # an earlier version's run
    assert bigram_models(table) == (
        " As good without its context, so a bigram model: ResNetBK diagonal (0.02%)."
    )
    assert bigram_models(table[1:]) == ""
    off = {r["model"]: r["mixer off"] for r in readable_contexts(table)}
    assert off == {"ResNetBK diagonal": "50.0", "GPT": "80.0", "NewLLM": "not measured"}


def test_a_model_that_lost_seeds_is_no_candidate_for_the_best_and_gets_no_verdict():
    lost = [run_of("newllm", 0, 10.0), run_of("newllm", 1, None), run_of("newllm", 2, None)]
    whole = [run_of("gpt", seed, perplexity) for seed, perplexity in enumerate((12.0, 12.1, 12.2))]
    trials = [*lost, *whole]
    assert MODELS.best(trials) == "gpt"
    assert MODELS.ratios(trials) == {}
    assert MODELS.finding(trials) == (
        "Lowest validation PPL: GPT, 12.1 (11.9 to 12.4). Diverged, and in none of these numbers: NewLLM, seed 1; NewLLM, "
        "seed 2. A model that lost a seed is given no verdict (model NewLLM)."
    )
    assert MODELS.headline(trials).endswith("; diverged: NewLLM (2 seeds)")
    table = model_table(trials, {"gpt": {}, "newllm": {}})
    assert [(r["model"], r["seeds"], r["diverged"]) for r in table] == [("newllm", 1, 2), ("gpt", 3, 0)]


def test_the_tables_say_what_is_not_possible_and_whose_numbers_they_are():
    runs = [run_of("newllm", 0, 50.0), run_of("gpt", 0, 60.0)]
    cost = {"tokens_per_second": 100.0, "training_bytes": 2e6, "memory_reason": ""}
    possible = {"position": 64, "tokens": 10, "seconds": 1.25, "state_bytes": 1024, "reason": ""}
    ends = {**possible, "seconds": None, "state_bytes": None, "reason": "it ends at 32 positions"}
    measured = {
        "newllm": {**cost, "generation": [possible]},
        "gpt": {**cost, "tokens_per_second": 50.0, "generation": [ends]},
    }
    table = model_table(runs, measured)
    contexts = readable_contexts(table)
    assert [row["64"] for row in contexts] == ["49.0", "not possible"]
    assert [row["1024"] for row in contexts] == ["text too short", "not possible"]
    first, second = readable_cost(table, measured)
    assert first["10 tokens from 64"] == "1.25 s"
    assert first["state at 64"] == "1.02 kB"
    quick = {"newllm": {**cost, "generation": [{**possible, "seconds": 0.00125, "state_bytes": 128}]}}
    (row,) = readable_cost(table[:1], quick)
    assert (row["10 tokens from 64"], row["state at 64"]) == ("1.25 ms", "128 B")
    assert second["training tokens/s (ratio)"] == "50 (x0.50)"
    assert second["10 tokens from 64"] == "not possible: it ends at 32 positions"
    longer_table = {**measured, "gpt": {**measured["gpt"], "generation": [possible]}}
    assert readable_cost(table, longer_table)[1]["10 tokens from 64"] == "1.25 s (positions never trained)"
    quality = readable_quality(table, [{"name": "unigram", "val_ppl": 99.0, "val_ppl_without_unk": 199.0}])
    assert quality[0]["parameters (active)"] == "10 (8)"
    assert quality[-1]["val PPL (95%)"] == "23.34"
    assert "reported by the original" in quality[-1]["model"]


def test_the_advanced_models_announced_numbers_stand_beside_measured_ones():
    rows = claims_table(model_table([run_of("newllm_advanced", 0, 40.0)], {}))
    assert any("below 20 (announced)" in r["original"] and r["measured here"] == "40.0" for r in rows)
    assert any("0.6" in r["original"] and r["measured here"].startswith("0.50") for r in rows)
    assert any("100x" in r["original"] and "x120.0" in r["measured here"] for r in rows)
    without = claims_table(model_table([run_of("newllm", 0, 40.0)], {}))
    assert sum("not run" in r["measured here"] for r in without) == 3


def test_contexts_that_make_no_difference_are_drawn_as_a_flat_line(monkeypatch, tmp_path):
    figure = Figure()
    monkeypatch.setattr(baseline_figures, "save_figure", lambda path, draw, **words: draw(figure))
    row = {"model": "resnet_bk", "val_ppl_context_16": 99.41, "val_ppl_context_32": 99.4}
    baseline_figures.draw_contexts(tmp_path / "x.png", [row], 32, "")
    low, high = figure.axes[0].get_ylim()
    assert low < 95
    assert high > 104


def test_costs_are_measured_anew_on_another_machine_and_read_back_on_this_one(tmp_path, monkeypatch, caplog):
    measured = []

    def step(runs, *arguments):
        measured.append(sorted(runs))
        return {name: {"tokens_per_second": float(len(measured))} for name in runs}

    machine = {"device": "cpu", "processor": "this one"}
    monkeypatch.setattr(baseline_measure, "machine_fingerprint", lambda device: dict(machine))
    monkeypatch.setattr(baseline_measure, "_training_step", step)
    monkeypatch.setattr(baseline_measure, "_generation", lambda runs, *arguments: {name: [] for name in runs})
    runs, path = [{"model": "gpt"}], tmp_path / "measured.json"

    def measure():
        return baseline_measure.measure_models(runs, None, path, "cpu", "fp32", 8)["gpt"]["tokens_per_second"]

    assert [measure(), measure()] == [1.0, 1.0]
    machine["processor"] = "another"
    with caplog.at_level(logging.INFO, logger=baseline_measure.__name__):
        assert [measure(), measure()] == [2.0, 2.0]
    assert "processor 'this one' then, 'another' now" in caplog.text
    # An earlier version's.
    (tmp_path / "measured.json").write_text(json.dumps({"gpt": {"tokens_per_second": 7.0}}))
    assert measure() == 3.0
    runs.append({"model": "newllm"})
    assert [measure(), measure()] == [4.0, 4.0]


def test_each_models_dropout_is_the_best_of_whole_trainings_of_the_first_seed_which_are_not_repeated(
    small_text, tmp_path, monkeypatch
):
    trained, train_run = [], baseline_runner.train_run

    def counted(study, name, fields, *rest, **more):
        trained.append((fields["dropout_p"], rest[0].seed))
        return train_run(study, name, fields, *rest, **more)

    monkeypatch.setattr(baseline_runner, "train_run", counted)
    config = tiny_config(small_text, tmp_path, seeds=(0, 1), dropouts=(0.0, 0.9))
    result = run_baseline(config)
    tried = {row["dropout"]: row["val_ppl"] for row in result.search}
    best = min(tried, key=tried.get)
    assert tried[0.0] != tried[0.9]
    assert trained == [(0.0, 0), (0.9, 0), (best, 1)]
    assert [(run["seed"], run["dropout"], run["model_config"]["dropout_p"]) for run in result.runs] == [
        (0, best, best),
        (1, best, best),
    ]
    assert result.runs[0]["val_ppl"] == tried[best]
    (row,) = result.tables()["search"]()
    assert row[f"dropout {best:g}"].endswith("(taken, at the edge)")
    # A curve is written once, and a checkpoint's folder says its dropout.
    assert [r["best_epoch"] for r in result.table] == [result.table[0]["best_epoch"]]
    with (result.folder / "epochs.csv").open() as file:
        curves = [(r["seed"], r["epoch"], r["val_perplexity"]) for r in csv.DictReader(file)]
    assert len(curves) == len(set(curves)) == 3 * config.epochs
    assert {(r["seed"], r["dropout"]) for r in checkpoints_table(result)} == {(0, 0.0), (0, 0.9), (1, best)}
    assert run_baseline(config).table == result.table
    assert len(trained) == 3
