"""The embedding-freeze study, end to end on a tiny text."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bklm.data import embeddings
from bklm.harness import progress
from bklm.harness.report import command_words
from bklm.models import ContextTokenConfig, ContextTokenLM, future_leak
from bklm.studies.embedding_freeze import figures as embedding_freeze_figures
from bklm.studies.embedding_freeze import phase2
from bklm.studies.embedding_freeze import run as embedding_freeze
from bklm.studies.embedding_freeze import text as embedding_freeze_text
from bklm.studies.embedding_freeze import train as embedding_freeze_runner
from bklm.studies.embedding_freeze.config import INEQUALITY, PHASE1_ARMS, EmbeddingFreezeConfig, arms_of
from bklm.studies.embedding_freeze.run import (
    estimated_minutes,
    prepare_text,
    run_embedding_freeze,
    write_sample,
)
from bklm.training.non_finite import NonFiniteError

WORDS = [
    a + b for a in ("ka", "lo", "mi", "ne", "ru", "so", "ta", "vi") for b in ("bar", "den", "fis", "gol", "him")
]


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Drawing takes most of a tiny study's time; one test draws for real."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(
            embedding_freeze_figures, "save_figure", lambda path, *a, **k: path.write_bytes(b"") and path
        )


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training, 3 validation and 3 test documents; training document 2 nearly equals validation document 1."""
    folder, rng = tmp_path_factory.mktemp("documents"), random.Random(0)

    def document(split: str, number: int) -> str:
        words = " ".join(rng.choices(WORDS, weights=range(1, len(WORDS) + 1), k=70))
        return f" = {split} {number} = \n {words} .\n"

    texts = {
        split: [document(split, i) for i in range(n)] for split, n in (("train", 20), ("valid", 3), ("test", 3))
    }
    texts["train"][2] = texts["valid"][1].replace("= \n ", "= \n once ")
    for split, written in texts.items():
        (folder / f"{split}.txt").write_text("".join(written))
    return folder


@pytest.fixture
def config(documents: Path, tmp_path: Path) -> EmbeddingFreezeConfig:
    """Two arms, one sample, two seeds: about a second."""
    return EmbeddingFreezeConfig(
        profile="smoke", data_dir=str(documents), output_dir=str(tmp_path / "results"), device="cpu",
        initialisation="pretrained", head="tied", original_comparison=False, samples=(5,), seeds=(0, 1), val_documents=3,
        document_tokens=100, vocab_size=300, embed_dim=8, context_dim=8, n_layers=1, epochs=2, batch_tokens=128, iterations=2,
    )  # fmt: skip


def numbers(folder: Path) -> list:
    """What the study computed, without its timings."""
    trials = [json.loads(p.read_text()) for p in sorted(folder.glob("internals/trials/*/result.json"))]
    names = ("arm", "samples", "seed", "val_ppl", "val_accuracy", "train_ppl", "best_epoch", "context_drift")
    return [[t[n] for n in names] + [e["val_loss"] for e in t["epochs"]] for t in trials]


@pytest.mark.slow
@pytest.mark.draws
def test_every_arm_is_trained_and_the_zip_holds_tables_curves_figures_and_what_the_table_says(config):
    config = dataclasses.replace(
        config, initialisation="both", head="both", original_comparison=True, samples=(5, 8)
    )
    result = run_embedding_freeze(config)
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {n.removeprefix("embedding_freeze/") for n in archive.namelist()}
        summary = json.loads(archive.read("embedding_freeze/summary.json"))
        manifest = json.loads(archive.read("embedding_freeze/manifest.json"))
    assert {
        "table.csv", "effects.csv", "trials.csv", "epochs.csv", "phase1.csv", "phase1_iterations.csv", "baselines.csv",
        "arms.png", "curves.png", "effects.png", "phase1.png", "budget.png", "tokenizer.json", "run.log", "config.json",
    } <= names  # fmt: skip
    weights = [n for n in names if n.endswith(".safetensors")]
    assert [n.rsplit("/", 1)[1] for n in weights] == ["best_model.safetensors"], (
        "context blocks are for phase 2 alone"
    )
    assert list(result.tables()) == ["arms", "effects", "phase 1", "baselines"]
    assert [len(make()) for make in result.tables().values()] == [20, len(result.effects), 8, 10]
    assert [(r["arm"], r["samples"]) for r in result.table] == [
        (arm.name, n) for arm in arms_of(config) for n in (5, 8)
    ]
    assert summary["findings"] == result.findings
    assert "two seeds, so ranges, no interval and no verdict" in result.findings[0]
    assert summary["inequality"] == result.inequality == INEQUALITY
    assert {b["samples"] for b in summary["baselines"]} == {5, 8}
    assert {e["where"] for e in result.effects if e["factor"] == "freezing"} >= {
        "all",
        "tied head",
        "8 samples",
    }
    assert manifest["tokenizer"]["sha256"]
    assert "-m bklm.studies.embedding_freeze" in manifest["command"]


