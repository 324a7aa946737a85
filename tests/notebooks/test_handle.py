"""The handle of a notebook on its study: headless, in a kernel, and after the Run button."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from bklm import notebook
from bklm.notebook import cells, controls
from bklm.notebook.form import FORMS
from bklm.notebook.handle import Study
from bklm.studies import STUDIES, GradBlendConfig
from bklm.studies.grad_blend import run as grad_blend


def variables(config, **more) -> dict:
    """A notebook's globals after its form cells."""
    return {name: getattr(config, name) for name in config.names()} | {"headless": True} | more


@pytest.fixture(scope="module")
def finished(small_text, tmp_path_factory):
    """A folder with a finished sweep, and the settings that made it."""
    config = GradBlendConfig(
        profile="smoke", data_dir=str(small_text), output_dir=str(tmp_path_factory.mktemp("handle")), device="cpu",
        alphas=(0.0,), seeds=(0,), epochs_per_trial=1, final_epochs=1, batch_size=8, seq_len=8, d_model=8,
        n_layers=1, max_train_tokens=400, workers=1,
    )  # fmt: skip
    grad_blend.run_grad_blend(config)
    return config


@pytest.fixture
def shown(monkeypatch):
    """What a kernel's front end was given: HTML, pictures, widgets."""
    given = []

    def display(thing, display_id=None):
        given.append(thing)
        return SimpleNamespace(update=given.append)

    for module in (cells, controls):
        monkeypatch.setattr(module, "display", display)
    monkeypatch.setattr(cells, "where", lambda: "jupyter")
    return given


@pytest.mark.slow
def test_headless_every_part_of_a_study_is_plain_text_in_the_order_of_the_cells(finished, shown, capsys):
    study = notebook.study("grad_blend", variables(finished))
    study.text()
    study.run()
    study.table()
    study.finding()
    study.say("test_finding")
    study.sample(prompt="the cat", temperature=0)
    study.zip()
    study.download()
    printed = capsys.readouterr().out
    parts = (
        "training tokens", "Kneser-Ney 3-gram", "val PPL (95%)", study.result.finding.splitlines()[0],
        "Test perplexity with alpha 0: ", "the cat", "SHA-256: ",
    )  # fmt: skip
    places = [printed.index(part) for part in parts]
    assert places == sorted(places)
    assert {type(thing).__name__ for thing in shown} == {"Image"}  # the run's figure; no widget, no HTML


def test_in_a_kernel_controls_text_log_tables_and_pictures_are_displayed(finished, shown, capsys):
    study = notebook.study("grad_blend", variables(finished, headless=False))
    widgets = shown.pop(0)
    assert type(widgets).__name__ == "VBox"
    assert tuple(study.controls.widgets) == GradBlendConfig.basic
    study.text()
    assert "Kneser-Ney 3-gram" in shown[-1].data
    study.run()
    assert any("Settings: " in thing.data for thing in shown)
    study.table("alphas")
    assert "val PPL (95%)" in shown[-1].data
    study.finding()
    assert shown[-1].data.startswith("<p")
    study.figure("experts.png")
    assert type(shown[-1]).__name__ == "Image"
    study.zip()
    assert "the notebook" in capsys.readouterr().out.lower()  # its own path is unknown in a test


def test_the_text_is_prepared_once_for_cell_run_and_sample(finished, monkeypatch):
    made, prepare = [], grad_blend.prepare_text

    def counted(config):
        made.append(prepare(config))
        return made[-1]

    monkeypatch.setattr(grad_blend, "prepare_text", counted)
    study = notebook.study("grad_blend", variables(finished))
    study.text()
    study.run()
    study.sample(prompt="the")
    study.table("future")
    assert len(made) == 1


def test_a_moved_control_gives_the_run_its_own_text_and_folder(finished, shown, capsys, monkeypatch):
    study = notebook.study("grad_blend", variables(finished, headless=False))
    study.text()
    given = []
    monkeypatch.setattr(
        cells, "run", lambda run, config, headless: given.append((run.keywords["text"], config))
    )
    study.controls.widgets["batch_size"].value = 16
    study.run()
    study.run()
    assert [text.batch_size for text, _ in given] == [16, 16]
    assert given[0][0] is given[1][0]
    assert given[0][1].output_dir.endswith("run_2")
    assert capsys.readouterr().out.count("holds a run with other settings") == 1


def test_what_is_measured_on_demand_is_a_table_with_its_picture(finished, shown, capsys):
    study = notebook.study("grad_blend", variables(finished))
    study.run()
    (study.result.folder / "future_leak.png").unlink(missing_ok=True)
    shown.clear()
    study.figure("future_leak.png")
    assert "drew no future_leak.png; it drew experts.png" in capsys.readouterr().out
    study.table("future")
    assert "SEES THE FUTURE" in capsys.readouterr().out
    study.figure("future_leak.png")
    assert len(shown) == 1


def test_a_table_that_a_run_does_not_have_is_a_sentence_with_those_it_has(finished, capsys):
    study = notebook.study("grad_blend", variables(finished))
    study.run()
    capsys.readouterr()
    study.table("contexts")
    assert capsys.readouterr().out == "This run has no table 'contexts'; it has alphas, claims.\n"
    study.result = SimpleNamespace(
        tables=lambda: {"claims": list}, config=study.result.config, silent=None, number=3
    )
    study.table()
    assert capsys.readouterr().out == "This run has no rows for the table 'claims'.\n"
    study.say("silent")
    assert capsys.readouterr().out == ""
    for name in ("number", "nothing"):
        with pytest.raises(ValueError, match=f"say: got '{name}'; the result has no sentence"):
            study.say(name)


