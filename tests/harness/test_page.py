"""report.html holds what was found and needs nothing else; a log has no traceback of an earlier run."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from html import unescape
from urllib.parse import unquote

import pytest

from bklm.compression.int8 import QuantisationRow
from bklm.harness.figures import save_figure
from bklm.harness.folder import logging_to, shorten_tracebacks
from bklm.harness.page import alternative_text, meaning
from bklm.harness.report import Report
from bklm.studies.grad_blend.run import run_grad_blend


@pytest.fixture
def result(tiny_config):
    return run_grad_blend(
        dataclasses.replace(tiny_config, alphas=(0.0,), epochs_per_trial=1, final_epochs=1, workers=1)
    )


@pytest.mark.slow
@pytest.mark.draws
def test_the_page_shows_finding_tables_pictures_settings_and_command_without_any_other_file(result):
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    words = unescape(re.sub("<[^>]*>", " ", page))
    manifest = json.loads((result.folder / "manifest.json").read_text())
    for sentence in (result.finding, result.test_finding, manifest["command"], manifest["corpus"]["source"]):
        assert sentence in words
    for make in result.tables().values():
        for cell in (str(v) for row in make() for v in row.values() if isinstance(v, str)):
            assert cell in words
    for name, value in manifest["config"].items():
        assert value is None or f"<td>{name}</td>" in page
    pictures = re.findall(r'<img src="([^"]*)" alt="([^"]*)"', page)
    assert len(pictures) == len(list(result.folder.glob("*.png"))) > 0
    assert all(source.startswith("data:image/png;base64,") and " " in alt for source, alt in pictures)
    # What it links to lies beside it, in the zip too, whose first file it is.
    names = zipfile.ZipFile(result.bundle.path).namelist()
    assert names[0] == "grad_blend/report.html"
    assert {f"grad_blend/{unquote(name)}" for name in re.findall(r'href="([^"]*)"', page)} <= set(names)
    assert not re.search(r"src=.?http|<link|<script", page)


def test_a_column_is_explained_with_its_unit():
    assert meaning("seconds") == "computing time, seconds"
    assert meaning("val_ppl_low") == "lower end of the 95% interval of val ppl"
    assert meaning("claimed_low") == "the original's claim, its low end"
    # int8.csv, which a notebook adds when somebody asks for it.
    for name in (field.name for field in dataclasses.fields(QuantisationRow)):
        assert meaning(name), name
    assert meaning("nobody knows") == ""


def test_what_was_measured_since_the_run_is_on_the_page_and_what_is_no_table_stops_nothing(result):
    (result.folder / "int8.csv").write_text("perplexity\n7\n")
    (result.folder / "empty.csv").touch()
    result.renew_page()
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert '<a href="int8.csv">' in page
    assert meaning("perplexity") in page
    assert '<a href="empty.csv">empty.csv</a></li>' in page


@pytest.mark.slow
def test_numbers_have_six_digits_and_a_table_without_rows_is_no_file(result, tmp_path):
    class Study:
        folder = tmp_path

    report = Report(Study)
    report.csv("a.csv", [{"x": 1 / 3, "n": 123456789, "big": 2.0**40}])
    assert (tmp_path / "a.csv").read_text() == "x,n,big\n0.333333,123456789,1.09951e+12\n"
    report.csv("a.csv", [])
    assert not (tmp_path / "a.csv").exists()


def test_a_picture_says_what_it_shows(tmp_path):
    path = save_figure(tmp_path / "a.png", lambda figure: figure.subplots(), title="A < B", note="one seed")
    assert alternative_text(path) == "A < B. one seed"
    (tmp_path / "no_picture.png").write_bytes(b"half a file")
    assert alternative_text(tmp_path / "no_picture.png") == "no picture"


@pytest.mark.slow
def test_the_page_of_a_run_that_is_read_back_is_the_same_and_says_when_it_was_computed(result):
    page = (result.folder / "report.html").read_text()
    assert re.search(r"Begun \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d, last part finished \d{4}", page)
    run_grad_blend(result.config)
    assert (result.folder / "report.html").read_text() == page


def test_of_an_earlier_runs_traceback_the_log_keeps_the_last_line(tmp_path):
    path = tmp_path / "run.log"
    for number in range(2):
        shorten_tracebacks(path)
        with pytest.raises(ValueError), logging_to(path, on_screen=False):
            raise ValueError(f"failure {number}\nof two lines")
    text = path.read_text()
    assert text.count("Traceback") == 1
    shorten_tracebacks(path)
    assert re.fullmatch(r"(\S+ \S+ ERROR bklm: the run stopped: of two lines\n){2}", path.read_text())
    before = path.stat().st_mtime_ns
    shorten_tracebacks(path)
    assert path.stat().st_mtime_ns == before


def test_internals_lie_in_a_folder_of_their_own(result):
    folders = {p.name for p in result.folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders == {"internals", "final"}
    assert [*(result.folder / "internals" / "trials").glob("*/result.json")]
