"""Notebooks 01 and 03 as a user has them: run all, move a slider, choose values, Run, look at the figure, Stop; the
others are run and read, at a desk and on a phone.

$BKLM_SCREENSHOTS keeps what was seen.
"""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

# Per notebook: its study's folder, the form's values, the list that is typed (field, a bad value, a good one), and the
# field and value that make a run long enough to be stopped.
CASES = {
    "01_grad_blend_sweep.ipynb": (
        "grad_blend",
        {"profile": "smoke", "dataset": "embedded"},
        ("alphas", "0, 2", "0, 1"),
        ("epochs per trial", "400"),
    ),
    "03_baseline_training.ipynb": (
        "baseline",
        {"profile": "smoke", "dataset": "embedded", "model": "resnet_bk", "seeds": "0", "processes": 1},
        ("learning rates", "-1", "0.001, 0.002"),
        ("epochs", "400"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_run_all_then_sliders_run_figure_and_stop(name, open_notebook, screenshots, checkout):
    study, values, (field, bad, good), (length, long) = CASES[name]
    stem = name.removesuffix(".ipynb")
    lab = open_notebook(name, **values, output_dir=f"results/{study}")
    lab.run_all()
    assert lab.errors() == []
    lab.screenshot(screenshots / f"{stem}_1_run_all.png")
    first = checkout / "results" / study / f"{study}.zip"
    assert first.exists()
    made = first.stat().st_mtime_ns

    assert lab.slide("batch size", 1) == "36"
    lab.write(field, bad)
    lab.says(f"{field.replace(' ', '_')}: got")
    assert lab.button("Run").is_disabled()
    lab.write(field, good)
    lab.press("Run")
    lab.shows_picture()
    lab.says("Done in", 240)
    lab.screenshot(screenshots / f"{stem}_2_run.png")
    folder = checkout / "results" / study / "run_2" / study
    recorded = json.loads((folder / "config.json").read_text())["config"]
    assert recorded["batch_size"] == 36
    assert recorded[field.replace(" ", "_")] == [float(word) for word in good.split(",")]
    assert first.stat().st_mtime_ns == made

    lab.write(length, long)
    lab.press("Run")
    lab.says(" · ", 120)
    lab.press("Stop")
    lab.says("Stopped after", 60)
    lab.screenshot(screenshots / f"{stem}_3_stop.png")
    stopped = checkout / "results" / study / "run_3" / study
    assert not (stopped / "manifest.json").exists()
    assert lab.button("Run").is_enabled()

    lab.page.set_viewport_size({"width": 390, "height": 844})  # a phone
    lab.screenshot(screenshots / f"{stem}_4_phone.png")
    assert 0 < lab.right_edge_of_controls() <= 390


# Form values of the notebooks that are run and read.
WALKS = {
    "00_setup.ipynb": {},
    "02_precision_benchmark.ipynb": {"profile": "smoke"},
    "04_embedding_freeze_study.ipynb": {"profile": "smoke", "dataset": "embedded"},
    "05_koopman.ipynb": {"profile": "smoke", "dataset": "embedded"},
    "06_physics_informed.ipynb": {"profile": "smoke", "dataset": "embedded"},
    "07_compression.ipynb": {"profile": "smoke", "dataset": "embedded"},
    "08_dialogue.ipynb": {"profile": "smoke", "pretraining": "embedded"},
    "09_integration.ipynb": {"profile": "smoke", "dataset": "embedded"},
}


@pytest.mark.parametrize("name", WALKS)
def test_run_all_has_no_error_and_all_of_it_can_be_read_on_a_phone(name, open_notebook, screenshots):
    stem = name.removesuffix(".ipynb")
    lab = open_notebook(name, **WALKS[name], output_dir=f"results/{stem}")
    lab.run_all(420)
    assert lab.errors() == []
    lab.screenshot(screenshots / f"{stem}_1_run_all.png")
    assert lab.pictures() > 0
    lab.page.set_viewport_size({"width": 390, "height": 844})  # a phone
    lab.screenshot(screenshots / f"{stem}_2_phone.png")
    assert lab.wider_than_the_page() == []