def test_arms_that_tell_whether_phase_1_helps_are_added_and_move_no_other_number(config, tmp_path, monkeypatch):
    config, blocks = dataclasses.replace(config, head="untied", n_layers=2), {}
    whole = embedding_freeze_runner.train_phase2

    def spy(model, *args, **options):
        blocks[options["label"].split(", seed")[0]] = model
        return whole(model, *args, **options)

    without = run_embedding_freeze(config)
    monkeypatch.setattr(embedding_freeze_runner, "train_phase2", spy)
    more = dataclasses.replace(config, phase1_arms=True, output_dir=str(tmp_path / "more"))
    found = run_embedding_freeze(more)
    rows = {row["arm"]: row for row in found.table}
    bases = dict.fromkeys(arm.name for arm in arms_of(more.resolved()) if arm.original in PHASE1_ARMS)
    bases = dict.fromkeys(
        name.removesuffix(f", {w}") for name in bases for w in PHASE1_ARMS.values() if name.endswith(w)
    )
    assert list(bases) == ["pretrained, frozen, untied", "pretrained, trained, untied"]
    added = [f"{base}, {words}" for base in bases for words in PHASE1_ARMS.values()]
    assert sorted(rows) == sorted([*added, *(row["arm"] for row in without.table)])
    for row in without.table:
        assert rows[row["arm"]]["val_ppl"] == row["val_ppl"]
    own = [e for e in found.effects if e["factor"] != "phase 1"]
    assert [e["ratio"] for e in own] == [e["ratio"] for e in without.effects]
    ratios = {e["change"]: e["ratio"] for e in found.effects if e["factor"] == "phase 1"}
    changes = {
        f"{words} ({base})": (f"{base}, {words}", base) for base in bases for words in PHASE1_ARMS.values()
    }
    assert ratios.keys() == changes.keys()
    for change, (arm, base) in changes.items():
        assert ratios[change] == pytest.approx(rows[arm]["val_ppl"] / rows[base]["val_ppl"], rel=1e-6)
        # The weights on a token that nothing reads are none of its size.
        assert (rows[arm]["parameters"] < rows[base]["parameters"]) == arm.endswith(PHASE1_ARMS["first"])
    said = next(s for s in found.findings if s.startswith("PPL with something else in place of phase 1"))
    assert (
        "no verdict on phase 1, no verdict on its fixed point; with phase 1 and another wiring: token to"
        in said
    )
    # Nothing trained the one; the others' layers read what they say.
    named = {label.split(", 6 samples")[0].split(", 4 samples")[0]: m for label, m in blocks.items()}
    for label, model in named.items():
        assert future_leak(model, torch.arange(8)[None], 5).max() <= 1e-12, label
    iterations = {words: int(m.context_block.fixed_point_iterations) for label, m in named.items()
                  for words in PHASE1_ARMS.values() if words in label}  # fmt: skip
    assert iterations["untrained context block"] == 1 < iterations["phase 1 with diversity only"]
    reading = {label: m.config.token_to for label, m in named.items() if "first layer" in label}
    assert set(reading.values()) == {"first"}


def test_near_duplicates_of_validation_documents_are_left_out_and_reported(config):
    text = prepare_text(config.resolved())
    assert [r.resembles.split()[1:3] for r in text.split.removed] == [["valid", "1"]]
    assert len(text.documents) == 5
    assert not any(" once " in document for document in [*text.split.train, *text.split.spare])
    result = run_embedding_freeze(dataclasses.replace(config, phase="1", seeds=(0,)))
    summary = json.loads(result.paths["summary.json"].read_text())
    assert summary["near_duplicates"]["threshold"] == 0.5
    assert len(summary["near_duplicates"]["removed"]) == 1


