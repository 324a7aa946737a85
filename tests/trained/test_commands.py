"""``bklm generate``, ``score``, ``features``, ``export`` and ``report`` do what Python does."""

from __future__ import annotations

import csv

import bklm
from bklm.command.main import main


def test_the_commands_print_what_python_returns(runs, validation, tmp_path, capsys):
    run = str(runs / "baseline.zip")
    trained = bklm.load(run)
    assert main(["generate", run, "--prompt", "The cat", "--tokens", "6", "--seed", "3"]) == 0
    assert capsys.readouterr().out == trained.generate("The cat", 6, seed=3) + "\n"
    assert main(["score", run, str(validation)]) == 0
    assert capsys.readouterr().out == f"resnet_bk: {trained.score(validation)}.\n"
    table, figure = tmp_path / "features.csv", tmp_path / "features.png"
    assert main(["features", run, "the cat sees", "--csv", str(table), "--figure", str(figure)]) == 0
    assert len(list(csv.DictReader(table.open()))) == len(trained.features("the cat sees").rows())
    assert figure.exists()
    assert main(["export", run, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["export", run, "--output", str(tmp_path)]) == 2


def test_report_says_finding_dates_text_profile_command_and_page(runs, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(runs / "grad_blend.zip"), "--open"]) == 0
    shown = capsys.readouterr().out
    manifest = bklm.load(runs / "grad_blend").manifest
    assert manifest["begun"] <= manifest["finished"]
    assert manifest["finished"].endswith("+00:00")
    for words in (
        "Lowest validation PPL",
        manifest["finished"],
        manifest["command"],
        "profile: smoke",
        "text: text0",
    ):
        assert words in shown
    assert opened == [(tmp_path / "grad_blend_report.html").as_uri()]
    assert "what was found" in (tmp_path / "grad_blend_report.html").read_text(encoding="utf-8")
