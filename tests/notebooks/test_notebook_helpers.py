"""Where a notebook runs, its live log, Google Drive and the download, with a stand-in for Colab."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell

from bklm.harness import values
from bklm.harness.bundle import Bundle, add_notebook
from bklm.notebook import SelfTest
from bklm.notebook import cells as notebook
from bklm.notebook.saved import saved_notebook
from bklm.studies import GradBlendConfig


def test_config_from_reads_the_forms_variables():
    variables = dict.fromkeys(GradBlendConfig.names(), "") | {"profile": "smoke", "batch_size": 16, "x": 1}
    assert notebook.config_from(GradBlendConfig, variables) == GradBlendConfig(profile="smoke", batch_size=16)


def test_a_form_of_another_version_is_refused_in_one_sentence_that_names_its_lines():
    variables = dict.fromkeys(GradBlendConfig.names(), "") | {"profile": "smoke"}
    forms = ['# @title Settings { display-mode: "form" }\nprofile = "smoke"  # @param ["smoke"]']
    own = '# @title My cell\nmine = 1  # @param {type:"integer"}'
    assert notebook.config_from(GradBlendConfig, variables | {"In": ["", *forms, own]}).profile == "smoke"
    forms.append(
        '# @title More settings { display-mode: "form" }\nlearning_rate = 0.1  # @param {type:"number"}\n'
        'headless = False  # @param {type:"boolean"}'
    )
    with pytest.raises(
        ValueError, match=r"^settings: learning_rate of this notebook's form .*01_grad_blend_sweep"
    ):
        notebook.config_from(GradBlendConfig, variables | {"In": forms})
    del variables["tracker"]
    with pytest.raises(ValueError, match=r"^settings: this notebook's form has no tracker\. Run both"):
        notebook.config_from(GradBlendConfig, variables)


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """A stand-in for google.colab: its kernel class, a browser that can refuse, and a Drive in a folder of the test."""
    modules = {
        name: ModuleType(name)
        for name in ("google", "google.colab", "google.colab.files", "google.colab.drive")
    }
    package, files, drive = (modules[n] for n in ("google.colab", "google.colab.files", "google.colab.drive"))
    package.files, package.drive, package._message = files, drive, SimpleNamespace()
    files.taken, files.download = [], lambda path: files.taken.append(path)
    drive.mounted = []

    def mount(point):
        drive.mounted.append(point)
        (notebook.DRIVE / "MyDrive").mkdir(parents=True)

    drive.mount = mount
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    shell_class = type("Shell", (InteractiveShell,), {"__module__": "google.colab._shell"})
    monkeypatch.setattr(notebook, "get_ipython", lambda: shell_class.__new__(shell_class))
    monkeypatch.setattr(notebook, "DRIVE", tmp_path / "content" / "drive")
    return package


def test_the_place_is_told_by_the_kernels_class_and_not_by_variables(colab, monkeypatch):
    assert notebook.where() == "colab"
    monkeypatch.setattr(notebook, "get_ipython", lambda: SimpleNamespace(config={"IPKernelApp": {}}))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert notebook.where() == "jupyter"
    monkeypatch.setattr(notebook, "get_ipython", lambda: None)
    assert notebook.where() == "shell"


def test_download_hands_the_zip_to_colab_but_not_when_headless(colab, tmp_path):
    bundle = Bundle(tmp_path / "x.zip", 1, "0")
    notebook.download(bundle, headless=True)
    assert colab.files.taken == []
    notebook.download(bundle)
    assert colab.files.taken == [str(tmp_path / "x.zip")]


def test_a_blocked_download_leaves_the_zip_and_says_where_it_lies(colab, tmp_path, capsys):
    def refuse(path):
        raise RuntimeError("blocked by the browser")

    colab.files.download = refuse
    (tmp_path / "x.zip").write_bytes(b"x")
    notebook.download(Bundle(tmp_path / "x.zip", 1, "0"))
    printed = capsys.readouterr().out
    assert "blocked by the browser" in printed
    assert str(tmp_path / "x.zip") in printed
    assert (tmp_path / "x.zip").exists()


def test_in_colab_the_notebook_comes_from_the_front_end_and_its_absence_is_said(colab, tmp_path, capsys):
    folder = tmp_path / "grad_blend"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    empty = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    colab._message.blocking_request = lambda what, timeout_sec: {"ipynb": empty}
    bundle = notebook.finish(folder)
    assert (folder / "notebook.ipynb").exists()
    assert (folder / "notebook.html").exists()
    colab._message.blocking_request = lambda what, timeout_sec: None  # a lost front end answers nothing
    assert notebook.finish(folder).path == bundle.path
    assert "could not be added" in capsys.readouterr().out


@pytest.fixture
def kernel(monkeypatch):
    """As in a kernel with a front end that renders."""
    monkeypatch.setattr(notebook, "where", lambda: "jupyter")


def form(**values) -> dict:
    return dict.fromkeys(GradBlendConfig.names(), "") | {"headless": False} | values


def test_a_folder_on_the_drive_is_mounted_once_and_only_when_it_is_asked_for(colab, monkeypatch):
    notebook.config_from(GradBlendConfig, form(output_dir="results"))
    assert colab.drive.mounted == []
    on_drive = form(output_dir=str(notebook.DRIVE / "MyDrive" / "bklm"))
    assert notebook.config_from(GradBlendConfig, on_drive).output_dir.endswith("bklm")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == notebook.DRIVE)
    notebook.config_from(GradBlendConfig, on_drive)
    assert colab.drive.mounted == [str(notebook.DRIVE)]


def test_a_drive_that_nobody_can_allow_or_that_is_refused_is_one_sentence(colab):
    on_drive = form(data_dir=str(notebook.DRIVE / "MyDrive" / "text"))
    with pytest.raises(ValueError, match=r"data_dir: .* is on Google Drive, which is not mounted, and nobody"):
        notebook.config_from(GradBlendConfig, on_drive | {"headless": True})

    def refuse(point):
        raise RuntimeError("credential propagation was unsuccessful")

    colab.drive.mount = refuse
    with pytest.raises(ValueError, match=r"not mounted \(credential propagation .*\); allow it"):
        notebook.config_from(GradBlendConfig, on_drive)


def test_a_folder_where_the_drive_would_be_is_no_mounted_drive(colab):
    (notebook.DRIVE / "MyDrive" / "x").mkdir(parents=True)

    def mount(point):
        raise ValueError("Mountpoint must not already contain files")

    colab.drive.mount = mount
    with pytest.raises(
        ValueError, match=r"output_dir: .* not mounted \(Mountpoint must .* move away what was written"
    ):
        notebook.config_from(GradBlendConfig, form(output_dir=str(notebook.DRIVE / "MyDrive" / "bklm")))


@pytest.mark.parametrize(
    "written",
    [
        "drive/MyDrive/x",
        "gdrive/My Drive/x",
        "My Drive/x",
        "/gdrive/MyDrive/x",
        "/MyDrive/x",
        "content/drive/mydrive/x",
    ],
)
def test_a_drive_path_as_people_write_it_is_mounted_and_lies_on_the_drive(colab, written):
    assert values.drive_path("output_dir", written, notebook.DRIVE) == notebook.DRIVE / "MyDrive" / "x"
    notebook.config_from(GradBlendConfig, form(output_dir=written))
    assert colab.drive.mounted == [str(notebook.DRIVE)]
    # Where nothing is mounted, as below a ``!`` line of this machine, no folder of the runtime takes its place.
    with pytest.raises(ValueError, match=r"^output_dir: .* is on Google Drive, which is not mounted"):
        GradBlendConfig(profile="smoke", output_dir=written).resolved()


def test_a_drive_mounted_elsewhere_is_used_as_it_is(colab, monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "gdrive")
    there = str(tmp_path / "gdrive" / "MyDrive" / "x")
    notebook.config_from(GradBlendConfig, form(output_dir=there))
    assert colab.drive.mounted == []
    assert GradBlendConfig(profile="smoke", output_dir=there).resolved().output_dir == there


@pytest.mark.parametrize("written", ["drive", "gdrive/x", "/content/drive/x"])
def test_a_path_that_names_a_drive_and_no_folder_of_it_is_one_sentence(colab, written):
    with pytest.raises(
        ValueError, match=r"^output_dir: got .* names a Google Drive .*; write /content/drive/MyDrive"
    ):
        GradBlendConfig(profile="smoke", output_dir=written).resolved()


def test_notebook_00_mounts_the_drive_that_its_folder_lies_on(colab):
    def refuse(point):
        raise RuntimeError("no")

    colab.drive.mount = refuse
    with pytest.raises(ValueError, match="not mounted"):
        SelfTest({"output_dir": "drive/MyDrive/x", "headless": False})


@pytest.mark.parametrize("text", ["False", "false", " False ", "", "None"])
def test_headless_as_text_is_read_as_its_word(kernel, text, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda html: shown.append(html.data))
    notebook.say("a sentence", text)
    notebook.show_table([{"a": 1}], text)
    assert (len(shown), capsys.readouterr().out) == (2, "")
    with pytest.raises(ValueError, match="headless: got 'perhaps'; allowed is True or False"):
        notebook.say("a sentence", "perhaps")


def test_elsewhere_a_folder_of_that_name_is_just_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(notebook, "DRIVE", tmp_path)
    assert notebook.config_from(GradBlendConfig, form(output_dir=str(tmp_path / "x")))


def test_a_cell_shows_the_last_lines_of_the_log_and_headless_all_of_them(kernel, monkeypatch, capsys):
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    monkeypatch.setattr(notebook, "display", lambda html, display_id: shown.append(html.data) or handle)

    def study(config, on_figure):
        for number in range(30):
            print("line", number)
        return number

    assert notebook.run(study, None) == 29
    assert "line 29<" in shown[-1]
    assert "line 19" not in shown[-1]
    assert capsys.readouterr().out == ""
    notebook.run(study, None, headless=True)
    assert capsys.readouterr().out.count("line") == 30


def test_a_sentence_is_plain_when_headless_and_escaped_in_a_browser(kernel, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda html: shown.append(html.data))
    notebook.say("<unk> is a word", headless=True)
    assert capsys.readouterr().out == "<unk> is a word\n"
    notebook.say("<unk> is a word")
    assert "&lt;unk&gt; is a word" in shown[0]


def test_in_a_table_only_sentences_wrap_and_columns_of_words_stand_left(kernel, monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda html: shown.append(html.data))
    why = "the processor has no such arithmetic"
    notebook.show_table([{"way": "a", "time": "2 ms (1 to 3)", "here": "native", "because": why, "-": "-"}])
    assert 'class="dataframe bklm words3 words4"' in shown[0]
    assert f'<td class="long">{why}</td>' in shown[0]
    assert "<td>2 ms (1 to 3)</td>" in shown[0]


def test_the_figure_of_a_run_ends_as_the_study_left_it(kernel, monkeypatch, tmp_path):
    shown = []
    handle = SimpleNamespace(update=lambda image: shown.append(image.data))
    monkeypatch.setattr(notebook, "display", lambda image, display_id: shown.append(image.data) or handle)
    png = b"\x89PNG\r\n\x1a\n" + bytes(16)

    def study(config, on_figure):
        (tmp_path / "a.png").write_bytes(png + b"1 of 8 trials done")
        on_figure(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes(png + b"all of them")

    notebook.run(study, None, headless=True)
    assert shown == [png + b"1 of 8 trials done", png + b"all of them"]


def test_a_console_shows_the_text_that_html_and_pictures_stand_for(kernel, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda thing, display_id=None: shown.append(thing))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    notebook.say("<unk> is a word")
    notebook.show_table([{"way": "a", "time": 2}])
    notebook.show_picture(tmp_path / "a.png")
    notebook._Tail().write("a line of the log\n")
    bundles = [DisplayFormatter().format(thing)[0] for thing in shown]
    assert [" ".join(bundle["text/plain"].split()) for bundle in bundles] == [
        "<unk> is a word", "way time a 2", f"Picture: {tmp_path / 'a.png'}", "a line of the log",
    ]  # fmt: skip
    assert all("text/html" in bundle or "image/png" in bundle for bundle in bundles)


def test_without_a_front_end_everything_is_plain_text(tmp_path, capsys):
    notebook._tell_what_is_plain.cache_clear()
    (tmp_path / "a.png").write_bytes(b"png")
    notebook.say("<unk> is a word")
    notebook.show_table([{"way": "a", "time": 2}])
    notebook.show_picture(tmp_path / "a.png")

    def study(config, on_figure):
        print("a line of the log")
        on_figure(tmp_path / "a.png")

    notebook.run(study, None)
    printed = capsys.readouterr().out
    picture = f"Picture: {tmp_path / 'a.png'}"
    said = "No front end shows this: tables are plain text, and a picture is named by its file."
    assert [line.split() for line in printed.splitlines()] == [
        line.split()
        for line in (said, "<unk> is a word", "way time", "a 2", picture, "a line of the log", picture)
    ]


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(ran, saved): a shell that ran these sources, and the file that Jupyter names, with these cells' counts."""

    def make(ran: list[str], saved: list[tuple[str, int | None]]) -> SimpleNamespace:
        cells = []
        for source, count in saved:
            cells.append(nbformat.v4.new_code_cell(source, execution_count=count))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
        monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "mine.ipynb"))
        return SimpleNamespace(user_ns={}, history_manager=SimpleNamespace(input_hist_raw=["", *ran]))

    return make