def test_documents_of_the_embedding_are_neither_trained_nor_scored_on(config):
    split = prepare_text(config.resolved()).split
    assert len(split.spare) == 20 - 1 - 5
    assert not set(split.spare) & {*split.train, *split.valid}


@pytest.mark.slow
def test_parameters_are_counted_from_the_model_and_frozen_ones_are_not_trained(config):
    result = run_embedding_freeze(dataclasses.replace(config, head="both", seeds=(0,)))
    size = len(prepare_text(config.resolved()).bpe)
    rows = {row["arm"]: row for row in result.table}
    block, table, norm = (16 * 8 + 8) + 16, size * 8, 16
    tied, untied = 2 * block + table + norm, 2 * block + 2 * table + norm
    expected = {
        "pretrained, frozen, tied": (block, tied),
        "pretrained, trained, tied": (block + table + norm, tied),
        "pretrained, frozen, untied": (block + table, untied),
        "pretrained, trained, untied": (block + 2 * table + norm, untied),
    }
    for arm, (trained, total) in expected.items():
        assert (rows[arm]["trainable_parameters"], rows[arm]["parameters"]) == (trained, total)
        assert rows[arm]["tokens_per_parameter"] == pytest.approx(rows[arm]["train_tokens"] / trained)


@pytest.fixture
def trained_models(monkeypatch) -> dict[str, tuple[dict, dict]]:
    """label -> (state before phase 2, state after it) of every model that a study trains."""
    seen = {}
    real = embedding_freeze_runner.train_phase2

    def spy(model, *args, **options):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trained = real(model, *args, **options)
        seen[options["label"]] = before, {name: value.clone() for name, value in model.state_dict().items()}
        return trained

    monkeypatch.setattr(embedding_freeze_runner, "train_phase2", spy)
    return seen


def test_the_smoke_profile_needs_no_network_and_no_folder_and_a_folder_is_read_where_one_is_given(config):
    smoke = EmbeddingFreezeConfig(profile="smoke").resolved()
    assert (smoke.dataset, smoke.tokenizer, smoke.embedding) == ("embedded", "corpus", "svd")
    assert prepare_text(smoke).is_demonstration
    assert EmbeddingFreezeConfig(profile="quick").resolved().dataset == "ultrachat"
    assert config.dataset is None
    assert not prepare_text(config.resolved()).is_demonstration


@pytest.mark.slow
def test_frozen_embeddings_stay_bit_equal_and_trained_ones_move(config, trained_models):
    run_embedding_freeze(dataclasses.replace(config, seeds=(0,), original_comparison=True, head="both"))
    for label, (before, after) in trained_models.items():
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        trains_embedding = label.startswith("pretrained, trained")
        assert ("embedding.weight" in changed) == trains_embedding, label
        # The original's "frozen" arm trained the LayerNorm after the embedding.
        trains_norm = trains_embedding or label.startswith("original comparison: frozen")
        assert ("norm.weight" in changed) == trains_norm, label
        assert not any(name.startswith("context_block") for name in changed), label
        assert any(name.startswith("token_block") for name in changed), label


@pytest.mark.slow
def test_arms_of_one_seed_start_from_the_same_blocks_and_another_seed_from_others(config, trained_models):
    run_embedding_freeze(dataclasses.replace(config, head="both"))
    starts: dict[str, set[float]] = {}
    for label, (before, _) in trained_models.items():
        starts.setdefault(label[-1], set()).add(float(before["token_block.linears.0.weight"].double().sum()))
    assert {seed: len(sums) for seed, sums in starts.items()} == {"0": 1, "1": 1}
    assert starts["0"] != starts["1"]


def test_a_random_embedding_has_the_pretrained_ones_scale_and_depends_on_the_seed(config):
    text = prepare_text(dataclasses.replace(config, initialisation="both").resolved())
    pretrained, random_one = text.table("pretrained", 0), text.table("random", 0)
    assert random_one.std() == pytest.approx(pretrained.std(), rel=0.1)
    assert np.array_equal(text.table("pretrained", 1), pretrained)
    assert not np.array_equal(text.table("random", 1), random_one)


