"""The GRAD_BLEND study, end to end on a tiny text."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bklm.harness import folder as folder_module
from bklm.harness.report import command_for
from bklm.harness.text import prepare_text
from bklm.models import ResNetBK
from bklm.studies.grad_blend import figures as grad_blend_figures
from bklm.studies.grad_blend import future
from bklm.studies.grad_blend import train as grad_blend
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.directions import measure_directions
from bklm.studies.grad_blend.run import load_final_model, run_grad_blend
from bklm.studies.grad_blend.tables import ALPHAS, claims_table, trained_for_directions
from bklm.studies.grad_blend.train import model_config
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.non_finite import NonFiniteError

NUMBERS = ("final_perplexity", "gradient_variance", "convergence_speed", "loss_curve", "perplexity_curve")


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Drawing takes most of a tiny study's time; one test draws for real."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(
            grad_blend_figures, "save_figure", lambda path, *a, **k: path.write_bytes(b"") and path
        )


def numbers(folder: Path) -> list:
    """What the study computed, without its timings."""
    results = json.loads((folder / "grad_blend_results.json").read_text())["results"]
    return [[r["alpha"], *(r[n] for n in NUMBERS)] for r in results]


@pytest.mark.slow
@pytest.mark.draws
def test_the_zip_holds_the_originals_files_with_the_originals_keys_and_the_manifest(tiny_config):
    result = run_grad_blend(tiny_config)
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {n.removeprefix("grad_blend/") for n in archive.namelist()}
        results = json.loads(archive.read("grad_blend/grad_blend_results.json"))
        manifest = json.loads(archive.read("grad_blend/manifest.json"))
    assert {
        "grad_blend_results.json", "summary.json", "grad_blend_analysis.png", "training_curves.png", "epochs.csv",
        "final/best_model.safetensors", "run.log", "manifest.json", "gradient_directions.csv",
    } <= names  # fmt: skip
    assert {"alpha_values", "epochs_per_trial", "best_alpha", "best_perplexity", "results"} <= set(results)
    assert {
        "alpha", "final_perplexity", "convergence_speed", "gradient_variance", "training_time", "loss_curve",
        "perplexity_curve",
    } <= set(results["results"][0])  # fmt: skip
    assert len(results["results"][0]["perplexity_curve"]) == tiny_config.epochs_per_trial
    assert manifest["corpus"]["sha256"] == prepare_text(tiny_config.resolved()).corpus.sha256
    assert manifest["config"] == json.loads(json.dumps(tiny_config.resolved().to_dict()))
    assert "-m bklm.studies.grad_blend" in manifest["command"]
    assert result.best_alpha == min(result.table, key=lambda r: r["val_ppl"])["alpha"]


@pytest.mark.slow
def test_two_fresh_runs_of_the_same_config_give_the_same_numbers(tiny_config, tmp_path):
    first = run_grad_blend(tiny_config)
    second = run_grad_blend(dataclasses.replace(tiny_config, output_dir=str(tmp_path / "second")))
    assert numbers(first.folder) == numbers(second.folder)


@pytest.mark.slow
def test_a_damaged_trial_result_is_set_aside_and_only_that_trial_is_trained_again(tiny_config, monkeypatch):
    first = run_grad_blend(tiny_config)
    (first.folder / "internals" / "trials" / "alpha_0.5_seed_1" / "result.json").write_text(
        '{"alpha": 0.5, "se'
    )
    trained = []
    real = grad_blend.train
    monkeypatch.setattr(grad_blend, "train", lambda *a, **k: trained.append(k["label"]) or real(*a, **k))
    second = run_grad_blend(tiny_config)
    assert trained == ["alpha 0.5, seed 1"]
    assert [r["val_ppl"] for r in second.table] == [r["val_ppl"] for r in first.table]


@pytest.mark.slow
def test_a_folder_whose_text_has_changed_is_refused(tiny_config, small_text, tmp_path):
    run_grad_blend(tiny_config)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "valid", "test"):
        (other / f"{name}.txt").write_text((small_text / f"{name}.txt").read_text().replace("cat", "cow"))
    with pytest.raises(ValueError, match="the text"):
        run_grad_blend(dataclasses.replace(tiny_config, data_dir=str(other)))


@pytest.mark.slow
def test_a_folder_that_does_not_say_its_version_is_of_the_first_and_can_be_gone_on_with(
    tiny_config, monkeypatch
):
    first = run_grad_blend(tiny_config)
    recorded = json.loads((first.folder / "config.json").read_text())
    del recorded["bklm"]
    (first.folder / "config.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(folder_module, "__version__", folder_module.VERSION_UNTOLD)
    monkeypatch.setattr(grad_blend, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run_grad_blend(tiny_config).table == first.table


@pytest.mark.slow
def test_a_text_named_by_the_environment_is_in_manifest_and_command_and_old_folders_go_on(
    tiny_config, monkeypatch
):
    monkeypatch.setenv("BKLM_DATA_DIR", tiny_config.data_dir)
    result = run_grad_blend(dataclasses.replace(tiny_config, data_dir=None))
    manifest = json.loads(result.paths["manifest.json"].read_text())
    assert manifest["config"]["data_dir"] == tiny_config.data_dir
    assert f"--data_dir {tiny_config.data_dir}" in manifest["command"]
    claimed = json.loads((result.folder / "config.json").read_text())
    claimed["config"]["data_dir"] = None  # as an earlier version wrote it
    (result.folder / "config.json").write_text(json.dumps(claimed))
    monkeypatch.setattr(grad_blend, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run_grad_blend(dataclasses.replace(tiny_config, data_dir=None)).table == result.table


@pytest.mark.slow
def test_a_refused_run_claims_no_folder(tiny_config):
    with pytest.raises(ValueError, match="batch"):
        run_grad_blend(dataclasses.replace(tiny_config, batch_size=128, seq_len=16))
    run_grad_blend(tiny_config)


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tiny_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"output_dir: cannot write to .*; choose"):
        run_grad_blend(dataclasses.replace(tiny_config, output_dir=str(tmp_path / "file")))


def test_all_models_of_a_seed_start_from_the_same_weights_and_another_seed_from_others(tiny_config):
    config = tiny_config.resolved()

    def initial(alpha, seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in ResNetBK(model_config(config, 30, alpha)).parameters()])

    assert torch.equal(initial(0.0, 0), initial(1.0, 0))
    assert not torch.equal(initial(0.0, 0), initial(0.0, 1))


@pytest.mark.slow
def test_the_original_protocol_is_the_originals_model_and_says_on_everything_that_it_sees_the_future(
    tiny_config,
):
    result = run_grad_blend(dataclasses.replace(tiny_config, protocol="original"))
    model = load_final_model(result.folder)
    assert (model.config.causal, model.config.gradient, model.config.router_gradient, model.config.clamps) == (
        False, "original", "none", True,
    )  # fmt: skip
    assert json.loads(result.paths["summary.json"].read_text())["sees_the_future"] is True
    rows = future.measure_future(model, prepare_text(result.config))
    verdicts = {r["model"]: v["verdict"] for r, v in zip(rows, future.readable_probes(rows), strict=True)}
    assert verdicts["trained, bidirectional"] == verdicts["untrained, bidirectional"] == "SEES THE FUTURE"
    assert verdicts["untrained, causal"] == "never sees the future"


@pytest.mark.slow
def test_the_corrected_model_leaks_exactly_nothing(tiny_config):
    result = run_grad_blend(tiny_config)
    rows = future.measure_future(load_final_model(result.folder), prepare_text(result.config))
    assert rows[0]["causal"]
    assert rows[0]["leak"] <= 1e-12


def test_measured_directions_agree_with_their_definitions(tiny_config):
    config = dataclasses.replace(tiny_config, mixer="diagonal").resolved()
    text = prepare_text(config)
    torch.manual_seed(0)
    model = ResNetBK(model_config(config, text.vocab_size, 0.7))
    rows = measure_directions(model, *text.first_batch(4), alphas=(0.0, 1.0), gradient="exact")
    pooled = {r["direction"]: r for r in rows if r["layer"] == "all"}
    assert pooled["exact"]["cosine"] == pytest.approx(1, abs=1e-9)
    assert pooled["alpha 0"]["norm"] == pytest.approx(pooled["exact"]["norm"], rel=1e-6)
    assert pooled["alpha 1"]["cosine"] == pytest.approx(pooled["hypothesis-7"]["cosine"], abs=1e-6)
    assert pooled["local"]["cosine"] > 0.5
    assert pooled["hypothesis-7"]["norm_ratio"] > 1


@pytest.mark.slow
def test_the_sweep_runs_on_the_model_that_reads(tiny_config):
    result = run_grad_blend(dataclasses.replace(tiny_config, mixer="solve"))
    model = load_final_model(result.folder)
    assert (model.config.mixer, model.config.n_seq) == ("solve", None)
    assert all(r["leak"] <= 1e-12 for r in future.measure_future(model, prepare_text(result.config))[:2])
    found = {r["direction"]: r for r in result.directions if r["weights"] == "at the end"}
    assert found["exact"]["cosine"] == pytest.approx(1, abs=1e-9)
    assert "local" not in found
    # Blends of other models have other gradients: the sweep's arms are not one and the same.
    assert len({r["val_ppl"] for r in result.table}) > 1
    for change in ({"gradient": "local"}, {"causal": False}, {"protocol": "original"}):
        with pytest.raises(ValueError, match="mixer: got 'solve' with gradient"):
            dataclasses.replace(tiny_config, mixer="solve", **change).resolved()


def trial(alpha: float, seed: int, perplexity: float | None) -> dict:
    if perplexity is None:
        return {"alpha": alpha, "seed": seed, "val_ppl": None, "reason": "nan", "seconds": 1.0}
    return {
        "alpha": alpha, "seed": seed, "learning_rate": 1e-3, "val_ppl": perplexity, "val_ppl_without_unk": perplexity,
        "val_accuracy": 0.1, "context_gain": 0.1, "convergence_speed": 2, "gradient_variance": 0.1, "seconds": 1.0,
        "epochs": [{"val_perplexity": 2 * perplexity}, {"val_perplexity": perplexity}],
    }  # fmt: skip


def test_a_difference_inside_its_interval_is_called_none_and_one_outside_worse():
    same = [trial(0.0, s, p) for s, p in enumerate((100.0, 110.0, 105.0))]
    same += [trial(0.5, s, p) for s, p in enumerate((111.0, 100.0, 106.0))]
    assert "not told apart by the 95% interval: alpha 0.5 x" in ALPHAS.finding(same)
    # Paired over seeds a constant ratio is certain although the seeds themselves scatter.
    worse = same[:3] + [trial(0.5, s, p) for s, p in enumerate((105.0, 115.6, 110.25))]
    assert "worse over 3 paired seeds: alpha 0.5 x1.050 (" in ALPHAS.finding(worse)
    assert "1 of 1 other alphas is worse" in ALPHAS.headline(worse)


def test_one_diverged_seed_widens_the_interval_and_cannot_take_it_below_zero():
    trials = [trial(0.0, s, 100.0 + s) for s in range(3)] + [
        trial(1.0, s, p) for s, p in enumerate((90.0, 1e5, 110.0))
    ]
    row = ALPHAS.rows(trials)[1]
    assert 0 < row["val_ppl_low"] < row["val_ppl"] < row["val_ppl_high"]
    assert row["val_ppl"] == pytest.approx((90.0 * 1e5 * 110.0) ** (1 / 3))
    assert ALPHAS.best(trials) == 0.0
    assert "not told apart by the 95% interval: alpha 1" in ALPHAS.finding(trials)


def test_one_seed_gives_no_interval_and_no_verdict():
    trials = [trial(0.0, 0, 100.0), trial(0.5, 0, 90.0)]
    assert ALPHAS.rows(trials)[0]["val_ppl_low"] is None
    assert ALPHAS.best(trials) == 0.5
    assert "no verdict" in ALPHAS.finding(trials)


@pytest.mark.slow
def test_the_command_of_a_study_ends_with_one_sentence_and_code_2_for_bad_input(tmp_path):
    words = [sys.executable, "-m", "bklm.studies.grad_blend", "--data_dir", str(tmp_path / "nowhere")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_command_prints_settings_trials_with_the_time_left_table_and_zip(tiny_config):
    words = [sys.executable, *command_for(tiny_config.resolved()).split()[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("Settings: ", "Trial 1 of 4, ", " left\n", "Lowest validation PPL", "SHA-256"):
        assert part in done.stdout


def test_the_config_in_the_package_is_the_one_in_the_module():
    from bklm import studies

    assert studies.GradBlendConfig is GradBlendConfig
    with pytest.raises(AttributeError, match="no attribute 'run_nothing'"):
        studies.run_nothing  # noqa: B018


def test_settings_that_cannot_train_are_refused_before_the_folder_is_claimed(tiny_config):
    with pytest.raises(ValueError, match=r"balance: got 0\.1 with a router that never learns"):
        run_grad_blend(dataclasses.replace(tiny_config, protocol="original", balance=0.1))
    with pytest.raises(ValueError, match="within six digits"):
        run_grad_blend(dataclasses.replace(tiny_config, alphas=(0.1234567, 0.1234568)))
    assert not (Path(tiny_config.output_dir) / "grad_blend" / "config.json").exists()


@pytest.mark.slow
def test_a_damaged_config_does_not_let_other_settings_into_the_folder(tiny_config):
    first = run_grad_blend(tiny_config)
    (first.folder / "config.json").write_text('{"config": {"alph')
    with pytest.raises(ValueError, match=r"config\.json is missing or damaged"):
        run_grad_blend(dataclasses.replace(tiny_config, learning_rates=0.02))
    again = run_grad_blend(tiny_config)
    assert again.table == first.table
    assert json.loads((first.folder / "config.json").read_text())["config"]["learning_rates"] == list(
        first.config.learning_rates
    )


@pytest.mark.slow
def test_damaged_early_directions_make_the_trial_start_again(tiny_config, monkeypatch):
    config = dataclasses.replace(tiny_config, alphas=(0.0,), epochs_per_trial=2)
    undisturbed = run_grad_blend(dataclasses.replace(config, output_dir=f"{config.output_dir}/undisturbed"))
    save = CheckpointFolder.save

    def stop_after_the_first(self, *arguments, **named):
        save(self, *arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFolder, "save", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            run_grad_blend(config)
    (early,) = Path(config.output_dir).rglob("directions_after_one_epoch.json")
    early.write_text('[{"lay')
    result = run_grad_blend(config)
    assert [r["val_ppl"] for r in result.table] == [r["val_ppl"] for r in undisturbed.table]


def test_perplexity_that_never_fell_is_no_fast_convergence():
    epochs = [{"val_perplexity": p, "train_loss": 1.0} for p in (100.0, 200.0)]
    trial = {
        "alpha": 1.0,
        "seed": 0,
        "val_ppl": 200.0,
        "val_ppl_without_unk": 200.0,
        "val_accuracy": 0.0,
        "context_gain": 0.0,
    }
    trial |= {
        "learning_rate": 1e-3,
        "convergence_speed": 1,
        "gradient_variance": 1.0,
        "seconds": 1.0,
        "epochs": epochs,
    }
    assert ALPHAS.readable(ALPHAS.rows([trial]))[0]["converged at epoch"] == "-"


@pytest.fixture
def diverging(monkeypatch):
    """Call it with labels such as "alpha 0, seed 1": those trainings then diverge after their first epoch's checkpoint."""
    real = grad_blend.train

    def make(*labels):
        def train(*arguments, label, on_epoch, **options):
            def end(record):
                on_epoch(record)
                if label in labels and record.epoch == 2:
                    raise NonFiniteError(f"{label}: the loss was nan", "; the last good checkpoint is there.")

            return real(*arguments, label=label, on_epoch=end, **options)

        monkeypatch.setattr(grad_blend, "train", train)

    return make