def test_a_saved_notebook_with_all_its_outputs_is_taken(session, tmp_path):
    ran = ["x = 1", "y = 2", "x = 1", "study.zip()"]
    assert (
        saved_notebook(session(ran, [("x = 1", 3), ("y = 2", 2), ("study.zip()", None)]))
        == tmp_path / "mine.ipynb"
    )


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ([("x = 1", None), ("y = 2", None), ("study.zip()", None)], r"lacks the outputs of 2 of the 2 cells"),
        ([("x = 1", 1), ("y = 2", 2), ("study.zip()", 4)], r"lacks the outputs of 1 of the 2 cells"),
        ([("secret = 'only mine'", 1)], r"holds no cell like this one: it is another notebook"),
    ],
)
def test_another_notebook_and_one_that_is_not_saved_since_are_not_taken(session, saved, sentence):
    with pytest.raises(ValueError, match=sentence):
        saved_notebook(session(["x = 1", "y = 2", "x = 1", "study.zip()"], saved))


def test_a_file_from_before_the_kernel_started_is_not_taken_whatever_its_counts(session, tmp_path):
    shell = session(["x = 1", "study.zip()"], [("x = 1", 1), ("study.zip()", 2)])
    os.utime(tmp_path / "mine.ipynb", (1e9, 1e9))
    with pytest.raises(ValueError, match="lacks the outputs of 1 of the 1 cells"):
        saved_notebook(shell)