@pytest.mark.slow
def test_the_original_comparison_is_as_unequal_as_the_original_was(config, monkeypatch):
    calls = {}
    real = embedding_freeze_runner.train_phase2

    def spy(model, train_ids, val_ids, *args, **options):
        head = model.head()[0].detach()
        calls[options["label"]] = len(train_ids), val_ids, bool(head.abs().sum() == 0), model.config.tied
        return real(model, train_ids, val_ids, *args, **options)

    monkeypatch.setattr(embedding_freeze_runner, "train_phase2", spy)
    config = dataclasses.replace(config, seeds=(0,), freezing="frozen", original_comparison=True)
    result = run_embedding_freeze(config)
    controlled, frozen, trained = (
        next(call for label, call in calls.items() if label.startswith(start))
        for start in ("pretrained", "original comparison: frozen", "original comparison: trained")
    )
    assert frozen[0] == controlled[0]
    assert trained[0] == round(controlled[0] / 3)
    assert np.array_equal(frozen[1], controlled[1])
    assert not np.array_equal(trained[1], controlled[1])
    assert (controlled[2:], frozen[2:], trained[2:]) == ((False, True), (False, True), (True, False))
    assert any("unequal" in sentence for sentence in result.findings)


@pytest.mark.slow
def test_a_damaged_result_is_set_aside_and_only_that_trial_is_trained_again(config, monkeypatch):
    first = run_embedding_freeze(config)
    damaged = (
        next(first.folder.glob("internals/trials/pretrained_trained_tied_samples_5_seed_1*")) / "result.json"
    )
    damaged.write_text(damaged.read_text()[:60])
    trained = []
    real = embedding_freeze_runner.train_phase2
    monkeypatch.setattr(
        embedding_freeze_runner, "train_phase2", lambda *a, **k: trained.append(k["label"]) or real(*a, **k)
    )
    second = run_embedding_freeze(config)
    assert trained == ["pretrained, trained, tied, 5 samples, seed 1"]
    assert [row["val_ppl"] for row in second.table] == [row["val_ppl"] for row in first.table]


@pytest.mark.slow
def test_a_study_that_was_interrupted_goes_on_and_ends_with_the_numbers_of_an_undisturbed_one(
    config, tmp_path, monkeypatch
):
    real, epochs = phase2.train, []

    def interrupt(*args, **options):
        def stop(record):
            epochs.append(record)
            if len(epochs) == 4:  # in the middle of the second trial, before its checkpoint is written
                raise KeyboardInterrupt

        return real(*args, **options, on_epoch=stop)

    monkeypatch.setattr(phase2, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_embedding_freeze(config)
    monkeypatch.setattr(phase2, "train", real)
    resumed = run_embedding_freeze(config)
    undisturbed = run_embedding_freeze(dataclasses.replace(config, output_dir=str(tmp_path / "undisturbed")))
    assert len(numbers(resumed.folder)) == 4
    assert numbers(resumed.folder) == numbers(undisturbed.folder)


@pytest.mark.slow
def test_phase_1_alone_and_phase_2_later_give_the_numbers_of_both_at_once(config, tmp_path):
    apart = dataclasses.replace(config, output_dir=str(tmp_path / "apart"))
    first = run_embedding_freeze(dataclasses.replace(apart, phase="1"))
    assert (first.table, first.best) == ([], None)
    assert len(first.phase1) == 2
    weights = sorted(first.folder.glob("internals/phase1/*/context_block.safetensors"))
    weights[0].write_bytes(weights[0].read_bytes()[:100])  # damaged: phase 1 is done again where it is needed
    weights[1].unlink()
    second = run_embedding_freeze(dataclasses.replace(apart, phase="2"))
    assert numbers(second.folder) == numbers(run_embedding_freeze(config).folder)


def test_phase_1_is_the_same_whether_the_embedding_is_frozen_or_not(config):
    result = run_embedding_freeze(dataclasses.replace(config, phase="1"))
    assert any("bit for bit in 1 of 1" in sentence for sentence in result.findings)
    assert result.inequality is None
    assert write_sample(result, None) == "Phase 1 alone trains no model that writes."


@pytest.mark.slow
def test_contexts_follow_a_trained_embedding_unless_told_not_to(config):
    config = dataclasses.replace(config, freezing="trained", seeds=(0,))
    log = (run_embedding_freeze(config).folder / "run.log").read_text()
    assert "contexts computed again" in log
    kept = dataclasses.replace(
        config, recompute_contexts=False, output_dir=str(Path(config.output_dir) / "kept")
    )
    assert "contexts computed again" not in (run_embedding_freeze(kept).folder / "run.log").read_text()


@pytest.mark.slow
def test_every_arm_gets_the_same_search_over_learning_rates_and_goes_on_with_its_best(config, monkeypatch):
    bars = []
    real = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **k: bars.append(real(**k)) or bars[-1])
    config = dataclasses.replace(config, learning_rates=(1e-5, 1e-2), samples=(4, 5))
    result = run_embedding_freeze(config)
    assert bars[0].n == bars[0].total
    trials = [json.loads(p.read_text()) for p in result.folder.glob("internals/trials/*/result.json")]
    for arm in {t["arm"] for t in trials}:
        own = [t for t in trials if t["arm"] == arm]
        searched = {t["learning_rate"]: t["val_ppl"] for t in own if (t["samples"], t["seed"]) == (4, 0)}
        assert set(searched) == {1e-5, 1e-2}
        best = min(searched, key=searched.get)
        assert {t["learning_rate"] for t in own if (t["samples"], t["seed"]) != (4, 0)} == {best}
        assert {row["learning_rate"] for row in result.table if row["arm"] == arm} == {best}