def read_strictly(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path} holds {word}"))


@pytest.mark.slow
@pytest.mark.draws
def test_a_trial_that_diverges_is_named_and_counted_in_no_number_and_the_rest_goes_on(tiny_config, diverging):
    diverging("alpha 0, seed 1")
    result = run_grad_blend(tiny_config)
    rows = {r["alpha"]: r for r in result.table}
    assert [(rows[a]["seeds"], rows[a]["diverged"]) for a in (0.0, 0.5)] == [(1, 1), (2, 0)]
    assert result.best_alpha == 0.5  # whatever the one seed of alpha 0 reached
    assert "Diverged, and in none of these numbers: alpha 0, seed 1." in result.finding
    assert "no difference" not in result.finding
    assert "worse over" not in result.finding
    assert ALPHAS.readable(result.table)[0]["val PPL (95%)"].endswith("; diverged: 1 of 2 seeds")
    assert [(t["alpha"], t["seed"], t["reason"]) for t in result.diverged] == [
        (0.0, 1, "alpha 0, seed 1: the loss was nan.")
    ]
    assert read_strictly(result.paths["summary.json"])["diverged"] == result.diverged
    by_seed = read_strictly(result.paths["grad_blend_results.json"])["results"][0]["final_perplexity_by_seed"]
    # The table's mean goes through a logarithm and back: the same number but for the last digits.
    assert by_seed == {"0": pytest.approx(rows[0.0]["val_ppl"], rel=1e-12), "1": None}
    assert not list(result.folder.glob("internals/trials/*/checkpoints"))
    assert "it is recorded as diverged; delete" in (result.folder / "run.log").read_text()