def test_after_the_run_button_the_cells_below_show_what_it_left(finished, shown, monkeypatch):
    study = notebook.study("grad_blend", variables(finished, headless=False))
    shown.clear()
    study.controls.study = SimpleNamespace(config=finished, returncode=None, is_running=True)
    with pytest.raises(ValueError, match="nothing has been run yet"):
        study.table()
    study.controls.study.returncode = 0
    # A control that was moved afterwards does not belong to that run.
    study.controls.widgets["batch_size"].value = 16
    study.table()
    kinds = [type(thing).__name__ for thing in shown]
    assert kinds.index("Image") < len(kinds) - 1
    assert "val PPL (95%)" in shown[-1].data
    assert study.result.config == finished.resolved()
    shown.clear()
    study.table()
    assert [type(thing).__name__ for thing in shown] == ["HTML"]


def test_cells_below_one_that_has_not_run_say_so(finished):
    study = notebook.study("grad_blend", variables(finished))
    for call in (study.table, study.finding, study.sample, study.zip, study.download):
        with pytest.raises(
            ValueError, match=r"nothing has been run yet; run the cell with study\.run\(\) first"
        ):
            call()


@pytest.mark.parametrize("part", ["run", "text"])
def test_a_failed_run_leaves_no_result_of_an_earlier_one(part, finished, monkeypatch):
    study = notebook.study("grad_blend", variables(finished))
    study.run()

    def fail(*arguments):
        raise OSError("no room")

    monkeypatch.setattr(*{"run": (cells, "run"), "text": (study, "_text_of")}[part], fail)
    with pytest.raises(OSError, match="no room"):
        study.run()
    with pytest.raises(ValueError, match="nothing has been run yet"):
        study.table()


def test_the_run_button_is_read_when_it_has_ended_though_the_run_cell_was_tried_before(finished, monkeypatch):
    study = notebook.study("grad_blend", variables(finished))
    button = SimpleNamespace(is_running=True, returncode=None, config=finished)
    study.controls.study = button
    read, monkey = cells.run, monkeypatch.context

    def busy(run, config, headless):
        raise ValueError("output_dir: another run is working there")

    with monkey() as patch:
        patch.setattr(cells, "run", busy)
        with pytest.raises(ValueError, match="another run is working"):
            study.run()
    assert cells.run is read
    button.is_running, button.returncode = False, 0
    study.table()
    assert study.result.table


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "precision"])
def test_the_text_cell_of_every_study_that_reads_one_says_source_and_sizes_and_counts(
    name, monkeypatch, capsys, tmp_path
):
    (config_class,) = (c for c in FORMS.values() if c.study == name)
    dataset = "grammar" if name == "dialogue" else "embedded"
    config = config_class(profile="smoke", dataset=dataset, output_dir=str(tmp_path), device="cpu")
    study = notebook.study(name, variables(config))
    study.text()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{dataset}, from ")
    assert re.search(r"[\d,]+ (training|tokens|dialogues)", printed)
    assert printed.count("Kneser-Ney 3-gram") == (
        len(config.resolved().samples) if name == "embedding_freeze" else 1
    )


def test_a_study_that_is_not_there_and_a_bad_value_are_one_sentence(finished):
    with pytest.raises(ValueError, match="study: got 'koopman_x'; allowed is one of 'grad_blend', "):
        notebook.study("koopman_x", {})
    with pytest.raises(ValueError, match="alphas: got"):
        notebook.study("grad_blend", variables(finished, alphas="0, 2"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_handle_whose_controls_are_its_basic_settings(name, shown, tmp_path, monkeypatch):
    (config_class,) = (c for c in FORMS.values() if c.study == name)
    values = variables(config_class(profile="smoke", output_dir=str(tmp_path)), headless=False)
    monkeypatch.setattr(controls.Controls, "_validate", lambda self: None)  # an estimate takes seconds
    study = notebook.study(name, values)
    assert isinstance(study, Study)
    assert tuple(study.controls.widgets) == (config_class.controls or config_class.basic)
    assert study.controls.config().study == name


def test_run_all_keeps_what_the_controls_were_moved_to_and_says_so(finished, shown, capsys):
    names = variables(finished, headless=False)
    names["study"] = notebook.study("grad_blend", names)
    names["study"].controls.widgets["batch_size"].value = 16
    names["study"].controls.widgets["device"].value = "auto"
    names["device"] = "auto"
    names["study"] = notebook.study("grad_blend", names)
    assert names["study"].controls.config().batch_size == 16
    said = capsys.readouterr().out
    assert "The controls keep what they were moved to: batch_size = 16." in said
    assert "The controls follow the form again: device = auto." in said
    # A second time as well.
    assert notebook.study("grad_blend", names).controls.config().batch_size == 16
    assert notebook.study("grad_blend", names | {"headless": True}).controls.config().batch_size == 8


def test_a_finished_run_that_is_read_back_shows_its_main_picture(shown, tmp_path):
    (tmp_path / "main.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    paths = {n: tmp_path / n for n in ("table.csv", "main.png", "other.png")}
    cells.run(lambda config, on_figure: SimpleNamespace(paths=paths), None, headless=True)
    assert [type(thing).__name__ for thing in shown] == ["Image"]
