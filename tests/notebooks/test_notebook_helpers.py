"""Controls, folders and the download, without a front end and with a stand-in for Colab's."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from bklm import notebook
from bklm.reporting import Bundle
from bklm.studies.grad_blend import GradBlendConfig, run_grad_blend


def test_controls_start_from_the_form_and_give_back_what_was_moved(tiny_config):
    controls = notebook.Controls(tiny_config, ["batch_size", "alphas"])
    assert controls.widgets["batch_size"].value == 8
    assert controls.widgets["alphas"].value == "0, 0.5"
    controls.widgets["batch_size"].value = 16
    controls.widgets["alphas"].value = "0, 1"
    config = controls.config()
    assert (config.batch_size, config.alphas) == (16, (0.0, 1.0))


def test_the_slider_has_the_schemas_bounds(tiny_config):
    slider = notebook.Controls(tiny_config, ["batch_size"]).widgets["batch_size"]
    spec = next(s for s in GradBlendConfig.specs() if s.name == "batch_size")
    assert (slider.min, slider.max, slider.step) == (spec.low, spec.high, spec.step)


def test_a_bad_entry_is_named_beside_the_controls_while_typing(tiny_config):
    controls = notebook.Controls(tiny_config, ["alphas"])
    controls.widgets["alphas"].value = "0, 2"
    assert "alphas: got" in controls._message.value
    controls.widgets["alphas"].value = "0, 1"
    assert controls._message.value == ""


def test_headless_controls_give_the_config_unchanged(tiny_config):
    assert notebook.Controls(tiny_config, ["batch_size"], headless=True).config() is tiny_config


def test_after_moving_a_control_the_next_run_gets_a_folder_of_its_own(tiny_config, capsys):
    run_grad_blend(tiny_config)
    controls = notebook.Controls(tiny_config, ["batch_size"])
    assert controls.config().output_dir == tiny_config.output_dir
    controls.widgets["batch_size"].value = 16
    moved = controls.config()
    assert moved.output_dir.endswith("run_2")
    assert "holds a run with other settings" in capsys.readouterr().out


def test_config_from_reads_the_forms_variables():
    variables = dict.fromkeys(GradBlendConfig.names(), "") | {"profile": "smoke", "batch_size": 16, "x": 1}
    assert notebook.config_from(GradBlendConfig, variables) == GradBlendConfig(profile="smoke", batch_size=16)


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab whose browser can be made to refuse."""
    files = ModuleType("google.colab.files")
    files.taken = []
    files.download = files.taken.append
    package = ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.files", files)
    monkeypatch.setattr(notebook, "where", lambda: "colab")
    return files


def test_download_hands_the_zip_to_colab_but_not_when_headless(colab, tmp_path):
    bundle = Bundle(tmp_path / "x.zip", 1, "0")
    notebook.download(bundle, headless=True)
    assert colab.taken == []
    notebook.download(bundle)
    assert colab.taken == [str(tmp_path / "x.zip")]


def test_a_blocked_download_says_where_the_zip_lies(colab, tmp_path, capsys):
    def refuse(path):
        raise RuntimeError("blocked by the browser")

    colab.download = refuse
    notebook.download(Bundle(tmp_path / "x.zip", 1, "0"))
    assert str(tmp_path / "x.zip") in capsys.readouterr().out


def test_outside_a_kernel_the_place_is_a_shell():
    assert notebook.where() == "shell"