def diverging(monkeypatch, diverges):
    """Phase 2 as ever, but a failure where ``diverges(settings)``."""
    real = phase2.train

    def train(model, loader, val, settings, **options):
        if diverges(settings):
            raise NonFiniteError(
                f"{options['label']}: the loss was nan", f"; the last good one is {options['folder']}."
            )
        return real(model, loader, val, settings, **options)

    monkeypatch.setattr(phase2, "train", train)


@pytest.mark.slow
def test_a_learning_rate_that_diverges_loses_and_is_recorded(config, monkeypatch):
    diverging(monkeypatch, lambda settings: settings.learning_rate >= 1)
    result = run_embedding_freeze(dataclasses.replace(config, learning_rates=(1e-2, 1.0), epochs=1))
    assert {row["learning_rate"] for row in result.table} == {1e-2}
    assert result.diverged == []  # the search's losers are no trials of the study
    recorded = [json.loads(p.read_text()) for p in result.folder.glob("internals/trials/*_rate_1/result.json")]
    assert [r["val_ppl"] for r in recorded] == [None] * len(result.table)
    assert recorded[0]["reason"].endswith("seed 0: the loss was nan."), (
        "the checkpoint that the message names is gone"
    )


@pytest.mark.slow
def test_where_every_rate_of_the_search_diverges_one_sentence_names_the_arm_and_the_rates(config, monkeypatch):
    diverging(monkeypatch, lambda settings: True)
    with pytest.raises(
        RuntimeError, match=r"learning_rates: .* diverged with each of 1, 2; add smaller ones"
    ) as caught:
        run_embedding_freeze(dataclasses.replace(config, learning_rates=(1.0, 2.0)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_trial_that_diverges_is_reported_and_the_others_without_it(config, monkeypatch):
    diverging(monkeypatch, lambda settings: settings.seed == 0)
    config = dataclasses.replace(config, learning_rates=(1e-2,), epochs=1)
    result = run_embedding_freeze(config)
    assert {t["seed"] for t in result.diverged} == {0}
    assert {(row["seeds"], row["diverged"]) for row in result.table} == {(1, 1)}
    assert (
        "Diverged, and in none of these numbers: pretrained, frozen, tied, 5 samples, seed 0; "
        in result.finding
    )
    shown = {row["val PPL (95%)"].split("; ")[1] for row in result.tables()["arms"]()}
    assert shown == {"diverged: 1 of 2 seeds"}
    monkeypatch.setattr(phase2, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run_embedding_freeze(config).table == result.table


@pytest.mark.slow
@pytest.mark.draws
def test_an_arm_whose_seeds_all_diverged_keeps_its_row_and_is_drawn_as_diverged(config, monkeypatch):
    diverging(monkeypatch, lambda settings: False)
    real = phase2.train

    def train(model, *arguments, **options):
        if options["label"].startswith("pretrained, trained"):
            raise NonFiniteError("the loss was nan")
        return real(model, *arguments, **options)

    monkeypatch.setattr(phase2, "train", train)
    result = run_embedding_freeze(dataclasses.replace(config, epochs=1))
    lost = result.table[1]
    assert (lost["arm"], lost["seeds"], lost["diverged"], lost["val_ppl"]) == (
        "pretrained, trained, tied",
        0,
        2,
        None,
    )
    assert [row["val PPL (95%)"] for row in result.tables()["arms"]()][1] == "diverged"
    assert result.effects == []
    assert "No two arms that differ in one factor finished the same seed" in result.finding
    assert result.best["arm"] == "pretrained, frozen, tied"
    assert {"arms.png", "curves.png", "budget.png"} < result.paths.keys()
    assert "effects.png" not in result.paths


@pytest.mark.slow
def test_a_trial_that_meets_nan_once_is_trained_again_and_leaves_no_trace(config, monkeypatch, tmp_path):
    real, failed = phase2.train, []

    def train(*arguments, **options):
        if options["label"] not in failed:
            failed.append(options["label"])
            raise NonFiniteError("the loss was nan")
        return real(*arguments, **options)

    monkeypatch.setattr(phase2, "train", train)
    found = run_embedding_freeze(config)
    monkeypatch.setattr(phase2, "train", real)
    undisturbed = run_embedding_freeze(dataclasses.replace(config, output_dir=str(tmp_path / "undisturbed")))
    assert len(failed) == 4
    assert numbers(found.folder) == numbers(undisturbed.folder)


@pytest.mark.slow
def test_the_best_arms_first_seed_is_kept_and_scores_what_its_trial_scored(config):
    config = dataclasses.replace(config, epochs=4, learning_rates=(3e-2,))
    result = run_embedding_freeze(config)
    best = min(result.table, key=lambda row: row["val_ppl"])
    assert (result.best, result.best_perplexity) == (best, best["val_ppl"])
    trials = [json.loads(p.read_text()) for p in result.folder.glob("internals/trials/*/result.json")]
    (own,) = [t for t in trials if (t["arm"], t["seed"]) == (best["arm"], 0)]
    model, ids = result.load(), prepare_text(config.resolved()).valid
    assert not model.training
    # One row, as the context runs on through the whole validation text.
    losses = model.token_losses(torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[None, 1:]))
    assert math.exp(losses.nll.mean()) == pytest.approx(own["val_ppl"], rel=1e-4)


@pytest.mark.slow
def test_a_sample_is_written_by_the_best_arm_and_the_same_seed_writes_the_same(config):
    result, text = run_embedding_freeze(config), prepare_text(config.resolved())
    sample = write_sample(result, text, "kabar loden")
    assert sample.startswith("kabar loden")
    assert len(sample) > len("kabar loden") + 30
    assert write_sample(result, text, "kabar loden") == sample
    assert write_sample(result, text) != sample
    with pytest.raises(ValueError, match="prompt: got no text"):
        text.generate(result.load(), "", 5)


def test_a_text_that_was_prepared_before_is_not_prepared_again(config, monkeypatch):
    text = prepare_text(config.resolved())
    monkeypatch.setattr(embedding_freeze, "load_corpus", lambda *a, **k: pytest.fail("read again"))
    assert run_embedding_freeze(dataclasses.replace(config, phase="1"), text=text).baselines == text.baselines


@pytest.mark.slow
def test_two_workers_find_what_one_finds_and_share_both_phases(config, tmp_path):
    one = dataclasses.replace(config, initialisation="both", learning_rates=(1e-3, 1e-2))
    two = dataclasses.replace(one, workers=2, output_dir=str(tmp_path / "two"))
    alone, shared = run_embedding_freeze(one), run_embedding_freeze(two)
    assert numbers(shared.folder) == numbers(alone.folder)
    assert [r["converged"] for r in shared.phase1] == [r["converged"] for r in alone.phase1]
    assert (shared.findings, shared.effects) == (alone.findings, alone.effects)
    weights = [r.paths["best_model.safetensors"].read_bytes() for r in (shared, alone)]
    assert weights[0] == weights[1]
    log = (shared.folder / "run.log").read_text()
    assert log.count("2 trials run at once") == 1
    for line in ("phase 1 (1 of 4)", "phase 1 (4 of 4)", "trained again up to its best epoch"):
        assert log.count(line) == 1, "each part is done once, whoever does it"


@pytest.mark.slow
def test_two_processes_that_train_one_model_together_find_what_one_finds(config, tmp_path):
    both = dataclasses.replace(config, processes=2, seeds=(0,), output_dir=str(tmp_path / "two"))
    words = command_words(both.resolved())[2:]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        *words,
    ]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two" / "embedding_freeze" / "summary.json").read_text())["table"]
    alone = run_embedding_freeze(dataclasses.replace(config, seeds=(0,))).table
    assert [r["val_ppl"] for r in found] == pytest.approx([r["val_ppl"] for r in alone], rel=1e-4)


@pytest.mark.slow
def test_when_every_trial_diverges_one_sentence_says_so(config, monkeypatch):
    diverging(monkeypatch, lambda settings: True)
    with pytest.raises(
        RuntimeError,
        match=r"every trial diverged, .*the loss was nan\. Take other settings, .*another output_dir",
    ):
        run_embedding_freeze(dataclasses.replace(config, learning_rates=(1e-2,)))


@pytest.mark.slow
def test_a_training_loss_too_large_for_exp_is_recorded_not_a_traceback(config, monkeypatch):
    real = phase2.train

    def train(*arguments, **options):
        large = {"train_loss": 5000.0, "train_perplexity": math.exp(700)}
        return [dataclasses.replace(r, **large) for r in real(*arguments, **options)]

    monkeypatch.setattr(phase2, "train", train)
    result = run_embedding_freeze(dataclasses.replace(config, learning_rates=(1e-2,), epochs=1))
    trials = [json.loads(p.read_text()) for p in result.folder.glob("internals/trials/*/result.json")]
    assert {t["train_ppl"] for t in trials} == {math.exp(700)}


def test_the_model_of_an_arm_is_the_one_that_its_config_describes(config):
    """At GPT-2's sizes the counts are the original's, and without the head's mistake 45,690,624 are trained."""
    with torch.device("meta"):
        model = ContextTokenLM(ContextTokenConfig())
    assert model.num_parameters() == 52_782_336
    model.freeze_context()
    assert model.num_parameters(trainable_only=True) == 45_690_624
    model.freeze_embedding()
    assert model.num_parameters(trainable_only=True) == 7_091_712
    full = EmbeddingFreezeConfig(profile="full").resolved()
    assert (full.vocab_size, full.embed_dim, full.context_dim, full.n_layers) == (50257, 768, 768, 6)
    assert (full.tokenizer, full.embedding, full.samples, full.epochs) == ("gpt2", "gpt2", (500, 1000), 10)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"context_dim": 4}, r"a tied head needs embed_dim and context_dim to be equal, but they are 8 and 4"),
        ({"n_layers": 0}, r"n_layers: got 0, which with a frozen embedding .* leaves nothing to train"),
        (
            {"samples": (3, 25)},
            r"samples: got 25, but .* has 20 documents, 1 of them nearly equal .* at most 19",
        ),
        ({"val_documents": 4}, r"val_documents: got 4, but .* has 3 documents"),
        (
            {"embedding": "gpt2", "vocab_size": None},
            r"got 'gpt2' with tokenizer 'corpus', whose tokens are not GPT-2's",
        ),
        (
            {"embedding": "gpt2", "tokenizer": "gpt2"},
            r"embed_dim: got 8, but GPT-2's embedding has 768 columns",
        ),
        ({"samples": (19,)}, r"'svd' needs documents that no model is trained or scored on, but all 19"),
        (
            {"phase": "2"},
            r"phase: got '2', but .* lacks phase 1 for 2 of 2 combinations .* run phase '1' or 'both'",
        ),
        ({"batch_tokens": 512}, r"batch_tokens: got 512, but the smallest sample of .* has 500 tokens"),
        ({"samples": ()}, "samples: got"),
        ({"freezing": "half"}, r"freezing: got 'half'; allowed is one of 'both', 'frozen', 'trained'"),
        ({"embedding_file": "nowhere.npy"}, r"nowhere.npy.* does not exist"),
    ],
)
def test_bad_input_is_one_sentence_before_any_training(config, values, says, monkeypatch):
    monkeypatch.setattr(embedding_freeze_runner, "train_in_its_place", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises((ValueError, OSError), match=says) as caught:
        run_embedding_freeze(dataclasses.replace(config, **values))
    assert "\n" not in str(caught.value)


def test_a_test_split_of_a_token_is_refused_where_an_arm_is_scored_on_it_and_not_read_elsewhere(
    config, documents
):
    (documents / "test.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"^data_dir: the test split of .* original_comparison False"):
        prepare_text(dataclasses.replace(config, original_comparison=True).resolved())
    assert len(prepare_text(config.resolved()).other_valid) == 0


def test_an_embedding_file_of_another_vocabulary_or_width_is_refused_and_a_fitting_one_used(config, tmp_path):
    size = len(prepare_text(config.resolved()).bpe)
    wrong = {
        (size + 1, 8): f"has rows for {size + 1} tokens, but the tokeniser has {size}",
        (size, 9): "has 9 columns, but embed_dim is 8",
    }
    for shape, says in wrong.items():
        np.save(tmp_path / "table.npy", np.zeros(shape))
        with pytest.raises(ValueError, match=says):
            run_embedding_freeze(dataclasses.replace(config, embedding_file=str(tmp_path / "table.npy")))
    table = np.random.default_rng(0).normal(size=(size, 8)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    text = prepare_text(dataclasses.replace(config, embedding_file=str(tmp_path / "table.npy")).resolved())
    assert np.array_equal(text.table("pretrained", 0), table)
    assert text.source == "the file table.npy"


def test_gpt2s_own_embedding_and_tokeniser_are_the_pretrained_ones_when_asked_for(config, monkeypatch):
    bpe = prepare_text(config.resolved()).bpe
    table = np.random.default_rng(0).normal(size=(len(bpe), 8)).astype(np.float32)
    monkeypatch.setattr(embeddings, "GPT2_SHAPE", table.shape)
    monkeypatch.setattr(embedding_freeze_text, "gpt2_embedding", lambda: table)
    monkeypatch.setattr(embedding_freeze, "gpt2_bpe", lambda folder: bpe if folder == "here" else None)
    gpt2 = dataclasses.replace(config, embedding="gpt2", tokenizer="gpt2", gpt2_dir="here", samples=(19,))
    text = prepare_text(gpt2.resolved())
    assert np.array_equal(text.table("pretrained", 0), table)
    assert text.split.spare == []  # GPT-2's embedding needs no documents kept apart
    assert text.source == "GPT-2"


@pytest.mark.slow
def test_another_embedding_file_is_another_experiment(config, tmp_path):
    size, path = len(prepare_text(config.resolved()).bpe), tmp_path / "table.npy"
    config = dataclasses.replace(config, embedding_file=str(path), seeds=(0,), freezing="frozen")
    np.save(path, np.random.default_rng(0).normal(size=(size, 8)))
    run_embedding_freeze(config)
    np.save(path, np.random.default_rng(1).normal(size=(size, 8)))
    with pytest.raises(ValueError, match="holds a study made with other settings"):
        run_embedding_freeze(config)


@pytest.mark.slow
def test_the_benchmark_of_a_language_models_table_runs_and_compares_both_tables(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "freeze_lm_embedding.py"
    words = [
        sys.executable,
        str(script),
        "--quick",
        "--tokens",
        "4000",
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("SVD", "a tied language model's", "frozen", "trained", "x"):
        assert part in done.stdout.split("pretrained embedding in phase 2")[1]
    assert (tmp_path / "table.csv").exists()
    table = (tmp_path / "embedding.npy").stat().st_mtime_ns
    other = subprocess.run([*words, "--epochs", "3"], capture_output=True, text=True)
    assert other.returncode == 1
    assert (
        "holds a table trained with other settings: --epochs (1 there, 3 now). Choose another" in other.stderr
    )
    assert (tmp_path / "embedding.npy").stat().st_mtime_ns == table
    (tmp_path / "embedding.json").unlink()
    unknown = subprocess.run(words, capture_output=True, text=True)
    assert "embedding.npy is a table without a record of how it was trained; delete it" in unknown.stderr


def test_the_estimate_grows_with_what_is_asked_for(config, monkeypatch):
    assert estimated_minutes(config.resolved()) > 0
    # What was timed may be of a busy moment.
    monkeypatch.setattr(embedding_freeze, "seconds_per_token", lambda *of_what: 1e-5)

    def minutes(seeds: int, **values) -> float:
        return estimated_minutes(dataclasses.replace(config, seeds=tuple(range(seeds)), **values).resolved())

    least = minutes(2)
    assert 0 < least < 1
    assert minutes(4) - least == pytest.approx(minutes(6) - minutes(4))
    assert 1.5 * least < minutes(4) < 2 * least, "the best arm is trained once more, whatever the seeds"
    assert minutes(2, epochs=20) > 2 * least
