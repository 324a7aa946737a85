"""Intervals, manifest and zip."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

import bklm
from bklm.harness import bundle
from bklm.harness import comparison as verdict
from bklm.harness.bundle import zip_study
from bklm.harness.cli import parse
from bklm.harness.figures import mean_with_error
from bklm.harness.machine import environment, git_revision
from bklm.harness.report import command_for, seeds_in_words
from bklm.harness.statistics import Perplexity, interval95, with_interval
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.training.evaluation import LARGEST_PERPLEXITY, Evaluation


@pytest.mark.parametrize("words", [["nowhere"], [".", "--notebook", "nowhere.ipynb"]])
def test_what_the_zip_cannot_be_made_of_is_one_sentence(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bundle", *words])
    with pytest.raises(SystemExit) as ended:
        bundle.main()
    assert ended.value.code == 2
    assert re.fullmatch(r"FileNotFoundError: .*nowhere.*\n", capsys.readouterr().err)


def test_the_interval_is_students_for_the_number_of_seeds():
    mean, half = interval95([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30265273 / 3**0.5, rel=1e-9))
    assert interval95([5.0]) == (5.0, None)
    assert with_interval(2.0, None) == "2.0"
    assert with_interval(2.04, 0.26) == "2.0 ± 0.3"


def test_perplexities_are_averaged_as_losses_and_their_interval_is_carried_over():
    over = Perplexity.over_seeds([100.0, 110.0, 121.0])
    loss, half = interval95([math.log(p) for p in (100.0, 110.0, 121.0)])
    assert over.mean == pytest.approx(110.0)
    assert (over.low, over.high) == (pytest.approx(math.exp(loss - half)), pytest.approx(math.exp(loss + half)))
    assert str(Perplexity.over_seeds([268.44])) == "268.4"
    assert str(Perplexity(2180.0, 450.04, 1.2e9)) == "2,180 (450.0 to 1e+09, seeds far apart)"
    assert str(Perplexity(2180.0, 450.04, 30_000.0)) == "2,180 (450.0 to 30,000)"


def test_the_revision_is_that_of_the_packages_own_checkout_and_of_none_around_it(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        ran = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    for inside in ("bklm", "copy/bklm", "venv/lib/bklm"):
        (tmp_path / inside).mkdir(parents=True)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    found = {}
    for inside in ("bklm", "copy/bklm", "venv/lib/bklm"):
        monkeypatch.setattr(bklm, "__file__", str(tmp_path / inside / "__init__.py"))
        found[inside] = git_revision()
    assert found == {
        "bklm": git("rev-parse", "HEAD"),
        "copy/bklm": "not a git checkout",
        "venv/lib/bklm": "not a git checkout",
    }


def test_perplexities_off_the_scale_are_never_called_equal():
    capped = Evaluation(nll=800.0, tokens=1, correct=0, known_nll=900.0, known_tokens=1)
    assert capped.perplexity == capped.perplexity_without_unk == LARGEST_PERPLEXITY
    both = Perplexity.ratio_over_seeds([capped.perplexity] * 3, [capped.perplexity_without_unk] * 3)
    one = Perplexity.ratio_over_seeds([capped.perplexity, 110.0, 110.0], [100.0, 100.0, 100.0])
    fine = Perplexity.ratio_over_seeds([200.0, 221.0, 200.0], [100.0, 110.0, 100.0])
    assert (both.low, one.low) == (None, None)
    assert fine == Perplexity.over_seeds([2.0, 221.0 / 110.0, 2.0])
    said = verdict.state_finding("Best", {"a": both, "b": one, "c": fine}, seeds=3)
    assert "no difference" not in said
    assert "no verdict, because a perplexity is too large to be recorded: a, b." in said
    assert "worse over 3 paired seeds: c x2.0" in said
    assert verdict.headline("Best", {"a": both, "c": fine}, "other").endswith(
        "1 of 1 others is worse beyond the 95% interval; 1 without a verdict"
    )
    assert verdict.headline("Best", {"a": both}, "other") == "Best; no interval, no verdict"


def test_two_seeds_give_their_range_and_no_verdict_however_far_apart():
    two = Perplexity.over_seeds([100.0, 90.0])
    assert str(two) == "94.9 (range 90.0 to 100.0)"
    far = Perplexity.ratio_over_seeds([300.0, 301.0], [100.0, 100.0])
    said = verdict.state_finding("Best", {"a": far}, seeds=2)
    assert said.startswith(
        "Best; two seeds, so ranges, no interval and no verdict on the differences: a x3.005 (range 3.000 "
    )
    assert verdict.headline("Best", {"a": far}, "other") == "Best; no interval, no verdict"
    assert interval95([1.0, 2.0]) == (1.5, None)
    assert seeds_in_words(2) == "2 seeds, bars: from the lower to the higher"
    assert (seeds_in_words(3), seeds_in_words(3, bars=False)) == (
        "3 seeds, bars: 95% interval",
        "3 seeds, means",
    )


def test_a_finding_names_the_baselines_that_the_best_model_does_not_beat():
    scores = {"unigram": 109.26, "Kneser-Ney 2-gram": 88.8, "Kneser-Ney 3-gram": 81.3}
    rows = [{"name": name, "val_ppl": score} for name, score in scores.items()]
    said = verdict.state_not_beaten(
        "alpha 0", 90.0, [*rows, {"name": "true law, 8 tokens of context", "val_ppl": 5.0}]
    )
    assert said == " The best, alpha 0, does not beat Kneser-Ney 2-gram (88.8), Kneser-Ney 3-gram (81.3)."
    assert verdict.not_beaten_in_short(90.0, rows) == "; not below Kneser-Ney 3-gram (81.3) and 1 more"
    assert (verdict.state_not_beaten("x", 80.0, rows), verdict.not_beaten_in_short(80.0, rows)) == ("", "")


def test_the_zip_holds_every_file_but_hidden_ones_and_its_hash_is_that_of_the_file(tmp_path):
    folder = tmp_path / "study"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.csv").write_text("a")
    (folder / "sub" / "b.json").write_text("{}")
    (folder / ".lock").touch()
    bundle = zip_study(folder)
    assert bundle.path == tmp_path / "study.zip"
    assert sorted(zipfile.ZipFile(bundle.path).namelist()) == ["study/a.csv", "study/sub/b.json"]
    assert bundle.sha256 == hashlib.sha256(bundle.path.read_bytes()).hexdigest()
    assert bundle.size == bundle.path.stat().st_size


def test_the_zip_begins_with_the_page_and_holds_no_hidden_folder_and_no_older_notebook(tmp_path):
    folder = tmp_path / "study"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.csv", "report.html", ".ipynb_checkpoints/x.ipynb", "old.ipynb", "old.html", "kept.html"):
        (folder / name).write_text("{}")
    new = nbformat.v4.new_notebook()
    nbformat.write(new, tmp_path / "new.ipynb")
    held = zipfile.ZipFile(zip_study(folder, tmp_path / "new.ipynb").path).namelist()
    assert held == [f"study/{n}" for n in ("report.html", "a.csv", "kept.html", "new.html", "new.ipynb")]
    assert (folder / "old.ipynb").exists()
    # A run after it packs no notebook that is not of that run.
    assert zipfile.ZipFile(zip_study(folder).path).namelist() == [
        f"study/{n}" for n in ("report.html", "a.csv", "kept.html")
    ]


def test_a_file_that_a_run_removes_meanwhile_is_left_out_of_the_zip(tmp_path, monkeypatch):
    folder = tmp_path / "study"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("a.csv", "checkpoints/state.bin", "report.html"):
        (folder / name).write_text("x")
    write = zipfile.ZipFile.write

    def slow(archive, *words):
        (folder / "checkpoints" / "state.bin").unlink(missing_ok=True)
        write(archive, *words)

    monkeypatch.setattr(zipfile.ZipFile, "write", slow)
    with zipfile.ZipFile(zip_study(folder).path) as archive:
        assert archive.namelist() == ["study/report.html", "study/a.csv"]
        assert archive.testzip() is None


def test_an_executed_notebook_goes_in_with_its_html(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Found it")])
    nbformat.write(notebook, tmp_path / "01_x.ipynb")
    bundle = zip_study(folder, tmp_path / "01_x.ipynb")
    archive = zipfile.ZipFile(bundle.path)
    assert "Found it" in archive.read("study/01_x.html").decode()
    assert "study/01_x.ipynb" in archive.namelist()


def test_zipping_a_study_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the study first"):
        zip_study(tmp_path / "nothing")


def test_the_recorded_command_repeats_the_config():
    config = GradBlendConfig(profile="smoke", alphas=(0, 0.25), data_dir="a folder", causal=False).resolved()
    words = command_for(config)
    import shlex

    assert parse(GradBlendConfig, shlex.split(words)[3:]) == config


def test_the_environment_names_versions_processor_and_gpu():
    found = environment()
    assert found["packages"]["torch"]
    assert found["cores"] >= 1
    assert "gpu" in found


def test_a_point_without_an_interval_has_no_bar_and_leaves_the_others_theirs():
    axes = Figure().subplots()
    mean_with_error(axes, [1, 2, 3], [5.0, 6.0, 7.0], [(4.0, 6.0), (None, None), (6.5, 8.0)])
    (bars,) = axes.containers[0].lines[2]
    drawn = [segment for segment in bars.get_segments() if len(segment) and np.isfinite(segment).all()]
    assert [segment[:, 1].tolist() for segment in drawn] == [[4.0, 6.0], [6.5, 8.0]]
    mean_with_error(axes, [1, 2], [5.0, 6.0], [(None, None)] * 2)
    assert not axes.containers[1].has_yerr