@pytest.mark.slow
def test_a_diverged_trial_is_not_trained_again_and_the_numbers_stay(tiny_config, diverging, monkeypatch):
    diverging("alpha 0, seed 1")
    first = run_grad_blend(tiny_config)
    monkeypatch.setattr(grad_blend, "train", lambda *a, **k: pytest.fail("trained again"))
    second = run_grad_blend(tiny_config)
    assert (second.table, second.finding, second.diverged) == (first.table, first.finding, first.diverged)


@pytest.mark.slow
def test_a_sweep_interrupted_before_a_diverging_trial_records_it_when_it_goes_on(
    tiny_config, diverging, monkeypatch
):
    real = grad_blend.train

    def stop(*arguments, label, **options):
        if label == "alpha 0, seed 1":
            raise KeyboardInterrupt
        return real(*arguments, label=label, **options)

    with monkeypatch.context() as patched:
        patched.setattr(grad_blend, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run_grad_blend(tiny_config)
    diverging("alpha 0, seed 1")
    resumed = run_grad_blend(tiny_config)
    undisturbed = run_grad_blend(dataclasses.replace(tiny_config, output_dir=f"{tiny_config.output_dir}/2"))
    assert numbers(resumed.folder) == numbers(undisturbed.folder)
    assert [(t["alpha"], t["seed"]) for t in resumed.diverged] == [(0.0, 1)]


@pytest.mark.slow
@pytest.mark.draws
def test_an_alpha_whose_seeds_all_diverged_stands_in_table_and_title_as_diverged(tiny_config, diverging):
    diverging("alpha 0.5, seed 0", "alpha 0.5, seed 1")
    result = run_grad_blend(tiny_config)
    lost = ALPHAS.readable(result.table)[1]
    assert (lost["alpha"], lost["val PPL (95%)"], lost["accuracy"]) == ("0.5", "diverged", "-")
    assert result.table[1]["val_ppl"] is None
    assert "none of these numbers: alpha 0.5, seed 0; alpha 0.5, seed 1." in result.finding
    trials = [trial(0.0, 0, 9.0), trial(0.5, 0, None), trial(0.5, 1, None), trial(0.0, 1, 9.0)]
    assert ALPHAS.headline(trials).endswith("; diverged: alpha 0.5 (2 seeds)")
    assert read_strictly(result.paths["summary.json"])["table"][1]["val_ppl"] is None
    row = read_strictly(result.paths["grad_blend_results.json"])["results"][1]
    assert (row["final_perplexity"], row["loss_curve"], row["gradient_variance"]) == (None, [], None)


def test_when_every_trial_diverges_one_sentence_says_so(tiny_config, diverging):
    diverging(*(f"alpha {a:g}, seed {s}" for a in (0.0, 0.5) for s in (0, 1)))
    for _ in ("first run", "resumed"):
        with pytest.raises(
            RuntimeError,
            match=r"every trial diverged, the first so: alpha 0, seed 0: the loss was nan\. Take other",
        ):
            run_grad_blend(tiny_config)


@pytest.mark.slow
def test_when_the_final_training_diverges_the_sweeps_table_and_zip_are_there(tiny_config, diverging):
    best = run_grad_blend(dataclasses.replace(tiny_config, output_dir=f"{tiny_config.output_dir}/2")).best_alpha
    diverging(f"best alpha {best:g}, seed 0")
    for _ in ("first run", "resumed"):
        with pytest.raises(
            RuntimeError, match=r"the sweep is done, .*\.zip.*, but the final training diverged: best"
        ):
            run_grad_blend(tiny_config)
    folder = Path(tiny_config.output_dir) / "grad_blend"
    assert len(read_strictly(folder / "summary.json")["table"]) == 2
    assert folder.with_suffix(".zip").exists()
    with pytest.raises(FileNotFoundError, match="no finished final model"):
        load_final_model(folder)


def test_the_best_alpha_finished_all_its_seeds_or_where_none_did_the_most():
    trials = [trial(0.0, 0, 50.0), trial(0.0, 1, None), trial(0.5, 0, 100.0), trial(0.5, 1, 100.0)]
    assert ALPHAS.best(trials) == 0.5
    assert "An alpha that lost a seed is given no verdict (alpha 0)." in ALPHAS.finding(trials)
    none = [trial(0.0, 0, 50.0), trial(0.0, 1, None), trial(0.5, 0, None), trial(0.5, 1, 40.0)]
    assert ALPHAS.best(none) == 0.5
    assert "No alpha finished all its seeds; the best is among those that finished the most" in ALPHAS.finding(
        none
    )
    assert " x" not in ALPHAS.finding(none)  # no seed in common, no ratio


@pytest.mark.slow
def test_each_alpha_takes_its_best_rate_and_no_training_is_made_twice(tiny_config, monkeypatch):
    trained = []
    real = grad_blend.train
    monkeypatch.setattr(grad_blend, "train", lambda *a, **k: trained.append(k["label"]) or real(*a, **k))
    config = dataclasses.replace(tiny_config, learning_rates=(1e-3, 3e-2))
    result = run_grad_blend(config)
    tried = json.loads((result.folder / "summary.json").read_text())["searched"]
    assert [(r["alpha"], r["learning_rate"]) for r in tried] == [
        (a, r) for a in (0.0, 0.5) for r in (1e-3, 3e-2)
    ]
    for row in result.table:
        own = {r["learning_rate"]: r["val_ppl"] for r in tried if r["alpha"] == row["alpha"]}
        assert row["learning_rate"] == min(own, key=own.get)
    # Two alphas with two rates, the second seed of each, the final training.
    assert len(trained) == len(set(trained)) == 4 + 2 + 1
    trained.clear()
    assert run_grad_blend(config).table == result.table
    assert trained == []


@pytest.mark.slow
def test_as_published_starts_from_torchs_own_weights_and_the_solve_refuses_them(tiny_config, monkeypatch):
    started = {}
    real = grad_blend.train

    def train(model, *arguments, label, **options):
        started[label] = (
            model.embedding.weight.std().item(),
            model.blocks[0].potential.weight.abs().max().item(),
        )
        return real(model, *arguments, label=label, **options)

    monkeypatch.setattr(grad_blend, "train", train)
    run_grad_blend(dataclasses.replace(tiny_config, protocol="original"))
    width = tiny_config.resolved().d_model
    for deviation, largest in started.values():
        assert deviation == pytest.approx(1.0, abs=0.1)
        assert largest <= width**-0.5
    with pytest.raises(ValueError, match="first_weights: got 'torch' with mixer 'solve'"):
        dataclasses.replace(tiny_config, first_weights="torch").resolved()


def test_the_claim_is_judged_in_pairs_for_all_the_alphas_of_which_any_would_do():
    def sweep(*scores: tuple[float, tuple[float | None, ...]], rate: float = 1e-2) -> list:
        return [{**trial(a, s, p), "learning_rate": rate} for a, own in scores for s, p in enumerate(own)]

    rates = (1e-3, 1e-2, 3e-2)
    none, better = (0.0, (100.0, 110.0, 120.0)), (0.5, (90.0, 99.1, 107.9))
    worse, lost = (0.3, (200.0, 219.0, 241.0)), (0.7, (None, None, None))
    assert claims_table(sweep(none, better, worse, lost), rates)[0]["verdict"] == "holds"
    row = claims_table(sweep(none, worse, lost), rates)[0]
    assert row["verdict"] == "does not hold"
    assert "alpha 0.7: diverged" in row["measured"]
    assert "(intervals for 2 alphas at once)" in row["measured"]
    equal = (0.5, (99.0, 112.0, 119.0))
    assert claims_table(sweep(none, equal, worse), rates)[0]["verdict"] == "not shown"
    assert claims_table(sweep((0.0, (100.0,)), (0.5, (90.0,))), rates)[0]["verdict"] == "no verdict"
    assert "[best rate 0.03, at the edge]" in claims_table(sweep(none, worse, rate=3e-2), rates)[0]["measured"]
    assert claims_table(sweep(none, (1.0, (1.0, 2.0, 3.0))), rates) == []


def test_directions_are_compared_at_weights_that_the_theory_alone_trained():
    trials = [trial(0.0, 0, 50.0), trial(0.5, 0, 20.0), trial(0.0, 1, None)]
    assert trained_for_directions(trials) == (0.0, trials[:1])
    assert trained_for_directions(trials[1:]) == (0.5, trials[1:2])