def test_what_colab_saves_is_a_notebook_with_ids_and_widgets(tmp_path):
    kind = "application/vnd.jupyter.widget-state+json"
    model = {"model_module": "@jupyter-widgets/controls", "model_name": "VBoxModel", "state": {}}
    cells = [
        {"cell_type": "code", "metadata": {"id": name}, "source": "1", "outputs": [], "execution_count": 1}
        for name in ("controls", "controls", "not an id!")
    ]
    saved = {"cells": cells, "metadata": {"widgets": {kind: {"m1": model}}}, "nbformat": 4, "nbformat_minor": 0}
    path = add_notebook(tmp_path, json.dumps(saved), "notebook.ipynb")
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    assert [cell.id for cell in found.cells] == ["controls", "cell-1", "cell-2"]
    assert found.metadata.widgets[kind].state.m1 == model
    assert path.with_suffix(".html").exists()


def test_a_page_that_cannot_be_rendered_leaves_the_notebook_and_a_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("state")

    monkeypatch.setattr("nbconvert.HTMLExporter.from_notebook_node", fail)
    (tmp_path / "n.html").write_text("of an earlier run")
    add_notebook(tmp_path, json.dumps(nbformat.v4.new_notebook()), "n.ipynb")
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]
    assert "n.html could not be rendered (KeyError" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no notebook"):
        add_notebook(tmp_path, "[1, 2", "n.ipynb")
